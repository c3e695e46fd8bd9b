"""mlpdown bench op --plans, on a GPU that is played: which plans are tried, that each is checked first, and what is shown of them."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from rich.console import Console

import mlpdown
from mlpdown import native_backend
from mlpdown.accuracy import CheckError
from mlpdown.bench import plans
from mlpdown.bench.inputs import Inputs
from mlpdown.bench.shapes import PYTHIA_2B8, SHAPES, SHORT_SHAPES, Shape
from mlpdown.heuristics import choose_plan
from mlpdown.plan import H200, RTX_5090, Device, Plan, check_plan

TINY = Shape("tiny", 40, 64)
CPU = torch.device("cpu")
FASTEST = {"cluster_size": 1, "rows_per_stage": 2, "num_stages": 8, "stages_in_flight": 3}


class PlayedGraph:
    """Runs its work on the CPU; what a replay would do is done already."""

    def __init__(self, work: functools.partial[list[torch.Tensor]]) -> None:
        self.plan: Plan = work.args[0].keywords["plan"]
        self.outs = work()

    def replay(self) -> None:
        """Nothing to do again."""


def play_layer(plan: Plan, *tensors: torch.Tensor) -> torch.Tensor:
    if plan.num_stages == 5:
        raise RuntimeError("plan: not one cluster fits\nmore words")
    return mlpdown.run(*tensors, backend="numba")


def play_times(replays: Mapping[Any, Any], clock: object, num_rounds: int, num_calls: int) -> dict[Any, list[float]]:
    """The fastest plan takes 10 us chained and 20 isolated, every other one more, with noise in it."""
    times = {}
    for name, replay in replays.items():
        plan = replay.__self__.plan
        generator = random.Random(repr(plan))
        is_fastest = all(getattr(plan, member) == value for member, value in FASTEST.items())
        center = (10.0 if is_fastest else 12.0 + generator.random()) + (0.0 if plan.weight_prefetch else 10.0)
        times[name] = [center + 0.1 * generator.random() for _ in range(num_rounds)]
    return times


@pytest.fixture
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(plans, "Captured", PlayedGraph)
    monkeypatch.setattr(plans, "time_rounds", play_times)
    monkeypatch.setattr(plans, "native_layer", played_layer(play_layer))
    monkeypatch.setattr(native_backend, "device_properties", lambda index: H200)
    return monkeypatch


def played_layer(layer: Callable[..., torch.Tensor]) -> Callable[[Plan], functools.partial[torch.Tensor]]:
    return lambda plan: functools.partial(lambda *tensors, plan: layer(plan, *tensors), plan=plan)


def sweep(seconds: float = 1000.0) -> tuple[list[dict[str, Any]], int]:
    return plans.sweep(Inputs(TINY, torch.float16, CPU, 2, seed=0), seconds, 0, lambda text: None)


def test_sweep_finds_the_fastest_plan_and_says_which_one_is_chosen_now(played_gpu: pytest.MonkeyPatch) -> None:
    rows, num_plans = sweep()
    assert len(rows) == num_plans
    best = rows[0]
    assert {name: best["plan"][name] for name in FASTEST} == FASTEST
    final = [row for row in rows if row["is_final"]]
    assert 10 <= len(final) <= 2 * plans.NUM_FINALISTS + 2
    assert all(len(row[kind]) == plans.NUM_FINAL_ROUNDS for row in final for kind in plans.KINDS)
    screened = [row for row in rows if not row["is_final"] and "error" not in row]
    assert all(len(row[kind]) == plans.NUM_SCREENING_ROUNDS for row in screened for kind in plans.KINDS)
    chosen = [Plan(**row["plan"]) for row in rows if row["is_chosen"]]
    assert plans.variants(choose_plan(40, 64, H200))["isolated"] in chosen and all(row["is_final"] for row in rows if row["is_chosen"])
    refused = [row for row in rows if "error" in row]
    assert refused and all(row["plan"]["num_stages"] == 5 and row["error"] == "RuntimeError: plan: not one cluster fits" for row in refused)


def test_plan_that_changes_a_bit_is_never_timed(played_gpu: pytest.MonkeyPatch) -> None:
    def spoil(plan: Plan, *tensors: torch.Tensor) -> torch.Tensor:
        out = play_layer(plan, *tensors)
        if plan.rows_per_stage == 4 and plan.weight_prefetch:
            out.view(torch.int16)[0, 3] ^= 1
        return out

    played_gpu.setattr(plans, "native_layer", played_layer(spoil))
    with pytest.raises(CheckError, match="chained under Plan.*rows_per_stage=4.*other bits"):
        sweep()


def test_sweep_without_time_has_the_chosen_plans_alone(played_gpu: pytest.MonkeyPatch) -> None:
    rows, _ = sweep(seconds=0.0)
    assert rows and all(row["is_chosen"] and row["is_final"] for row in rows)


def test_table_fits_a_terminal_of_80_columns(played_gpu: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    Console(file=text, width=80).print(plans.table(sweep()[0], "title", 8.0))
    lines = text.getvalue().splitlines()
    first = next(line for line in lines if line.startswith("chained 1"))
    assert first.split()[2:5] == ["1", "2", "8"]
    assert "10.0" in first and "(1.2" in first and "20.0" in first and "…" not in text.getvalue()
    assert sum(line.startswith("isolated") for line in lines) == plans.NUM_SHOWN
    assert any(line.startswith("chosen now") for line in lines)


@pytest.mark.parametrize("device", [H200, RTX_5090], ids=lambda device: device.name)
@pytest.mark.parametrize("shape", [*SHAPES, *SHORT_SHAPES], ids=str)
def test_plans_of_the_grid_run_and_are_few_enough(shape: Shape, device: Device) -> None:
    grid = plans.grid(shape.intermediate_dim, device)
    assert len(set(grid)) == len(grid) <= 3000
    for plan in grid:
        check_plan(plan, shape.intermediate_dim, device)


def test_grid_varies_what_a_ring_has() -> None:
    rings = [plan for plan in plans.grid(PYTHIA_2B8.intermediate_dim, H200) if not plan.rows_in_registers]
    assert {plan.cluster_size for plan in rings} == {1, 2, 4}
    assert {plan.activation_in_registers for plan in rings} == {False, True}
    short = [plan for plan in plans.grid(SHORT_SHAPES[0].intermediate_dim, H200) if not plan.rows_in_registers]
    assert {plan.cluster_size for plan in short} == {1}, "rows of 5 KB are not split"
    fewest_warps = min(plan.num_consumer_warps for plan in short)
    assert {plan.num_consumer_warps // fewest_warps for plan in short} >= {1, 2}, "groups of warps"
    assert {plan.rows_per_stage for plan in short} == {1, 2, 4}
    assert {plan.stagger_rows for plan in short} == {0, 1}
    assert {(plan.num_stages, plan.stages_in_flight) for plan in short} >= {(12, 4), (8, 3), (16, 8)}
