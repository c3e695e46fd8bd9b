"""GPT-NeoX and Pythia, with parallel and with sequential residual."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.models.gpt_neox import modeling_gpt_neox

from .layer import PatchedLayer

# Where the layer is asked for attention weights it answers with a tuple; later versions answer with the bare hidden states.
ANSWERS_WITH_TUPLE = "output_attentions" in inspect.signature(modeling_gpt_neox.GPTNeoXLayer.forward).parameters


class GPTNeoXLayer(PatchedLayer, modeling_gpt_neox.GPTNeoXLayer):
    """``modeling_gpt_neox.GPTNeoXLayer`` with the sum at its end, MLP down-projection included, in one op."""

    @staticmethod
    def stepped_over(layer: Any) -> tuple[tuple[str, nn.Module, type[nn.Module]], ...]:
        mlp = layer._modules["mlp"]
        return (
            ("mlp", mlp, modeling_gpt_neox.GPTNeoXMLP),
            ("post_mlp_dropout", layer._modules["post_mlp_dropout"], nn.Dropout),
            ("mlp.dense_4h_to_h", mlp._modules.get("dense_4h_to_h"), nn.Linear),
        )

    def forward(self, hidden_states: torch.Tensor, *positional: Any, **keywords: Any) -> Any:  # type: ignore[override]
        if positional or not self.takes(hidden_states):
            return super().forward(hidden_states, *positional, **keywords)
        keywords.setdefault("attention_mask", None)
        attn_output, attn_weights = self.attention(self.input_layernorm(hidden_states), **keywords)
        attn_output = self.post_attention_dropout(attn_output)
        if not self.use_parallel_residual:
            hidden_states, attn_output = attn_output + hidden_states, None
        mlp = self.mlp
        mlp_intermediate = mlp.act(mlp.dense_h_to_4h(self.post_attention_layernorm(hidden_states)))
        hidden_states = self.fused(hidden_states, attn_output, mlp_intermediate, mlp.dense_4h_to_h)
        if not ANSWERS_WITH_TUPLE:
            return hidden_states
        return (hidden_states, attn_weights) if keywords.get("output_attentions") else (hidden_states,)
