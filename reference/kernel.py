"""The specification as a Numba-CUDA kernel: one block of 8 warps for a row, one warp for a segment.

Read it beside ``native/mlp_down.cuh``: the sections have the same names and stand in the same order. What is missing here is
mechanism (the ring of stages, barriers, clusters), not arithmetic. It also runs in Numba's simulator, so it uses nothing that the
simulator lacks: no shuffles, no clusters, no 16-bit types.
"""

# Kernels are Python only to look at: Numba types them, not mypy.
# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, cuda, types

from .order import NUM_LANES, NUM_SEGMENTS, VECTOR_SIZE, Machine, arithmetic

NUM_THREADS = NUM_SEGMENTS * NUM_LANES

# Grids are limited to 65535 in their second dimension; more tokens take further passes.
MAX_TOKEN_BLOCKS = 65535


def _machine() -> Machine:
    if config.ENABLE_CUDASIM:

        def fused_multiply_add(a, b, c):
            # The product of two float32 is exact in float64. Rounding the sum to odd there, and then to float32, rounds it once
            # (S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
            with np.errstate(all="ignore"):
                product, addend = np.float64(a) * np.float64(b), np.float64(c)
                total = product + addend
                if np.isfinite(total):
                    subtrahend = total - product
                    error = (product - (total - subtrahend)) + (addend - subtrahend)
                    if error != 0 and not total.view(np.int64) & 1:
                        total = np.nextafter(total, np.inf if error > 0 else -np.inf)
                return np.float32(total)

        return Machine(lambda function: function, fused_multiply_add, lambda value: np.float32(value).view(np.uint32))

    from numba.cuda.extending import intrinsic

    def compile_function(function):
        return cuda.jit(function, device=True)

    @intrinsic
    def float_bits(typing_context, value):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

        return types.uint32(types.float32), generate

    @compile_function
    def fused_multiply_add(a, b, c):
        return cuda.fma(a, b, c)

    return Machine(compile_function, fused_multiply_add, float_bits)


@functools.cache
def _kernel() -> Callable[..., Any]:
    sum_lane, fold_lanes, sum_segments, add_residuals, round_once = arithmetic(_machine())

    @cuda.jit
    def mlp_down(
        hidden_states,
        attn_output,
        has_attn_output,
        mlp_intermediate,
        weight,
        bias,
        has_bias,
        dtype,
        segment_length,
        sums,
        out,
    ):
        # Sizes
        num_tokens, intermediate_dim = mlp_intermediate.shape
        num_vectors = intermediate_dim // VECTOR_SIZE
        row = cuda.blockIdx.x
        segment = cuda.threadIdx.x // NUM_LANES
        lane = cuda.threadIdx.x % NUM_LANES

        # Shared memory
        lane_sums = cuda.shared.array((NUM_SEGMENTS, NUM_LANES), np.float32)
        partials = cuda.shared.array(NUM_SEGMENTS, np.float32)

        for token in range(cuda.blockIdx.y, num_tokens, cuda.gridDim.y):
            # Consumers: each warp sums its segment of the row, lane by lane, then over the lanes.
            first_vector = min(segment * segment_length, num_vectors)
            end_vector = min(first_vector + segment_length, num_vectors)
            lane_sums[segment, lane] = sum_lane(weight[row], mlp_intermediate[token], first_vector, end_vector, lane)
            cuda.syncthreads()
            width = NUM_LANES // 2
            while width > 0:
                fold_lanes(lane_sums[segment], lane, width)
                cuda.syncthreads()
                width //= 2

            # Segment sums meet
            if lane == 0:
                partials[segment] = lane_sums[segment, 0]
            cuda.syncthreads()

            # Epilogue: segments in order, bias, residuals, one rounding
            if cuda.threadIdx.x == 0:
                total = sum_segments(partials)
                if sums.size > 0:
                    sums[token, row] = total
                else:
                    row_bias = bias[row] if has_bias else total
                    row_attn_output = attn_output[token, row] if has_attn_output else total
                    value = add_residuals(
                        total, row_bias, has_bias, row_attn_output, has_attn_output, hidden_states[token, row]
                    )
                    out[token, row] = round_once(value, dtype)
            cuda.syncthreads()

    return mlp_down


def launch(
    hidden_states,
    attn_output,
    has_attn_output,
    mlp_intermediate,
    weight,
    bias,
    has_bias,
    dtype,
    segment_length,
    sums,
    out,
    stream=0,
):
    """Launch the kernel on arrays that live where the kernel runs (device arrays on a GPU, NumPy arrays in the simulator)."""
    grid = (weight.shape[0], min(mlp_intermediate.shape[0], MAX_TOKEN_BLOCKS))
    _kernel()[grid, NUM_THREADS, stream](
        hidden_states,
        attn_output,
        has_attn_output,
        mlp_intermediate,
        weight,
        bias,
        has_bias,
        dtype,
        segment_length,
        sums,
        out,
    )
