"""Which layers can be patched: the model's own class, and the module here that has a class of the same name to put in its place.

A module is imported when a model of its family is patched or unpickled, never before: it imports transformers.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from .layer import PatchedLayer

FAMILIES = {
    "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXLayer": "mlpdown.patching.gpt_neox",
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": "mlpdown.patching.llama",
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer": "mlpdown.patching.qwen2",
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer": "mlpdown.patching.mistral",
}

OLDEST_TRANSFORMERS = (4, 57)


def own_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class of a known family that ``layer`` is an instance of (of itself, or of a subclass), or None."""
    for cls in type(layer).__mro__:
        if f"{cls.__module__}.{cls.__qualname__}" in FAMILIES:
            return cls
    return None


def patched_class(own: type[nn.Module]) -> type[PatchedLayer]:
    """The class that takes the place of ``own``, a class of a known family.

    Raises:
        RuntimeError: transformers is older than 4.57, whose layers are called and answer in other ways.
    """
    version: str = sys.modules["transformers"].__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRANSFORMERS:
        raise RuntimeError(f"transformers must be {'.'.join(map(str, OLDEST_TRANSFORMERS))} or newer, got {version}")
    module: Any = importlib.import_module(FAMILIES[f"{own.__module__}.{own.__qualname__}"])
    found: type[PatchedLayer] = getattr(module, own.__name__)
    return found
