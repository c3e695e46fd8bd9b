"""Ctrl-C while the ``mlpdown`` command is still imported, before it can catch anything: one line, and status 130.

The first import of the package, because torch's takes a second. In every other program that imports the package it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

INTERRUPTED = 130


def main_takes_over() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, which ``cli.main`` catches."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> None:
    os.write(2, b"mlpdown: interrupted\n")
    os._exit(INTERRUPTED)  # an exception could end in code of others that catches all, or that prints a traceback


def _is_the_command() -> bool:
    """By the console script, or by ``python -m mlpdown``, of which Python says ``-m`` until it has found the module."""
    program = getattr(sys, "argv", [""])[0]
    return os.path.basename(program) == "mlpdown" or (program == "-m" and "mlpdown" in sys.orig_argv)


# Whoever ignores the signal, as a shell does for what it starts in the background, goes on doing so.
if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
