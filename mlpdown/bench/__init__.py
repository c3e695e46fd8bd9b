"""``mlpdown bench``: op (one call, against its floor and its peers), e2e (a whole model), compare (two results)."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

SUBCOMMANDS = {
    "op": ("mlpdown.bench.op", "time the op against the memory floor and against PyTorch"),
    "e2e": ("mlpdown.bench.e2e", "decode a whole model, PyTorch against patched"),
    "compare": ("mlpdown.bench.compare", "compare two results of bench op; exit status 1 on a regression"),
}


class _LazyParser(argparse.ArgumentParser):
    """A parser that imports its subcommand's module, and takes its arguments from there, when it is first used."""

    def __init__(self, *arguments: Any, module_name: str, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._module_name: str | None = module_name

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._module_name is not None:
            module = importlib.import_module(self._module_name)
            self._module_name = None
            module.add_arguments(self)
            self.set_defaults(run_benchmark=module.main)
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of ``mlpdown bench``."""
    subparsers = parser.add_subparsers(
        dest="benchmark", required=True, metavar="BENCHMARK", parser_class=_LazyParser
    )
    for name, (module_name, summary) in SUBCOMMANDS.items():
        subparsers.add_parser(
            name, module_name=module_name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )


def main(arguments: argparse.Namespace) -> int:
    """Run the subcommand; returns its exit status."""
    return arguments.run_benchmark(arguments)
