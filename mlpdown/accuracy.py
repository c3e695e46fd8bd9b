"""How far a result is from the exact one: errors against float64 in units in the last place (ULPs), and the bound that the canonical
order keeps."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from .cases import Case
from .reference.order import NUM_LANES, num_segments, vectors_per_segment

Float64Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Format:
    """A 16-bit floating-point format."""

    mantissa_bits: int
    minimum_exponent: int
    largest: float


FORMATS = {"float16": Format(10, -14, 65504.0), "bfloat16": Format(7, -126, float.fromhex("0x1.fep127"))}

_FLOAT32_UNIT = 2.0**-24  # half an ULP of 1
_FLOAT64_UNIT = 2.0**-53
_FLOAT32_UNDERFLOW = 2.0**-150  # half of the smallest subnormal


def bits_to_float64(bits: npt.NDArray[np.uint16], dtype: str) -> Float64Array:
    """The values that 16-bit patterns of ``dtype`` stand for."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def float64_result(case: Case) -> Float64Array:
    """The op in float64, ``[num_tokens, hidden_dim]``: the oracle."""
    with np.errstate(invalid="ignore", over="ignore"):
        result = case.mlp_intermediate.astype(np.float64) @ case.weight.T.astype(np.float64)
        for residual in (case.bias, case.attn_output, case.hidden_states):
            if residual is not None:
                result = result + residual
    return result


def ulp(values: Float64Array, dtype: str) -> Float64Array:
    """The distance between neighbours of ``dtype`` around finite values, as if its exponents had no upper end."""
    form = FORMATS[dtype]
    _, exponent = np.frexp(values)  # values = fraction * 2**exponent, 0.5 <= |fraction| < 1
    exponent = np.where(values == 0, form.minimum_exponent, np.maximum(exponent - 1, form.minimum_exponent))
    return np.ldexp(1.0, exponent - form.mantissa_bits)


def errors_in_ulps(bits: npt.NDArray[np.uint16], oracle: Float64Array, dtype: str) -> Float64Array:
    """``|result - oracle|`` in ULPs of the oracle, where both are finite; one-dimensional."""
    values = bits_to_float64(bits, dtype)
    both = np.isfinite(values) & np.isfinite(oracle)
    return np.abs(values[both] - oracle[both]) / ulp(oracle[both], dtype)


def error_bound(case: Case) -> Float64Array:
    """The most by which the canonical order's float32 sum can be off, before it is rounded to 16 bits; ``[num_tokens, hidden_dim]``.

    Each of the n roundings on an element's way into the result changes it by a factor within ``1 +- 2**-24``, so the sum is off by at
    most ``n * u / (1 - n * u)`` times the sum of magnitudes (N. Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section
    4.2). The way of a product: a rounding for each vector of its lane, 3 additions over the positions of a vector, 5 over the lanes, one
    less than there are segments over these, 3 for bias and residuals.
    """
    intermediate_dim = case.weight.shape[1]
    depth = -(-vectors_per_segment(intermediate_dim) // NUM_LANES) + 3 + 5 + (num_segments(intermediate_dim) - 1) + 3
    magnitudes = float64_result(Case(case.dtype, *(None if a is None else np.abs(a) for a in case.arrays())))  # type: ignore[arg-type]
    gamma = depth * _FLOAT32_UNIT / (1 - depth * _FLOAT32_UNIT)
    oracle_gamma = 2 * intermediate_dim * _FLOAT64_UNIT
    return (gamma + oracle_gamma) * magnitudes + intermediate_dim * _FLOAT32_UNDERFLOW


def outside_bound(bits: npt.NDArray[np.uint16], case: Case, oracle: Float64Array) -> npt.NDArray[np.bool_]:
    """Elements of a result that no correctly rounded sum within :func:`error_bound` of the oracle can be; False where the oracle or a
    partial sum of it leaves float32's range."""
    bound = error_bound(case)
    values = bits_to_float64(bits, case.dtype)
    decided = np.isfinite(oracle) & (bound < np.finfo(np.float32).max * _FLOAT32_UNIT)
    wrong = np.zeros(values.shape, np.bool_)
    low, high = oracle[decided] - bound[decided], oracle[decided] + bound[decided]
    actual = values[decided]
    below = actual < low - ulp(low, case.dtype) / 2
    above = actual > high + ulp(high, case.dtype) / 2
    # Infinity is what rounds from half an ULP above the largest number on.
    largest = FORMATS[case.dtype].largest
    limit = largest + ulp(np.float64(largest), case.dtype) / 2
    may_overflow = np.where(actual > 0, high >= limit, low <= -limit)
    wrong[decided] = np.where(np.isinf(actual), ~may_overflow, below | above | np.isnan(actual))
    return wrong
