"""Which backends there are, which can run here, and why the others cannot."""

from __future__ import annotations

import dataclasses
import logging

import torch

from . import native_backend
from .jit import BuildError
from .numba_refusal import numba_refusal

BACKENDS = ("native", "numba", "torch")

logger = logging.getLogger("mlpdown")
_said: set[str] = set()


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, and if not, why (if so, on what)."""

    available: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """The state of every backend on this machine, best first.

    Finding out about ``native`` loads its library, and builds it if there is a compiler and no library yet.
    """
    return {
        "native": _native_status(),
        "numba": _numba_status(),
        "torch": BackendStatus(True, f"torch {torch.__version__}"),
    }


def native_refusal_here(device_index: int | None = None) -> Exception | None:
    """Why ``native`` cannot run on a CUDA device (the current one) of this machine; None if it can."""
    if torch.version.cuda is None:
        return RuntimeError("backend 'native' needs a torch built with CUDA, this one is " + torch.__version__)
    if not torch.cuda.is_available():
        return RuntimeError(
            "backend 'native' needs a CUDA GPU, torch finds none (no GPU, no driver, or CUDA_VISIBLE_DEVICES hides it)"
        )
    refusal = native_backend.refusal_of_device(torch.cuda.current_device() if device_index is None else device_index)
    if refusal is not None:
        return refusal
    try:
        native_backend.load()
    except BuildError as error:
        return error
    return None


def say_once(message: str, *, level: int = logging.WARNING) -> None:
    """Log a message, the first time in this process that one comes up which is the same up to ``, got``."""
    if torch.compiler.is_compiling():
        return  # a graph has no log
    reason = message.partition(", got ")[0]
    if reason not in _said:
        _said.add(reason)
        logger.log(level, message)


def _native_status() -> BackendStatus:
    refusal = native_refusal_here()
    if refusal is not None:
        return BackendStatus(False, str(refusal))
    device = native_backend.device_properties(torch.cuda.current_device())
    return BackendStatus(True, f"{device.name}, compute capability {'.'.join(map(str, device.compute_capability))}")


def _numba_status() -> BackendStatus:
    refusal = numba_refusal("cpu")
    if refusal is not None:
        return BackendStatus(False, refusal)
    on_gpu = numba_refusal("cuda") if torch.cuda.is_available() else None
    on_cuda = f"; on CUDA tensors not: {on_gpu}" if on_gpu else " and on CUDA tensors"
    return BackendStatus(True, f"the specification, on CPU tensors{on_cuda}")
