"""Steps 1 to 7 of the canonical order: the sum of a row of weights times an activation, in float32, unrounded.

The same loop twice: on a CPU, and as a CUDA kernel for a GPU or Numba's simulator. Read the kernel beside ``native/ring.cuh``: sections of
the same name stand in the same order. What is missing here is mechanism (stages, barriers, clusters), not arithmetic. The kernel uses
nothing that the simulator lacks: no shuffles, no clusters, no 16-bit types.
"""

# Kernels are Python only to look at: Numba types them, not mypy.
# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import machines
from .order import MAX_SEGMENTS, NUM_LANES, VECTOR_SIZE, num_segments, vectors_per_segment

MIN_ROWS_PER_THREAD = 64


def on_cpu(activation, weight, sums) -> None:
    """Write the row sums of ``activation`` ``[num_tokens, row_length]`` and ``weight`` ``[num_rows, row_length]`` to
    ``sums`` ``[num_tokens, num_rows]``. All are float32 arrays."""
    row_length = weight.shape[1]
    shape = num_segments(row_length), vectors_per_segment(row_length)
    loop = _cpu_loop()
    machines.run_in_threads(
        lambda first_row, end_row: loop(activation, weight, *shape, first_row, end_row, sums),
        weight.shape[0],
        MIN_ROWS_PER_THREAD,
    )


def on_cuda(activation, weight, sums, stream=0) -> None:
    """The same on arrays that live where the kernel runs: device arrays on a GPU, NumPy arrays in the simulator."""
    row_length = weight.shape[1]
    grid = (weight.shape[0], min(activation.shape[0], machines.MAX_TOKEN_BLOCKS))
    block = num_segments(row_length) * NUM_LANES
    _cuda_kernel()[grid, block, stream](
        activation, weight, num_segments(row_length), vectors_per_segment(row_length), sums
    )


@functools.cache
def _cpu_loop() -> Callable[..., Any]:
    from numba import njit

    sum_lane, fold_lanes, sum_segments, _, _ = machines.on_cpu()

    @njit(nogil=True)
    def row_sums(activation, weight, num_segments, segment_length, first_row, end_row, sums):
        num_tokens, num_vectors = activation.shape[0], activation.shape[1] // VECTOR_SIZE
        lane_sums = np.empty(NUM_LANES, np.float32)
        segment_sums = np.empty(MAX_SEGMENTS, np.float32)
        for token in range(num_tokens):
            for row in range(first_row, end_row):
                for segment in range(num_segments):
                    first_vector = segment * segment_length
                    end_vector = min(first_vector + segment_length, num_vectors)
                    for lane in range(NUM_LANES):
                        lane_sums[lane] = sum_lane(weight[row], activation[token], first_vector, end_vector, lane)
                    width = NUM_LANES // 2
                    while width > 0:
                        for lane in range(width):
                            fold_lanes(lane_sums, lane, width)
                        width //= 2
                    segment_sums[segment] = lane_sums[0]
                sums[token, row] = sum_segments(segment_sums, num_segments)

    return row_sums


@functools.cache
def _cuda_kernel() -> Callable[..., Any]:
    global cuda  # where the simulator looks for it
    from numba import cuda

    sum_lane, fold_lanes, sum_segments, _, _ = machines.on_cuda()

    @cuda.jit
    def row_sums(activation, weight, num_segments, segment_length, sums):
        # Sizes: a block for a row, a warp for a segment
        num_tokens, num_vectors = activation.shape[0], activation.shape[1] // VECTOR_SIZE
        row = cuda.blockIdx.x
        segment = cuda.threadIdx.x // NUM_LANES
        lane = cuda.threadIdx.x % NUM_LANES

        # Shared memory
        lane_sums = cuda.shared.array((MAX_SEGMENTS, NUM_LANES), np.float32)
        segment_sums = cuda.shared.array(MAX_SEGMENTS, np.float32)

        for token in range(cuda.blockIdx.y, num_tokens, cuda.gridDim.y):
            # Consumers: each warp sums its segment of the row, lane by lane, then over the lanes
            first_vector = segment * segment_length
            end_vector = min(first_vector + segment_length, num_vectors)
            lane_sums[segment, lane] = sum_lane(weight[row], activation[token], first_vector, end_vector, lane)
            cuda.syncthreads()
            width = NUM_LANES // 2
            while width > 0:
                fold_lanes(lane_sums[segment], lane, width)
                cuda.syncthreads()
                width //= 2

            # Segment sums meet
            if lane == 0:
                segment_sums[segment] = lane_sums[segment, 0]
            cuda.syncthreads()
            if cuda.threadIdx.x == 0:
                sums[token, row] = sum_segments(segment_sums, num_segments)
            cuda.syncthreads()

    return row_sums
