"""The models that are decoded: a checkpoint, or random weights of a named size, made on the device within seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

INITIALISER_STD = 0.02
ROTARY_FRACTION = 0.25
ROTARY_BASE = 10000
LAYER_NORM_EPSILON = 1e-5


# Its name in checkpoints and in transformers 4; transformers 5 calls it lm_head.
OUTPUT_EMBEDDING = "embed_out.weight"


@dataclasses.dataclass(frozen=True)
class Size:
    """A GPT-NeoX of the Pythia suite (S. Biderman et al., "Pythia", 2023, table 1), or a tiny one."""

    hidden_dim: int
    num_layers: int
    num_heads: int
    vocabulary: int = 50304

    @property
    def intermediate_dim(self) -> int:
        return 4 * self.hidden_dim

    @property
    def head_dim(self) -> int:
        return self.hidden_dim // self.num_heads


SIZES = {
    "tiny": Size(64, 2, 4, vocabulary=256),
    "70m": Size(512, 6, 8),
    "160m": Size(768, 12, 12),
    "410m": Size(1024, 24, 16),
    "1b": Size(2048, 16, 8),
    "1.4b": Size(2048, 24, 16),
    "2.8b": Size(2560, 32, 32),
    "6.9b": Size(4096, 32, 32, vocabulary=50432),
    "12b": Size(5120, 36, 40, vocabulary=50688),
}

StateDict = dict[str, torch.Tensor]


def random_weights(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> StateDict:
    """Seeded random weights under the names that a GPT-NeoX checkpoint has."""
    generator = torch.Generator(device).manual_seed(seed)
    weights: StateDict = {}

    def matrix(name: str, num_rows: int, num_columns: int) -> None:
        weights[name] = torch.empty(num_rows, num_columns, dtype=dtype, device=device).normal_(
            std=INITIALISER_STD, generator=generator
        )

    def linear(name: str, num_inputs: int, num_outputs: int) -> None:
        matrix(f"{name}.weight", num_outputs, num_inputs)
        weights[f"{name}.bias"] = torch.empty(num_outputs, dtype=dtype, device=device).normal_(
            std=INITIALISER_STD, generator=generator
        )

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = torch.ones(size.hidden_dim, dtype=dtype, device=device)
        weights[f"{name}.bias"] = torch.zeros(size.hidden_dim, dtype=dtype, device=device)

    matrix("gpt_neox.embed_in.weight", size.vocabulary, size.hidden_dim)
    for index in range(size.num_layers):
        layer = f"gpt_neox.layers.{index}"
        norm(f"{layer}.input_layernorm")
        norm(f"{layer}.post_attention_layernorm")
        linear(f"{layer}.attention.query_key_value", size.hidden_dim, 3 * size.hidden_dim)
        linear(f"{layer}.attention.dense", size.hidden_dim, size.hidden_dim)
        linear(f"{layer}.mlp.dense_h_to_4h", size.hidden_dim, size.intermediate_dim)
        linear(f"{layer}.mlp.dense_4h_to_h", size.intermediate_dim, size.hidden_dim)
    norm("gpt_neox.final_layer_norm")
    matrix(OUTPUT_EMBEDDING, size.vocabulary, size.hidden_dim)
    return weights


def build(size: Size, weights: StateDict, max_length: int) -> Any:
    """A transformers model around ``weights``, which it shares."""
    import transformers

    make_config: Any = transformers.GPTNeoXConfig  # takes older names of fields too, which its signature does not show
    config = make_config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.intermediate_dim,
        max_position_embeddings=max(2048, max_length),
        rotary_pct=ROTARY_FRACTION,
        rotary_emb_base=ROTARY_BASE,
        layer_norm_eps=LAYER_NORM_EPSILON,
        use_parallel_residual=True,
        tie_word_embeddings=False,
    )
    return assemble(transformers.GPTNeoXForCausalLM, config, weights)


def assemble(model_class: Any, config: Any, weights: StateDict) -> Any:
    """A model of ``config`` whose parameters are ``weights``: nothing is initialised, nothing copied."""
    with torch.device("meta"):
        model = model_class(config)
    names = {OUTPUT_EMBEDDING: output_embedding(model)}
    model.load_state_dict({names.get(name, name): tensor for name, tensor in weights.items()}, assign=True)
    # What is not in a checkpoint is computed from the configuration, on a real device.
    device = next(iter(weights.values())).device
    model.base_model.rotary_emb = type(model.base_model.rotary_emb)(config=config).to(device)
    leftover = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if leftover:
        raise RuntimeError(
            f"transformers has tensors that no checkpoint fills and the benchmark does not know: {', '.join(leftover)}"
        )
    return model.eval().requires_grad_(False)


def output_embedding(model: Any) -> str:
    """The name of the output embedding's parameter in ``model``."""
    output = model.get_output_embeddings()
    return next(
        name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is output.weight
    )


def weights_of(model: Any) -> StateDict:
    """The weights of a GPT-NeoX, shared, under the names that :func:`random_weights` gives."""
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {**weights, OUTPUT_EMBEDDING: model.get_output_embeddings().weight.detach()}


def load(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A checkpoint: a folder, or a name on the Hugging Face hub."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def twin(model: Any) -> Any:
    """A second model around the weights of ``model``, which it shares."""
    return assemble(type(model), model.config, model.state_dict())


def in_float64(model: Any) -> Any:
    """A copy of ``model`` in float64, the oracle's."""
    return assemble(type(model), model.config, {name: tensor.double() for name, tensor in model.state_dict().items()})
