"""A seeded scheduler runs the kernel as a GPU would once a year: nothing may go wrong, and a failing seed must replay."""

from __future__ import annotations

import dataclasses

import pytest
from mlpdown.reference.order import num_segments

from mlpdown.plan import CLUSTER_SIZES, REGISTERS_KERNELS, Plan

from .cases import DTYPES, assert_same_bits, expected_bits, make_inputs
from .launch import Kernel


@dataclasses.dataclass(frozen=True)
class Case:
    plan: Plan
    hidden_dim: int
    intermediate_dim: int
    num_clusters: int
    dtype: str

    def __str__(self) -> str:
        plan = self.plan
        kind = (
            f"registers={plan.rows_in_registers}x{plan.vectors_in_flight}"
            if plan.rows_in_registers
            else f"clusters={self.num_clusters}x{plan.cluster_size}"
        )
        activation = "-activation" if plan.activation_in_registers else ""
        return f"{self.hidden_dim}x{self.intermediate_dim}-{kind}{activation}-{self.dtype}"


def _cases() -> list[Case]:
    cases = []
    for dtype in DTYPES:
        for cluster_size in CLUSTER_SIZES:
            # The shortest rows that have a segment for each CTA, and 8 bytes more, so that segments do not fill the last lanes.
            length = 1024 * cluster_size + 8 if cluster_size > 1 else 200
            warps_per_group = num_segments(length) // cluster_size
            # Rows that do not fill the last stage; two clusters where that is cheap.
            num_clusters = 1 if cluster_size == 8 else 2
            cases.append(
                Case(Plan(cluster_size, 2, 3, 2, warps_per_group), num_clusters * 21, length, num_clusters, dtype)
            )
            # A row a stage, so that most ranks own none, and the slots for partial sums wrap too.
            cases.append(Case(Plan(cluster_size, 1, 3, 1, warps_per_group), 35, length, 1, dtype))
            # Two groups of warps.
            cases.append(Case(Plan(cluster_size, 4, 2, 2, 2 * warps_per_group), 27, length, 1, dtype))
        # Eight segments of a lone CTA, with the activation in shared memory.
        cases.append(Case(Plan(1, 2, 3, 2, 8), 21, 8200, 1, dtype))
        # The activation in registers: one vector a lane, two vectors, groups of warps. Clusters of unequal shares.
        activation = Plan(1, 1, 3, 2, 1, activation_in_registers=True, stagger_rows=2)
        cases.append(Case(activation, 37, 200, 3, dtype))
        cases.append(
            Case(
                dataclasses.replace(activation, rows_per_stage=2, num_consumer_warps=2, stagger_rows=0),
                19,
                2056,
                1,
                dtype,
            )
        )
        two_groups = dataclasses.replace(activation, rows_per_stage=2, num_stages=2, num_consumer_warps=2)
        cases.append(Case(two_groups, 32, 200, 2, dtype))
        cases.append(Case(dataclasses.replace(two_groups, num_stages=4, num_consumer_warps=4), 60, 2560, 2, dtype))
        cases.append(Case(Plan(2, 1, 3, 3, 1, stagger_rows=1), 56, 2056, 5, dtype))
        for rows, vectors in REGISTERS_KERNELS:
            cases.append(Case(Plan.in_registers(rows, vectors), 16 * rows + 1, 200, 1, dtype))
    return cases


def test_ring_as_long_as_the_slots(kernel: Kernel) -> None:
    """Warps that find no rows in the last stage may be a whole pass over the slots ahead of the epilogue."""
    inputs = make_inputs(33, 64, "float16", 1)
    expected = expected_bits(inputs)
    for seed in range(60):
        out, _ = kernel.launch(inputs, Plan(1, 2, 16, 16, 16), num_clusters=1, seed=seed)
        assert_same_bits(out, expected, f"seed {seed}")


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_schedules(kernel: Kernel, case: Case, num_schedules: int) -> None:
    fewest_rows = case.hidden_dim // case.num_clusters - case.plan.stagger_rows
    num_stages_of_rows = -(-fewest_rows // case.plan.rows_per_stage)
    assert case.plan.rows_in_registers or num_stages_of_rows > 3 * case.plan.num_stages, "the ring must wrap three times"
    inputs = make_inputs(case.hidden_dim, case.intermediate_dim, case.dtype, 1)
    expected = expected_bits(inputs)
    for seed in range(-(-num_schedules // len(_cases()))):
        plan = dataclasses.replace(case.plan, weight_prefetch=seed % 2 == 1)
        out, _ = kernel.launch(inputs, plan, num_clusters=case.num_clusters, seed=seed)
        assert_same_bits(out, expected, f"{plan}, seed {seed}")


@pytest.mark.parametrize("weight_prefetch", [False, True])
@pytest.mark.parametrize("plan", [Plan(1, 1, 5, 2, 4, activation_in_registers=True), Plan(4, 2, 3, 1, 1)], ids=str)
def test_the_whole_ring_is_filled_before_earlier_grids_end_if_the_weight_may_be_prefetched(
    kernel: Kernel, plan: Plan, weight_prefetch: bool
) -> None:
    """Nobody that waits for earlier grids may hold the producer, whose copies beyond those in flight come behind the CTA's barrier."""
    inputs = make_inputs(50, 4096, "float16", 1)
    num_clusters = 2
    ring_bytes = plan.num_stages * plan.rows_per_stage * inputs.weight[0].nbytes
    for seed in range(20):
        out, statistics = kernel.launch(
            inputs,
            dataclasses.replace(plan, weight_prefetch=weight_prefetch),
            num_clusters=num_clusters,
            seed=seed,
            earlier_grids_last=True,
        )
        assert_same_bits(out, expected_bits(inputs), f"seed {seed}")
        assert statistics.bytes_prefetched == (num_clusters * ring_bytes if weight_prefetch else 0)


def test_a_seed_replays_exactly(kernel: Kernel) -> None:
    inputs = make_inputs(44, 4096, "float16", 1)
    plan = Plan(4, 2, 3, 2, 1)
    runs = [kernel.launch(inputs, plan, num_clusters=1, seed=seed)[1] for seed in (1, 2, 1, 3)]
    assert runs[0] == runs[2]
    assert len({runs[0], runs[1], runs[3]}) == 3
