"""What the op is measured beside: PyTorch, plain and compiled."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Layer

def torch_layer(hidden: Tensor, attn_output: Tensor, activation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The three calls that a model makes: backend ``torch`` without its checks, which a model does not make."""
    return F.linear(activation, weight, bias) + attn_output + hidden


def multiply_and_sum(hidden: Tensor, attn_output: Tensor, activation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The form that torch.compile turns into one reduction kernel, with one rounding."""
    return ((activation.float() * weight.float()).sum(-1) + bias + attn_output + hidden).to(weight.dtype)


# Name -> what is compiled, and how. The strongest first, for the case that time runs out. CUDA graphs are left to the benchmark, which
# captures all candidates alike.
COMPILED: dict[str, tuple[Layer, dict[str, Any]]] = {
    "compile_multiply_and_sum": (multiply_and_sum, {"options": {"coordinate_descent_tuning": True}}),
    "compile_default": (torch_layer, {}),
    "compile_max_autotune": (torch_layer, {"mode": "max-autotune-no-cudagraphs"}),
}


def compile_layer(name: str, first_call: Callable[[Layer], object], limit_seconds: float) -> tuple[Layer | None, str]:
    """Compile a baseline by calling it for the first time; None and the reason if that fails or takes longer than the limit."""
    layer, settings = COMPILED[name]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, **settings)
    try:
        with time_limit(limit_seconds):
            first_call(compiled)
    except TimeLimitExpired:
        return None, f"torch.compile did not end in {limit_seconds:.0f} s"
    except (RuntimeError, OSError, ImportError) as error:
        return None, f"torch.compile failed: {type(error).__name__}: {first_line(error)[:200]}"
    return compiled, ""


class TimeLimitExpired(BaseException):
    """Not an Exception: the compiler catches those, and goes on with something slower."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExpired in the body once it has run for so long. For the main thread, the only one that signals reach."""

    def expire(_number: int, _frame: object) -> None:
        raise TimeLimitExpired(f"not done in {seconds:.1f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
