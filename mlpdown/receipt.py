"""One command that turns the claims about a GPU into a receipt: build, tests, bits, errors, goldens, hazards, sanitizers.

    python -m mlpdown.receipt --out DIR        on a machine with a GPU, in a checkout; DIR/receipt.json is the receipt,
                                               DIR/goldens/*.json are the goldens
    python -m mlpdown.receipt --readme         write the figures of native/receipts/ into README.md

The receipt is one JSON object: ``receipt`` ("gpu"), ``schema_version``, ``machine`` (see :mod:`mlpdown.bench.machine`) and ``stages``,
name -> {verdict, seconds, findings, log_tail}; what each stage finds is said in :mod:`mlpdown.receipt_stages`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

import mlpdown

from .bench import machine
from .bench.tables import new_console
from .receipt_readme import README, RECEIPTS, update_readme
from .receipt_stages import STAGES, Outcome, run_stage, summarize

SCHEMA_VERSION = 1


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if a stage did not pass; 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpdown.receipt", description="Make a receipt on a machine with a GPU."
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for receipt.json, logs and goldens")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"with commas, of {','.join(STAGES)} (all)")
    parser.add_argument("--commit", help="the commit, where the checkout does not say")
    parser.add_argument("--readme", action="store_true", help=f"instead, write the figures of {RECEIPTS} into {README}")
    arguments = parser.parse_args(argv)
    repository = Path(mlpdown.__file__).parent.parent
    if arguments.readme:
        update_readme(repository)
        return 0
    asked = arguments.stages.split(",")
    unknown = [name for name in asked if name not in STAGES]
    if unknown:
        parser.error(f"--stages must be some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    if arguments.out is None:
        parser.error("--out is needed")
    if not (repository / "tests" / "gpu").is_dir():
        parser.error(f"a receipt is made in a checkout, with its tests; {repository} has none")
    folder = arguments.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in asked:
        if (folder / name).exists():
            parser.error(f"--out must be a folder without {name}, got {folder}")
    facts = machine.describe()
    facts["commit"] = arguments.commit or facts["commit"]
    console = new_console()
    outcomes: dict[str, Outcome] = {}
    for name, stage in STAGES.items():
        if name in asked:
            console.print(f"{name} (at most {stage.limit_seconds:.0f} s) ...", highlight=False)
            outcomes[name] = run_stage(stage, folder / name, repository)
            # After each: if the machine goes, what is known stays.
            (folder / "receipt.json").write_text(json.dumps(_content(facts, outcomes), indent=1) + "\n")
    for name, outcome in outcomes.items():
        if outcome.log_tail:
            console.print(f"--- {name} {outcome.verdict}; the end of its log:", highlight=False)
            console.print(outcome.log_tail, highlight=False, markup=False)
    console.print(_table(facts, outcomes))
    return 0 if all(outcome.verdict == "passed" for outcome in outcomes.values()) else 1


def _content(facts: dict[str, Any], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    stages = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
    return {"receipt": "gpu", "schema_version": SCHEMA_VERSION, "machine": facts, "stages": stages}


def _table(facts: dict[str, Any], outcomes: dict[str, Outcome]) -> Table:
    title = (
        f"{facts['gpu'] or 'no GPU'}, torch {facts['torch']}, commit {facts['commit'] or 'not known'}, {facts['date']}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("stage")
    table.add_column("verdict")
    table.add_column("s", justify="right")
    table.add_column("findings")
    for name, outcome in outcomes.items():
        style = None if outcome.verdict == "passed" else "bold red"
        table.add_row(name, outcome.verdict, f"{outcome.seconds:.0f}", summarize(name, outcome.findings), style=style)
    return table


if __name__ == "__main__":
    sys.exit(main())
