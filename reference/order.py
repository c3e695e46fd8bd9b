"""The canonical order of summation: which products are added to which partial sum, in which order, up to the last rounding.

In prose, for one output element of one token, over a row of ``row_length`` weights:

1.  Cut the row into *vectors* of 8 consecutive elements.
2.  Cut the vectors into consecutive *segments*: 8 of them if there are 128 vectors for each, else 4, else 2, else 1. That is 8 from 8,192
    elements on, 4 from 4,096, 2 from 2,048. Each has ``ceil(num_vectors / num_segments)`` vectors; the last may have fewer.
3.  Deal the vectors of a segment to 32 *lanes*, one after the other: lane ``l`` takes vectors ``l``, ``l + 32``, ``l + 64`` ... of it.
4.  A lane keeps 8 float32 accumulators, one for each position within a vector, all +0.0 at first. For each of its vectors, in rising
    order, ``accumulator[j] = fma(weight[j], activation[j], accumulator[j])``: a product that is not rounded, an addition that is.
5.  The lane's sum is ``((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))``. A lane without vectors has the sum +0.0.
6.  The segment's sum is a tree over its lanes: lane ``l`` adds lane ``l + 16``'s sum to its own, then that of ``l + 8``, ``l + 4``,
    ``l + 2`` and ``l + 1``; the sum of lane 0 is the segment's.
7.  The row's sum is ``(((s0 + s1) + s2) + ...)`` over the segments in order. A NaN becomes 0x7fffffff, whatever NaN it was: a GPU's
    additions give no other.
8.  The result is ``((sum + bias) + attn_output) + hidden_states``; a tensor that is absent leaves its addition out.
9.  That is rounded once, to nearest even, to float16 or bfloat16. A NaN becomes 0x7fff in both, whatever NaN it was.

Steps 1 to 7 are *row sums* (``row_sums.py``), steps 8 and 9 the *finish* (``finish.py``).

Every addition is a float32 addition, rounded to nearest even, with subnormals kept. Nothing here depends on a device, a launch
configuration, the number of tokens or the position of a token among them: the bits are a function of the numbers and of
``row_length`` alone.

Exact domain: all inputs. Because step 4 is defined as a fused multiply-add, this holds beyond the range in which a product of two
16-bit floats is exact in float32. Within that range (every pair of float16 values; pairs of bfloat16 values whose product is zero or
has a magnitude in [2**-126, 2**128)) a plain multiplication followed by an addition gives the same bits.

The same source is compiled for a GPU, compiled for a CPU, and interpreted by Numba's simulator. A compiler may fuse ``a * b + c``, or
widen a literal to float64. So float32 arithmetic here has no operator and no literal: it calls the operations of a ``Machine``
(``machines.py``), and constants are ``np.float32`` values bound outside of the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

VECTOR_SIZE = 8
"""Elements of a vector, the unit in which a row is dealt out."""
NUM_LANES = 32
MAX_SEGMENTS = 8
MIN_VECTORS_PER_SEGMENT = 128

FLOAT16 = 0
BFLOAT16 = 1
DTYPES = {"float16": FLOAT16, "bfloat16": BFLOAT16}

CANONICAL_NAN = 0x7FFF
CANONICAL_NAN_SUM = np.uint32(0x7FFFFFFF)
"""The NaN of a row's sum, in float32."""
_INFINITY = np.uint32(0x7F800000)

_ZERO = np.float32(0.0)


def num_segments(row_length: int) -> int:
    """Segments of a row (step 2): 8, 4, 2 or 1."""
    segments = MAX_SEGMENTS
    while segments > 1 and row_length // VECTOR_SIZE < segments * MIN_VECTORS_PER_SEGMENT:
        segments //= 2
    return segments


