"""One command that turns the claims about a GPU into a receipt: build, bits, errors, goldens, tests, hazards, sanitizers.

    python -m tests.receipt --out DIR    in a checkout, on a machine with a GPU: DIR/receipt.json, and a folder a stage
    python -m tests.receipt --readme     write the figures of tests/data/receipts/ into README.md and beside the receipts, and draw

The receipt is one JSON object: ``receipt`` ("gpu"), ``schema_version``, ``machine`` (:mod:`mlpdown.machine`) and ``stages``, name ->
{verdict, seconds, findings, log_tail}; :mod:`stages` says what each finds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mlpdown import machine
from mlpdown.json_lines import write_json
from mlpdown.tables import new_console, new_table

from .readme import README, RECEIPTS, update_readme
from .stages import REPOSITORY, STAGES, run_stage, summarize


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if a stage did not pass; 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m tests.receipt", description="Make a receipt on a machine with a GPU.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for receipt.json, logs and goldens")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"with commas, of {','.join(STAGES)} (all)")
    parser.add_argument("--commit", help="the commit, where the checkout does not say")
    parser.add_argument("--readme", action="store_true", help=f"instead, write the figures of {RECEIPTS} into {README}")
    arguments = parser.parse_args(argv)
    if arguments.readme:
        update_readme(REPOSITORY)
        return 0
    asked = arguments.stages.split(",")
    if not set(asked) <= STAGES.keys():
        parser.error(f"--stages must be some of {', '.join(STAGES)}, got {arguments.stages}")
    if arguments.out is None:
        parser.error("--out is needed, to write a receipt of --stages")
    folder = arguments.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in asked:
        if (folder / name).exists():
            parser.error(f"--out must be a folder without {name}, got {folder}")
    facts, outcomes, console = machine.describe(arguments.commit), {}, new_console()
    for name in [name for name in STAGES if name in asked]:
        print(f"{name} (at most {STAGES[name].limit_seconds} s) ...", flush=True)
        outcomes[name] = run_stage(STAGES[name], folder / name)
        # After each: if the machine goes, what is known stays.
        content: dict[str, Any] = {"receipt": "gpu", "schema_version": 1, "machine": facts, "stages": outcomes}
        write_json(folder / "receipt.json", content)
    table = new_table(f"{facts['gpu'] or 'no GPU'}, commit {facts['commit'] or 'not known'}", "stage", "verdict", "s", "findings")
    table.columns[3].justify = "left"
    for name, outcome in outcomes.items():
        if outcome["log_tail"]:
            print(f"--- {name} {outcome['verdict']}; the end of its log:\n{outcome['log_tail']}")
        table.add_row(name, outcome["verdict"], f"{outcome['seconds']:.0f}", summarize(name, outcome["findings"]))
    console.print(table)
    return 0 if all(outcome["verdict"] == "passed" for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
