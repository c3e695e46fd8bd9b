"""GPT-NeoX by hand: eager layers in plain PyTorch over a flat cache of keys and values, as the end-to-end benchmark that ClusterFusion
publishes with its Pythia kernels is built. Needs no transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlpdown.bench.e2e_models import LAYER_NORM_EPSILON, OUTPUT_EMBEDDING, ROTARY_BASE, ROTARY_FRACTION, StateDict

# Not cuDNN's: at each length of the cache that is new to the process a step took tens of milliseconds more, as if it were prepared anew.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# hidden_states, attn_output, mlp_intermediate, weight, bias -> the layer's output
MLPDownFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def torch_mlp_down(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """The three calls that PyTorch needs for the op."""
    return hidden_states + attn_output + F.linear(mlp_intermediate, weight, bias)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The tensors of one layer; each pair is a weight and a bias."""

    input_layernorm: tuple[torch.Tensor, torch.Tensor]
    post_attention_layernorm: tuple[torch.Tensor, torch.Tensor]
    query_key_value: tuple[torch.Tensor, torch.Tensor]
    attention_dense: tuple[torch.Tensor, torch.Tensor]
    mlp_up: tuple[torch.Tensor, torch.Tensor]
    mlp_down: tuple[torch.Tensor, torch.Tensor]


class LoopModel:
    """One sequence, greedy or forced. ``mlp_down`` computes the tail of each layer while one token is decoded.

    Args:
        weights: as ``e2e_models.random_weights`` makes them. num_heads: of the attention. max_length: positions in the cache.
    """

    def __init__(self, weights: StateDict, num_heads: int, max_length: int) -> None:
        def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return weights[f"{name}.weight"], weights[f"{name}.bias"]

        self.embedding = weights["gpt_neox.embed_in.weight"]
        self.output_embedding = weights[OUTPUT_EMBEDDING]
        self.final_norm = pair("gpt_neox.final_layer_norm")
        self.layers: list[Layer] = []
        while f"gpt_neox.layers.{len(self.layers)}.mlp.dense_4h_to_h.weight" in weights:
            name = f"gpt_neox.layers.{len(self.layers)}"
            self.layers.append(
                Layer(
                    pair(f"{name}.input_layernorm"),
                    pair(f"{name}.post_attention_layernorm"),
                    pair(f"{name}.attention.query_key_value"),
                    pair(f"{name}.attention.dense"),
                    pair(f"{name}.mlp.dense_h_to_4h"),
                    pair(f"{name}.mlp.dense_4h_to_h"),
                )
            )
        self.num_heads = num_heads
        self.head_dim = self.embedding.shape[1] // num_heads
        dtype, device = self.embedding.dtype, self.embedding.device
        self.cache = torch.zeros(len(self.layers), 2, num_heads, max_length, self.head_dim, dtype=dtype, device=device)
        self.rotary_dim = int(self.head_dim * ROTARY_FRACTION)
        frequencies = ROTARY_BASE ** -(
            torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device) / self.rotary_dim
        )
        angles = torch.arange(max_length, device=device)[:, None] * frequencies
        # [max_length, 1, 1, rotary_dim]: the same for every head, for query and key. The first half of a pair is turned by minus the sine.
        self.cosine = torch.cat((angles.cos(), angles.cos()), dim=-1).to(dtype)[:, None, None]
        self.sine = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(dtype)[:, None, None]

    @torch.inference_mode()
    @sdpa_kernel(ATTENTION)
    def forward(self, tokens: torch.Tensor, position: int, mlp_down: MLPDownFunction) -> torch.Tensor:
        """Logits ``[num_tokens, vocabulary]`` of ``tokens`` ``[num_tokens]`` that begin at ``position``; fills the cache there.

        More than one token is a prefill: causal among themselves, from position 0, with PyTorch's three calls.
        """
        end = position + tokens.shape[0]
        if tokens.shape[0] > 1:
            if position:
                raise ValueError(
                    f"position must be 0 where several tokens come at once, got {position} with {tokens.shape[0]} tokens"
                )
            mlp_down = torch_mlp_down
        cosine, sine = self.cosine[position:end], self.sine[position:end]
        hidden_dim = self.embedding.shape[1]
        hidden_states = F.embedding(tokens, self.embedding)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            normed = F.layer_norm(hidden_states, (hidden_dim,), *layer.input_layernorm, LAYER_NORM_EPSILON)
            # [num_tokens, num_heads, query or key or value, head_dim]
            query_key_value = F.linear(normed, *layer.query_key_value).view(-1, self.num_heads, 3, self.head_dim)
            self._rotate(query_key_value[:, :, :2, : self.rotary_dim], cosine, sine)
            by_head = query_key_value.permute(2, 1, 0, 3)
            cache[:, :, position:end] = by_head[1:]
            attended = F.scaled_dot_product_attention(
                by_head[None, 0], cache[None, 0, :, :end], cache[None, 1, :, :end], is_causal=tokens.shape[0] > 1
            )
            attn_output = F.linear(attended[0].transpose(0, 1).reshape(-1, hidden_dim), *layer.attention_dense)
            normed = F.layer_norm(hidden_states, (hidden_dim,), *layer.post_attention_layernorm, LAYER_NORM_EPSILON)
            mlp_intermediate = F.gelu(F.linear(normed, *layer.mlp_up))
            hidden_states = mlp_down(hidden_states, attn_output, mlp_intermediate, *layer.mlp_down)
        hidden_states = F.layer_norm(hidden_states, (hidden_dim,), *self.final_norm, LAYER_NORM_EPSILON)
        return F.linear(hidden_states, self.output_embedding)

    def _rotate(self, states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Rotary position embedding, in place (J. Su et al., "RoFormer", 2021)."""
        halves_exchanged = states.roll(self.rotary_dim // 2, -1)
        states.mul_(cosine).addcmul_(halves_exchanged, sine)
