"""``mlpdown bench op --plans``: which plan is fastest at a shape? Every plan is checked bit for bit before it is timed.

A sweep screens a grid of plans in random order, a few samples each, until its time is up. Then it times the best of them anew, in turns.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.table import Table

from .. import native_backend
from ..plan import MAX_STAGES, ROWS_IN_REGISTERS, ROWS_PER_STAGE, Device, Plan, check_plan
from .chain import Captured, Chain, Oracle, calls_for, check_same_bits
from .measure import native_layer, native_plans
from .results import median
from .shapes import Shape
from .timing import time_replays

NUM_SCREENING_ROUNDS = 3
NUM_FINAL_ROUNDS = 20
NUM_SHOWN = 5
# So many of the fastest chained, and as many of the fastest isolated, are timed anew.
NUM_FINALISTS = 10
# A stage of a row of at least so many bytes may be worth a cluster, which splits it.
SMALLEST_SPLIT_ROW_BYTES = 16 * 2**10
CLUSTER_SIZES = (1, 2, 4)
CONSUMER_WARPS = (1, 2, 4, 8, 16)
STAGES = (2, 3, 4, 5, 6, 8, 10, 12, 14, MAX_STAGES)
STAGES_IN_FLIGHT = (1, 2, 3, 4, 6, 8, 12)
KINDS = ("chained", "isolated")
COLUMNS = {
    "cl": "cluster_size",
    "rows": "rows_per_stage",
    "st": "num_stages",
    "fl": "stages_in_flight",
    "warps": "num_consumer_warps",
    "act": "activation_in_registers",
    "stag": "stagger_rows",
}
LEGEND = "cl: cluster size; st: stages; fl: stages in flight; act: activation in registers or shared memory; stag: rows staggered"


def grid(shape: Shape, device: Device) -> list[Plan]:
    """Every plan that fits: all of the registers kernel; of the ring, rows and groups of warps, stages and how many of them are in flight,
    the activation in shared memory or in registers, shares staggered or not, and clusters where rows are long."""
    plans = [Plan.in_registers(rows) for rows in ROWS_IN_REGISTERS]
    cluster_sizes = CLUSTER_SIZES if 2 * shape.intermediate_dim >= SMALLEST_SPLIT_ROW_BYTES else CLUSTER_SIZES[:1]
    for cluster_size, rows, warps, stages, in_flight, in_registers, stagger in itertools.product(
        cluster_sizes, ROWS_PER_STAGE, CONSUMER_WARPS, STAGES, STAGES_IN_FLIGHT, (True, False), (0, 1)
    ):
        if in_flight <= stages:
            plan = Plan(
                cluster_size, rows, stages, in_flight, warps, activation_in_registers=in_registers, stagger_rows=stagger
            )
            plans.append(plan)
    return [plan for plan in plans if _fits(plan, shape, device)]


def variants(plan: Plan) -> dict[str, Plan]:
    """What a plan is timed as: chained with prefetch, and isolated."""
    return {
        "chained": dataclasses.replace(plan, weight_prefetch=True, dependent_launch=True),
        "isolated": dataclasses.replace(plan, weight_prefetch=False, dependent_launch=False),
    }


def sweep(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    num_calls: int | None,
    seed: int,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Screen the grid for ``seconds``, then time the fastest anew.

    Returns:
        A row a plan: ``plan``, ``is_chosen`` (the plan that a caller gets), ``is_final``, and ``chained`` and ``isolated`` with a sample a
        round in microseconds a call, or ``error`` of a plan that cannot be launched. Finalists first, the fastest chained first.

    Raises:
        CheckError: a plan changes a bit.
    """
    end = time.monotonic() + seconds
    properties = native_backend.device_properties(device.index)
    num_calls = num_calls or calls_for(shape, torch.cuda.get_device_properties(device).L2_cache_size)
    chain = Chain.make(shape, dtype, device, num_calls, seed)
    chosen = native_plans(shape, device)
    expected = chain.run(native_layer(chosen["native_chained"]))
    Oracle(chain).check_bits("the chosen plan", expected)

    def capture(plan: Plan) -> dict[str, Captured]:
        graphs = {}
        for name, variant in variants(plan).items():
            graphs[name] = Captured(functools.partial(chain.run, native_layer(variant)))
            graphs[name].replay()
            check_same_bits(f"{name} under {variant}", graphs[name].outs, expected)
        return graphs

    # The chosen ones come first, whatever time there is; the rest in an order that makes a sweep cut short a fair sample.
    own = [variants(chosen[name])["isolated"] for name in ("native_chained_prefetch", "native_isolated")]
    others = [variants(plan)["isolated"] for plan in grid(shape, properties)]
    random.Random(seed).shuffle(others)
    plans = list(dict.fromkeys([*own, *others]))
    rows: list[dict[str, Any]] = []
    for plan in plans:
        if time.monotonic() >= end and plan not in own:
            break
        progress(f"plan {len(rows) + 1} of {len(plans)}")
        row: dict[str, Any] = {"plan": dataclasses.asdict(plan), "is_chosen": plan in own, "is_final": False}
        rows.append(row)
        try:
            row.update(time_replays(capture(plan), NUM_SCREENING_ROUNDS, num_calls))
        except RuntimeError as error:  # the launcher's words, if not one cluster of the plan fits
            row["error"] = str(error).splitlines()[0]
    finalists = [row for row in rows if "error" not in row and (row["is_chosen"] or _is_among_fastest(row, rows))]
    progress(f"{len(finalists)} finalists")
    graphs = {(index, kind): graph for index, row in enumerate(finalists) for kind, graph in capture(Plan(**row["plan"])).items()}
    for (index, kind), samples in time_replays(graphs, NUM_FINAL_ROUNDS, num_calls).items():
        finalists[index].update({kind: samples, "is_final": True})
    return sorted(rows, key=lambda row: (not row["is_final"], median(row["chained"]) if "chained" in row else float("inf")))


