"""What every patched layer shares: its settings, and the question whether the op may stand in for the model's own code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from mlpdown.module import fused_mlp_down

if TYPE_CHECKING:
    from mlpdown.plan import Plan


@dataclass(frozen=True)
class Settings:
    """How a patched layer calls the op; the arguments are those of ``mlpdown.run``."""

    backend: str = "auto"
    weight_prefetch: bool = False
    plan: Plan | None = None


class PatchedLayer:
    """Mixed into the model's own layer class. A subclass names what it steps over and takes the step in ``forward``."""

    _mlpdown: Settings
    training: bool

    @staticmethod
    def stepped_over(layer: Any) -> tuple[tuple[str, nn.Module, type[nn.Module]], ...]:
        """The modules whose call the op replaces: name within the layer, module, the class it must have. The linear comes last.

        Asked at every call, so it reads ``_modules``: ``nn.Module.__getattr__`` would take ten times as long.
        """
        raise NotImplementedError

    def takes(self, hidden_states: torch.Tensor) -> bool:
        """Whether the op may compute this call: inference, one token, tensors that it takes.

        Every question is a constant or a guard to ``torch.compile``, so that it never breaks a graph.
        """
        # With gradients on, any input of the layer may need one (a prefix in the cache, an adapter), so none is looked at.
        if self.training or torch.is_grad_enabled() or hidden_states.shape[:-1].numel() != 1:
            return False
        if torch.is_autocast_enabled(hidden_states.device.type) or not hidden_states.is_contiguous():
            return False
        # Hooks for all modules would not see the ones that are stepped over.
        if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
            return False
        stepped_over = self.stepped_over(self)
        if obstacle(stepped_over) is not None:
            return False
        for _, module, _ in stepped_over:
            if module.training:
                return False
        weight: Any = stepped_over[-1][1]._parameters["weight"]
        return (
            weight.dtype == hidden_states.dtype
            and weight.device == hidden_states.device
            and weight.shape[0] == hidden_states.shape[-1]
        )

    def fused(
        self,
        hidden_states: torch.Tensor,
        attn_output: torch.Tensor | None,
        mlp_intermediate: torch.Tensor,
        linear: nn.Linear,
    ) -> torch.Tensor:
        """``hidden_states + attn_output + linear(mlp_intermediate)``, rounded once."""
        settings = self._mlpdown
        return fused_mlp_down(
            hidden_states,
            attn_output,
            mlp_intermediate,
            linear.weight,
            linear.bias,
            backend=settings.backend,
            plan=settings.plan,
            weight_prefetch=settings.weight_prefetch,
        )


def obstacle(stepped_over: tuple[tuple[str, nn.Module, type[nn.Module]], ...]) -> str | None:
    """Why the op cannot stand in for these modules, or None. Asked when a model is patched, and again at each call."""
    for name, module, expected in stepped_over:
        if type(module) is not expected:
            return (
                f"{name} is a {_full_name(type(module))}, not a {_full_name(expected)} (quantised, adapted or replaced)"
            )
        if "forward" in module.__dict__:
            return f"{name} has a forward of its own (offloaded or dispatched)"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has forward hooks (tensor-parallel, or somebody listens)"
    name, linear, _ = stepped_over[-1]
    weight: Any = linear._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        return f"{name}.weight is a {_full_name(type(weight))}, not a parameter"
    # Not `type(weight) is not nn.Parameter`: while a model is traced for export its parameters have another type.
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(weight):
        return f"{name}.weight is a {_full_name(type(weight))}, not a plain tensor (quantised or tensor-parallel)"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{name}.weight is {weight.dtype}; the op takes torch.float16 and torch.bfloat16"
    if weight.shape[1] % 8:
        return f"{name}.weight has an intermediate_dim of {weight.shape[1]}; the op takes multiples of 8"
    if not weight.is_contiguous():
        return f"{name}.weight is not contiguous, strides {tuple(weight.stride())}"
    return None


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
