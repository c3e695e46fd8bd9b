"""Which backends there are, which can run here, and why the others cannot."""

from __future__ import annotations

import dataclasses
import logging
from types import ModuleType

import torch

from . import native_backend, numba_backend, torch_backend
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


def check_name(backend: object) -> None:
    """Raise ValueError unless ``backend`` is ``"auto"`` or the name of one."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {backend!r}")


def other_than_native(backend: str) -> ModuleType:
    """The module of a backend that always answers: ``numba``, or ``torch``, which is what ``auto`` falls back to."""
    check_name(backend)
    return numba_backend if backend == "numba" else torch_backend


def fall_back(reason: Exception) -> str:
    """The backend that ``auto`` takes after ``native``. Logs why: a call that never suits as information, a refusal as a warning;
    nothing for one that no backend takes, whose error follows."""
    if reason is native_backend.OF_NO_USE:
        return "torch"
    level = logging.INFO if isinstance(reason, native_backend.PassedOver) else logging.WARNING
    say_once(f"mlpdown takes backend 'torch': {reason}", level=level)
    return "torch"


def say_once(message: str, *, level: int = logging.WARNING) -> None:
    """Log a message, the first time in this process that one comes up which is the same up to ``, got``."""
    if torch.compiler.is_compiling():
        return  # a graph has no log
    reason = message.partition(", got ")[0]
    if reason not in _said:
        _said.add(reason)
        logger.log(level, message)


def _native_status() -> BackendStatus:
    refusal = native_backend.refusal_here()
    if refusal is not None:
        return BackendStatus(False, str(refusal))
    device = native_backend.device_properties(torch.cuda.current_device())
    return BackendStatus(True, f"{device.name}, compute capability {'.'.join(map(str, device.compute_capability))}")


def _numba_status() -> BackendStatus:
    refusal = numba_refusal("cpu")
    if refusal is not None:
        return BackendStatus(False, refusal)
    on_cuda = ""
    if torch.cuda.is_available():
        on_gpu = numba_refusal("cuda")
        on_cuda = f"; on CUDA tensors not: {on_gpu}" if on_gpu else " and on CUDA tensors"
    return BackendStatus(True, f"the specification, on CPU tensors{on_cuda}")
