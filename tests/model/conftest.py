"""Tiny random models of every family, and a counter of the op's calls. No download, no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import mlpdown.ops

transformers = pytest.importorskip("transformers")

# Models this small gain nothing from threads, and lose much where several test processes share the cores.
torch.set_num_threads(1)

FAMILIES = ("gpt_neox_parallel", "gpt_neox_sequential", "llama", "qwen2", "mistral")
NUM_LAYERS = 2
VOCABULARY = 128

COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=4,
    intermediate_size=160,
    max_position_embeddings=64,
    # None of these occurs by chance: generation runs to its length.
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


def make_model(family: str, dtype: torch.dtype = torch.float16, **changes: Any) -> Any:
    """A seeded random model in eval mode, with weights large enough for the MLP to matter."""
    settings = {**COMMON, **changes}
    if family.startswith("gpt_neox"):
        parallel = family == "gpt_neox_parallel"
        config: Any = transformers.GPTNeoXConfig(use_parallel_residual=parallel, **settings)
        make: Any = transformers.GPTNeoXForCausalLM
    else:
        config_class, make = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
            "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        }[family]
        config = config_class(num_key_value_heads=2, **settings)
    torch.manual_seed(20)
    return randomise(make(config)).to(dtype).eval()


@torch.no_grad()
def randomise(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.1)
        elif name.endswith("bias"):
            parameter.normal_(std=0.02)
    return model


def layers_of(model: Any) -> Any:
    return model.base_model.layers


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return make_model(family)


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, 5), generator=torch.Generator().manual_seed(4))


@dataclass
class Calls:
    """Calls of ``mlpdown.run`` since the start of the test, and the arguments of each."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def take(self) -> int:
        """The number of calls since this was last asked."""
        number = len(self.arguments)
        self.arguments.clear()
        return number


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts the op's calls by models that are patched; each still computes."""
    seen = Calls()
    run: Callable[..., torch.Tensor] = mlpdown.ops.run

    def counted(*positional: Any, **keywords: Any) -> torch.Tensor:
        seen.arguments.append((positional, keywords))
        return run(*positional, **keywords)

    monkeypatch.setattr(mlpdown.ops, "run", counted)
    return seen


@torch.no_grad()
def step(model: Any, token: int = 3, **keywords: Any) -> torch.Tensor:
    """Logits of one token without a past: the shortest call that the op takes part in."""
    return model(torch.tensor([[token]]), use_cache=False, **keywords).logits


def greedy(model: Any, prompt: torch.Tensor, num_tokens: int = 8, **keywords: Any) -> torch.Tensor:
    """Greedy continuation of ``prompt``, ``num_tokens`` long."""
    attention_mask = torch.ones_like(prompt)
    return model.generate(
        prompt,
        attention_mask=attention_mask,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        **keywords,
    )
