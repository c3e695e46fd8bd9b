"""``mlpdown bench compare OLD NEW``: what became faster or slower, and whether that is more than noise."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from ..json_lines import read_json
from ..timing import median, quartiles
from . import e2e_timing
from .report import SCHEMA_VERSION, label_of, new_console, new_table

# A change is one when it exceeds this much of the old value, and three times the spread of both samples.
SMALLEST_CHANGE = 0.02
TIMES_SPREAD = 3.0
# The quartiles of a normal distribution are 1.349 standard deviations apart.
QUARTILES_PER_DEVIATION = 1.349
OURS = ("native", "patched")

Timings = dict[tuple[str, str], tuple[float, float]]
"""(shape or mode, candidate) -> median and standard deviation."""


class Change(NamedTuple):
    """One candidate in both files, or in one of them; ratio and noise are relative to the old median, NaN if only one file has it."""

    label: str
    name: str
    old: float
    new: float
    ratio: float
    noise: float
    verdict: str
    is_regression: bool
    """Ours became slower, or is gone from what the new file has measured. That a baseline became slower is no fault."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mlpdown bench compare``."""
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")


def main(arguments: argparse.Namespace) -> int:
    """Print the changes. Returns 1 if one of our own is a regression, 2 if the files cannot be compared."""
    try:
        changes = compare(arguments.old, arguments.new)
    except (ValueError, OSError) as error:
        print(f"mlpdown bench compare: {error}", file=sys.stderr)
        return 2
    title = f"{arguments.old} to {arguments.new}: medians; new over old below 1 is faster"
    table = new_table(title, "shape or mode", "candidate", "old", "new", "new over old", "noise", "")
    for change in changes:
        numbers = ["-" if math.isnan(value) else f"{value:.3f}" for value in change[2:6]]
        table.add_row(*change[:2], *numbers, change.verdict, style="bold red" if change.is_regression else None)
    new_console().print(table)
    num_regressions = sum(change.is_regression for change in changes)
    num_alone = sum(math.isnan(change.ratio) for change in changes)
    found = f"{num_regressions} of ours became slower, or are no longer measured" if num_regressions else "No regression"
    print(f"{found}: {len(changes) - num_alone} compared, {num_alone} in one file only.")
    return 1 if num_regressions else 0


def compare(old_path: Path, new_path: Path) -> list[Change]:
    """Every candidate of either file.

    Raises:
        ValueError: a file is no result of ``bench op`` or ``bench e2e``, or they are of different GPUs or have nothing in common.
        OSError: a file cannot be read.
    """
    (old_gpu, old), (new_gpu, new) = read_timings(old_path), read_timings(new_path)
    if old_gpu != new_gpu:
        raise ValueError(f"results of different machines cannot be compared: {old_gpu} and {new_gpu}")
    if not old.keys() & new.keys():
        raise ValueError("the two files have nothing in common")
    measured, changes = {label for label, _ in new}, []
    for label, name in {**old, **new}:
        (before, old_deviation), (after, new_deviation) = (file.get((label, name), (math.nan, math.nan)) for file in (old, new))
        noise = max(TIMES_SPREAD * math.hypot(old_deviation, new_deviation) / before, SMALLEST_CHANGE)
        ratio = after / before
        verdict = "within noise" if abs(ratio - 1) <= noise else "slower" if ratio > 1 else "faster"
        if math.isnan(ratio):
            verdict = "in the new file only" if math.isnan(before) else "in the old file only"
        is_worse = verdict == "slower" or (math.isnan(after) and label in measured)
        changes.append(Change(label, name, before, after, ratio, noise, verdict, is_worse and name.startswith(OURS)))
    return changes


def read_timings(path: Path) -> tuple[str, Timings]:
    """The GPU of a result and its times: of ``bench op`` in microseconds a call, of ``bench e2e`` in milliseconds a token. Raises as
    :func:`compare`."""
    timings: Timings = {}

    def add(label: str, name: str, middle: float, spread: tuple[float, float]) -> None:
        timings[label, name] = middle, (spread[1] - spread[0]) / QUARTILES_PER_DEVIATION

    if '"benchmark": "e2e"' in path.read_text():
        content = read_json(path, "e2e", e2e_timing.SCHEMA_VERSION)
        for row in content["rows"]:
            mode = e2e_timing.mode_label(row["mode"], row["cache_length"])
            label = f"{content['model']} {content['dtype']}, {mode}, {row['num_tokens']} tokens"
            for name in ("stock", "patched"):
                add(label, name, row[f"{name}_ms"]["median"], row[f"{name}_ms"]["quartiles"])
        return content["machine"]["gpu"] or "CPU", timings
    content = read_json(path, "op", SCHEMA_VERSION)
    for result in content["results"]:
        costs = {f"{name} (CPU time)": samples for name, samples in result["cpu_cost"].items()}
        for name, samples in {**result["timings"], **costs}.items():
            add(label_of(result), name, median(samples), quartiles(samples))
    return content["machine"]["gpu"] or "CPU", timings
