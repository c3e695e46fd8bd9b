"""The emulated kernel against the specification, bit for bit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mlpdown.reference.order import MAX_SEGMENTS, MIN_VECTORS_PER_SEGMENT, NUM_LANES, VECTOR_SIZE, num_segments

from mlpdown.heuristics import choose_plan
from mlpdown.plan import (
    CLUSTER_SIZES,
    H200,
    MAX_CONSUMER_WARPS,
    MAX_STAGES,
    REGISTERS_KERNELS,
    RTX_5090,
    Plan,
    check_plan,
    instantiations,
    vectors_per_lane,
)

from .build import HERE, NATIVE
from .cases import (
    DTYPES,
    assert_same_bits,
    expected_bits,
    expected_partial_sums,
    make_inputs,
    make_negative_zeros,
    widen,
)
from .launch import Inputs, Kernel

# From one vector a row to more than one for each lane of a segment; then the first lengths with 2, 4 and 8 segments, and ragged ones.
SHAPES = [(1, 8), (5, 72), (19, 200), (37, 520), (11, 1992), (9, 2048), (11, 2568), (7, 4104), (5, 8192), (4, 8280)]


def shapes_for(cluster_size: int, vectors: int) -> list[tuple[int, int]]:
    """Shapes for a ring kernel: rows that have a segment for each CTA, and so many vectors of the activation in a lane's registers."""
    shapes = [(rows, length) for rows, length in SHAPES if num_segments(length) >= cluster_size]
    if vectors == 0:
        return shapes
    lengths = []
    for segments in (1, 2, 4, 8):
        longest = vectors * segments * NUM_LANES * VECTOR_SIZE
        # All lanes have all vectors; the last segment is shorter; most lanes have the last vector; one lane of each segment has it.
        for length in (
            longest,
            longest - 7 * 8,
            longest - 24 * segments,
            longest - (NUM_LANES - 1) * VECTOR_SIZE * segments,
        ):
            if num_segments(length) == segments and vectors_per_lane(length) == vectors:
                lengths.append(length)
    return [
        *zip((7, 5, 6, 3) * 4, lengths, strict=False),
        *(shape for shape in shapes if vectors_per_lane(shape[1]) == vectors),
    ]


