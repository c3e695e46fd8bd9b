"""How far a result is from the exact one: errors against float64 in units in the last place (ULPs), and the bounds that the canonical order
and PyTorch keep."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from .cases import Case, to_float64
from .reference.order import NUM_LANES, num_segments, vectors_per_segment

Float64Array = npt.NDArray[np.float64]


class CheckError(Exception):
    """A result is wrong: nothing that rests on it is timed or said."""


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
        return to_float64((bits.astype(np.uint32) << 16).view(np.float32))


def float64_result(case: Case) -> Float64Array:
    """The op in float64, ``[num_tokens, hidden_dim]``: the oracle."""
    with np.errstate(invalid="ignore", over="ignore"):
        result = to_float64(case.mlp_intermediate) @ to_float64(case.weight).T
        for residual in (case.bias, case.attn_output, case.hidden_states):
            if residual is not None:
                result = result + to_float64(residual)
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


def magnitudes(case: Case) -> Float64Array:
    """The sum of the magnitudes of all terms of each element, ``[num_tokens, hidden_dim]``: what rounding errors are relative to."""
    return float64_result(Case(case.dtype, *(None if array is None else np.abs(array) for array in case.arrays())))  # type: ignore[arg-type]


def bound_of(sizes: Float64Array, intermediate_dim: int, dtype: str, *, any_order: bool = False) -> Float64Array:
    """The most by which a float32 sum can be off, before it is rounded to 16 bits; ``sizes`` are :func:`magnitudes`.

    Each of the n roundings on an element's way into the result changes it by a factor within ``1 +- 2**-24``, so the sum is off by at
    most ``n * u / (1 - n * u)`` times the sum of magnitudes (N. Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section
    4.2). The way of a product in the canonical order: a rounding for each vector of its lane, 3 additions over the positions of a vector,
    5 over the lanes, one less than there are segments over these, 3 for bias and residuals.

    ``any_order``: of a sum in whatever order, a rounding for each element; and of three more to ``dtype``, where PyTorch rounds, each at
    most an ULP of the largest partial sum there can be: of split sums, of the product with its bias, and after a residual.
    """
    depth = -(-vectors_per_segment(intermediate_dim) // NUM_LANES) + 3 + 5 + (num_segments(intermediate_dim) - 1) + 3
    if any_order:
        depth = intermediate_dim + 3
    gamma = depth * _FLOAT32_UNIT / (1 - depth * _FLOAT32_UNIT)
    oracle_gamma = 2 * intermediate_dim * _FLOAT64_UNIT
    bound = (gamma + oracle_gamma) * sizes + intermediate_dim * _FLOAT32_UNDERFLOW
    return bound + 3 * ulp(sizes + bound, dtype) if any_order else bound


def error_bound(case: Case) -> Float64Array:
    """:func:`bound_of` a case in the canonical order, ``[num_tokens, hidden_dim]``."""
    return bound_of(magnitudes(case), case.weight.shape[1], case.dtype)


def outside(
    bits: npt.NDArray[np.uint16], oracle: Float64Array, bound: Float64Array, dtype: str
) -> npt.NDArray[np.bool_]:
    """Elements of a result that no correctly rounded sum within ``bound`` of the oracle can be; False where the oracle or a partial sum of
    it leaves float32's range."""
    values = bits_to_float64(bits, dtype)
    decided = np.isfinite(oracle) & (bound < np.finfo(np.float32).max * _FLOAT32_UNIT)
    wrong = np.zeros(values.shape, np.bool_)
    low, high = oracle[decided] - bound[decided], oracle[decided] + bound[decided]
    actual = values[decided]
    below = actual < low - ulp(low, dtype) / 2
    above = actual > high + ulp(high, dtype) / 2
    # Infinity is what rounds from half an ULP above the largest number on.
    largest = FORMATS[dtype].largest
    limit = largest + ulp(np.float64(largest), dtype) / 2
    may_overflow = np.where(actual > 0, high >= limit, low <= -limit)
    wrong[decided] = np.where(np.isinf(actual), ~may_overflow, below | above | np.isnan(actual))
    return wrong


def outside_bound(bits: npt.NDArray[np.uint16], case: Case, oracle: Float64Array) -> npt.NDArray[np.bool_]:
    """:func:`outside` of the canonical order's bound for a case."""
    return outside(bits, oracle, error_bound(case), case.dtype)
