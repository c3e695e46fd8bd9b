"""The native kernel and the Numba kernel against the specification on the CPU, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from assertions import assert_same_bits, bits_of
from gpu_cases import DEVICE, check_native, gpu_case, on_device, run_guarded
from mlpdown.reference.order import num_segments

import mlpdown
from mlpdown import native_backend, reference
from mlpdown import plan as plans
from mlpdown.cases import KINDS, TORCH_DTYPES, make_case
from mlpdown.heuristics import choose_plan
from mlpdown.plan import RTX_5090, Device, Plan, check_plan

pytestmark = pytest.mark.gpu

DTYPES = sorted(TORCH_DTYPES)
PYTHIA_SHAPES = [(512, 2048), (768, 3072), (1024, 4096), (2048, 8192), (2560, 10240), (4096, 16384), (5120, 20480)]
COMMON_SHAPES = [(4096, 11008), (4096, 14336), (3584, 18944), (10240, 2560), (2560, 2560), (4096, 4096), (5120, 27648)]
RAGGED_SHAPES = [
    *itertools.product((1, 2, 31, 129), (8, 16, 56, 64, 72, 1032, 2040, 2048, 4088, 4096, 8184, 8192)),
    (2561, 10248),
    (1, 32768),
    (1001, 32760),
    (65537, 264),
    (262144, 2048),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), PYTHIA_SHAPES + COMMON_SHAPES)
def test_shapes_of_models(hidden_dim: int, intermediate_dim: int, dtype: str, kind: str) -> None:
    device = native_backend.device_properties(torch.cuda.current_device())
    check_native(hidden_dim, intermediate_dim, dtype, kind)
    check_native(
        hidden_dim,
        intermediate_dim,
        dtype,
        kind,
        choose_plan(hidden_dim, intermediate_dim, device, weight_prefetch=True),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), RAGGED_SHAPES)
def test_ragged_shapes(hidden_dim: int, intermediate_dim: int, dtype: str) -> None:
    check_native(hidden_dim, intermediate_dim, dtype, "cancelling")


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_size_with_every_row_its_own(dtype: str) -> None:
    case = make_case(2560, 10240, dtype, "cancelling", seed=1)
    assert_same_bits(bits_of(run_guarded(case.tensors(DEVICE))), case.expected_bits(), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", [(), ("attn_output",), ("bias",), ("attn_output", "bias")])
@pytest.mark.parametrize("kind", ["ordinary", "special"])
def test_optional_tensors(dtype: str, absent: tuple[str, ...], kind: str) -> None:
    tensors, expected = gpu_case(1027, 1288, dtype, kind, absent=absent)
    assert_same_bits(bits_of(run_guarded(tensors)), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden_dim", "intermediate_dim"), [(1, 8), (300, 1032), (700, 2560), (500, 5640), (1500, 10240)]
)
def test_plan_never_changes_a_bit(hidden_dim: int, intermediate_dim: int, dtype: str) -> None:
    device = native_backend.device_properties(torch.cuda.current_device())
    tensors, bits = gpu_case(hidden_dim, intermediate_dim, dtype)
    expected = on_device(bits)
    wrong: list[tuple[Plan, int]] = []
    chosen = plans_that_fit(intermediate_dim, device)
    for plan in chosen:
        num_wrong = int((run_guarded(tensors, plan=plan).view(torch.int16) != expected).sum())
        if num_wrong:
            wrong.append((plan, num_wrong))
    assert not wrong, f"{len(wrong)} of {len(chosen)} plans change bits, e.g. {wrong[:4]}"
    for kernel in plans.REGISTERS_KERNELS:
        assert sum((plan.rows_in_registers, plan.vectors_in_flight) == kernel for plan in chosen) >= 4
    rings = [plan for plan in chosen if not plan.rows_in_registers]
    for kernel in possible_kernels(intermediate_dim):
        assert sum(plans.instantiation(plan, intermediate_dim) == kernel for plan in rings) >= 4, kernel


def possible_kernels(intermediate_dim: int) -> list[tuple[int, int, int]]:
    """The ring kernels that were compiled in for rows of this length."""
    vectors = plans.vectors_per_lane(intermediate_dim)
    segments = num_segments(intermediate_dim)
    return [kernel for kernel in plans.instantiations() if kernel[2] in (0, vectors) and kernel[0] <= segments]


# For each number of segments and of vectors a lane: all lanes have all; one lane of each segment has the last; the last segment is shorter.
VECTOR_DIMS = [
    (vectors, length)
    for vectors, segments in itertools.product(range(1, 9), (1, 2, 4, 8))
    for length in (
        256 * segments * vectors,
        256 * segments * (vectors - 1) + 8 * segments,
        256 * segments * vectors - 56,
    )
    if num_segments(length) == segments and plans.vectors_per_lane(length) == vectors
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ordinary", "special"])
@pytest.mark.parametrize(("vectors", "intermediate_dim"), VECTOR_DIMS)
def test_activation_in_registers(vectors: int, intermediate_dim: int, kind: str, dtype: str) -> None:
    segments = num_segments(intermediate_dim)
    for rows_per_stage, most in plans.VECTORS_IN_REGISTERS.items():
        if vectors <= most:
            one_group = Plan(1, rows_per_stage, 4, 2, segments, activation_in_registers=True)
            staggered = dataclasses.replace(
                one_group, num_consumer_warps=2 * segments, weight_prefetch=True, stagger_rows=1
            )
            for ring in (one_group, staggered):
                check_native(1027, intermediate_dim, dtype, kind, ring)


def plans_that_fit(intermediate_dim: int, device: Device) -> list[Plan]:
    """Every combination of a few values of each field that is a plan for this device; the two switches take turns."""
    segments = num_segments(intermediate_dim)
    fitting = [
        Plan.in_registers(
            *kernel, num_consumer_warps=warps, weight_prefetch=weight_prefetch, dependent_launch=dependent_launch
        )
        for kernel in plans.REGISTERS_KERNELS
        for warps in {segments, 8}
        for weight_prefetch, dependent_launch in itertools.product((False, True), (False, True))
    ]
    switches = itertools.cycle(itertools.product((False, True), (True, False)))
    fields = ((1, 2, 3, 4, 8, 16), (1, 2, 16), (1, 2, 4, 8, 16))
    staggers = itertools.cycle((0, 1, 2))
    for kernel, values in itertools.product(possible_kernels(intermediate_dim), itertools.product(*fields)):
        cluster_size, rows_per_stage, vectors = kernel
        num_stages, stages_in_flight, num_groups = values
        weight_prefetch, dependent_launch = next(switches)
        try:
            plan = Plan(
                cluster_size=cluster_size,
                rows_per_stage=rows_per_stage,
                num_stages=num_stages,
                stages_in_flight=min(stages_in_flight, num_stages),
                num_consumer_warps=num_groups * segments // cluster_size,
                activation_in_registers=vectors > 0,
                stagger_rows=next(staggers),
                weight_prefetch=weight_prefetch,
                dependent_launch=dependent_launch,
            )
            check_plan(plan, intermediate_dim, device)
        except ValueError:
            continue
        if plan not in fitting:
            fitting.append(plan)
    return fitting


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ordinary", "special"])
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), [(1, 8), (131, 72), (1027, 32760), (2560, 10240)])
def test_both_kernels_at_every_kind_of_shape(hidden_dim: int, intermediate_dim: int, kind: str, dtype: str) -> None:
    """Which one a shape gets is the plan's affair; each must do for all."""
    segments = num_segments(intermediate_dim)
    ring = Plan(cluster_size=segments, rows_per_stage=2, num_stages=3, stages_in_flight=2, num_consumer_warps=1)
    for plan in (ring, *(Plan.in_registers(*kernel) for kernel in plans.REGISTERS_KERNELS)):
        check_native(hidden_dim, intermediate_dim, dtype, kind, plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), PYTHIA_SHAPES + COMMON_SHAPES)
