"""``mlpdown bench op --plans``: a grid of plans, each checked bit for bit, then timed isolated and chained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich import box
from rich.table import Table

from .. import native_backend
from ..plan import (
    CLUSTER_SIZES,
    MAX_ROWS_PER_STAGE,
    MAX_STAGES,
    ROWS_IN_REGISTERS,
    ROWS_PER_WARP,
    Device,
    Plan,
    check_plan,
)
from .chain import Captured, Chain, Oracle, calls_for, check_same_bits
from .measure import native_layer, native_plans
from .results import median
from .shapes import Shape
from .timing import time_replays

NUM_ROUNDS = 10
NUM_SHOWN = 20
STAGE_KILOBYTES = (10, 20, 30, 40, 60, 80, 100)
CONSUMER_WARPS = (4, 8, 12, 16)


def grid(shape: Shape, device: Device) -> Iterator[Plan]:
    """Plans that fit: of the ring every cluster size, rows per warp, size of a stage and number of warps, with all the stages there is room
    for; and all of the kernel that lands weights in registers."""
    yield from (Plan.in_registers(rows) for rows in ROWS_IN_REGISTERS)
    seen = set()
    for cluster_size, rows_per_warp, stage_kilobytes, num_warps in itertools.product(
        CLUSTER_SIZES, ROWS_PER_WARP, STAGE_KILOBYTES, CONSUMER_WARPS
    ):
        row_bytes = 2 * shape.intermediate_dim // cluster_size
        rows_per_stage = min(MAX_ROWS_PER_STAGE, 1024 * stage_kilobytes // row_bytes // rows_per_warp * rows_per_warp)
        for num_stages in range(MAX_STAGES, 1, -1):
            plan = Plan(cluster_size, rows_per_warp, rows_per_stage, num_stages, num_warps)
            if plan not in seen and _fits(plan, shape, device):
                seen.add(plan)
                yield plan
                break
            if plan in seen:
                break


def sweep(
    shape: Shape, dtype: torch.dtype, device: torch.device, num_calls: int | None, seed: int, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time the grid; the fastest chained plan first. A plan that cannot be launched has ``error`` in place of times.

    Raises:
        CheckError: a plan changes a bit.
    """
    properties = native_backend.device_properties(device.index)
    num_calls = num_calls or calls_for(shape, torch.cuda.get_device_properties(device).L2_cache_size)
    chain = Chain.make(shape, dtype, device, num_calls, seed)
    expected = chain.run(native_layer(native_plans(shape, device)["native_chained"]))
    Oracle(chain).check_bits("the default plan", expected)
    rows: list[dict[str, Any]] = []
    plans = list(grid(shape, properties))
    for position, plan in enumerate(plans):
        progress(f"plan {position + 1} of {len(plans)}")
        row: dict[str, Any] = {"plan": dataclasses.asdict(plan)}
        rows.append(row)
        variants = {
            "isolated": dataclasses.replace(plan, dependent_launch=False),
            "chained": dataclasses.replace(plan, weight_prefetch=True),
        }
        try:
            chain.run_first(native_layer(plan))
        except RuntimeError as error:  # what the launcher says: not one cluster of it fits
            row["error"] = str(error).splitlines()[0]
            continue
        graphs = {name: Captured(functools.partial(chain.run, native_layer(variant))) for name, variant in variants.items()}
        row.update(time_replays(graphs, NUM_ROUNDS, num_calls))
        for name, graph in graphs.items():
            check_same_bits(f"{name} under {plan}", graph.outs, expected)
    return sorted(rows, key=lambda row: median(row["chained"]) if "chained" in row else float("inf"))


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """The fastest plans chained and the fastest isolated, in the order of :func:`sweep`; and those that were refused, without times."""
    timed = [row for row in rows if "isolated" in row]
    by_isolated = sorted(timed, key=lambda row: median(row["isolated"]))
    shown = [row for row in rows if row in timed[:NUM_SHOWN] or row in by_isolated[:NUM_SHOWN] or "error" in row]
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("registers", "cluster", "rows/warp", "rows/stage", "stages", "warps", "chained us", "isolated us"):
        result.add_column(heading, justify="right")
    ring = ("cluster_size", "rows_per_warp", "rows_per_stage", "num_stages", "num_consumer_warps")
    for row in shown:
        plan = row["plan"]
        in_registers = plan["rows_in_registers"]
        cells = [str(in_registers), *[""] * len(ring)] if in_registers else ["", *(str(plan[name]) for name in ring)]
        if "error" in row:
            cells += [row["error"], ""]
        else:
            cells += [f"{median(row['chained']):.2f}", f"{median(row['isolated']):.2f}{' *' if row is by_isolated[0] else ''}"]
        result.add_row(*cells)
    return result


def _fits(plan: Plan, shape: Shape, device: Device) -> bool:
    try:
        check_plan(plan, shape.intermediate_dim, device)
    except ValueError:
        return False
    return True
