"""Qwen2."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2

from .gated import GatedMLPLayer


class Qwen2DecoderLayer(GatedMLPLayer, modeling_qwen2.Qwen2DecoderLayer):
    """``modeling_qwen2.Qwen2DecoderLayer`` with the MLP's down-projection and the residual in one op."""

    mlp_class = modeling_qwen2.Qwen2MLP
