"""The NVIDIA driver, asked without torch and without touching a GPU."""

from __future__ import annotations

import ctypes
import functools

CudaVersion = tuple[int, int]

# The oldest driver for each major version of CUDA: a library made by that CUDA needs it.
MINIMUM_DRIVER = {12: "525", 13: "580"}


@functools.cache
def supported_cuda() -> CudaVersion | None:
    """The newest CUDA that the installed driver supports, as ``(major, minor)``; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def refusal(library_cuda: CudaVersion) -> str | None:
    """Why the installed driver cannot run a library made by this CUDA; None if it can, or if there is no driver to ask."""
    supported = supported_cuda()
    if supported is None or supported[0] >= library_cuda[0]:
        return None
    made_by, offered = (".".join(map(str, version)) for version in (library_cuda, supported))
    needed = MINIMUM_DRIVER.get(library_cuda[0], "newer")
    return f"it was made by CUDA {made_by}, which needs driver {needed} or newer; the installed driver supports CUDA {offered}"
