"""The models that are decoded, GPT-NeoX all: a checkpoint, or random weights of a named size; and the same by hand."""

from __future__ import annotations

import socket
import urllib.parse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .torch_backend import Layer
from .torch_backend import compute as torch_layer

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
# Not cuDNN's: at each length of the cache that is new to the process a step took tens of milliseconds more, as if it were prepared anew.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Of a layer; each has a weight and a bias.
MODULES = (
    *("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense"),
    *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)


def random_model(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """A GPT-NeoX of such sizes as :data:`SIZES` has, with seeded random weights, made on the device within seconds."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    settings: dict[str, Any] = dict(zip(names, sizes, strict=True))
    config = GPTNeoXConfig(**settings, intermediate_size=4 * sizes[0])
    generator, weights = torch.Generator(device).manual_seed(seed), {}
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPTNeoXForCausalLM(config).named_parameters()}
    for name, shape in shapes.items():
        weights[name] = torch.full(shape, float(name.endswith("weight")), dtype=dtype, device=device)
        if "norm" not in name:
            weights[name].normal_(std=INITIALISER_STD, generator=generator)
    return assemble(GPTNeoXForCausalLM, config, weights)


def load(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A checkpoint: a folder, or a name on the Hugging Face hub. Raises ValueError if it is another model than a GPT-NeoX with parallel
    residual, OSError if there is no such checkpoint or the hub cannot be reached."""
    import huggingface_hub
    import transformers

    if not Path(name).is_dir() and huggingface_hub.try_to_load_from_cache(name, "config.json") is None:
        host = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname
        try:  # before transformers does, with pauses between
            socket.getaddrinfo(host, 443)
        except OSError as error:
            raise OSError(f"--model must be a folder, or a name on {host}, which cannot be reached ({error}), got {name}") from None
    config = transformers.AutoConfig.from_pretrained(name)
    if config.model_type != "gpt_neox" or not config.use_parallel_residual:
        raise ValueError(f"--model must be a GPT-NeoX with parallel residual, got a {config.model_type}")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def assemble(model_class: Any, config: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model of ``config`` whose parameters are ``weights``: nothing is initialised, nothing copied."""
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(weights, assign=True)
    # What is not in a checkpoint is computed from the configuration, on a real device.
    rotary, device = type(model.base_model.rotary_emb), next(iter(weights.values())).device
    model.base_model.rotary_emb = rotary(config=config).to(device)
    leftover = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if leftover:
        raise RuntimeError(f"transformers has tensors that no checkpoint fills and the benchmark does not know: {', '.join(leftover)}")
    return model.eval().requires_grad_(False)


def twin(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A second model around the weights of ``model``, which it shares; or around copies of them in another dtype."""
    weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in model.state_dict().items()}
    return assemble(type(model), model.config, weights)


class LoopModel:
    """The model by hand, around the same weights, for one sequence: eager layers in plain PyTorch over a flat cache of keys and values, as
    the end-to-end benchmark that ClusterFusion publishes with its Pythia kernels is built.

    Args:
        model: of transformers. max_length: positions in the cache. mlp_down: computes the tail of each layer while one token is decoded.
    """

    def __init__(self, model: Any, max_length: int, mlp_down: Layer) -> None:
        base, config = model.base_model, model.config
        self.mlp_down, self.num_heads, self.epsilon = mlp_down, config.num_attention_heads, config.layer_norm_eps
        self.embedding, self.output_embedding = base.embed_in.weight, model.get_output_embeddings().weight
        modules = [[layer.get_submodule(name) for name in MODULES] for layer in base.layers]
        *self.layers, (self.final_norm,) = ([(m.weight, m.bias) for m in layer] for layer in (*modules, [base.final_layer_norm]))
        head_dim = config.hidden_size // self.num_heads
        self.cache = self.embedding.new_zeros(len(self.layers), 2, self.num_heads, max_length, head_dim)
        positions = torch.arange(max_length, device=self.embedding.device)[None]
        # [max_length, 1, 1, rotary_dim]: the same for every head, for query and key. The first half of a pair is turned by minus the sine.
        self.cosine, sine = (values[0][:, None, None] for values in base.rotary_emb(self.embedding, positions))
        self.half = sine.shape[-1] // 2
        self.sine = torch.cat((-sine[..., : self.half], sine[..., self.half :]), -1)

    @torch.inference_mode()
    @sdpa_kernel(ATTENTION)
    def __call__(self, tokens: torch.Tensor, position: int = 0) -> torch.Tensor:
        """Logits ``[1, num_tokens, vocabulary]`` of ``tokens`` ``[1, num_tokens]`` that begin at ``position``; fills the cache there.

        More than one token is a prefill: causal among themselves, from position 0, with PyTorch's three calls.
        """
        num_tokens = tokens.shape[1]
        if num_tokens > 1 and position:
            raise ValueError(f"position must be 0 where several tokens come at once, got {position} with {num_tokens} tokens")
        mlp_down, end = torch_layer if num_tokens > 1 else self.mlp_down, position + num_tokens
        cosine, sine = self.cosine[position:end], self.sine[position:end]
        states = F.embedding(tokens[0], self.embedding)
        size, epsilon = states.shape[1:], self.epsilon
        for (norm, mlp_norm, query_key_value, dense, up, down), cache in zip(self.layers, self.cache, strict=True):
            # [num_tokens, num_heads, query or key or value, head_dim]
            heads = F.linear(F.layer_norm(states, size, *norm, epsilon), *query_key_value).view(num_tokens, self.num_heads, 3, -1)
            # Rotary position embedding, in place (J. Su et al., "RoFormer", 2021).
            turned = heads[:, :, :2, : 2 * self.half]
            halves_exchanged = turned.roll(self.half, -1)
            turned.mul_(cosine).addcmul_(halves_exchanged, sine)
            by_head = heads.permute(2, 1, 0, 3)
            cache[:, :, position:end] = by_head[1:]
            keys, values = cache[None, 0, :, :end], cache[None, 1, :, :end]
            attended = F.scaled_dot_product_attention(by_head[None, 0], keys, values, is_causal=num_tokens > 1)
            attn_output = F.linear(attended[0].transpose(0, 1).reshape(num_tokens, -1), *dense)
            mlp_intermediate = F.gelu(F.linear(F.layer_norm(states, size, *mlp_norm, epsilon), *up))
            states = mlp_down(states, attn_output, mlp_intermediate, *down)
        return F.linear(F.layer_norm(states, size, *self.final_norm, epsilon), self.output_embedding)[None]
