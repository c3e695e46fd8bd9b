"""Llama."""

from __future__ import annotations

from transformers.models.llama import modeling_llama

from .gated import GatedMLPLayer


class LlamaDecoderLayer(GatedMLPLayer, modeling_llama.LlamaDecoderLayer):
    """``modeling_llama.LlamaDecoderLayer`` with the MLP's down-projection and the residual in one op."""

    mlp_class = modeling_llama.LlamaMLP
