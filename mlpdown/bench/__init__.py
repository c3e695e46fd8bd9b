"""``mlpdown bench``: op (one call, against its floor and its baselines), e2e (a whole model), compare (two results)."""

from __future__ import annotations

import argparse
import importlib

BENCHMARKS = {
    "op": "time the op against the memory floor and against PyTorch",
    "e2e": "decode a whole model, PyTorch against patched",
    "compare": "compare two results of bench op, or two of bench e2e; exit status 1 on a regression",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of ``mlpdown bench``."""
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, summary in BENCHMARKS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        module = importlib.import_module(f".{name}", __name__)
        module.add_arguments(subparser)
        subparser.set_defaults(run_benchmark=module.main)


def main(arguments: argparse.Namespace) -> int:
    """Run the subcommand; returns its exit status."""
    return arguments.run_benchmark(arguments)
