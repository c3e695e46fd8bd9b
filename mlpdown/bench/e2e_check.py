"""Before anything is timed: are the logits as near to float64 as they must be, and the greedy tokens what float64 says?"""

from __future__ import annotations

from typing import Any

import torch

from ..accuracy import CheckError
from .e2e_decode import Decoder
from .e2e_models import twin

# Each probe is one draw of random signs; their mean square estimates the variance that roundings cause.
NUM_PROBES = 4
PROBE_SEED = 7


class Oracle:
    """The same model in float64, and what it says of the errors of others."""

    def __init__(self, model: Any, prompt: torch.Tensor, continuation: torch.Tensor) -> None:
        self.epsilon = torch.finfo(model.dtype).eps
        self.model, self.prompt, self.continuation = twin(model, torch.float64), prompt, continuation
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

        handles = [layer.register_forward_hook(move) for layer in self.model.base_model.layers]
        try:
            return self._logits(self.continuation)
        finally:
            for handle in handles:
                handle.remove()

    def check_logits(self, name: str, stock: torch.Tensor, patched: torch.Tensor) -> dict[str, Any]:
        """Hold both against float64.

        The op rounds once where PyTorch rounds up to three times, and the rest of the model is common. So the patched logits may be no
        farther from float64 than the stock ones, but for the one rounding a layer that both have and that may fall otherwise. This is
        an argument of first order, for errors that are independent, which is why it is made for the root mean square over many logits.

        Returns:
            ``stock`` and ``patched``: root mean square distances over tokens and vocabulary; ``one_rounding``: by how much one rounding of
            each layer's output moves the logits; ``bound``: of ``patched``.

        Raises:
            CheckError: the patched logits are farther away, or are not all finite.
        """
        errors = [logits.double() - self.exact for logits in (stock, patched)]
        self.largest_error = max(self.largest_error, *(error.abs().max().item() for error in errors))
        distances = [error.square().mean().sqrt().item() for error in errors]
        bound = distances[0] + self.one_rounding
        if not distances[1] <= bound:  # a NaN is not
            raise CheckError(
                f"{name}: patched logits are {distances[1]:.3e} (root mean square) from float64, must be at most {bound:.3e}: the stock "
                f"model's {distances[0]:.3e} and one rounding a layer, {self.one_rounding:.3e}"
            )
        return {"name": name, "stock": distances[0], "patched": distances[1], "one_rounding": self.one_rounding, "bound": bound}

    def check_tokens(self, name: str, stock: Decoder, patched: Decoder, num_tokens: int) -> dict[str, Any]:
        """Decode greedily with both, and ask the float64 model what it would have said after the same tokens.

        Returns:
            ``num_alike``: tokens before the two first differ; ``stock`` and ``patched``: the most by which the float64 logit of a token falls
            short of the largest one; ``limit``: twice the largest error of a logit seen. By so much two logits can be apart and yet change
            places.

        Raises:
            CheckError: a token is not the largest logit's, and is farther from it than rounding explains.
        """
        said = [self._greedy(decoder, num_tokens) for decoder in (stock, patched)]
        num_alike = next((index for index in range(num_tokens) if said[0][index] != said[1][index]), num_tokens)
        shortfalls, limit = [self._shortfall(tokens) for tokens in said], 2 * self.largest_error
        if not all(shortfall <= limit for shortfall in shortfalls):  # a NaN is not
            raise CheckError(
                f"{name}: greedy tokens are {shortfalls[0]:.2e} (stock) and {shortfalls[1]:.2e} (patched) from the largest float64 logit, "
                f"must be at most {limit:.2e}; {num_alike} of {num_tokens} alike: rounding does not explain that"
            )
        numbers = {"num_tokens": num_tokens, "num_alike": num_alike}
        return {"name": name, **numbers, "stock": shortfalls[0], "patched": shortfalls[1], "limit": limit}

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
