"""The read-only kernel: how fast this GPU can read the bytes of a call, launched like one, and how fast it reads at all."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from pathlib import Path

import torch

from .cuda_program import compile_cuda

SOURCE = "yardstick.cu"


@dataclasses.dataclass(frozen=True)
class ReadConfiguration:
    """How the read-only kernel is launched."""

    ctas_per_sm: int
    """0: one pass, with as many CTAs as that takes."""
    num_threads: int
    unroll: int
    """16-byte loads that a thread has in flight: 4, 5, 8 or 16."""


# The yardstick is the fastest of these, so that nobody gains by a slow one.
CONFIGURATIONS = (
    ReadConfiguration(1, 512, 16),
    ReadConfiguration(2, 512, 8),
    ReadConfiguration(4, 512, 4),
    ReadConfiguration(4, 256, 8),
    ReadConfiguration(8, 256, 4),
    ReadConfiguration(0, 512, 4),
    ReadConfiguration(0, 256, 5),
    ReadConfiguration(0, 256, 8),
)


def read(tensor: torch.Tensor, configuration: ReadConfiguration) -> None:
    """Enqueue a read of a contiguous CUDA tensor (a multiple of 16 bytes) on the current stream.

    Raises:
        BuildError: the kernel cannot be compiled here. ValueError: the tensor is no such tensor. RuntimeError: CUDA refused.
    """
    num_bytes = tensor.numel() * tensor.element_size()
    if not tensor.is_cuda or not tensor.is_contiguous() or num_bytes % 16:
        raise ValueError(f"tensor must be contiguous, on a CUDA device, of a multiple of 16 bytes, got {tensor.device}, {num_bytes} bytes")
    status = _library().mlpdown_read(
        tensor.data_ptr(),
        num_bytes,
        _sink(tensor.device).data_ptr(),
        torch.cuda.get_device_properties(tensor.device).multi_processor_count,
        configuration.ctas_per_sm,
        configuration.num_threads,
        configuration.unroll,
        torch.cuda.current_stream(tensor.device).cuda_stream,
    )
    if status != 0:
        raise RuntimeError(f"the read-only kernel was not launched: CUDA error {status} for {configuration}")


def source_files() -> dict[str, bytes]:
    """What is compiled."""
    return {SOURCE: (Path(__file__).parent / SOURCE).read_bytes()}


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compile_cuda("yardstick", source_files(), [SOURCE], shared=True)))
    library.mlpdown_read.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
        *[ctypes.c_uint] * 4,
        ctypes.c_void_p,
    ]
    return library


@functools.cache
def _sink(device: torch.device) -> torch.Tensor:
    return torch.zeros(4, dtype=torch.int32, device=device)
