"""Before anything is timed: are the logits as near to float64 as they must be, and the greedy tokens what float64 says?"""

from __future__ import annotations

from typing import Any

import torch

from ..accuracy import CheckError
from ..gpt_neox import twin
from .e2e_decode import Decoder

# Each probe is one draw of random signs; their mean square estimates the variance that roundings cause.
NUM_PROBES = 4
PROBE_SEED = 7


class Oracle:
    """The same model in float64, and what it says of the errors of others."""

    def __init__(self, model: Any, prompt: torch.Tensor, continuation: torch.Tensor) -> None:
        self.model, self.prompt = twin(model, torch.float64), prompt
        self.exact, self.largest_error = self._logits(continuation), 0.0
        generator = torch.Generator(prompt.device).manual_seed(PROBE_SEED)

        def move(module: Any, inputs: Any, output: Any) -> Any:
            """Each layer's output by half an ULP of the model's dtype, up or down."""
            states = output[0] if isinstance(output, tuple) else output
            signs = torch.randint(0, 2, states.shape, generator=generator, device=states.device) * 2 - 1
            moved = states * (1 + signs * (torch.finfo(model.dtype).eps / 2))
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handles = [layer.register_forward_hook(move) for layer in self.model.base_model.layers]
        squares = [(self._logits(continuation) - self.exact).square().mean().item() for _ in range(NUM_PROBES)]
        for handle in handles:
            handle.remove()
        self.one_rounding = (sum(squares) / NUM_PROBES) ** 0.5

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
        ours, theirs = (error.square().mean().sqrt().item() for error in reversed(errors))
        bound = theirs + self.one_rounding
        if not ours <= bound:  # a NaN is not
            raise CheckError(
                f"{name}: patched logits are {ours:.3e} (root mean square) from float64, must be at most {bound:.3e}: the stock model's "
                f"{theirs:.3e} and one rounding a layer, {self.one_rounding:.3e}"
            )
        return {"name": name, "stock": theirs, "patched": ours, "one_rounding": self.one_rounding, "bound": bound}

    def check_tokens(self, name: str, stock: Decoder, patched: Decoder, num_tokens: int) -> dict[str, Any]:
        """Decode greedily with both, and ask the float64 model what it would have said after the same tokens.

        Returns:
            ``num_alike``: tokens before the two first differ; ``stock`` and ``patched``: the most by which the float64 logit of a token
            falls short of the largest one; ``limit``: twice the largest error of a logit seen, by which two logits can swap.

        Raises:
            CheckError: a token is not the largest logit's, and is farther from it than rounding explains.
        """
        said, shortfalls, limit = [], [], 2 * self.largest_error
        for decoder in (stock, patched):
            decoder.rewind()
            for _ in range(num_tokens - 1):
                decoder.step()
            said.append(decoder.tokens())
            chosen = torch.tensor(said[-1], device=self.prompt.device)
            logits = self._logits(chosen[:-1], with_prompt=True)
            shortfalls.append((logits.amax(-1) - logits.gather(-1, chosen[:, None])[:, 0]).max().item())
        num_alike = next((index for index in range(num_tokens) if said[0][index] != said[1][index]), num_tokens)
        if not all(shortfall <= limit for shortfall in shortfalls):  # a NaN is not
            raise CheckError(
                f"{name}: greedy tokens are {shortfalls[0]:.2e} (stock) and {shortfalls[1]:.2e} (patched) from the largest float64 logit, "
                f"must be at most {limit:.2e}; {num_alike} of {num_tokens} alike: rounding does not explain that"
            )
        counts = {"name": name, "num_tokens": num_tokens, "num_alike": num_alike}
        return {**counts, "stock": shortfalls[0], "patched": shortfalls[1], "limit": limit}

    @torch.inference_mode()
    def _logits(self, continuation: torch.Tensor, with_prompt: bool = False) -> torch.Tensor:
        """Logits ``[num_tokens, vocabulary]`` after each token of ``continuation``; ``with_prompt``: those after the prompt come first."""
        tokens = torch.cat((self.prompt, continuation.view(1, -1)), 1)
        return self.model(tokens, use_cache=False).logits[0, self.prompt.shape[1] - with_prompt :]
