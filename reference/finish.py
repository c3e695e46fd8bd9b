"""Steps 8 and 9 of the canonical order: add bias and residuals to row sums, then round once.

One pass for each tensor that is there, and one that rounds: what is absent needs no flag. CPU loops and CUDA kernels
stand beside each other.
"""

# Kernels are Python only to look at: Numba types them, not mypy.
# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from . import machines

THREADS_PER_BLOCK = 128


def on_cpu(sums, addends: Sequence[Any], dtype: int, out) -> None:
    """Add each of ``addends``, ``[num_tokens, num_rows]`` or ``[1, num_rows]`` for all tokens, to ``sums``
    ``[num_tokens, num_rows]`` in the order given, in place; write the bits of the sums in ``dtype`` to ``out``, a
    16-bit integer array of the same shape."""
    add, round_once = _cpu_loops()
    with machines.ieee_arithmetic():
        for addend in addends:
            add(sums, addend)
        round_once(sums, dtype, out)


def on_cuda(sums, addends: Sequence[Any], dtype: int, out, stream=0) -> None:
    """The same on arrays that live where the kernels run: device arrays on a GPU, NumPy arrays in the simulator."""
    num_tokens, num_rows = sums.shape
    grid = (-(-num_rows // THREADS_PER_BLOCK), min(num_tokens, machines.MAX_TOKEN_BLOCKS))
    add, round_once = _cuda_kernels()
    for addend in addends:
        add[grid, THREADS_PER_BLOCK, stream](sums, addend)
    round_once[grid, THREADS_PER_BLOCK, stream](sums, dtype, out)


@functools.cache
def _cpu_loops() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from numba import njit

    _, _, _, add, round_once = machines.on_cpu()

    @njit(nogil=True)
    def add_tensor(sums, addend):
        for token in range(sums.shape[0]):
            for row in range(sums.shape[1]):
                sums[token, row] = add(sums[token, row], addend[token % addend.shape[0], row])

    @njit(nogil=True)
    def round_sums(sums, dtype, out):
        for token in range(sums.shape[0]):
            for row in range(sums.shape[1]):
                out[token, row] = round_once(sums[token, row], dtype)

    return add_tensor, round_sums


@functools.cache
def _cuda_kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    global cuda  # where the simulator looks for it
    from numba import cuda

    _, _, _, add, round_once = machines.on_cuda()

    @cuda.jit
    def add_tensor(sums, addend):
        row = cuda.blockIdx.x * THREADS_PER_BLOCK + cuda.threadIdx.x
        for token in range(cuda.blockIdx.y, sums.shape[0], cuda.gridDim.y):
            if row < sums.shape[1]:
                sums[token, row] = add(sums[token, row], addend[token % addend.shape[0], row])

    @cuda.jit
    def round_sums(sums, dtype, out):
        row = cuda.blockIdx.x * THREADS_PER_BLOCK + cuda.threadIdx.x
        for token in range(cuda.blockIdx.y, sums.shape[0], cuda.gridDim.y):
            if row < sums.shape[1]:
                out[token, row] = round_once(sums[token, row], dtype)

    return add_tensor, round_sums
