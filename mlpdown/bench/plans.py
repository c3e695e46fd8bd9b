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
    BYTES_PER_ELEMENT,
    CLUSTER_SIZES,
    MAX_STAGES,
    NUM_SEGMENTS,
    RESERVED_BYTES_PER_CTA,
    ROWS_IN_REGISTERS,
    ROWS_PER_STAGE,
    Device,
    Plan,
    check_plan,
    shared_memory_bytes,
)
from .chain import Captured, Chain, Oracle, calls_for, check_same_bits
from .measure import native_layer, native_plans
from .results import median
from .shapes import Shape
from .timing import time_replays

NUM_ROUNDS = 10
NUM_SHOWN = 20
IN_FLIGHT_KILOBYTES = (20, 40, 80)  # of each CTA
NUM_GROUPS = (1, 2)
CTAS_PER_SM = (1, 2, 3)


def grid(shape: Shape, device: Device) -> Iterator[Plan]:
    """Plans that fit: of the ring every cluster size and number of rows, the stages for which there is room where one, two or three CTAs
    share an SM, or two stages; some of them or all in flight; one or two groups of warps. And all of the kernel that lands weights in
    registers."""
    yield from (Plan.in_registers(rows) for rows in ROWS_IN_REGISTERS)
    seen = set()
    for cluster_size, rows, num_groups in itertools.product(CLUSTER_SIZES, ROWS_PER_STAGE, NUM_GROUPS):
        stage_bytes = rows * BYTES_PER_ELEMENT * shape.intermediate_dim // cluster_size
        for num_stages in {2, *(_most_stages(cluster_size, rows, shape, device, share) for share in CTAS_PER_SM)}:
            num_stages -= num_stages % num_groups
            for stages_in_flight in {num_stages, *(max(1, 1024 * size // stage_bytes) for size in IN_FLIGHT_KILOBYTES)}:
                plan = Plan(cluster_size, rows, num_stages, stages_in_flight, num_groups * NUM_SEGMENTS // cluster_size)
                if plan not in seen and _fits(plan, shape, device):
                    seen.add(plan)
                    yield plan


def _most_stages(cluster_size: int, rows: int, shape: Shape, device: Device, ctas_per_sm: int) -> int:
    """How many stages fit where so many CTAs share an SM."""

    def fits(num_stages: int) -> bool:
        plan = Plan(cluster_size, rows, num_stages, 1, NUM_SEGMENTS // cluster_size)
        needed = shared_memory_bytes(plan, shape.intermediate_dim) + RESERVED_BYTES_PER_CTA
        return needed * ctas_per_sm <= device.shared_memory_per_block + RESERVED_BYTES_PER_CTA

    return next((num_stages for num_stages in range(MAX_STAGES, 0, -1) if fits(num_stages)), 0)


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
    for heading in ("registers", "cluster", "rows/stage", "stages", "in flight", "warps", "chained us", "isolated us"):
        result.add_column(heading, justify="right")
    ring = ("cluster_size", "rows_per_stage", "num_stages", "stages_in_flight", "num_consumer_warps")
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
