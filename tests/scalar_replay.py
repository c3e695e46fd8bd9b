"""The canonical order once more, one number at a time, written from its prose alone: exact integers, rounded where the prose says so.

Every finite float32 is a whole number of units of 2**-149, every product of two of them one of 2**-298. Sums and products are done in
such whole numbers, without error, and rounded by looking at the bits that fall off.
"""

from __future__ import annotations

import math

import numpy as np

from mlpdown.cases import Case

UNIT = -298  # exponent of the unit in which exact numbers are counted
# (bits of the significand, exponent of the smallest step, exponent that no number reaches)
FLOAT32 = (24, -149, 128)
FORMATS = {"float16": (11, -24, 16), "bfloat16": (8, -133, 128)}


def exact(value: float) -> int:
    """A finite float as a whole number of units."""
    numerator, denominator = value.as_integer_ratio()  # the denominator is a power of two
    return numerator << -UNIT - (denominator.bit_length() - 1)


def rounded(units: int, form: tuple[int, int, int]) -> float:
    """The nearest number of a format, the even one of two that are as near; infinity from half a step above the largest."""
    significand_bits, smallest_step, top = form
    magnitude = abs(units)
    step = max(magnitude.bit_length() - significand_bits, smallest_step - UNIT)  # exponent of the last place, in units
    whole, rest = divmod(magnitude, 1 << step)
    half = 1 << step - 1
    if rest > half or (rest == half and whole % 2):
        whole += 1
    value = math.inf if (whole << step).bit_length() > top - UNIT else math.ldexp(whole, step + UNIT)
    return -value if units < 0 else value


def multiply_add(weight: float, activation: float, accumulator: float) -> float:
    """weight * activation + accumulator, one rounding to float32."""
    if math.isfinite(weight) and math.isfinite(activation) and math.isfinite(accumulator):
        product = exact(weight) * exact(activation) >> -UNIT  # 16-bit factors: a product of 2**-266 or more
        units = product + exact(accumulator)
        if units:
            return rounded(units, FLOAT32)
    # Nothing to round: infinities, NaNs, and sums that are exactly zero, whose sign double precision gets right too.
    return weight * activation + accumulator


def add(one: float, other: float) -> float:
    """one + other, rounded to float32."""
    if math.isfinite(one) and math.isfinite(other):
        units = exact(one) + exact(other)
        if units:
            return rounded(units, FLOAT32)
    return one + other


def bits16(value: float, dtype: str) -> int:
    """A float32 value rounded to 16 bits; every NaN is 0x7fff."""
    if math.isnan(value):
        return 0x7FFF
    significand_bits, smallest_step, top = FORMATS[dtype]
    sign = 0x8000 if math.copysign(1.0, value) < 0 else 0
    if math.isfinite(value) and value:
        value = rounded(exact(value), FORMATS[dtype])
    magnitude = abs(value)
    fraction_bits = significand_bits - 1
    if math.isinf(magnitude):
        return sign | (2 * top - 1) << fraction_bits
    if magnitude < math.ldexp(1.0, smallest_step + fraction_bits):  # subnormal, or zero
        return sign | int(math.ldexp(magnitude, -smallest_step))
    fraction, exponent = math.frexp(magnitude)
    return (
        sign
        | (exponent - 1 + top - 1) << fraction_bits
        | int(math.ldexp(fraction, significand_bits)) - (1 << fraction_bits)
    )


def row_sum(weight_row: np.ndarray, activation: np.ndarray) -> float:
    """Steps 1 to 7 of the prose, for one row and one token."""
    weights, activations = weight_row.tolist(), activation.tolist()
    num_vectors = len(weights) // 8
    num_segments = next(number for number in (8, 4, 2, 1) if number == 1 or num_vectors >= 128 * number)
    length = math.ceil(num_vectors / num_segments)
    total = None
    for segment in range(num_segments):
        vectors = range(num_vectors)[segment * length : (segment + 1) * length]
        lanes = []
        for lane in range(32):
            positions = [0.0] * 8
            for vector in vectors[lane::32]:
                for j in range(8):
                    positions[j] = multiply_add(weights[8 * vector + j], activations[8 * vector + j], positions[j])
            while len(positions) > 1:  # neighbours in pairs, then the pairs, then the halves
                positions = [add(left, right) for left, right in zip(positions[::2], positions[1::2], strict=True)]
            lanes += positions
        while len(lanes) > 1:  # the upper half onto the lower half
            half = len(lanes) // 2
            lanes = [add(lower, upper) for lower, upper in zip(lanes[:half], lanes[half:], strict=True)]
        total = lanes[0] if total is None else add(total, lanes[0])
    assert total is not None
    return total


def replay(case: Case, token: int, row: int) -> int:
    """The bits of one element of the result."""
    value = row_sum(case.weight[row], case.mlp_intermediate[token])
    if case.bias is not None:
        value = add(value, float(case.bias[row]))
    if case.attn_output is not None:
        value = add(value, float(case.attn_output[token, row]))
    return bits16(add(value, float(case.hidden_states[token, row])), case.dtype)
