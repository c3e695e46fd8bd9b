"""What is decoded: one model's weights, stock and patched, by transformers and by hand."""

from __future__ import annotations

import functools
from typing import Any

import torch

import mlpdown
from mlpdown.bench import e2e_models
from mlpdown.bench.e2e_check import LogitsCheck, Oracle
from mlpdown.bench.e2e_decode import (
    Decoder,
    EagerDecoder,
    LoopDecoder,
    StaticDecoder,
    forced_logits,
    forced_loop_logits,
)
from mlpdown.bench.e2e_loop import LoopModel, torch_mlp_down

# With a static cache: a CUDA graph of the model as it comes, or compiled, or compiled with dependent launch.
COMPILED_MODES = ("compile", "compile-pdl")
STATIC_MODES = ("graph", *COMPILED_MODES)
NUM_CHECKED_TOKENS = 32


class Subject:
    """A GPT-NeoX in two copies that share their weights, and the float64 model that both are held against.

    Not one model that is patched and unpatched between blocks: so each keeps what Python and the compiler know of its classes.

    Args:
        model: as transformers has it; stays as it is. prompt: ``[1, num_tokens]``. settings: of :func:`mlpdown.patch`.
        max_length: positions of the hand-written loops' caches.

    Raises:
        ValueError: it is another model than a GPT-NeoX with parallel residual.
    """

    def __init__(self, model: Any, prompt: torch.Tensor, settings: dict[str, Any], max_length: int) -> None:
        config = model.config
        if config.model_type != "gpt_neox" or not config.use_parallel_residual:
            raise ValueError(f"--model must be a GPT-NeoX with parallel residual, got a {config.model_type}")
        self.prompt = prompt
        self.model, self.patched_model = model, e2e_models.twin(model)
        self.patch = mlpdown.patch(self.patched_model, **settings)
        weights = e2e_models.weights_of(model)
        self.mlp_down = functools.partial(mlpdown.run, **settings)
        # Each has a cache of its own.
        self.loops = [(LoopModel(weights, config.num_attention_heads, max_length), torch_mlp_down)]
        self.loops += [(LoopModel(weights, config.num_attention_heads, max_length), self.mlp_down)]
        self.oracle: Oracle

    def check_logits(self) -> list[LogitsCheck]:
        """Logits of forced decode steps, stock and patched, against the float64 model, which is there from then on.

        Raises:
            CheckError: the patched logits are wrong.
        """
        decoder = EagerDecoder(self.model, self.prompt)
        decoder.rewind()
        for _ in range(NUM_CHECKED_TOKENS - 1):
            decoder.step()
        continuation = torch.tensor(decoder.tokens(), device=self.prompt.device)
        self.oracle = Oracle(self.model, self.prompt, continuation)
        stock, patched = (forced_logits(model, self.prompt, continuation) for model in (self.model, self.patched_model))
        checks = [self.oracle.check_logits("transformers", stock, patched)]
        stock, patched = (forced_loop_logits(model, self.prompt, continuation, op) for model, op in self.loops)
        return [*checks, self.oracle.check_logits("loop", stock, patched)]

    def decoder(self, mode: str, is_patched: bool, cache_length: int | None) -> Decoder:
        """A new decoder of one of the two, warm. ``cache_length``: positions of a static cache; None for modes without one."""
        if mode == "loop":
            model, op = self.loops[is_patched]
            return LoopDecoder(model, self.prompt, op)
        model = self.patched_model if is_patched else self.model
        if cache_length is None:
            return EagerDecoder(model, self.prompt)
        return StaticDecoder(
            model,
            self.prompt,
            cache_length,
            compile=mode in COMPILED_MODES,
            graph=self.prompt.is_cuda,
            pdl=mode == "compile-pdl",
        )
