"""Before anything is timed: are the logits as near to float64 as they must be, and does rounding explain where greedy tokens differ?"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mlpdown.bench.e2e_decode import Decoder, hooked
from mlpdown.bench.e2e_models import in_float64

# Each probe is one draw of random signs; their mean square estimates the variance that roundings cause.
NUM_PROBES = 4
PROBE_SEED = 7


class CheckError(RuntimeError):
    """The patched model computes something that rounding does not explain. Nothing is timed."""


@dataclasses.dataclass(frozen=True)
class LogitsCheck:
    """Distances (root mean square over tokens and vocabulary) of logits from those of the float64 model."""

    name: str
    stock: float
    patched: float
    one_rounding: float
    """What one rounding to the model's dtype of each layer's output moves the logits by."""

    @property
    def bound(self) -> float:
        return self.stock + self.one_rounding


@dataclasses.dataclass(frozen=True)
class TokensCheck:
    """Greedy tokens of the stock and of the patched model in one mode, and what the first difference comes from."""

    name: str
    num_tokens: int
    first_difference: int | None
    margin: float | None = None
    """Float64 logit of the one token minus that of the other, after the tokens that are common, without sign."""
    limit: float | None = None
    """Twice the largest error of a logit that was seen: a smaller margin can turn either way."""

    def __str__(self) -> str:
        if self.first_difference is None:
            return f"{self.name}: {self.num_tokens} greedy tokens alike"
        return (
            f"{self.name}: greedy tokens differ from token {self.first_difference} of {self.num_tokens}, where the float64 logits of the "
            f"two are {self.margin:.2e} apart (16-bit logits err by up to {self.limit:.2e} together)"
        )


class Oracle:
    """The same model in float64, and what it says of the errors of others."""

    def __init__(self, model: Any, prompt: torch.Tensor, continuation: torch.Tensor) -> None:
        self.epsilon = torch.finfo(model.dtype).eps
        self.model, self.prompt, self.continuation = in_float64(model), prompt, continuation
        self.exact = self._logits(continuation)
        self.largest_error = 0.0
        squares = [(self._rounded_logits(probe) - self.exact).square().mean().item() for probe in range(NUM_PROBES)]
        self.one_rounding = (sum(squares) / NUM_PROBES) ** 0.5

    def _logits(self, continuation: torch.Tensor) -> torch.Tensor:
        """Logits ``[num_tokens, vocabulary]`` after each token of ``continuation``, from one causal pass over all."""
        tokens = torch.cat((self.prompt, continuation.view(1, -1)), 1)
        with torch.inference_mode():
            return self.model(tokens, use_cache=False).logits[0, self.prompt.shape[1] :]

    def _rounded_logits(self, probe: int) -> torch.Tensor:
        """The same with each layer's output moved by half an ULP of the model's dtype, up or down."""
        generator = torch.Generator(self.prompt.device).manual_seed(PROBE_SEED + probe)

        def move(module: Any, inputs: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            signs = torch.randint(0, 2, states.shape, generator=generator, device=states.device) * 2 - 1
            moved = states * (1 + signs * (self.epsilon / 2))
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        with hooked(self.model.base_model.layers, move):
            return self._logits(self.continuation)

    def check_logits(self, name: str, stock: torch.Tensor, patched: torch.Tensor) -> LogitsCheck:
        """Hold both against float64.

        The op rounds once where PyTorch rounds up to three times, and the rest of the model is common. So the patched logits may be no
        farther from float64 than the stock ones, but for the one rounding a layer that both have and that may fall otherwise. This is
        an argument of first order, for errors that are independent, which is why it is made for the root mean square over many logits.

        Raises:
            CheckError: the patched logits are farther away, or are not all finite.
        """
        stock_error, patched_error = stock.double() - self.exact, patched.double() - self.exact
        self.largest_error = max(self.largest_error, stock_error.abs().max().item(), patched_error.abs().max().item())
        stock_distance, patched_distance = (
            error.square().mean().sqrt().item() for error in (stock_error, patched_error)
        )
        check = LogitsCheck(name, stock_distance, patched_distance, self.one_rounding)
        if not check.patched <= check.bound:  # a NaN is not
            raise CheckError(
                f"{name}: patched logits are {check.patched:.3e} (root mean square) from float64, must be at most {check.bound:.3e}: "
                f"the stock model's {check.stock:.3e} and one rounding a layer, {check.one_rounding:.3e}"
            )
        return check

    def check_tokens(self, name: str, stock: Decoder, patched: Decoder, num_tokens: int) -> TokensCheck:
        """Decode greedily with both. Where they part, the float64 logits of the two tokens must be near enough for rounding to decide.

        Raises:
            CheckError: they are not.
        """
        sequences = []
        for decoder in (stock, patched):
            decoder.rewind()
            with decoder.patch():
                for _ in range(num_tokens - 1):
                    decoder.step()
            sequences.append(decoder.tokens())
        one, other = sequences
        first = next((index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
        if first is None:
            return TokensCheck(name, num_tokens, None)
        if first == 0:
            raise CheckError(
                f"{name}: the first greedy token is {one[0]} stock and {other[0]} patched; both come from the same prefill"
            )
        common = torch.tensor(one[:first], device=self.prompt.device)
        logits = self._logits(common)[-1]
        margin = (logits[one[first]] - logits[other[first]]).abs().item()
        check = TokensCheck(name, num_tokens, first, margin, 2 * self.largest_error)
        if margin > 2 * self.largest_error:
            raise CheckError(str(check) + ": rounding does not explain that")
        return check
