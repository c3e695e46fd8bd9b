"""``mlpdown bench op --plans``: which plan is fastest at a shape? Every plan is checked bit for bit before it is timed.

A sweep screens a grid of plans in random order, a few samples each, until its time is up. Then it times the best of them anew, in turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from .. import native_backend
from ..plan import MAX_STAGES, REGISTERS_KERNELS, ROWS_PER_STAGE, Device, Plan, check_plan
from ..tables import new_table
from ..timing import Captured, Clock, median, time_rounds
from .baselines import described
from .inputs import Checks, Inputs, check_same_bits
from .measure import native_layer, native_plans

NUM_SCREENING_ROUNDS = 3
NUM_FINAL_ROUNDS = 20
NUM_SHOWN = 5
NUM_FINALISTS = 10  # of the fastest chained, and of the fastest isolated
SHORTEST_SPLIT_ROW = 8192  # shorter ones are not worth a cluster
CLUSTER_SIZES = (1, 2, 4)
CONSUMER_WARPS = (1, 2, 4, 8, 16)
STAGES = (2, 3, 4, 5, 6, 8, 10, 12, 14, MAX_STAGES)
STAGES_IN_FLIGHT = (1, 2, 3, 4, 6, 8, 12)
KINDS = ("chained", "isolated")
RING = ("cluster_size", "rows_per_stage", "num_stages", "stages_in_flight", "num_consumer_warps")
COLUMNS = dict(zip(("cl", "rows", "st", "fl", "warps", "act", "stag"), (*RING, "activation_in_registers", "stagger_rows"), strict=True))
LEGEND = "cl: cluster size; st: stages; fl: stages (or vectors) in flight; act: activation in registers or shared; stag: rows staggered"


def grid(intermediate_dim: int, device: Device) -> list[Plan]:
    """Every plan that fits: all of the registers kernel; of the ring, rows and groups of warps, stages and how many of them are in flight,
    the activation in shared memory or in registers, shares staggered or not, and clusters where rows are long."""
    plans = [Plan.in_registers(*kernel, num_consumer_warps=warps) for kernel in REGISTERS_KERNELS for warps in CONSUMER_WARPS]
    cluster_sizes = CLUSTER_SIZES if intermediate_dim >= SHORTEST_SPLIT_ROW else CLUSTER_SIZES[:1]
    members = (cluster_sizes, ROWS_PER_STAGE, STAGES, STAGES_IN_FLIGHT, CONSUMER_WARPS, (True, False), (0, 1))
    for *ring, in_registers, stagger in itertools.product(*members):
        plans.append(Plan(*ring, activation_in_registers=in_registers, stagger_rows=stagger))
    fitting = []
    for plan in plans:
        with contextlib.suppress(ValueError):
            check_plan(plan, intermediate_dim, device)
            fitting.append(plan)
    return fitting


def variants(plan: Plan) -> dict[str, Plan]:
    """What a plan is timed as: chained with prefetch, and isolated."""
    chained, isolated = (dataclasses.replace(plan, weight_prefetch=flag, dependent_launch=flag) for flag in (True, False))
    return {"chained": chained, "isolated": isolated}


def sweep(inputs: Inputs, seconds: float, seed: int, tell: Callable[[str], None]) -> tuple[list[dict[str, Any]], int]:
    """Screen the grid for ``seconds``, then time the fastest anew.

    Returns:
        A row a plan: ``plan``, ``is_chosen`` (the plan that a caller gets), ``is_final``, and ``chained`` and ``isolated`` with a sample a
        round in microseconds a call, or ``error`` of a plan that cannot be launched. Finalists first, the fastest chained first. And how
        many plans there would be with more time.

    Raises:
        CheckError: a plan changes a bit.
    """
    end = time.monotonic() + seconds
    device, weight_shape = inputs.bias.device, inputs.weights[0].shape
    chosen = native_plans(weight_shape, device)
    expected = inputs.run(native_layer(chosen["native_chained"]))
    Checks(inputs).check("the chosen plan", expected, bits=True)

    def measure(rows: list[dict[str, Any]], num_rounds: int) -> None:
        graphs = {}
        for index, row in enumerate(rows):
            for kind, variant in variants(Plan(**row["plan"])).items():
                graphs[index, kind] = graph = Captured(functools.partial(inputs.run, native_layer(variant)))
                graph.replay()
                check_same_bits(f"{kind} under {variant}", graph.outs, expected)
        replays = {key: graph.replay for key, graph in graphs.items()}
        for (index, kind), samples in time_rounds(replays, Clock(device, "device"), num_rounds, len(inputs.weights)).items():
            rows[index][kind] = samples

    # The chosen ones come first, whatever time there is; the rest in an order that makes a sweep cut short a fair sample.
    own = [variants(chosen[name])["isolated"] for name in ("native_chained_prefetch", "native_isolated")]
    others = grid(weight_shape[1], native_backend.device_properties(device.index))
    random.Random(seed).shuffle(others)
    plans = list(dict.fromkeys([*own, *(variants(plan)["isolated"] for plan in others)]))
    rows: list[dict[str, Any]] = []
    for plan in plans:
        if time.monotonic() >= end and plan not in own:
            break
        tell(f"plan {len(rows) + 1} of {len(plans)}")
        rows.append({"plan": dataclasses.asdict(plan), "is_chosen": plan in own, "is_final": False})
        try:
            measure(rows[-1:], NUM_SCREENING_ROUNDS)
        except RuntimeError as error:  # the launcher's words, if not one cluster of the plan fits
            rows[-1]["error"] = described(error)
    timed = [row for row in rows if "error" not in row]
    fastest = [row for kind in KINDS for row in sorted(timed, key=lambda row: median(row[kind]))[:NUM_FINALISTS]]
    finalists = [row for row in timed if row["is_chosen"] or row in fastest]
    tell(f"{len(finalists)} finalists")
    measure(finalists, NUM_FINAL_ROUNDS)
    for row in finalists:
        row["is_final"] = True
    rows.sort(key=lambda row: (not row["is_final"], median(row["chained"]) if "chained" in row else float("inf")))
    return rows, len(plans)


def table(rows: list[dict[str, Any]], title: str, floor_us: float) -> Table:
    """The fastest finalists chained with prefetch, the fastest isolated, and the chosen plans; times with their ratio to the floor."""
    options = {"caption": LEGEND, "caption_justify": "left", "box": SIMPLE, "padding": 0}
    result = new_table(f"{title}; floor {floor_us:.2f}", "", *COLUMNS, "chained, prefetch", "isolated", **options)
    final = [row for row in rows if row["is_final"]]
    sections = [[("chosen now", row) for row in final if row["is_chosen"]]]
    for kind in KINDS:
        fastest = sorted(final, key=lambda row: median(row[kind]))[:NUM_SHOWN]
        sections.append([(f"{kind} {rank}", row) for rank, row in enumerate(fastest, 1)])
    for section in sections:
        for label, row in section:
            plan = {**row["plan"], "activation_in_registers": "reg" if row["plan"]["activation_in_registers"] else "sh"}
            cells = [str(plan[name]) for name in COLUMNS.values()]
            if plan["rows_in_registers"]:
                kernel = plan["rows_in_registers"], "", plan["vectors_in_flight"], plan["num_consumer_warps"]
                cells = ["reg.", *map(str, kernel), "", ""]
            result.add_row(label, *cells, *(f"{median(row[kind]):.2f} ({median(row[kind]) / floor_us:.3f})" for kind in KINDS))
        result.add_section()
    return result