def num_in_grid(shape: Shape, device: torch.device) -> int:
    """How many plans a sweep without a limit would time, the chosen ones apart."""
    return len(grid(shape, native_backend.device_properties(device.index)))


def table(rows: list[dict[str, Any]], title: str, floor_us: float) -> Table:
    """The fastest finalists chained with prefetch, the fastest isolated, and the chosen plans; times with their ratio to the floor."""
    result = Table(title=title, title_justify="left", caption=LEGEND, caption_justify="left", box=box.SIMPLE, padding=0, show_edge=False)
    for heading in ("", *COLUMNS, "chained, prefetch", "isolated"):
        result.add_column(heading, justify="right" if heading else "left")
    final = [row for row in rows if row["is_final"]]
    for kind in KINDS:
        for rank, row in enumerate(sorted(final, key=lambda row: median(row[kind]))[:NUM_SHOWN], 1):
            result.add_row(f"{kind} {rank}", *_cells(row, floor_us))
        result.add_section()
    for row in final:
        if row["is_chosen"]:
            result.add_row("chosen now", *_cells(row, floor_us))
    return result


def _cells(row: dict[str, Any], floor_us: float) -> list[str]:
    plan = row["plan"]
    if plan["rows_in_registers"]:
        cells = ["reg.", str(plan["rows_in_registers"]), *[""] * (len(COLUMNS) - 2)]
    else:
        values = {**plan, "activation_in_registers": "reg" if plan["activation_in_registers"] else "sh"}
        cells = [str(values[name]) for name in COLUMNS.values()]
    return cells + [f"{median(row[kind]):.2f} ({median(row[kind]) / floor_us:.3f})" for kind in KINDS]


def _is_among_fastest(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    timed = [other for other in rows if "error" not in other]
    return any(
        sum(median(other[kind]) < median(row[kind]) for other in timed) < NUM_FINALISTS for kind in KINDS
    )


def _fits(plan: Plan, shape: Shape, device: Device) -> bool:
    try:
        check_plan(plan, shape.intermediate_dim, device)
    except ValueError:
        return False
    return True
