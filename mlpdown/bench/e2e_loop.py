"""GPT-NeoX by hand: eager layers in plain PyTorch over a flat cache of keys and values, as the end-to-end benchmark that ClusterFusion
publishes with its Pythia kernels is built."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .baselines import torch_layer
from .inputs import Layer

# Not cuDNN's: at each length of the cache that is new to the process a step took tens of milliseconds more, as if it were prepared anew.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Of a layer; each has a weight and a bias.
MODULES = (
    *("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense"),
    *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)


class LoopModel:
    """The weights of a GPT-NeoX, shared, for one sequence, with a cache of its own.

    Args:
        model: of transformers. max_length: positions in the cache. mlp_down: computes the tail of each layer while one token is decoded.
    """

    def __init__(self, model: Any, max_length: int, mlp_down: Layer) -> None:
        base = model.base_model
        self.mlp_down, self.num_heads, self.epsilon = mlp_down, model.config.num_attention_heads, model.config.layer_norm_eps
        self.embedding, self.output_embedding = base.embed_in.weight, model.get_output_embeddings().weight
        self.layers = [[_pair(layer.get_submodule(name)) for name in MODULES] for layer in base.layers]
        self.final_norm = _pair(base.final_layer_norm)
        head_dim = self.embedding.shape[1] // self.num_heads
        self.cache = self.embedding.new_zeros(len(self.layers), 2, self.num_heads, max_length, head_dim)
        positions = torch.arange(max_length, device=self.embedding.device)[None]
        cosine, sine = (values[0][:, None, None] for values in base.rotary_emb(self.embedding, positions))
        self.rotary_dim = sine.shape[-1]
        # [max_length, 1, 1, rotary_dim]: the same for every head, for query and key. The first half of a pair is turned by minus the sine.
        self.cosine, self.sine = cosine, torch.cat((-sine[..., : self.rotary_dim // 2], sine[..., self.rotary_dim // 2 :]), -1)

    @torch.inference_mode()
    @sdpa_kernel(ATTENTION)
    def __call__(self, tokens: torch.Tensor, position: int = 0) -> torch.Tensor:
        """Logits ``[1, num_tokens, vocabulary]`` of ``tokens`` ``[1, num_tokens]`` that begin at ``position``; fills the cache there.

        More than one token is a prefill: causal among themselves, from position 0, with PyTorch's three calls.
        """
        num_tokens = tokens.shape[1]
        if num_tokens > 1 and position:
            raise ValueError(f"position must be 0 where several tokens come at once, got {position} with {num_tokens} tokens")
        mlp_down = torch_layer if num_tokens > 1 else self.mlp_down
        end = position + num_tokens
        cosine, sine = self.cosine[position:end], self.sine[position:end]
        states = F.embedding(tokens[0], self.embedding)
        hidden_dim = states.shape[1:]
        for (norm, mlp_norm, query_key_value, dense, up, down), cache in zip(self.layers, self.cache, strict=True):
            # [num_tokens, num_heads, query or key or value, head_dim]
            heads = F.linear(F.layer_norm(states, hidden_dim, *norm, self.epsilon), *query_key_value)
            heads = heads.view(num_tokens, self.num_heads, 3, -1)
            # Rotary position embedding, in place (J. Su et al., "RoFormer", 2021).
            turned = heads[:, :, :2, : self.rotary_dim]
            halves_exchanged = turned.roll(self.rotary_dim // 2, -1)
            turned.mul_(cosine).addcmul_(halves_exchanged, sine)
            by_head = heads.permute(2, 1, 0, 3)
            cache[:, :, position:end] = by_head[1:]
            keys, values = cache[None, 0, :, :end], cache[None, 1, :, :end]
            attended = F.scaled_dot_product_attention(by_head[None, 0], keys, values, is_causal=num_tokens > 1)
            attn_output = F.linear(attended[0].transpose(0, 1).reshape(num_tokens, -1), *dense)
            mlp_intermediate = F.gelu(F.linear(F.layer_norm(states, hidden_dim, *mlp_norm, self.epsilon), *up))
            states = mlp_down(states, attn_output, mlp_intermediate, *down)
        logits = F.linear(F.layer_norm(states, hidden_dim, *self.final_norm, self.epsilon), self.output_embedding)
        return logits[None]


def _pair(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return module.weight, module.bias
