"""The ``mlpdown`` command. A subcommand's module is imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from . import __version__
from .jit import BuildError

# Each of these modules has add_arguments(parser) and main(arguments) -> exit status; the first line of its docstring is its description.
COMMANDS = {
    "check": ("mlpdown.check", "run the op through every backend that can run here, and compare the bits"),
    "doctor": ("mlpdown.doctor", "say what this machine has, which backend is taken, and why"),
    "build": ("mlpdown.jit.command", "build the native library ahead of time"),
    "bench": ("mlpdown.bench", "measure"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 good, 1 a promise or a build is broken, 2 wrong usage)."""
    arguments_given = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments_given if not word.startswith("-")), None)
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
    arguments = parser.parse_args(arguments_given)
    logging.basicConfig(level=_log_level(), format="mlpdown: %(levelname)s: %(message)s")
    try:
        return arguments.run(arguments)
    except BuildError as error:
        print(f"mlpdown {arguments.command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, say
        logging.debug("where that came from", exc_info=True)
        print(f"mlpdown {arguments.command}: {error}", file=sys.stderr)
        return 2


def _log_level() -> int:
    name = os.environ.get("MLPDOWN_LOG", "warning").upper()
    level = logging.getLevelName(name)  # a number for a name that it knows
    if not isinstance(level, int):
        raise SystemExit(f"MLPDOWN_LOG must be one of debug, info, warning, error, critical, got {name.lower()!r}")
    return level
