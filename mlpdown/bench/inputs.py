"""The calls that are timed: their inputs, and what their results are held to.

A run makes as many calls as a model has layers, each over a weight of its own, with the result of the call before as ``hidden_states``. All
weights together exceed the L2 cache three times, so that every call finds its weight in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..accuracy import CheckError, bound_of, float64_result, magnitudes, outside
from ..cases import Case
from ..check import result_bits
from .baselines import Layer
from .shapes import Shape

MINIMUM_CALLS = 32
TIMES_L2 = 3


def calls_for(shape: Shape, l2_bytes: int) -> int:
    """Calls whose weights exceed an L2 cache of this size three times."""
    return max(MINIMUM_CALLS, math.ceil(TIMES_L2 * l2_bytes / shape.weight_bytes))


class Inputs:
    """Random inputs, made on the device: all ``[1, dim]``, ``bias`` ``[hidden_dim]``, a weight for each call."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, num_calls: int, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def values(scale: float, *size: int) -> torch.Tensor:
            return torch.randn(size, dtype=dtype, device=device, generator=generator).mul_(scale)

        self.dtype, (_, hidden_dim, intermediate_dim) = str(dtype).removeprefix("torch."), shape
        self.hidden_states, self.attn_output = values(1.0, 1, hidden_dim), values(0.25, 1, hidden_dim)
        self.mlp_intermediate, self.bias = values(1.0, 1, intermediate_dim), values(0.1, hidden_dim)
        self.weights = [values(0.02, hidden_dim, intermediate_dim) for _ in range(num_calls)]

    def call(self, layer: Layer, index: int = 0, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """One of the calls, by default with the first one's ``hidden_states``."""
        before = self.hidden_states if hidden_states is None else hidden_states
        return layer(before, self.attn_output, self.mlp_intermediate, self.weights[index], self.bias)

    def run(self, layer: Layer) -> list[torch.Tensor]:
        """Every call in turn; all results."""
        outs: list[torch.Tensor] = []
        for index in range(len(self.weights)):
            outs.append(self.call(layer, index, outs[-1] if outs else None))
        return outs

    def case(self, index: int, hidden_states: torch.Tensor) -> Case:
        """A call in the form that the specification and the oracle take."""
        tensors = (hidden_states, self.attn_output, self.mlp_intermediate, self.weights[index], self.bias)
        return Case(self.dtype, *(tensor.float().cpu().numpy() for tensor in tensors))


class Checks:
    """Hold the first and the last of a run's results to float64, or to the specification's bits."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        # But for hidden_states, which depend on who computed the results before.
        cases = [inputs.case(index, torch.zeros_like(inputs.hidden_states)) for index in (0, -1)]
        self.oracles = [(float64_result(case), magnitudes(case)) for case in cases]

    def check(self, name: str, outs: Sequence[torch.Tensor], *, bits: bool = False) -> None:
        """Raise CheckError unless both results are within the bound of a sum in any order; with ``bits``, are the specification's."""
        inputs, befores = self.inputs, [self.inputs.hidden_states, [self.inputs.hidden_states, *outs][-2]]
        for which, index, before, (exact, sizes) in zip(("first", "last"), (0, -1), befores, self.oracles, strict=True):
            hidden_states, actual = before.double().cpu().numpy(), result_bits(outs[index])
            bound = bound_of(sizes + abs(hidden_states), inputs.weights[0].shape[1], inputs.dtype, any_order=True)
            wrongs = {"are further from float64 than their bound": outside(actual, exact + hidden_states, bound, inputs.dtype)}
            if bits:
                wrongs["have other bits than the specification"] = actual != inputs.case(index, before).expected_bits()
            for what, wrong in wrongs.items():
                if wrong.any():
                    raise CheckError(f"{name}: {wrong.sum()} of {wrong.size} elements of the {which} call {what}")


def check_same_bits(name: str, outs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Raise CheckError unless two runs agree in every bit of every call."""
    actual, other = (torch.stack(list(tensors)).view(torch.int16) for tensors in (outs, expected))
    wrong = int((actual != other).sum())
    if wrong:
        raise CheckError(f"{name}: {wrong} elements have other bits than under the default plan")
