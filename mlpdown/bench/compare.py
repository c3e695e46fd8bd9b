"""``mlpdown bench compare OLD NEW``: what became faster or slower, and whether that is more than noise."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

from rich.table import Table

from .results import Report, median, quartiles, read_report
from .tables import new_console

# A change is one when it exceeds this much of the old value, and three times the spread of both samples.
SMALLEST_CHANGE = 0.02
TIMES_SPREAD = 3.0
# The quartiles of a normal distribution are 1.349 standard deviations apart.
QUARTILES_PER_DEVIATION = 1.349
OURS = "native"


@dataclasses.dataclass(frozen=True)
class Change:
    """One candidate at one shape and dtype, in both files."""

    label: str
    name: str
    old_us: float
    new_us: float | None
    """None: no longer measured."""
    noise: float
    """The change, relative to the old value, that is within noise."""

    @property
    def ratio(self) -> float | None:
        return None if self.new_us is None else self.new_us / self.old_us

    @property
    def is_regression(self) -> bool:
        """Only of our own: that a peer became slower is no fault."""
        if not self.name.startswith(OURS):
            return False
        return self.ratio is None or self.ratio > 1 + self.noise

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "no longer measured"
        if abs(self.ratio - 1) <= self.noise:
            return "within noise"
        return "slower" if self.ratio > 1 else "faster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mlpdown bench compare``."""
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")


def main(arguments: argparse.Namespace) -> int:
    """Print the changes. Returns 1 if one of our own is a regression, 2 if the files cannot be compared."""
    try:
        old, new = read_report(arguments.old), read_report(arguments.new)
        changes = compare(old, new)
    except (ValueError, OSError) as error:
        print(f"mlpdown bench compare: {error}", file=sys.stderr)
        return 2
    table = Table(title=f"{old.machine['gpu'] or 'CPU'}: {arguments.old} to {arguments.new}", title_justify="left")
    for heading in ("shape", "candidate", "old us", "new us", "new over old", "noise", ""):
        is_name = heading in ("shape", "candidate")
        table.add_column(heading, justify="left" if is_name or not heading else "right", no_wrap=is_name)
    for change in changes:
        table.add_row(
            change.label,
            change.name,
            f"{change.old_us:.2f}",
            "-" if change.new_us is None else f"{change.new_us:.2f}",
            "-" if change.ratio is None else f"{change.ratio:.3f}",
            f"{change.noise:.3f}",
            change.verdict,
            style="bold red" if change.is_regression else None,
        )
    console = new_console()
    console.print(table)
    num_regressions = sum(change.is_regression for change in changes)
    console.print("No regression." if not num_regressions else f"{num_regressions} of ours became slower, or are no longer measured.")
    return 1 if num_regressions else 0


def compare(old: Report, new: Report) -> list[Change]:
    """Every candidate of ``old`` at every shape that both measured.

    Raises:
        ValueError: they are from different GPUs, or have nothing in common.
    """
    if old.machine["gpu"] != new.machine["gpu"]:
        raise ValueError(f"results of different machines cannot be compared: {old.machine['gpu']} and {new.machine['gpu']}")
    new_results = {result.label: result for result in new.results}
    changes = []
    for result in old.results:
        if result.label not in new_results:
            continue
        newer = new_results[result.label]
        pairs = [("", result.timings, newer.timings), (" (CPU time)", result.cpu_cost, newer.cpu_cost)]
        for suffix, old_samples, new_samples in pairs:
            for name, samples in old_samples.items():
                other = new_samples.get(name)
                changes.append(
                    Change(
                        result.label,
                        name + suffix,
                        median(samples),
                        None if other is None else median(other),
                        _noise(samples, samples if other is None else other),
                    )
                )
    if not changes:
        raise ValueError("the two files have no shape and dtype in common")
    return changes


def _noise(old: list[float], new: list[float]) -> float:
    deviations = []
    for samples in (old, new):
        lower, upper = quartiles(samples)
        deviations.append((upper - lower) / QUARTILES_PER_DEVIATION)
    return max(SMALLEST_CHANGE, TIMES_SPREAD * math.hypot(*deviations) / median(old))
