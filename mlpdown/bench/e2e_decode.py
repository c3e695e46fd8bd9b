"""Greedy decoding in each mode that is measured. A decoder is rewound to the end of the prompt, then steps one token at a time.

Both kinds have ``rewind``; ``step``, which waits for nothing; ``tokens``: those decoded since, the one that the prompt's own logits gave
first; and ``calls_of_op``: how often one step calls each of this package's ops.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config as inductor

from ..gpt_neox import LoopModel
from ..timing import Captured

# What graphs and compilers need to see before they are captured or settled.
NUM_WARMUP_STEPS = 3


class EagerDecoder:
    """A Python loop over the model's own forward with the cache that grows, or over a :class:`LoopModel`."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self.model, self.prompt, self.is_loop = model, prompt, isinstance(model, LoopModel)

    @torch.inference_mode()
    def feed(self, tokens: torch.Tensor, *, rewinds: bool = False) -> torch.Tensor:
        """Logits ``[1, num_tokens, vocabulary]`` after the tokens that were fed before, or after none."""
        if rewinds:
            self.position, self.keywords = 0, {} if self.is_loop else _cache_keywords(self.model, "DynamicCache")
        logits = self.model(tokens, self.position) if self.is_loop else self.model(tokens, **self.keywords).logits
        self.position += tokens.shape[1]
        return logits

    def rewind(self) -> None:
        self.generated = [self.feed(self.prompt, rewinds=True)[:, -1:].argmax(-1)]

    def step(self) -> None:
        self.generated.append(self.feed(self.generated[-1]).argmax(-1))

    def tokens(self) -> list[int]:
        return torch.cat(self.generated, 1)[0].tolist()

    def calls_of_op(self) -> dict[str, int]:
        return calls_of_op(self.step)


class StaticDecoder:
    """The model over a static cache, everything on the device: optionally compiled, and captured in a CUDA graph where there is one.

    Args:
        max_length: positions of the cache. compile: whether ``torch.compile`` takes the model. graph: whether a step is captured.
        pdl: whether the compiler's kernels have programmatic dependent launch, where it can write such kernels at all.
    """

    def __init__(self, model: Any, prompt: torch.Tensor, max_length: int, *, compile: bool, graph: bool, pdl: bool = False) -> None:
        self.prompt = prompt
        self.forward = torch.compile(model, fullgraph=True, dynamic=False) if compile else model
        self.keywords = _cache_keywords(model, "StaticCache", max_cache_len=max_length)
        # transformers 5 takes positions from position_ids and the cache itself, transformers 4 from cache_position.
        self.takes_cache_position = "cache_position" in inspect.signature(type(model).forward).parameters
        self.token, self.position, self.generated = (prompt.new_zeros(size) for size in ((1, 1), (1,), (max_length,)))
        with torch.no_grad():
            positions = torch.arange(prompt.shape[1], device=prompt.device)
            self.first_token = model(prompt, **self.keywords, **self._at(positions)).logits[:, -1:].argmax(-1)
        self.rewind()
        self.step: Callable[[], None] = self._decode
        setting = inductor.patch({"triton.enable_pdl": pdl}) if has_inductor_pdl() else contextlib.nullcontext()
        with setting:  # whatever the environment says; the first call compiles
            if graph:
                self.step = Captured(self._decode, self._warm_up).replay
            else:
                self._warm_up()
        self.rewind()

    def _at(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"position_ids": positions[None], **({"cache_position": positions} if self.takes_cache_position else {})}

    @torch.no_grad()
    def _decode(self) -> None:
        logits = self.forward(self.token, **self.keywords, **self._at(self.position)).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)
        self.generated.index_copy_(0, self.position, self.token[0])

    def _warm_up(self) -> None:
        for _ in range(NUM_WARMUP_STEPS - 1):
            self._decode()
        self.counted_calls = calls_of_op(self._decode)  # now: a replay makes no calls
        self.rewind()

    @torch.no_grad()
    def rewind(self) -> None:
        num_tokens = self.prompt.shape[1]
        # Later entries of the cache are behind the mask until they are written anew.
        for layer in next(iter(self.keywords.values())).layers:
            length = getattr(layer, "cumulative_length", None)  # only in transformers 5
            if isinstance(length, torch.Tensor):
                length.fill_(num_tokens)
        self.position.fill_(num_tokens)
        self.token.copy_(self.first_token)
        self.generated.zero_()
        self.generated[num_tokens] = self.first_token[0, 0]

    def tokens(self) -> list[int]:
        return self.generated[self.prompt.shape[1] : int(self.position) + 1].tolist()

    def calls_of_op(self) -> dict[str, int]:
        return self.counted_calls


Decoder = EagerDecoder | StaticDecoder


def forced_logits(model: Any, prompt: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
    """Logits ``[num_tokens, vocabulary]`` of one eager decode step for each of the tokens ``continuation``, fed after ``prompt``."""
    decoder = EagerDecoder(model, prompt)
    decoder.feed(prompt, rewinds=True)
    return torch.cat([decoder.feed(token.view(1, 1))[0] for token in continuation])


def has_inductor_pdl() -> bool:
    """Whether this torch's compiler knows programmatic dependent launch."""
    return hasattr(inductor.triton, "enable_pdl")


def calls_of_op(step: Callable[[], object]) -> dict[str, int]:
    """How often ``step`` calls each of this package's ops, by name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints lines of its own
    # Of the CPU's activities only: what is asked for is the dispatcher's calls, and the GPU's own tracing would slow what follows.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        step()
    return {event.key: event.count for event in profile.key_averages() if event.key.startswith("mlpdown::")}


def _cache_keywords(model: Any, name: str, **options: Any) -> dict[str, Any]:
    """How to call a model with a new cache of that class; the cache comes first."""
    import transformers

    # transformers 5.24 renamed the argument.
    is_new = "cache" in inspect.signature(type(model).forward).parameters
    return {"cache" if is_new else "past_key_values": getattr(transformers, name)(config=model.config, **options), "use_cache": True}