def vectors_per_segment(row_length: int) -> int:
    """Vectors of every segment but the last ones, which may have fewer (step 2)."""
    return -(-(row_length // VECTOR_SIZE) // num_segments(row_length))


class Machine(NamedTuple):
    """What the arithmetic needs from the machine that runs it. Every operation is one of IEEE 754 in float32, rounded to nearest even."""

    compile: Callable[[Callable[..., Any]], Any]
    """Turns a Python function into one that the machine can call."""
    add: Callable[..., Any]
    mul: Callable[..., Any]
    fma: Callable[..., Any]
    """``(a, b, c) -> a * b + c``, rounded once."""
    div: Callable[..., Any]
    sqrt: Callable[..., Any]
    float_to_bits: Callable[..., Any]
    """The 32 bits of a float32, as an unsigned integer."""
    bits_to_float: Callable[..., Any]


class Arithmetic(NamedTuple):
    """The canonical order as functions, for one machine."""

    sum_lane: Callable[..., Any]
    fold_lanes: Callable[..., Any]
    sum_segments: Callable[..., Any]
    add: Callable[..., Any]
    round_once: Callable[..., Any]


def arithmetic(machine: Machine) -> Arithmetic:
    """Compile the canonical order for ``machine``."""
    add, fma, float_to_bits, bits_to_float = machine.add, machine.fma, machine.float_to_bits, machine.bits_to_float

    def sum_lane(weight_row, activation, first_vector, end_vector, lane):
        """Steps 3 to 5: the sum of one lane over the vectors ``first_vector`` to ``end_vector`` of a row."""
        # Eight names, not an array: Numba keeps these in registers.
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = _ZERO
        for vector in range(first_vector + lane, end_vector, NUM_LANES):
            k = vector * VECTOR_SIZE
            a0 = fma(weight_row[k + 0], activation[k + 0], a0)
            a1 = fma(weight_row[k + 1], activation[k + 1], a1)
            a2 = fma(weight_row[k + 2], activation[k + 2], a2)
            a3 = fma(weight_row[k + 3], activation[k + 3], a3)
            a4 = fma(weight_row[k + 4], activation[k + 4], a4)
            a5 = fma(weight_row[k + 5], activation[k + 5], a5)
            a6 = fma(weight_row[k + 6], activation[k + 6], a6)
            a7 = fma(weight_row[k + 7], activation[k + 7], a7)
        return add(add(add(a0, a1), add(a2, a3)), add(add(a4, a5), add(a6, a7)))

    def fold_lanes(lane_sums, lane, width):
        """Step 6, one level of the tree: lanes below ``width`` take in the lane ``width`` above them."""
        if lane < width:
            lane_sums[lane] = add(lane_sums[lane], lane_sums[lane + width])

    def sum_segments(segment_sums, num_segments):
        """Step 7: the segments in order. ``segment_sums[s]`` is the sum of segment ``s``."""
        total = segment_sums[0]
        for segment in range(1, num_segments):
            total = add(total, segment_sums[segment])
        if float_to_bits(total) & CANONICAL_NAN_SUM > _INFINITY:
            return bits_to_float(CANONICAL_NAN_SUM)
        return total

    def round_once(value, dtype):
        """Step 9: the 16 bits of ``value`` in ``dtype`` (``FLOAT16`` or ``BFLOAT16``)."""
        bits = np.int64(float_to_bits(value))
        sign = (bits >> 16) & 0x8000
        magnitude = bits & 0x7FFFFFFF
        if magnitude > 0x7F800000:
            return CANONICAL_NAN
        if dtype == BFLOAT16:
            # The upper half of the float32, plus one if the lower half is over a tie, or at a tie with an odd upper half.
            return sign | ((magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16)
        if magnitude >= 0x477FF000:  # 65520: halfway between the largest float16 and what would follow it, and above
            return sign | 0x7C00
        if magnitude >= 0x38800000:  # 2**-14, the smallest normal float16: move the exponent's bias, drop 13 bits
            return sign | ((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13)
        if magnitude < 0x33000000:  # below 2**-25, half of the smallest subnormal float16
            return sign
        # A subnormal float16 counts units of 2**-24: shift the 24-bit significand to that unit, ties to even.
        shift = 126 - (magnitude >> 23)
        significand = (magnitude & 0x7FFFFF) | 0x800000
        return sign | ((significand + (1 << (shift - 1)) - 1 + ((significand >> shift) & 1)) >> shift)

    made = machine.compile
    return Arithmetic(made(sum_lane), made(fold_lanes), made(sum_segments), add, made(round_once))
