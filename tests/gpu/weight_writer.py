"""The test kernel that writes a tensor as late as it can: ``weight_writer.cu``, compiled on demand."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from mlpdown.jit.program import compile_cuda

SOURCE = "weight_writer.cu"
# Few enough that every cluster but a few finds its SMs free, many enough that writing a large weight takes microseconds, not milliseconds.
NUM_CTAS = 8
SLEEP_NANOSECONDS = 50_000


def write_late(destination: torch.Tensor, source: torch.Tensor) -> None:
    """Enqueue, on the current stream, a kernel that triggers its dependents, sleeps, and then copies ``source`` to ``destination``."""
    num_bytes = destination.numel() * destination.element_size()
    assert destination.is_contiguous() and source.is_contiguous() and destination.shape == source.shape
    assert destination.dtype == source.dtype and destination.device == source.device and num_bytes % 16 == 0
    status = _library().write_weight_late(
        destination.data_ptr(),
        source.data_ptr(),
        num_bytes,
        SLEEP_NANOSECONDS,
        NUM_CTAS,
        torch.cuda.current_stream(destination.device).cuda_stream,
    )
    assert status == 0, f"CUDA error {status}"


def source_files() -> dict[str, bytes]:
    return {SOURCE: (Path(__file__).parent / SOURCE).read_bytes()}


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compile_cuda("weight-writer", source_files(), [SOURCE], shared=True)))
    library.write_weight_late.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_ulonglong,
        ctypes.c_uint,
        ctypes.c_void_p,
    ]
    return library
