"""One layer's down projection out of a Hugging Face GPT-NeoX checkpoint, without loading the model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A folder does not hold the layer that was asked for."""


def tensor_names(layer: int) -> dict[str, str]:
    """What GPT-NeoX checkpoints call a layer's ``weight`` and ``bias``."""
    prefix = f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h"
    return {"weight": f"{prefix}.weight", "bias": f"{prefix}.bias"}


def read_layer(folder: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight [hidden_dim, intermediate_dim]`` and ``bias [hidden_dim]`` of a layer, as they are stored, on the CPU.

    Args:
        folder: holds ``model.safetensors``, or its index and the shards that it names.
        layer: from 0.

    Raises:
        CheckpointError: a file or a tensor is not there, or the tensors are not a weight and its bias.
    """
    names = tensor_names(layer)
    weight, bias = (_read_tensor(_file_of(folder, name), name) for name in (names["weight"], names["bias"]))
    if weight.dim() != 2 or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{names['weight']} must be [hidden_dim, intermediate_dim] and its bias [hidden_dim], "
            f"got {list(weight.shape)} and {list(bias.shape)} in {folder}"
        )
    return weight, bias


def _file_of(folder: Path, name: str) -> Path:
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            files = json.loads(index.read_text())["weight_map"]
            file = folder / files[name] if name in files else None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is not the index of a sharded checkpoint: {error!r}") from error
        if file is None:
            raise CheckpointError(f"{index} has no tensor {name}: is this GPT-NeoX, and does it have this layer?")
    else:
        file = folder / SINGLE_FILE
    if not file.is_file():
        raise CheckpointError(f"{file} is not there; a checkpoint has {SINGLE_FILE}, or {INDEX_FILE} and its shards")
    return file


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError("reading a checkpoint needs safetensors: pip install 'mlpdown[hf]'") from error
    try:
        with safe_open(file, framework="pt") as tensors:
            if name not in tensors.keys():  # noqa: SIM118 (it is no mapping)
                raise CheckpointError(f"{file} has no tensor {name}: is this GPT-NeoX, and does it have this layer?")
            return tensors.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
