"""The specification: near the exact result, the same by another hand, and the same in the simulator."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import scalar_replay
from assertions import assert_same_bits, assert_within_bound

from mlpdown import reference
from mlpdown.cases import KINDS, TORCH_DTYPES, Case, make_case

DTYPES = sorted(TORCH_DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_within_its_bound_of_float64_at_full_size(dtype: str, kind: str) -> None:
    case = make_case(2560, 10240, dtype, kind)
    assert_within_bound(case.expected_bits(), case)


def test_bound_catches_a_dropped_vector() -> None:
    case = make_case(64, 2048, "float16")
    assert case.bias is not None
    damaged = Case(
        case.dtype, case.hidden_states, case.attn_output, case.mlp_intermediate.copy(), case.weight, case.bias
    )
    damaged.mlp_intermediate[:, 512:520] = 0
    with pytest.raises(AssertionError, match="outside the bound"):
        assert_within_bound(damaged.expected_bits(), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_random_rows_replayed_in_exact_integers(dtype: str, kind: str) -> None:
    case = make_case(64, 10240, dtype, kind, seed=1, num_tokens=2)
    bits = case.expected_bits()
    for token, row in [(0, 1), (1, 2), (0, 7), (1, 21), (0, 44), (1, 63)]:
        assert bits[token, row] == scalar_replay.replay(case, token, row), (token, row)


@pytest.mark.parametrize("dtype", DTYPES)
# One vector; a few; on both sides of each length at which a row gets more segments; one more than a whole number of rounds of lanes; a
# model's odd size.
@pytest.mark.parametrize("intermediate_dim", [8, 40, 72, 2040, 2048, 2056, 4088, 4096, 8184, 8192, 8200, 11008])
def test_ragged_sizes_replayed_in_exact_integers(dtype: str, intermediate_dim: int) -> None:
    case = make_case(5, intermediate_dim, dtype, "cancelling", seed=2)
    expected = np.array([[scalar_replay.replay(case, 0, row) for row in range(5)]], np.uint16)
    assert_same_bits(case.expected_bits(), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", [(), ("attn_output",), ("bias",), ("attn_output", "bias")])
def test_absent_tensors_leave_their_addition_out(dtype: str, absent: tuple[str, ...]) -> None:
    case = make_case(16, 256, dtype, seed=3).without(*absent)
    expected = np.array([[scalar_replay.replay(case, 0, row) for row in range(16)]], np.uint16)
    assert_same_bits(case.expected_bits(), expected, dtype)


def test_absent_tensor_is_not_a_zero_one() -> None:
    """A total of -0.0 shows the difference: +0.0 added to it gives +0.0. Products that underflow in every lane make one."""
    minus_zero, zero = np.full((1, 1), -0.0, np.float32), np.zeros(1, np.float32)
    weight, activation = np.full((1, 2048), -(2.0**-133), np.float32), np.full((1, 2048), 2.0**-133, np.float32)
    assert reference.mlp_down(minus_zero, None, activation, weight, None, dtype="bfloat16")[0, 0] == 0x8000
    assert reference.mlp_down(minus_zero, None, activation, weight, zero, dtype="bfloat16")[0, 0] == 0x0000
    assert reference.mlp_down(minus_zero, zero[None], activation, weight, None, dtype="bfloat16")[0, 0] == 0x0000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_touch_each_other(dtype: str, kind: str) -> None:
    case = make_case(48, 1032, dtype, kind, num_tokens=7)
    together = case.expected_bits()
    assert case.attn_output is not None
    for token in range(7):
        one = slice(token, token + 1)
        alone = Case(
            dtype, case.hidden_states[one], case.attn_output[one], case.mlp_intermediate[one], case.weight, case.bias
        )
        assert_same_bits(alone.expected_bits(), together[one], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_order_changes_over_half_of_cancelling_results(dtype: str) -> None:
    case = make_case(2560, 10240, dtype, "cancelling")
    activation, weight = case.mlp_intermediate, case.weight
    orders = {
        "backwards": (activation[:, ::-1].copy(), weight[:, ::-1].copy()),
        "a segment later": (np.roll(activation, 1280, 1), np.roll(weight, 1280, 1)),
    }
    for name, (other_activation, other_weight) in orders.items():
        other = Case(dtype, case.hidden_states, case.attn_output, other_activation, other_weight, case.bias)
        assert (other.expected_bits() != case.expected_bits()).mean() > 0.5, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_trees_change_over_half_of_cancelling_results(dtype: str) -> None:
    """A mistake as small as folding neighbouring lanes first, or one accumulator a lane, must show."""
    case = make_case(2560, 10240, dtype, "cancelling", seed=4)
    products = case.weight * case.mlp_intermediate[0]  # exact in float32
    lanes = products.reshape(2560, 8, 5, 32, 8)
    by_position = lanes[:, :, 0]
    for vector in range(1, 5):
        by_position = by_position + lanes[:, :, vector]
    canonical = _in_order(_halves(_pairs(by_position)))
    assert_same_bits(_bits_of_sums(canonical, dtype), case.expected_bits(), dtype)

    neighbours_first = _in_order(_pairs(_pairs(by_position)))
    one_accumulator = _in_order(_halves(_in_order(np.moveaxis(lanes, 3, 2).reshape(2560, 8, 32, 40))))
    segments_in_pairs = _pairs(_halves(_pairs(by_position)))
    for sums in (neighbours_first, one_accumulator, segments_in_pairs):
        assert (_bits_of_sums(sums, dtype) != case.expected_bits()).mean() > 0.5


def test_full_size_in_under_a_second() -> None:
    case = make_case(2560, 10240, "float16")
    case.expected_bits()  # compiles
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        case.expected_bits()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0


SIMULATE = """
import sys
import numpy as np
from mlpdown import reference
from mlpdown.cases import make_case

