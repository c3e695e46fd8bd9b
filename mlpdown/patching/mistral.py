"""Mistral."""

from __future__ import annotations

from transformers.models.mistral import modeling_mistral

from .gated import GatedMLPLayer


class MistralDecoderLayer(GatedMLPLayer, modeling_mistral.MistralDecoderLayer):
    """``modeling_mistral.MistralDecoderLayer`` with the MLP's down-projection and the residual in one op."""

    mlp_class = modeling_mistral.MistralMLP
