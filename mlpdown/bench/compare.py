"""``mlpdown bench compare OLD NEW``: what became faster or slower, and whether that is more than noise."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from ..json_lines import read_json
from ..tables import new_console, new_table
from ..timing import median, quartiles
from . import e2e_timing
from .report import SCHEMA_VERSION, label_of

# A change is one when it exceeds this much of the old value, and three times the spread of both samples.
SMALLEST_CHANGE = 0.02
TIMES_SPREAD = 3.0
QUARTILES_PER_DEVIATION = 1.349  # of a normal distribution
OURS = ("native", "patched")

Timings = dict[tuple[str, str], tuple[float, float]]
"""(shape or mode, candidate) -> median and standard deviation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mlpdown bench compare``."""
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")


def main(arguments: argparse.Namespace) -> int:
    """Print every candidate of either file, and whether it changed by more than noise. Returns 1 if one of ours became slower, or is gone
    from what the new file has measured; 2 if the files cannot be compared."""
    try:
        (old_gpu, old), (new_gpu, new) = read_timings(arguments.old), read_timings(arguments.new)
        if old_gpu != new_gpu:
            raise ValueError(f"results of different machines cannot be compared: {old_gpu} and {new_gpu}")
        if not old.keys() & new.keys():
            raise ValueError("the two files have nothing in common")
    except (ValueError, OSError) as error:
        print(f"mlpdown bench compare: {error}", file=sys.stderr)
        return 2
    title = f"{arguments.old} to {arguments.new}: medians; new over old below 1 is faster"
    table = new_table(title, "shape or mode", "candidate", "old", "new", "new over old", "noise", "")
    num_regressions, measured, absent = 0, {label for label, _ in new}, (math.nan, math.nan)
    for label, name in {**old, **new}:
        (before, old_deviation), (after, new_deviation) = old.get((label, name), absent), new.get((label, name), absent)
        ratio, noise = after / before, max(TIMES_SPREAD * math.hypot(old_deviation, new_deviation) / before, SMALLEST_CHANGE)
        verdict = "within noise" if abs(ratio - 1) <= noise else "slower" if ratio > 1 else "faster"
        if math.isnan(ratio):
            verdict = "in the new file only" if math.isnan(before) else "in the old file only"
        # That a baseline became slower is no fault.
        is_regression = name.startswith(OURS) and (verdict == "slower" or (math.isnan(after) and label in measured))
        num_regressions += is_regression
        numbers = ["-" if math.isnan(value) else f"{value:.3f}" for value in (before, after, ratio, noise)]
        table.add_row(label, name, *numbers, verdict, style="bold red" if is_regression else None)
    new_console().print(table)
    found = f"{num_regressions} of ours became slower, or are no longer measured" if num_regressions else "No regression"
    print(f"{found}: {len(old.keys() & new.keys())} compared, {len(old.keys() ^ new.keys())} in one file only.")
    return 1 if num_regressions else 0


def read_timings(path: Path) -> tuple[str, Timings]:
    """The GPU of a result and its times: of ``bench op`` in microseconds a call, of ``bench e2e`` in milliseconds a token.

    Raises ValueError if the file is neither's, OSError if it cannot be read."""
    spreads: dict[tuple[str, str], tuple[float, float, float]] = {}
    is_e2e = '"benchmark": "e2e"' in path.read_text()
    content = read_json(path, "e2e", e2e_timing.SCHEMA_VERSION) if is_e2e else read_json(path, "op", SCHEMA_VERSION)
    for row in content["rows"] if is_e2e else ():
        mode = f"{e2e_timing.mode_label(row['mode'], row['cache_length'])}, {row['num_tokens']} tokens"
        for name in ("stock", "patched"):
            times = row[f"{name}_ms"]
            spreads[f"{content['model']} {content['dtype']}, {mode}", name] = times["median"], *times["quartiles"]
    for result in () if is_e2e else content["results"]:
        costs = {f"{name} (CPU time)": samples for name, samples in result["cpu_cost"].items()}
        for name, samples in {**result["timings"], **costs}.items():
            spreads[label_of(result), name] = median(samples), *quartiles(samples)
    timings = {key: (middle, (upper - lower) / QUARTILES_PER_DEVIATION) for key, (middle, lower, upper) in spreads.items()}
    return content["machine"]["gpu"] or "CPU", timings
