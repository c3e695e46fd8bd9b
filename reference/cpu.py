"""The specification on a CPU: the canonical order compiled by Numba, at full size in a fraction of a second."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from .order import NUM_LANES, NUM_SEGMENTS, Machine, arithmetic, vectors_per_segment


@intrinsic
def _fused_multiply_add(typing_context, a, b, c):
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda context, builder, signature, arguments: builder.fma(*arguments)


@intrinsic
def _float_bits(typing_context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@functools.cache
def _kernel() -> Callable[..., Any]:
    compile_function = njit(nogil=True)
    a = arithmetic(Machine(compile_function, _fused_multiply_add, _float_bits))
    # Numba sees names, not attributes of tuples.
    sum_lane, fold_lanes, sum_segments, add_residuals, round_once = a

    @compile_function
    def mlp_down_rows(
        hidden_states,
        attn_output,
        has_attn_output,
        mlp_intermediate,
        weight,
        bias,
        has_bias,
        dtype,
        segment_length,
        rows,
        sums,
        out,
    ):
        num_tokens, num_vectors = mlp_intermediate.shape[0], mlp_intermediate.shape[1] // 8
        lane_sums = np.empty(NUM_LANES, np.float32)
        segment_sums = np.empty(NUM_SEGMENTS, np.float32)
        for token in range(num_tokens):
            for row in range(rows[0], rows[1]):
                for segment in range(NUM_SEGMENTS):
                    first_vector = min(segment * segment_length, num_vectors)
                    end_vector = min(first_vector + segment_length, num_vectors)
                    for lane in range(NUM_LANES):
                        lane_sums[lane] = sum_lane(weight[row], mlp_intermediate[token], first_vector, end_vector, lane)
                    width = NUM_LANES // 2
                    while width > 0:
                        for lane in range(width):
                            fold_lanes(lane_sums, lane, width)
                        width //= 2
                    segment_sums[segment] = lane_sums[0]
                total = sum_segments(segment_sums)
                if sums.size:
                    sums[token, row] = total
                else:
                    value = add_residuals(
                        total,
                        bias[row] if has_bias else total,
                        has_bias,
                        attn_output[token, row] if has_attn_output else total,
                        has_attn_output,
                        hidden_states[token, row],
                    )
                    out[token, row] = round_once(value, dtype)

    return mlp_down_rows


def launch(hidden_states, attn_output, mlp_intermediate, weight, bias, dtype, sums, out) -> None:
    """Run the specification over all rows, on every core. See ``reference.mlp_down`` for the arrays."""
    hidden_dim, intermediate_dim = weight.shape
    absent = np.empty((0, 0), np.float32)
    arguments = (
        hidden_states if hidden_states is not None else absent,
        attn_output if attn_output is not None else absent,
        attn_output is not None,
        mlp_intermediate,
        weight,
        bias if bias is not None else np.empty(0, np.float32),
        bias is not None,
        dtype,
        vectors_per_segment(intermediate_dim),
    )
    kernel = _kernel()
    num_threads = max(1, min(os.cpu_count() or 1, hidden_dim // 64))
    bounds = np.linspace(0, hidden_dim, num_threads + 1, dtype=np.int64)
    # Threads of our own, not Numba's: its threading layers do not allow two callers at once.
    with ThreadPoolExecutor(num_threads) as pool:
        parts = [pool.submit(kernel, *arguments, bounds[i : i + 2], sums, out) for i in range(num_threads)]
        for part in parts:
            part.result()
