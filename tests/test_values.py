"""Any shape, any values: hypothesis draws them, the exact replay judges. And the rounding at the end, against torch's."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import scalar_replay
import torch
from assertions import assert_same_bits, assert_within_bound, bits_of
from hypothesis import given, settings
from hypothesis import strategies as st

import mlpdown
from mlpdown import accuracy, reference
from mlpdown.cases import KINDS, TORCH_DTYPES, Case, make_case, round_to

DTYPES = sorted(TORCH_DTYPES)
CANONICAL_NAN = 0x7FFF

FROZEN_DIGESTS = {
    ("bfloat16", "ordinary"): "260973f63fa73b77",
    ("bfloat16", "cancelling"): "0716da45f93a320a",
    ("bfloat16", "special"): "d81fcd6b882d2940",
    ("bfloat16", "subnormal"): "e8fcd7451a4ea8cc",
    ("float16", "ordinary"): "066fe9d31fb02cbd",
    ("float16", "cancelling"): "d21b10d64b9aef3a",
    ("float16", "special"): "232aab179665a5a1",
    ("float16", "subnormal"): "28f57d3e3e86d58c",
}

# Exponent fields (sign and mantissa are drawn freely): zeros and subnormals, small and large normal numbers, infinities and NaNs.
EXPONENTS = {
    "float16": {"tiny": (0, 3), "middling": (12, 18), "huge": (28, 30), "any": (0, 30), "special": (31, 31)},
    "bfloat16": {"tiny": (0, 3), "middling": (120, 134), "huge": (240, 254), "any": (0, 254), "special": (255, 255)},
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Cases of a few hundred products, each tensor with values of a class of its own, some sprinkled with others."""
    dtype = draw(st.sampled_from(DTYPES))
    hidden_dim, num_tokens = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    intermediate_dim = 8 * draw(st.integers(1, 24) | st.just(65))
    generator = np.random.Generator(np.random.PCG64(draw(st.integers(0, 2**32 - 1))))
    classes = st.sampled_from(["tiny", "middling", "huge", "any"])

    def values(*shape: int) -> np.ndarray:
        array = _random_values(generator, shape, EXPONENTS[dtype][draw(classes)], dtype)
        sprinkled = draw(st.sampled_from([None, None, "tiny", "huge", "special"]))
        if sprinkled is not None:
            where = generator.random(shape) < 2 / array.size
            array = np.where(where, _random_values(generator, shape, EXPONENTS[dtype][sprinkled], dtype), array)
        return array * np.float32(draw(st.sampled_from([1.0, 1.0, 1.0, 0.0])))

    case = Case(
        dtype,
        values(num_tokens, hidden_dim),
        values(num_tokens, hidden_dim),
        values(num_tokens, intermediate_dim),
        values(hidden_dim, intermediate_dim),
        values(hidden_dim),
    )
    return case.without(*(name for name in ("attn_output", "bias") if draw(st.booleans())))


@settings(max_examples=300)
@given(cases())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_values_replayed_in_exact_integers(case: Case) -> None:
    num_tokens, hidden_dim = case.hidden_states.shape
    expected = [[scalar_replay.replay(case, token, row) for row in range(hidden_dim)] for token in range(num_tokens)]
    assert_same_bits(case.expected_bits(), np.array(expected, np.uint16), case.dtype)


@settings(max_examples=100)
@given(cases())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_values_within_the_bound(case: Case) -> None:
    # Where a partial sum can leave float32's range, an infinity may stay although the exact sum is finite: no bound holds there.
    with np.errstate(all="ignore"):
        magnitudes = accuracy.float64_result(
            Case(case.dtype, *(None if a is None else np.abs(a) for a in case.arrays()))
        )  # type: ignore[arg-type]
    if np.all(magnitudes < np.finfo(np.float32).max) and np.all(np.isfinite(magnitudes)):
        assert_within_bound(case.expected_bits(), case)