for dtype in ("float16", "bfloat16"):
    for hidden_dim, intermediate_dim, num_tokens, kind in [
        (3, 264, 1, "cancelling"), (8, 40, 1, "special"), (1, 2056, 1, "cancelling"), (2, 72, 2, "ordinary")
    ]:
        case = make_case(hidden_dim, intermediate_dim, dtype, kind, 5, num_tokens)
        for absent in ((), ("attn_output", "bias")) if hidden_dim == 3 else ((),):
            arrays = case.without(*absent).arrays()
            simulated = reference.mlp_down(*arrays, dtype=dtype, machine="simulator")
            wrong = int((simulated != reference.mlp_down(*arrays, dtype=dtype)).sum())
            print(dtype, hidden_dim, intermediate_dim, kind, absent, wrong)
        sums = reference.partial_sums(case.mlp_intermediate, case.weight, machine="simulator")
        same = sums.tobytes() == reference.partial_sums(case.mlp_intermediate, case.weight).tobytes()
        print(dtype, hidden_dim, intermediate_dim, kind, "sums", int(not same))
"""


def test_simulator_gives_the_bits_of_the_cpu() -> None:
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    process = subprocess.run(
        [sys.executable, "-c", SIMULATE], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 2 * (4 + 1 + 4)
    assert [line for line in lines if not line.endswith(" 0")] == []


def test_simulator_must_be_asked_for_in_time() -> None:
    case = make_case(1, 8, "float16")
    with pytest.raises(RuntimeError, match="NUMBA_ENABLE_CUDASIM=1"):
        reference.mlp_down(*case.arrays(), dtype="float16", machine="simulator")


def test_partial_sums_are_what_the_result_is_rounded_from() -> None:
    case = make_case(32, 1280, "bfloat16", "cancelling", num_tokens=3)
    sums = reference.partial_sums(case.mlp_intermediate, case.weight)
    assert sums.dtype == np.float32
    assert sums[2, 5] == np.float32(scalar_replay.row_sum(case.weight[5], case.mlp_intermediate[2]))
    assert_same_bits(_bits_of_sums(sums, "bfloat16"), case.expected_bits(), "bfloat16")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dtype": "float32"}, ValueError, "dtype must be one of"),
        ({"machine": "gpu"}, ValueError, "machine must be 'cpu' or 'simulator', got 'gpu'"),
        ({"weight": np.zeros((4, 12), np.float32)}, ValueError, "multiple of 8"),
        ({"weight": np.zeros((4, 16), np.float64)}, TypeError, "weight must be float32"),
        ({"bias": np.zeros(5, np.float32)}, ValueError, r"bias must be \[4\], got \[5\]"),
        ({"attn_output": np.zeros((2, 4), np.float32)}, ValueError, r"attn_output must be \[1, 4\], got \[2, 4\]"),
    ],
)
def test_wrong_arguments_of_the_specification(change: dict[str, object], error: type[Exception], words: str) -> None:
    case = make_case(4, 16, "float16")
    names = ("hidden_states", "attn_output", "mlp_intermediate", "weight", "bias")
    arguments = {**dict(zip(names, case.arrays(), strict=True)), "dtype": "float16", **change}
    with pytest.raises(error, match=words):
        reference.mlp_down(**arguments)  # type: ignore[arg-type]


def _in_order(parts: np.ndarray) -> np.ndarray:
    total = parts[..., 0]
    for position in range(1, parts.shape[-1]):
        total = total + parts[..., position]
    return total


def _pairs(parts: np.ndarray) -> np.ndarray:
    while parts.shape[-1] > 1:
        parts = parts[..., ::2] + parts[..., 1::2]
    return parts[..., 0]


def _halves(parts: np.ndarray) -> np.ndarray:
    while parts.shape[-1] > 1:
        half = parts.shape[-1] // 2
        parts = parts[..., :half] + parts[..., half:]
    return parts[..., 0]


def _bits_of_sums(sums: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded as the specification rounds: sums as residuals of a product of zeros."""
    rows = np.atleast_2d(sums)
    hidden_dim = rows.shape[1]
    zeros = np.zeros((rows.shape[0], 8), np.float32)
    return reference.mlp_down(rows.copy(), None, zeros, np.zeros((hidden_dim, 8), np.float32), dtype=dtype)
