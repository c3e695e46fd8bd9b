"""The ``mlpdown`` command. A subcommand's module is imported only when it is asked for.

Exit status: 0 done, 1 a promise is broken, 2 cannot be served, 130 interrupted. What cannot be served is said on standard error, without
a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from . import __version__, interrupt
from .jit import BuildError

# Each of these modules has add_arguments(parser) and main(arguments) -> exit status.
COMMANDS = {
    "check": ("mlpdown.check", "replay results recorded on GPUs, run every backend that can run here, and compare the bits"),
    "doctor": ("mlpdown.doctor", "say what this machine has, which backend is taken, and why"),
    "build": ("mlpdown.jit.command", "build the native library ahead of time"),
    "bench": ("mlpdown.bench", "measure"),
}
BROKEN, NOT_SERVED, INTERRUPTED = 1, 2, interrupt.INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. Without ``argv``: that of this process, whose standard streams are
    replaced by ones that can print every character and whose readers may leave."""
    output = None
    if argv is None and (sys.stdout, sys.stderr) == (sys.__stdout__, sys.__stderr__):
        sys.stdout, output = _mended(sys.stdout, 1)
        sys.stderr, _ = _mended(sys.stderr, 2)
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), None)
    name = f"mlpdown {command}" if command in COMMANDS else "mlpdown"
    try:
        interrupt.main_takes_over()
        level = _log_level()
        logging.basicConfig(level=level, format="mlpdown: %(levelname)s: %(message)s")
        parser = _parser(command)
        try:
            if not words:
                parser.print_help()
                return 0
            arguments = parser.parse_args(words)
            return arguments.run(arguments)
        finally:
            sys.stdout.flush()
            if output is not None:
                output.check()  # a full disk shows here
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (BuildError, OSError, _WrongVariable) as error:
        logging.debug("where that came from", exc_info=True)
        print(f"{name}: {error}", file=sys.stderr)
        return NOT_SERVED
    except Exception as error:
        logging.debug("where that came from", exc_info=True)
        first_line = next(iter(str(error).splitlines()), "")
        print(f"{name}: {type(error).__name__}: {first_line} (MLPDOWN_LOG=debug shows where)", file=sys.stderr)
        return NOT_SERVED


class _WrongVariable(Exception):
    """A variable of the environment has a value that nothing is known of."""


class _Pipe(io.FileIO):
    """A file whose errors wait for :meth:`check`: once it takes no more, what is written goes nowhere."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def check(self) -> None:
        """Raise what went wrong; that the reader has left is not wrong, and the command goes on to its own exit status."""
        if self.error is not None and not isinstance(self.error, BrokenPipeError):
            raise self.error


def _mended(stream: TextIO | None, descriptor: int) -> tuple[TextIO, _Pipe | None]:
    """A standard stream that can print every character and whose reader may leave, and its file. A closed stream becomes /dev/null."""
    if stream is None:
        return open(os.devnull, "w"), None
    file = _Pipe(descriptor, "w", closefd=False)
    by_line = getattr(stream, "line_buffering", True) or getattr(stream, "write_through", True)
    text = io.TextIOWrapper(io.BufferedWriter(file), encoding=stream.encoding, errors="backslashreplace", line_buffering=by_line)
    return text, file


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlpdown", description="The MLP down projection of a decode step, with bias and residuals, as one kernel."
    )
    parser.add_argument("--version", action="version", version=f"mlpdown {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == command:
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.main)
    return parser


def _log_level() -> int:
    name = os.environ.get("MLPDOWN_LOG") or "warning"
    level = logging.getLevelName(name.upper())  # a number for a name that it knows
    if not isinstance(level, int):
        raise _WrongVariable(f"MLPDOWN_LOG must be one of debug, info, warning, error, critical, got {name!r}")
    return level
