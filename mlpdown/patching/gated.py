"""Layers with a gated MLP and a sequential residual: Llama and its kin."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .layer import PatchedLayer


class GatedMLPLayer(PatchedLayer):
    """A decoder layer whose end is ``residual + down_proj(act_fn(gate_proj(x)) * up_proj(x))``, the last two steps in one op."""

    mlp_class: ClassVar[type[nn.Module]]

    @classmethod
    def stepped_over(cls, layer: Any) -> tuple[tuple[str, nn.Module, type[nn.Module]], ...]:
        mlp = layer._modules["mlp"]
        return (("mlp", mlp, cls.mlp_class), ("mlp.down_proj", mlp._modules.get("down_proj"), nn.Linear))

    def forward(self: Any, hidden_states: torch.Tensor, *positional: Any, **keywords: Any) -> Any:
        if positional or not self.takes(hidden_states):
            return super().forward(hidden_states, *positional, **keywords)  # type: ignore[misc]
        keywords.setdefault("attention_mask", None)
        attn_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **keywords)
        hidden_states = hidden_states + attn_output
        mlp = self.mlp
        mlp_input = self.post_attention_layernorm(hidden_states)
        mlp_intermediate = mlp.act_fn(mlp.gate_proj(mlp_input)) * mlp.up_proj(mlp_input)
        return self.fused(hidden_states, None, mlp_intermediate, mlp.down_proj)
