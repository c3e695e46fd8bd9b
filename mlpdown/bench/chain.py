"""A chain of calls over distinct weights: its inputs, its capture in a CUDA graph, and what its results are held to.

The result of each call is ``hidden_states`` of the next, as between the layers of a model; weights in all exceed the L2 cache three
times, so that every call finds its weight in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..accuracy import CheckError
from ..cases import Case
from .shapes import Shape

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(hidden_states, attn_output, mlp_intermediate, weight, bias) -> out``."""

MINIMUM_CALLS = 32
TIMES_L2 = 3
_NUM_ROUNDINGS = 3  # of PyTorch's result: after the product with its bias, and after each residual
_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_FLOAT32_UNIT = 2.0**-24


def calls_for(shape: Shape, l2_bytes: int) -> int:
    """Calls of a chain whose weights exceed an L2 cache of this size three times."""
    return max(MINIMUM_CALLS, math.ceil(TIMES_L2 * l2_bytes / shape.weight_bytes))


@dataclasses.dataclass
class Chain:
    """The inputs: all ``[1, dim]``, ``bias`` ``[hidden_dim]``, a weight for each call."""

    hidden_states: torch.Tensor
    attn_output: torch.Tensor
    mlp_intermediate: torch.Tensor
    weights: list[torch.Tensor]
    bias: torch.Tensor

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device, num_calls: int, seed: int) -> Chain:
        generator = torch.Generator(device).manual_seed(seed)

        def values(*size: int, scale: float) -> torch.Tensor:
            return torch.randn(size, dtype=dtype, device=device, generator=generator).mul_(scale)

        return cls(
            hidden_states=values(1, shape.hidden_dim, scale=1.0),
            attn_output=values(1, shape.hidden_dim, scale=0.25),
            mlp_intermediate=values(1, shape.intermediate_dim, scale=1.0),
            weights=[values(shape.hidden_dim, shape.intermediate_dim, scale=0.02) for _ in range(num_calls)],
            bias=values(shape.hidden_dim, scale=0.1),
        )

    def run(self, layer: Layer) -> list[torch.Tensor]:
        """Every call in turn; all results."""
        outs = []
        hidden_states = self.hidden_states
        for weight in self.weights:
            hidden_states = layer(hidden_states, self.attn_output, self.mlp_intermediate, weight, self.bias)
            outs.append(hidden_states)
        return outs

    def run_first(self, layer: Layer) -> torch.Tensor:
        """The first call alone."""
        return layer(self.hidden_states, self.attn_output, self.mlp_intermediate, self.weights[0], self.bias)


class Oracle:
    """The first and the last call of a chain in float64, for results that round as they please, and in the specification's bits.

    A result may differ from float64 by PyTorch's roundings in its dtype and those of the sum in float32, each a relative unit of a
    partial sum; the sum of the magnitudes of all terms is above every one of those.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.dtype = chain.bias.dtype
        self.products = []
        self.bounds = []
        unit = _NUM_ROUNDINGS * _UNIT[self.dtype] + chain.mlp_intermediate.shape[-1] * _FLOAT32_UNIT
        activation = chain.mlp_intermediate[0].double()
        for weight in (chain.weights[0], chain.weights[-1]):
            matrix = weight.double()
            self.products.append(matrix @ activation + chain.bias.double() + chain.attn_output[0].double())
            residuals = chain.bias.double().abs() + chain.attn_output[0].double().abs()
            self.bounds.append(unit * (matrix.abs_() @ activation.abs() + residuals))
        self.unit = unit

    def check(self, name: str, outs: Sequence[torch.Tensor]) -> None:
        """Raise CheckError unless the first and the last result are within the bound of float64."""
        hidden_states = [self.chain.hidden_states, outs[-2] if len(outs) > 1 else self.chain.hidden_states]
        for which, before, out, product, bound in zip(
            ("first", "last"), hidden_states, (outs[0], outs[-1]), self.products, self.bounds, strict=True
        ):
            exact = product + before[0].double()
            allowed = bound + self.unit * before[0].double().abs()
            excess = (out[0].double() - exact).abs() - allowed
            wrong = int((~(excess <= 0)).sum())
            if wrong:
                raise CheckError(
                    f"{name}: {wrong} of {exact.numel()} elements of the chain's {which} call are further from float64 than "
                    f"their bound, the worst by {float(excess.max()):.3e}"
                )

    def check_bits(self, name: str, outs: Sequence[torch.Tensor]) -> None:
        """Raise CheckError unless the first and the last result have the specification's bits."""
        hidden_states = [self.chain.hidden_states, outs[-2] if len(outs) > 1 else self.chain.hidden_states]
        weights = (self.chain.weights[0], self.chain.weights[-1])
        for which, before, weight, out in zip(("first", "last"), hidden_states, weights, (outs[0], outs[-1]), strict=True):
            tensors = (before, self.chain.attn_output, self.chain.mlp_intermediate, weight, self.chain.bias)
            arrays = [tensor.float().cpu().numpy() for tensor in tensors]
            expected = Case({torch.float16: "float16", torch.bfloat16: "bfloat16"}[self.dtype], *arrays).expected_bits()
            wrong = int((out.cpu().view(torch.int16).numpy().view(np.uint16) != expected).sum())
            if wrong:
                raise CheckError(
                    f"{name}: {wrong} of {expected.size} elements of the chain's {which} call have other bits than the specification"
                )


def check_same_bits(name: str, outs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Raise CheckError unless two runs of a chain agree in every bit of every call."""
    actual, other = (torch.stack(list(tensors)).view(torch.int16) for tensors in (outs, expected))
    wrong = int((actual != other).sum())
    if wrong:
        raise CheckError(f"{name}: {wrong} elements of the chain have other bits than under the default plan")


class Captured:
    """Work in a CUDA graph: run once to warm up, once to be captured, then replayed.

    ``torch.cuda.graph`` would do, but for the garbage collection before each capture, which takes longer than a whole measurement.
    """

    def __init__(self, work: Callable[[], list[torch.Tensor]]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
            torch.cuda.synchronize()
            self.graph.capture_begin()
            try:
                self.outs = work()
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> None:
        self.graph.replay()