@settings(max_examples=50)
@given(cases())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numba_backend_is_the_specification(case: Case) -> None:
    hidden_states, attn_output, mlp_intermediate, weight, bias = case.tensors()
    assert hidden_states is not None and mlp_intermediate is not None and weight is not None
    actual = mlpdown.run(hidden_states, attn_output, mlp_intermediate, weight, bias, backend="numba")
    assert_same_bits(bits_of(actual), case.expected_bits(), case.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_torchs_but_for_nans(dtype: str) -> None:
    values = _values_to_round(dtype)
    hidden_dim = values.size
    bits = reference.mlp_down(
        values[None], None, np.zeros((1, 8), np.float32), np.zeros((hidden_dim, 8), np.float32), dtype=dtype
    )[0]
    expected = bits_of(torch.from_numpy(values)[None].to(TORCH_DTYPES[dtype]))[0].copy()
    expected[np.isnan(values)] = CANONICAL_NAN
    expected[values == 0] = 0  # the total is +0.0, and (+0.0) + (-0.0) is +0.0
    assert_same_bits(bits[None], expected[None], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalar_rounding_is_torchs_but_for_nans(dtype: str) -> None:
    """The judge is judged too."""
    values = _values_to_round(dtype)[::37]
    expected = bits_of(torch.from_numpy(values)[None].to(TORCH_DTYPES[dtype]))[0].copy()
    expected[np.isnan(values)] = CANONICAL_NAN
    actual = np.array([scalar_replay.bits16(value, dtype) for value in values.tolist()], np.uint16)
    assert_same_bits(actual[None], expected[None], dtype)


@pytest.mark.parametrize(
    ("dtype", "sums", "expected"),
    [
        ("float16", 65519.996, 0x7BFF),  # the last float32 that rounds to the largest float16
        ("float16", 65520.0, 0x7C00),
        ("float16", -65520.0, 0xFC00),
        ("float16", 2.0**-25, 0x0000),  # half of the smallest subnormal: to even, which is zero
        ("float16", -(2.0**-25) * (1 + 2.0**-23), 0x8001),
        ("float16", 1023.5 * 2.0**-24, 0x0400),  # from the subnormals into the normal numbers
        ("bfloat16", float.fromhex("0x1.fefffep127"), 0x7F7F),
        ("bfloat16", float.fromhex("0x1.ffp127"), 0x7F80),
        ("bfloat16", 2.0**-134, 0x0000),
        ("bfloat16", 2.0**-134 + 2.0**-149, 0x0001),
    ],
)
def test_edges_of_the_result(dtype: str, sums: float, expected: int) -> None:
    hidden_states = np.full((1, 1), sums, np.float32)
    assert float(hidden_states[0, 0]) == pytest.approx(sums, rel=2.0**-24)
    zeros = np.zeros((1, 8), np.float32)
    assert reference.mlp_down(hidden_states, None, zeros, zeros, dtype=dtype)[0, 0] == expected


def test_product_is_not_rounded_before_it_is_added() -> None:
    """Outside the range where products of bfloat16 values are exact in float32, the definition is still a fused multiply-add."""
    small = np.float32(2.0**-75) * np.float32(
        1 + 2.0**-7
    )  # squared: 2**-150 * 1.0157, above half of the smallest subnormal
    weight, activation = np.zeros((1, 8), np.float32), np.zeros((1, 8), np.float32)
    weight[0, 0] = activation[0, 0] = small
    assert reference.partial_sums(activation, weight)[0, 0] == np.float32(2.0**-149)
    huge = np.float32(2.0**64)
    weight[0, 0] = activation[0, 0] = (
        huge  # 2**128: beyond float32, until -2**127 of the same accumulator is there first
    )
    long_weight, long_activation = np.zeros((1, 8 * 8 * 64), np.float32), np.zeros((1, 8 * 8 * 64), np.float32)
    long_weight[0, 0], long_activation[0, 0] = -(2.0**63), 2.0**64
    long_weight[0, 8 * 32], long_activation[0, 8 * 32] = huge, huge
    assert reference.partial_sums(long_activation, long_weight)[0, 0] == np.float32(2.0**127)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nan_is_the_canonical_one(dtype: str) -> None:
    case = make_case(6, 64, dtype)
    assert case.attn_output is not None and case.bias is not None
    case.weight[0, 3] = np.nan
    case.bias[1] = -np.nan
    case.attn_output[0, 2] = np.nan
    case.hidden_states[0, 3] = -np.nan
    case.weight[4, 5], case.weight[4, 60] = np.inf, -np.inf
    case.mlp_intermediate[0, [5, 60]] = 1.0
    bits = case.expected_bits()[0]
    assert bits[:5].tolist() == [CANONICAL_NAN] * 5
    assert np.isfinite(accuracy.bits_to_float64(bits[5:], dtype)).all()


@pytest.mark.parametrize("row_length", [64, 8192])
def test_partial_sums_have_one_nan(row_length: int) -> None:
    """Of any NaN, of infinities that cancel, of zero times infinity; of a row of one segment and of eight."""
    weight, activation = np.ones((4, row_length), np.float32), np.ones((1, row_length), np.float32)
    weight[0, 3] = np.uint32(0xFFC01234).view(np.float32)
    weight[1, [0, row_length - 1]] = np.inf, -np.inf
    weight[2, 5], activation[0, 5] = np.inf, 0.0
    sums = reference.partial_sums(activation, weight)[0]
    assert sums.view(np.uint32)[:3].tolist() == [0x7FFFFFFF] * 3
    assert sums[3] == row_length - 1


def _random_values(
    generator: np.random.Generator, shape: tuple[int, ...], exponents: tuple[int, int], dtype: str
) -> np.ndarray:
    fraction_bits = {"float16": 10, "bfloat16": 7}[dtype]
    size = int(np.prod(shape))
    bits = (
        generator.integers(0, 2, size) << 15
        | generator.integers(exponents[0], exponents[1] + 1, size) << fraction_bits
        | generator.integers(0, 1 << fraction_bits, size)
    ).astype(np.uint16)
    return accuracy.bits_to_float64(bits, dtype).astype(np.float32).reshape(shape)


def _values_to_round(dtype: str) -> np.ndarray:
    """Every 16-bit value, the points halfway to the next, their float32 neighbours, and a million random float32 patterns."""
    with np.errstate(invalid="ignore"):
        values = accuracy.bits_to_float64(np.arange(1 << 16, dtype=np.uint16), dtype).astype(np.float32)
    finite = np.sort(values[np.isfinite(values)])
    halfway = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    largest = np.float32(accuracy.FORMATS[dtype].largest)
    overflow = np.nextafter(
        np.float32(largest * (1 + 2.0 ** -(accuracy.FORMATS[dtype].mantissa_bits + 2))), np.float32([0, np.inf])
    )
    with np.errstate(invalid="ignore"):  # signalling NaNs
        points = [
            values,
            halfway,
            np.nextafter(halfway, np.float32(np.inf)),
            np.nextafter(halfway, np.float32(-np.inf)),
            overflow,
            random,
        ]
    return np.concatenate(points)


@pytest.mark.parametrize("dtype", DTYPES)
def test_generated_inputs_are_values_of_their_dtype(dtype: str) -> None:
    for kind in ("ordinary", "cancelling", "special"):
        for array in make_case(24, 264, dtype, kind, num_tokens=2).arrays():
            assert array is not None
            finite = array[np.isfinite(array)]
            np.testing.assert_array_equal(round_to(finite, dtype), finite)
            np.testing.assert_array_equal(torch.from_numpy(finite).to(TORCH_DTYPES[dtype]).float().numpy(), finite)


def test_generated_inputs_never_change() -> None:
    """Committed goldens hang on these."""
    case = make_case(3, 16, "float16", "ordinary", seed=9)
    again = make_case(3, 16, "float16", "ordinary", seed=9)
    np.testing.assert_array_equal(case.weight, again.weight)
    assert not np.array_equal(case.weight, make_case(3, 16, "float16", "ordinary", seed=10).weight)
    assert {
        (dtype, kind): _digest(make_case(64, 64, dtype, kind, seed=9)) for dtype in DTYPES for kind in KINDS
    } == FROZEN_DIGESTS


def _digest(case: Case) -> str:
    """Of the 16-bit patterns of all inputs; NaNs, whose patterns are a library's affair, as one number."""
    digest = hashlib.sha256()
    for array in case.arrays():
        assert array is not None
        digest.update(np.where(np.isnan(array), np.float32(12345.0), array).tobytes())
    return digest.hexdigest()[:16]
