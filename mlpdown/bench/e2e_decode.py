"""Greedy decoding in each mode that is measured. A decoder is rewound to the end of the prompt, then steps one token at a time."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from mlpdown.bench.e2e_loop import LoopModel, MLPDownFunction

# What graphs and compilers need to see before they are captured or settled.
NUM_WARMUP_STEPS = 3


class Decoder(Protocol):
    """One model in one mode, at the end of the prompt or some tokens on. Nothing in ``step`` waits for the device."""

    def rewind(self) -> None:
        """Back to the end of the prompt."""

    def step(self) -> None:
        """Decode one token."""

    def tokens(self) -> list[int]:
        """The tokens decoded since ``rewind``, the one that the prompt's own logits gave first. Waits for the device."""

    def calls_of_op(self) -> dict[str, int]:
        """How often one step calls each of this package's ops, by name. May take a step."""


class EagerDecoder:
    """The model's own forward in a Python loop, with the cache that grows."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.generated: list[torch.Tensor] = []

    @torch.inference_mode()
    def rewind(self) -> None:
        output = self.model(self.prompt, use_cache=True)
        self.cache = output.past_key_values
        self.generated = [output.logits[:, -1:].argmax(-1)]

    @torch.inference_mode()
    def step(self) -> None:
        output = self.model(self.generated[-1], past_key_values=self.cache, use_cache=True)
        self.generated.append(output.logits[:, -1:].argmax(-1))

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

    def __init__(
        self, model: Any, prompt: torch.Tensor, max_length: int, *, compile: bool, graph: bool, pdl: bool = False
    ) -> None:
        from transformers import StaticCache

        self.model, self.prompt = model, prompt
        self.forward = torch.compile(model, fullgraph=True, dynamic=False) if compile else model
        # transformers 5 takes positions from position_ids and the cache itself, transformers 4 from cache_position.
        self.takes_cache_position = "cache_position" in inspect.signature(type(model).forward).parameters
        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        device = prompt.device
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.generated = torch.zeros(max_length, dtype=torch.long, device=device)
        with torch.no_grad():
            self._prefill()
        self.rewind()
        with inductor_pdl(pdl):  # the first call compiles
            self._run: Callable[[], None] = self._capture() if graph else self._decode
            if not graph:
                self._warm_up()
        self.rewind()

    def _prefill(self) -> None:
        num_tokens = self.prompt.shape[1]
        positions = torch.arange(num_tokens, device=self.prompt.device)
        logits = self.model(self.prompt, past_key_values=self.cache, use_cache=True, **self._at(positions)).logits
        self.first_token = logits[:, -1:].argmax(-1)

    def _at(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        keywords = {"position_ids": positions[None]}
        return {**keywords, "cache_position": positions} if self.takes_cache_position else keywords

    @torch.no_grad()
    def _decode(self) -> None:
        logits = self.forward(self.token, past_key_values=self.cache, use_cache=True, **self._at(self.position)).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)
        self.generated.index_copy_(0, self.position, self.token[0])

    def _warm_up(self) -> None:
        for _ in range(NUM_WARMUP_STEPS - 1):
            self._decode()
        # A replay makes no calls, so they are counted here.
        self.counted_calls = calls_of_op(self._decode)

    def _capture(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._warm_up()
        stream.synchronize()
        self.rewind()
        graph = torch.cuda.CUDAGraph()
        # In the stream that is warm, whose workspaces exist. Only this thread is held to what a capture allows: others may draw.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._decode()
        return graph.replay

    @torch.no_grad()
    def rewind(self) -> None:
        num_tokens = self.prompt.shape[1]
        # Later entries of the cache are behind the mask until they are written anew.
        for layer in self.cache.layers:
            length = getattr(layer, "cumulative_length", None)  # only in transformers 5
            if isinstance(length, torch.Tensor):
                length.fill_(num_tokens)
        self.position.fill_(num_tokens)
        self.token.copy_(self.first_token)
        self.generated.zero_()
        self.generated[num_tokens] = self.first_token[0, 0]

    def step(self) -> None:
        self._run()

    def tokens(self) -> list[int]:
        return self.generated[self.prompt.shape[1] : int(self.position) + 1].tolist()

    def calls_of_op(self) -> dict[str, int]:
        return self.counted_calls


def has_inductor_pdl() -> bool:
    """Whether this torch's compiler knows programmatic dependent launch."""
    import torch._inductor.config

    return hasattr(torch._inductor.config.triton, "enable_pdl")


def inductor_pdl(enable: bool) -> contextlib.AbstractContextManager[Any]:
    """What is compiled meanwhile has programmatic dependent launch, or has it not, whatever the environment says."""
    if not has_inductor_pdl():
        return contextlib.nullcontext()
    return torch._inductor.config.patch({"triton.enable_pdl": enable})


class LoopDecoder:
    """The hand-written eager loop of ``e2e_loop``."""

    def __init__(self, model: LoopModel, prompt: torch.Tensor, mlp_down: MLPDownFunction) -> None:
        self.model, self.prompt, self.mlp_down = model, prompt[0], mlp_down

    def rewind(self) -> None:
        logits = self.model.forward(self.prompt, 0, self.mlp_down)
        self.position = self.prompt.shape[0]
        self.generated = [logits[-1:].argmax(-1)]

    def step(self) -> None:
        logits = self.model.forward(self.generated[-1], self.position, self.mlp_down)
        self.position += 1
        self.generated.append(logits.argmax(-1))

    def tokens(self) -> list[int]:
        return torch.cat(self.generated).tolist()

    def calls_of_op(self) -> dict[str, int]:
        return calls_of_op(self.step)


def forced_logits(model: Any, prompt: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
    """Logits ``[num_tokens, vocabulary]`` of one eager decode step for each of the tokens ``continuation``, fed after ``prompt``."""
    rows = []
    with torch.inference_mode():
        cache = model(prompt, use_cache=True).past_key_values
        for token in continuation:
            output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            rows.append(output.logits[0, -1])
    return torch.stack(rows)


def forced_loop_logits(
    model: LoopModel, prompt: torch.Tensor, continuation: torch.Tensor, mlp_down: MLPDownFunction
) -> torch.Tensor:
    """As :func:`forced_logits`, of the hand-written loop."""
    model.forward(prompt[0], 0, mlp_down)
    rows = [
        model.forward(token.view(1), prompt.shape[1] + index, mlp_down)[0] for index, token in enumerate(continuation)
    ]
    return torch.stack(rows)


def calls_of_op(step: Callable[[], object]) -> dict[str, int]:
    """How often ``step`` calls each of this package's ops, by name."""
    # Of the CPU's activities only: what is asked for is the dispatcher's calls, and the GPU's own tracing would slow what follows.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        step()
    return {event.key: event.count for event in profile.key_averages() if event.key.startswith("mlpdown::")}


@contextlib.contextmanager
def hooked(modules: Any, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook on each of ``modules``, for a while."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
