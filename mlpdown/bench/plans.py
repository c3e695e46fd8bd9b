"""``mlpdown bench op --plans``: a grid of plans, each checked bit for bit, then timed isolated and chained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.table import Table

from .. import native_backend
from ..plan import (
    BYTES_IN_FLIGHT,
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
# Not eight, so that a sweep ends within minutes.
GRID_CLUSTER_SIZES = (1, 2, 4)
KILOBYTES_IN_FLIGHT = (20, 40, 80)
GROUPS = (1, 2)
GRID_CTAS_PER_SM = (3, 2, 1)


def grid(shape: Shape, device: Device) -> list[Plan]:
    """Plans that fit: all of the kernel that lands weights in registers; and of the ring every number of rows in clusters of one, two and
    four, the activation in shared memory and where possible in registers, with one and two groups of warps, from as many stages as fit down
    to two, of which one, 20, 40, 80 KB a CTA, or all are in flight; and with shares staggered by a row."""
    plans = [Plan.in_registers(rows) for rows in ROWS_IN_REGISTERS]
    for cluster_size, rows, num_groups, in_registers in itertools.product(GRID_CLUSTER_SIZES, ROWS_PER_STAGE, GROUPS, (False, True)):
        num_warps = NUM_SEGMENTS // cluster_size * num_groups
        ring = Plan(cluster_size, rows, 2, 1, num_warps, activation_in_registers=in_registers)
        stage_bytes = rows * 2 * shape.intermediate_dim // cluster_size
        for num_stages in _stage_counts(ring, num_groups, shape, device):
            fewest = min(-(-BYTES_IN_FLIGHT // stage_bytes), num_stages - 1)
            wanted = {1, fewest, num_stages, *(1024 * kilobytes // stage_bytes for kilobytes in KILOBYTES_IN_FLIGHT)}
            for stages_in_flight in sorted(wanted):
                if 1 <= stages_in_flight <= num_stages:
                    plan = dataclasses.replace(ring, num_stages=num_stages, stages_in_flight=stages_in_flight)
                    plans.append(plan)
                    if in_registers and num_groups == 1 and stages_in_flight == fewest:
                        plans.append(dataclasses.replace(plan, stagger_rows=1))
    return [plan for plan in dict.fromkeys(plans) if _fits(plan, shape, device)]


def _stage_counts(ring: Plan, num_groups: int, shape: Shape, device: Device) -> list[int]:
    """As many stages as fit with each number of CTAs on an SM, half of the most, and two. The groups must be able to share them out."""
    counts = {2}
    for num_ctas in GRID_CTAS_PER_SM:
        limit = (device.shared_memory_per_block + RESERVED_BYTES_PER_CTA) // num_ctas - RESERVED_BYTES_PER_CTA
        for num_stages in range(MAX_STAGES, 2, -1):
            needed = shared_memory_bytes(dataclasses.replace(ring, num_stages=num_stages), shape.intermediate_dim)
            if needed <= limit and num_stages % num_groups == 0:
                counts.add(num_stages)
                break
    half = max(counts) // 2
    return sorted(counts | ({half} if half > 2 and half % num_groups == 0 else set()), reverse=True)


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
    plans = grid(shape, properties)
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
    ring = {
        "cluster": "cluster_size",
        "rows/stage": "rows_per_stage",
        "stages": "num_stages",
        "in flight": "stages_in_flight",
        "warps": "num_consumer_warps",
        "activation": "activation_in_registers",
        "stagger": "stagger_rows",
    }
    for heading in ("registers", *ring, "chained us", "isolated us"):
        result.add_column(heading, justify="right")
    for row in shown:
        plan = row["plan"]
        in_registers = plan["rows_in_registers"]
        cells = [str(in_registers), *[""] * len(ring)] if in_registers else ["", *(_cell(name, plan[name]) for name in ring.values())]
        if "error" in row:
            cells += [row["error"], ""]
        else:
            cells += [f"{median(row['chained']):.2f}", f"{median(row['isolated']):.2f}{' *' if row is by_isolated[0] else ''}"]
        result.add_row(*cells)
    return result


def _cell(name: str, value: int) -> str:
    if name == "activation_in_registers":
        return "registers" if value else "shared"
    return str(value)


def _fits(plan: Plan, shape: Shape, device: Device) -> bool:
    try:
        check_plan(plan, shape.intermediate_dim, device)
    except ValueError:
        return False
    return True
