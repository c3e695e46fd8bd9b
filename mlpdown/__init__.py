"""The tail of a decoder layer at batch 1, as one kernel: MLP down projection, bias and residuals.

``run`` is the op, ``MLPDown`` a module, ``patch`` puts it under a Hugging Face model, ``backends`` says what can run here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import interrupt as interrupt  # before torch
from .backends import BackendStatus, backends
from .ops import partial_sums, pythia_2b8_mlp_only, run
from .plan import Plan

if TYPE_CHECKING:
    from .module import MLPDown
    from .patching import patch, unpatch

__version__ = "0.1.0"
__all__ = [
    "BackendStatus",
    "MLPDown",
    "Plan",
    "backends",
    "partial_sums",
    "patch",
    "pythia_2b8_mlp_only",
    "run",
    "unpatch",
]

_LAZY = {"MLPDown": "module", "patch": "patching", "unpatch": "patching"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