def test_rtx_5090s_plan_on_this_gpu(hidden_dim: int, intermediate_dim: int, dtype: str) -> None:
    for weight_prefetch in (False, True):
        plan = choose_plan(hidden_dim, intermediate_dim, RTX_5090, weight_prefetch=weight_prefetch)
        check_native(hidden_dim, intermediate_dim, dtype, "cancelling", plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_prefetch", [False, True])
def test_a_thousand_repeats_give_the_same_bits(dtype: str, weight_prefetch: bool) -> None:
    tensors, bits = gpu_case(2560, 10240, dtype)
    expected = on_device(bits)
    num_wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        out = mlpdown.run(*tensors, backend="native", weight_prefetch=weight_prefetch)
        num_wrong += (out.view(torch.int16) != expected).sum()
    assert int(num_wrong) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_result_owes_nothing_to_the_memory_it_gets(dtype: str) -> None:
    tensors, expected = gpu_case(2560, 2048, dtype)
    for _ in range(20):
        poisoned = torch.full_like(tensors[0], float("nan"))
        del poisoned  # torch's allocator hands this memory out again
        assert_same_bits(bits_of(mlpdown.run(*tensors, backend="native")), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim"), [(1, 8), (127, 1032), (512, 10240)])
def test_partial_sums(hidden_dim: int, intermediate_dim: int, dtype: str) -> None:
    case = make_case(hidden_dim, intermediate_dim, dtype, "cancelling", seed=2)
    _, _, mlp_intermediate, weight, _ = case.tensors(DEVICE)
    assert mlp_intermediate is not None and weight is not None
    expected = reference.partial_sums(case.mlp_intermediate, case.weight)
    for backend in ("native", "numba", "auto"):
        actual = mlpdown.partial_sums(mlp_intermediate, weight, backend=backend).cpu().numpy()
        np.testing.assert_array_equal(actual.view(np.int32), expected.view(np.int32), err_msg=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("hidden_dim", "intermediate_dim", "num_tokens"), [(1, 8, 1), (127, 1032, 3), (2560, 2048, 1)])
def test_numba_kernel(hidden_dim: int, intermediate_dim: int, num_tokens: int, dtype: str, kind: str) -> None:
    case = make_case(hidden_dim, intermediate_dim, dtype, kind, 3, num_tokens)
    for absent in ((), ("attn_output", "bias")):
        part = case.without(*absent)
        out = run_guarded(part.tensors(DEVICE), backend="numba")  # type: ignore[arg-type]
        assert_same_bits(bits_of(out), part.expected_bits(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(600,), (1, 600), (1, 1, 600)])
def test_auto_takes_native_for_one_token(dtype: str, shape: tuple[int, ...]) -> None:
    tensors, expected = gpu_case(600, 2048, dtype)
    hidden_states, attn_output, mlp_intermediate, weight, bias = tensors
    assert attn_output is not None
    leading = shape[:-1]
    out = mlpdown.run(
        hidden_states.view(shape), attn_output.view(shape), mlp_intermediate.view(*leading, 2048), weight, bias
    )
    assert out.shape == shape
    # PyTorch's own order gives other bits on these inputs.
    assert_same_bits(bits_of(out), expected, dtype)


def test_auto_takes_torch_for_more_tokens() -> None:
    case = make_case(64, 256, "float16", num_tokens=3)
    tensors = case.tensors(DEVICE)
    assert torch.equal(mlpdown.run(*tensors), mlpdown.run(*tensors, backend="torch"))  # type: ignore[arg-type]
