"""What the op is measured beside: PyTorch, plain and compiled."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F

from .chain import Layer


def torch_layer(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """The three calls that a model makes."""
    return hidden_states + attn_output + F.linear(mlp_intermediate, weight, bias)


def multiply_and_sum_layer(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """The form that torch.compile turns into one reduction kernel, with one rounding."""
    product = (mlp_intermediate.float() * weight.float()).sum(-1)
    return (product + bias + attn_output + hidden_states).to(weight.dtype)


# Name -> what is compiled, and how. The strongest first, for the case that time runs out. CUDA graphs are left to the benchmark, which
# captures all candidates alike.
COMPILED: dict[str, tuple[Layer, dict[str, Any]]] = {
    "compile_multiply_and_sum": (multiply_and_sum_layer, {"options": {"coordinate_descent_tuning": True}}),
    "compile_default": (torch_layer, {}),
    "compile_max_autotune": (torch_layer, {"mode": "max-autotune-no-cudagraphs"}),
}


def compile_layer(name: str, first_call: Callable[[Layer], object], limit_seconds: float) -> tuple[Layer | None, str]:
    """Compile a peer by calling it for the first time.

    Returns:
        The compiled layer, or None and why there is none: the compiler failed, or did not end within the limit.
    """
    layer, settings = COMPILED[name]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, **settings)
    try:
        with time_limit(limit_seconds):
            first_call(compiled)
    except TimeLimitExpired:
        return None, f"torch.compile did not end in {limit_seconds:.0f} s"
    except (RuntimeError, OSError, ImportError) as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        return None, f"torch.compile failed: {type(error).__name__}: {first_line[:200]}"
    return compiled, ""


class TimeLimitExpired(BaseException):
    """Not an Exception: the compiler catches those, and goes on with something slower."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExpired in the body once it has run for so long.

    Raises:
        RuntimeError: not in the main thread, the only one that signals reach.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a time limit works in the main thread only")

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise TimeLimitExpired(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
