"""One layer's down projection out of a Hugging Face GPT-NeoX checkpoint, without loading the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

# As transformers looks for them: a whole file comes before the index of a sharded one, which may be left over.
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Of a model with its output embedding, and of the base model alone.
PREFIXES = ("gpt_neox.", "")


class CheckpointError(ValueError):
    """A checkpoint is not there, or does not hold the layer that was asked for."""


def tensor_names(layer: int, prefix: str = PREFIXES[0]) -> dict[str, str]:
    """What GPT-NeoX checkpoints call a layer's ``weight`` and ``bias``."""
    names = f"{prefix}layers.{layer}.mlp.dense_4h_to_h"
    return {"weight": f"{names}.weight", "bias": f"{names}.bias"}


def read_layer(model: str | Path, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight [hidden_dim, intermediate_dim]`` and ``bias [hidden_dim]`` of a layer, as they are stored, on the CPU.

    Args:
        model: a folder with ``model.safetensors``, or with its index and the shards that it names; or a name on the Hugging Face hub,
            of which only the files that hold the layer are fetched.
        layer: from 0.

    Raises:
        CheckpointError: a file or a tensor is not there, or the tensors are not a weight and its bias.
    """
    single = _file(model, SINGLE_FILE)
    index = None if single is not None else _file(model, INDEX_FILE)
    if single is not None:
        files = dict.fromkeys(_tensors_in(single), SINGLE_FILE)
    elif index is not None:
        files = _weight_map(index)
    else:
        raise CheckpointError(f"{model} has neither {SINGLE_FILE} nor {INDEX_FILE}, one of which a checkpoint has")
    source = single or index
    names = next((names for prefix in PREFIXES if set((names := tensor_names(layer, prefix)).values()) <= set(files)), None)
    if names is None:
        known = {int(found[1]) for name in files if (found := re.search(r"layers\.(\d+)\.mlp\.dense_4h_to_h\.weight$", name))}
        layers = f"its layers are {min(known)} to {max(known)}" if known else "it is no GPT-NeoX"
        raise CheckpointError(f"{source} has no tensors {' and '.join(tensor_names(layer).values())}: {layers}")
    weight, bias = (_read_tensor(model, files[name], name) for name in (names["weight"], names["bias"]))
    if weight.dim() != 2 or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{names['weight']} must be [hidden_dim, intermediate_dim] and its bias [hidden_dim], "
            f"got {list(weight.shape)} and {list(bias.shape)} in {model}"
        )
    return weight, bias


def _file(model: str | Path, name: str) -> Path | None:
    """A file of a checkpoint: in a folder, or fetched from the hub; None if the checkpoint has no such file."""
    folder = Path(model)
    if folder.exists():
        if not folder.is_dir():
            raise CheckpointError(f"{model} is a file; a checkpoint is the folder that holds it")
        return folder / name if (folder / name).is_file() else None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) is None:
        raise CheckpointError(f"{model} is not there, and no name on the hub, which looks like owner/model")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise CheckpointError(f"{model} is no folder here, and asking the hub needs pip install 'mlpdown[hf]'") from error
    try:
        return Path(hf_hub_download(str(model), name))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{model} is no folder here, and the hub cannot be reached") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{model} is no folder here, and the hub says: {str(error).strip().splitlines()[0]}") from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not the index of a sharded checkpoint: {error!r}") from error


def _tensors_in(file: Path) -> list[str]:
    with _opened(file) as tensors:
        return list(tensors.keys())


def _read_tensor(model: str | Path, file: str, name: str) -> torch.Tensor:
    path = _file(model, file)
    if path is None:
        raise CheckpointError(f"{Path(model, file)} is not there, which holds {name}")
    with _opened(path) as tensors:
        if name not in tensors.keys():  # noqa: SIM118 (it is no mapping)
            raise CheckpointError(f"{path} has no tensor {name}")
        return tensors.get_tensor(name)


def _opened(file: Path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError("reading a checkpoint needs safetensors: pip install 'mlpdown[hf]'") from error
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
