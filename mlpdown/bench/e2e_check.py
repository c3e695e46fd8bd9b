"""Before anything is timed: are the logits as near to float64 as they must be, and the greedy tokens what float64 says?"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mlpdown.accuracy import CheckError
from mlpdown.bench.e2e_decode import Decoder, hooked
from mlpdown.bench.e2e_models import in_float64

# Each probe is one draw of random signs; their mean square estimates the variance that roundings cause.
NUM_PROBES = 4
PROBE_SEED = 7


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
    """Greedy tokens of the stock and of the patched model in one mode. Each must be what float64 says, as far as 16 bits can tell."""

    name: str
    num_tokens: int
    num_alike: int
    """Tokens before the two first differ."""
    stock: float
    """The most by which the float64 logit of a token falls short of the largest one after the same tokens."""
    patched: float
    limit: float
    """Twice the largest error of a logit that was seen: by so much two logits can be apart and yet change places."""

    def __str__(self) -> str:
        return (
            f"{self.name}: greedy tokens are at most {self.patched:.2e} from the largest float64 logit (stock {self.stock:.2e}, 16-bit "
            f"logits err by up to {self.limit:.2e} together); {self.num_alike} of {self.num_tokens} alike"
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

    def _logits(self, continuation: torch.Tensor, with_prompt: bool = False) -> torch.Tensor:
        """Logits ``[num_tokens, vocabulary]`` after each token of ``continuation``, from one causal pass over all.

        ``with_prompt``: the logits after the prompt come first.
        """
        tokens = torch.cat((self.prompt, continuation.view(1, -1)), 1)
        with torch.inference_mode():
            return self.model(tokens, use_cache=False).logits[0, self.prompt.shape[1] - with_prompt :]

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
        """Decode greedily with both, and ask the float64 model what it would have said after the same tokens.

        Raises:
            CheckError: a token is not the largest logit's, and is farther from it than rounding explains.
        """
        one, other = (self._greedy(decoder, num_tokens) for decoder in (stock, patched))
        num_alike = next((index for index in range(num_tokens) if one[index] != other[index]), num_tokens)
        limit = 2 * self.largest_error
        check = TokensCheck(name, num_tokens, num_alike, self._shortfall(one), self._shortfall(other), limit)
        if not (check.stock <= limit and check.patched <= limit):  # a NaN is not
            raise CheckError(f"{check}: rounding does not explain that")
        return check

    def _greedy(self, decoder: Decoder, num_tokens: int) -> list[int]:
        decoder.rewind()
        for _ in range(num_tokens - 1):
            decoder.step()
        return decoder.tokens()

    def _shortfall(self, tokens: list[int]) -> float:
        """The most by which the logit of one of ``tokens`` falls short of the largest after the prompt and the tokens before it."""
        chosen = torch.tensor(tokens, device=self.prompt.device)
        logits = self._logits(chosen[:-1], with_prompt=True)
        return (logits.amax(-1) - logits.gather(-1, chosen[:, None])[:, 0]).max().item()
