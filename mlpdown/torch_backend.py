"""Backend ``torch``: plain PyTorch, the baseline and the fallback. It has a derivative, and rounds after every operation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from . import validate

Layer = Callable[..., torch.Tensor]
"""``(hidden_states, attn_output, mlp_intermediate, weight, bias) -> out``."""


def run(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`mlpdown.run`."""
    validate.check_arguments(hidden_states, attn_output, mlp_intermediate, weight, bias, out)
    with _no_autocast(weight):
        result = compute(hidden_states, attn_output, mlp_intermediate, weight, bias)
    return result if out is None else out.copy_(result)


def compute(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The op in plain PyTorch, as a model calls it: nothing is checked, and any dtypes that PyTorch takes will do."""
    result = F.linear(mlp_intermediate, weight, bias)
    if result.shape != hidden_states.shape:
        result = result.reshape(hidden_states.shape)
    if attn_output is not None:
        result = result + attn_output
    return result + hidden_states


def partial_sums(mlp_intermediate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As :func:`mlpdown.partial_sums`. Converts the weight to float32: exact sums are what it is for, not speed."""
    validate.check_product(mlp_intermediate, weight)
    with _no_autocast(weight):
        return F.linear(mlp_intermediate.float(), weight.float())


def _no_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """The op says what its result is, whatever autocast says of the operations that it is made of."""
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