def some_plans(cluster_size: int, rows_per_stage: int, vectors: int, seed: int) -> list[Plan]:
    """One plan of this instantiation for each shape, the rest of it drawn."""
    random = np.random.default_rng([seed, cluster_size, rows_per_stage, vectors])
    plans = []
    for _, length in shapes_for(cluster_size, vectors):
        warps_per_group = num_segments(length) // cluster_size
        num_groups = min(int(random.choice([1, 1, 2, 4])), MAX_CONSUMER_WARPS // warps_per_group)
        num_stages = num_groups * int(random.integers(1, 5))
        stages_in_flight = int(random.integers(1, num_stages + 1))
        weight_prefetch, dependent_launch = (bool(random.integers(2)) for _ in range(2))
        plan = Plan(
            cluster_size,
            rows_per_stage,
            num_stages,
            stages_in_flight,
            num_groups * warps_per_group,
            activation_in_registers=vectors > 0,
            stagger_rows=int(random.integers(3)),
            weight_prefetch=weight_prefetch,
            dependent_launch=dependent_launch,
        )
        plans.append(plan)
    return plans


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cluster_size", "rows_per_stage", "vectors"), instantiations())
def test_plan_never_changes_a_bit(
    kernel: Kernel, cluster_size: int, rows_per_stage: int, vectors: int, dtype: str
) -> None:
    shapes, plans = shapes_for(cluster_size, vectors), some_plans(cluster_size, rows_per_stage, vectors, 1)
    for seed, ((hidden_dim, intermediate_dim), plan) in enumerate(zip(shapes, plans, strict=True)):
        inputs = make_inputs(hidden_dim, intermediate_dim, dtype, seed)
        out, _ = kernel.launch(inputs, plan, num_clusters=min(hidden_dim, 3), seed=seed)
        assert_same_bits(out, expected_bits(inputs), f"{hidden_dim} x {intermediate_dim}, {plan}, seed {seed}")


@pytest.mark.parametrize(("rows_per_stage", "vectors"), [(1, 2), (1, 5), (1, 8), (2, 2), (2, 4), (2, 7)])
def test_missing_vectors_keep_a_negative_zero(kernel: Kernel, rows_per_stage: int, vectors: int) -> None:
    """Accumulators of -0: whether a lane then has one more vector must not show."""
    intermediate_dim = (vectors - 1) * NUM_LANES * VECTOR_SIZE + VECTOR_SIZE  # one lane has one more
    assert num_segments(intermediate_dim) == 1 and vectors_per_lane(intermediate_dim) == vectors
    inputs = make_negative_zeros(3, intermediate_dim)
    assert (expected_bits(inputs) == 0x8000).all()
    plan = Plan(1, rows_per_stage, 2, 1, 1, activation_in_registers=True)
    out, _ = kernel.launch(inputs, plan, seed=1)
    assert_same_bits(out, expected_bits(inputs), str(plan))


def test_absent_segments_keep_a_negative_zero(kernel: Kernel) -> None:
    """A short row has fewer segments than a slot has places: none of the others may turn a sum of -0 into +0."""
    for intermediate_dim in (264, 2048, 4096):
        inputs = make_negative_zeros(3, intermediate_dim)
        for plan in (Plan(1, 1, 2, 1, num_segments(intermediate_dim)), Plan.in_registers(1)):
            out, _ = kernel.launch(inputs, plan, seed=1)
            assert_same_bits(out, expected_bits(inputs), str(plan))
            assert (out == 0x8000).all()


# Two to sixteen groups of consumer warps, each on a stage of its own: rows of 8 segments, then shorter ones.
SEVERAL_STAGES_AT_ONCE = [
    (8200, Plan(1, 2, 4, 2, 16)),
    (8200, Plan(2, 4, 2, 2, 8)),
    (8200, Plan(4, 1, 4, 3, 8)),
    (8200, Plan(4, 2, 8, 8, 16)),
    (8200, Plan(8, 1, 16, 2, 16)),
    (8200, Plan(8, 4, 2, 1, 2)),
    (4104, Plan(1, 2, 2, 1, 8)),
    (2568, Plan(1, 2, 8, 3, 8)),
    (2568, Plan(2, 1, 16, 16, 16)),
    (200, Plan(1, 1, 16, 4, 16)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("intermediate_dim", "plan"),
    SEVERAL_STAGES_AT_ONCE,
    ids=lambda value: f"{value.cluster_size}-{value.num_consumer_warps}" if isinstance(value, Plan) else str(value),
)
def test_several_stages_at_once(kernel: Kernel, intermediate_dim: int, plan: Plan, dtype: str) -> None:
    check_plan(plan, intermediate_dim, H200)
    inputs = make_inputs(71, intermediate_dim, dtype, 11)
    for seed in range(2):
        plan = dataclasses.replace(plan, weight_prefetch=seed == 1)
        out, _ = kernel.launch(inputs, plan, seed=seed)
        assert_same_bits(out, expected_bits(inputs), f"{plan}, seed {seed}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_prefetch", [False, True])
@pytest.mark.parametrize(("rows", "vectors_in_flight"), REGISTERS_KERNELS)
def test_registers_never_change_a_bit(
    kernel: Kernel, rows: int, vectors_in_flight: int, weight_prefetch: bool, dtype: str
) -> None:
    # The last shape takes more than one round of loads in every kernel.
    for seed, (hidden_dim, intermediate_dim) in enumerate([*SHAPES, (5, 14344), (5, 16392)]):
        inputs = make_inputs(hidden_dim, intermediate_dim, dtype, seed)
        for warps in {num_segments(intermediate_dim), MAX_SEGMENTS}:
            plan = Plan.in_registers(
                rows,
                vectors_in_flight,
                num_consumer_warps=warps,
                weight_prefetch=weight_prefetch,
                dependent_launch=bool(seed % 2),
            )
            check_plan(plan, intermediate_dim, H200)
            out, _ = kernel.launch(inputs, plan, seed=seed)
            assert_same_bits(out, expected_bits(inputs), f"{hidden_dim} x {intermediate_dim}, {plan}, seed {seed}")


def test_more_segments_from_one_vector_to_the_next(kernel: Kernel) -> None:
    """On both sides of each length at which a row gets more segments, and not by the emulated kernel's own arithmetic."""
    for segments in (2, 4, 8):
        first = segments * MIN_VECTORS_PER_SEGMENT * VECTOR_SIZE
        assert (num_segments(first - VECTOR_SIZE), num_segments(first)) == (segments // 2, segments)
        for intermediate_dim in (first - VECTOR_SIZE, first):
            inputs = make_inputs(3, intermediate_dim, "float16", segments)
            for plan in (Plan(1, 1, 2, 1, num_segments(intermediate_dim)), Plan.in_registers(1)):
                out, _ = kernel.launch(inputs, plan, seed=1)
                assert_same_bits(out, expected_bits(inputs), f"{intermediate_dim}, {plan}")


def one_plan_a_size(rows_per_stage: int) -> list[tuple[int, Plan]]:
    """A plan of each cluster size with the length of its rows, and of each way into registers."""
    ring = [(1024 * c if c > 1 else 200, c) for c in CLUSTER_SIZES]
    plans = [(length, Plan(c, rows_per_stage, 2, 1, num_segments(length) // c)) for length, c in ring]
    return plans + [(200, Plan.in_registers(rows, vectors)) for rows, vectors in REGISTERS_KERNELS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("attn_output", [False, True])
def test_optional_tensors(kernel: Kernel, attn_output: bool, bias: bool, dtype: str) -> None:
    for seed, (intermediate_dim, plan) in enumerate(one_plan_a_size(2)):
        inputs = make_inputs(19, intermediate_dim, dtype, 3, attn_output=attn_output, bias=bias)
        out, _ = kernel.launch(inputs, plan, num_clusters=2, seed=seed)
        assert_same_bits(out, expected_bits(inputs), f"{plan}, seed {seed}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_sums(kernel: Kernel, dtype: str) -> None:
    for seed, (intermediate_dim, plan) in enumerate(one_plan_a_size(1)):
        inputs = make_inputs(19, intermediate_dim, dtype, 4)
        out, _ = kernel.launch(inputs, plan, num_clusters=2, seed=seed, is_partial_sums=True)
        assert_same_bits(out, expected_partial_sums(inputs), f"{plan}, seed {seed}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bits_as_input(kernel: Kernel, dtype: str) -> None:
    """NaNs, infinities, subnormals and overflow, as they come in uniformly drawn bits."""
    random = np.random.default_rng(5)
    kinds: set[str] = set()
    for seed in range(8):
        # A few rows with few vectors: else every sum is a NaN.
        drawn = {name: random.integers(0, 1 << 16, shape, np.uint16) for name, shape in _shapes(64, 8).items()}
        drawn["weight"][:, 3:] = 0
        drawn["mlp_intermediate"][3:] = 0
        inputs = Inputs(dtype, **drawn)
        plans = [Plan(1, 4, 2, 2, 1), Plan.in_registers(2), Plan(1, 2, 2, 1, 1, activation_in_registers=True)]
        plan = plans[seed % len(plans)]
        out, _ = kernel.launch(inputs, plan, seed=seed)
        assert_same_bits(out, expected_bits(inputs), f"seed {seed}")
        tests = {"nan": np.isnan, "infinity": np.isinf, "finite": np.isfinite}
        kinds |= {kind for kind, test in tests.items() if test(widen(out, dtype)).any()}
    assert kinds == {"nan", "infinity", "finite"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_sums_of_any_bits(kernel: Kernel, dtype: str) -> None:
    """In rows of one segment and of eight: most sums are NaNs, and there is one NaN."""
    random = np.random.default_rng(6)
    for seed, (intermediate_dim, plan) in enumerate(one_plan_a_size(1)):
        drawn = {name: random.integers(0, 1 << 16, shape, np.uint16) for name, shape in _shapes(19, intermediate_dim).items()}
        inputs = Inputs(dtype, **drawn)
        out, _ = kernel.launch(inputs, plan, num_clusters=2, seed=seed, is_partial_sums=True)
        assert np.isnan(out).any()
        assert_same_bits(out, expected_partial_sums(inputs), f"{plan}, seed {seed}")


def _shapes(hidden_dim: int, intermediate_dim: int) -> dict[str, tuple[int, ...]]:
    vectors = {name: (hidden_dim,) for name in ("hidden_states", "attn_output", "bias")}
    return {"mlp_intermediate": (intermediate_dim,), "weight": (hidden_dim, intermediate_dim), **vectors}


# The plans that are chosen, one for each other cluster size, and registers.
FULL_SIZE_PLANS = [
    choose_plan(2560, 10240, H200, weight_prefetch=True),
    choose_plan(2560, 10240, RTX_5090, weight_prefetch=True),
    choose_plan(2560, 10240, H200),
    Plan(2, 1, 4, 2, 4),
    Plan(4, 4, 4, 2, 4, weight_prefetch=True),
    Plan(8, 2, 5, 5, 1),
    Plan.in_registers(2),
]


@pytest.mark.parametrize(
    "plan", FULL_SIZE_PLANS, ids=lambda plan: f"{plan.cluster_size}-{plan.num_stages}-{plan.rows_in_registers}"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pythia_2b8(kernel: Kernel, plan: Plan, dtype: str) -> None:
    check_plan(plan, 10240, H200)
    inputs = make_inputs(2560, 10240, dtype, 6)
    out, _ = kernel.launch(inputs, plan, num_clusters=120 // plan.cluster_size, seed=7)
    assert_same_bits(out, expected_bits(inputs), str(plan))


def test_most_stages_and_warps(kernel: Kernel) -> None:
    inputs = make_inputs(150, 2056, "float16", 8)
    out, _ = kernel.launch(inputs, Plan(2, 1, MAX_STAGES, MAX_STAGES, MAX_CONSUMER_WARPS), num_clusters=1, seed=9)
    assert_same_bits(out, expected_bits(inputs), "most stages and warps")


# ---- The emulator's own arithmetic, and its interface ---------------------------------------------------------------------------------


def test_widening_is_exact(kernel: Kernel) -> None:
    all_bits = np.arange(1 << 16, dtype=np.uint16)
    expected = all_bits.view(np.float16).astype(np.float32)
    actual = np.array([kernel.widen_float16(int(bits)) for bits in all_bits], np.float32)
    numbers = ~np.isnan(expected)
    assert_same_bits(actual[numbers], expected[numbers], "float16 to float32")
    assert np.isnan(actual[~numbers]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(kernel: Kernel, dtype: str) -> None:
    random = np.random.default_rng(10)
    # All 16-bit values, what lies halfway between each and the next, what lies just beside that, and values of any size.
    exact = widen(np.arange(1 << 16, dtype=np.uint16), dtype)
    exact = exact[np.isfinite(exact)]
    with np.errstate(over="ignore"):
        halfway = (exact[:-1].astype(np.float64) + exact[1:]).astype(np.float32) / np.float32(2)
        beside = np.nextafter(halfway, np.float32(np.inf)), np.nextafter(halfway, np.float32(-np.inf))
    values = np.concatenate([exact, halfway, *beside, random.integers(0, 1 << 32, 20000, np.uint32).view(np.float32)])
    values = np.append(values[~np.isnan(values)], np.array([np.inf, -np.inf], np.float32))[::7]
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.uint16).numpy()
    actual = np.array([kernel.round_once[dtype](value) for value in values], np.uint16)
    assert_same_bits(actual, expected, dtype)
    assert kernel.round_once[dtype](np.nan) == 0x7FFF


def interface_of(header: Path) -> dict[str, list[str]]:
    """The functions of a ptx.cuh by name, each with its result's and its parameters' types and names."""
    code = re.sub(r"//[^\n]*", "", header.read_text()).split("namespace ptx {")[1]
    functions: dict[str, list[str]] = {}
    for result, name, parameters in re.findall(
        r"^(?:MLPDOWN_DEVICE )?(\w+) (\w+)\(([^{;]*)\)\s*[{;]", code, re.MULTILINE
    ):
        parameters = re.sub(r",?\s*Where where = Where::current\(\)", "", parameters)
        functions.setdefault(name, []).append(re.sub(r"\s+", " ", f"{result} ({parameters})"))
    return functions


def test_both_primitives_headers_have_the_same_interface() -> None:
    native, emulated = interface_of(NATIVE / "ptx.cuh"), interface_of(HERE / "ptx.cuh")
    assert len(native) > 20
    assert emulated == native
