"""The read-only kernel: how fast this GPU can read the bytes of a call, launched like one, and how fast it reads at all."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from ..jit.program import compile_cuda
from ..timing import Captured, Clock, median, time_rounds

SOURCE = "read_only.cu"
STEADY_READ_BYTES = 4 << 30
NUM_TRIALS = 5
# CTAs an SM (0: as many as it takes to read all in one pass), threads, 16-byte loads that a thread has in flight. The fastest of these
# counts, so that nobody gains by a slow one.
CONFIGURATIONS = ((1, 512, 16), (2, 512, 8), (4, 512, 4), (4, 256, 8), (8, 256, 4), (0, 512, 4), (0, 256, 5), (0, 256, 8))


def fastest_read(tensors: Sequence[torch.Tensor]) -> tuple[Captured, list[float]]:
    """A graph that reads contiguous CUDA tensors (of a multiple of 16 bytes) one after the other, in the fastest configuration; and samples
    of it, in microseconds a tensor. Raises BuildError if the kernel cannot be compiled here, RuntimeError if CUDA refuses it."""
    device = tensors[0].device
    sink = torch.zeros(4, dtype=torch.int32, device=device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def read_all(configuration: tuple[int, int, int]) -> list[torch.Tensor]:
        stream = torch.cuda.current_stream(device).cuda_stream
        for tensor in tensors:
            assert tensor.is_cuda and tensor.is_contiguous() and tensor.nbytes % 16 == 0
            status = _library().mlpdown_read(tensor.data_ptr(), tensor.nbytes, sink.data_ptr(), num_sms, *configuration, stream)
            if status != 0:
                raise RuntimeError(f"the read-only kernel was not launched: CUDA error {status} for {configuration}")
        return [sink]

    graphs = {configuration: Captured(functools.partial(read_all, configuration)) for configuration in CONFIGURATIONS}
    replays = {configuration: graph.replay for configuration, graph in graphs.items()}
    samples = time_rounds(replays, Clock(device, "device"), NUM_TRIALS, len(tensors))
    fastest = min(samples, key=lambda configuration: median(samples[configuration]))
    return graphs[fastest], samples[fastest]


def steady_read(device: torch.device) -> list[float]:
    """TB/s of reads of 4 GiB."""
    data = torch.empty(STEADY_READ_BYTES // 4, dtype=torch.int32, device=device).random_()
    return [STEADY_READ_BYTES / microseconds / 1e6 for microseconds in fastest_read([data])[1]]


def source_files() -> dict[str, bytes]:
    """What is compiled."""
    return {SOURCE: (Path(__file__).parent / SOURCE).read_bytes()}


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compile_cuda("read-only", source_files(), [SOURCE], shared=True)))
    library.mlpdown_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, *[ctypes.c_uint] * 4, ctypes.c_void_p]
    return library
