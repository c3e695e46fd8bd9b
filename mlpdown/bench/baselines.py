"""What the op is measured beside: PyTorch, plain and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..timing import TimeLimitExpired, time_limit
from ..torch_backend import Layer
from ..torch_backend import compute as torch_layer


def multiply_and_sum(hidden: Tensor, attn_output: Tensor, activation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The form that torch.compile turns into one reduction kernel, with one rounding."""
    return ((activation.float() * weight.float()).sum(-1) + bias + attn_output + hidden).to(weight.dtype)


# The strongest first, for the case that time runs out. CUDA graphs are left to the benchmark, which captures all candidates alike.
COMPILED: dict[str, tuple[Layer, dict[str, Any]]] = {
    "compile_multiply_and_sum": (multiply_and_sum, {"options": {"coordinate_descent_tuning": True}}),
    "compile_default": (torch_layer, {}),
    "compile_max_autotune": (torch_layer, {"mode": "max-autotune-no-cudagraphs"}),
}


def compile_layer(name: str, first_call: Callable[[Layer], object], limit_seconds: float) -> tuple[Layer | None, str]:
    """Compile one of :data:`COMPILED` by calling it for the first time; None and the reason if that fails or takes too long."""
    layer, settings = COMPILED[name]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, **settings)
    try:
        with time_limit(limit_seconds):
            first_call(compiled)
    except (TimeLimitExpired, RuntimeError, OSError, ImportError) as error:
        return None, f"torch.compile: {described(error)[:200]}"
    return compiled, ""


def described(error: BaseException) -> str:
    """Kind and first line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
