"""The models that are decoded: a GPT-NeoX checkpoint, or random weights of a named size, made on the device within seconds."""

from __future__ import annotations

import socket
import urllib.parse
from pathlib import Path
from typing import Any

import torch

INITIALISER_STD = 0.02
# hidden_dim, layers, heads, vocabulary of the Pythia suite (S. Biderman et al., "Pythia", 2023, table 1), and of a tiny one.
SIZES = {
    "tiny": (64, 2, 4, 256),
    "70m": (512, 6, 8, 50304),
    "160m": (768, 12, 12, 50304),
    "410m": (1024, 24, 16, 50304),
    "1b": (2048, 16, 8, 50304),
    "1.4b": (2048, 24, 16, 50304),
    "2.8b": (2560, 32, 32, 50304),
    "6.9b": (4096, 32, 32, 50432),
    "12b": (5120, 36, 40, 50688),
}


def random_model(size: str, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """A GPT-NeoX of one of :data:`SIZES` with seeded random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes = dict(zip(names, SIZES[size], strict=True))
    config = GPTNeoXConfig(**sizes, intermediate_size=4 * sizes["hidden_size"])
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPTNeoXForCausalLM(config).named_parameters()}
    weights = {}
    for name, shape in shapes.items():
        weights[name] = torch.empty(shape, dtype=dtype, device=device)
        if "norm" in name:
            weights[name].fill_(name.endswith("weight"))
        else:
            weights[name].normal_(std=INITIALISER_STD, generator=generator)
    return assemble(GPTNeoXForCausalLM, config, weights)


def load(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A GPT-NeoX checkpoint: a folder, or a name on the Hugging Face hub.

    Raises:
        ValueError: it is another model. OSError: there is no such checkpoint, or the hub cannot be reached.
    """
    import huggingface_hub
    import transformers

    if not Path(name).is_dir() and huggingface_hub.try_to_load_from_cache(name, "config.json") is None:
        host = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname
        try:  # before transformers does, with pauses between
            socket.getaddrinfo(host, 443)
        except OSError as error:
            raise OSError(f"--model must be a folder, or a name on {host}, which cannot be reached ({error}), got {name}") from None
    check_config(transformers.AutoConfig.from_pretrained(name))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def check_config(config: Any) -> None:
    """Raise ValueError unless it is that of a GPT-NeoX with parallel residual."""
    if config.model_type != "gpt_neox" or not config.use_parallel_residual:
        raise ValueError(f"--model must be a GPT-NeoX with parallel residual, got a {config.model_type}")


def assemble(model_class: Any, config: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model of ``config`` whose parameters are ``weights``: nothing is initialised, nothing copied."""
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(weights, assign=True)
    # What is not in a checkpoint is computed from the configuration, on a real device.
    device = next(iter(weights.values())).device
    model.base_model.rotary_emb = type(model.base_model.rotary_emb)(config=config).to(device)
    leftover = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if leftover:
        raise RuntimeError(f"transformers has tensors that no checkpoint fills and the benchmark does not know: {', '.join(leftover)}")
    return model.eval().requires_grad_(False)


def twin(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A second model around the weights of ``model``, which it shares; or around copies of them in another dtype."""
    weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in model.state_dict().items()}
    return assemble(type(model), model.config, weights)
