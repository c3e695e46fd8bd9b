"""Backend ``numba`` reads memory behind torch's back: where torch traces or transforms a call it is an op, or it refuses. It never bakes in
what lay in the memory of a tensor without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import mlpdown

Tensors = tuple[torch.Tensor, ...]
SEEDS = (1, 2)


def inputs(seed: int, num_tokens: int = 1) -> Tensors:
    """Of ``calls``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_tokens, 24), (num_tokens, 24), (num_tokens, 64), (24, 64), (24,))
    return tuple(torch.randn(shape, generator=generator).half() for shape in shapes)


def run(*tensors: torch.Tensor) -> torch.Tensor:
    return mlpdown.run(*tensors, backend="numba")


def run_into(*tensors: torch.Tensor) -> torch.Tensor:
    return mlpdown.run(*tensors, backend="numba", out=torch.empty_like(tensors[0]))


def partial_sums(*tensors: torch.Tensor) -> torch.Tensor:
    return mlpdown.partial_sums(tensors[2], tensors[3], backend="numba")


calls = pytest.mark.parametrize("call", [run, run_into, partial_sums])
Call = Callable[..., torch.Tensor]


@calls
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_graph_of_make_fx_computes_with_other_inputs_too(call: Call, mode: str, seed: int) -> None:
    graph = make_fx(call, tracing_mode=mode)(*inputs(seed))
    for tensors in (inputs(seed), inputs(seed + 10)):
        assert torch.equal(graph(*tensors), call(*tensors))


@calls
def test_fake_tensors_give_a_fake_result_within_their_mode_and_without(call: Call) -> None:
    right = call(*inputs(3, 2))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in inputs(3, 2)]
        results = [call(*fakes)]
    results.append(call(*fakes))
    for result in results:
        assert isinstance(result, torch._subclasses.FakeTensor)
        assert (result.shape, result.dtype, result.device) == (right.shape, right.dtype, right.device)


@calls
@pytest.mark.parametrize("seed", SEEDS)
def test_functionalize_and_harmless_modes_change_no_bit(call: Call, seed: int) -> None:
    tensors = inputs(seed)
    right = call(*tensors)
    assert torch.equal(torch.func.functionalize(call)(*tensors), right)
    with FlopCounterMode(display=False):
        assert torch.equal(call(*tensors), right)
    with torch.device("cpu"):
        assert torch.equal(call(*tensors), right)


@calls
@pytest.mark.parametrize("seed", SEEDS)
def test_compiled_call_is_one_op(call: Call, seed: int) -> None:
    torch._dynamo.reset()
    tensors = inputs(seed)
    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(*tensors), call(*tensors))


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function: Any, kinds: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        return result * 2 if function is torch.nn.functional.linear else result


@calls
def test_what_an_op_cannot_answer_to_is_refused_by_name(call: Call) -> None:
    tensors = inputs(5)
    stacked = tuple(torch.stack([tensor, tensor]) for tensor in tensors)

    def refused(what: str, function: Callable[[], Any]) -> None:
        with pytest.raises(NotImplementedError, match=rf"^backend 'numba' cannot be used while {what}: take backend='torch'$"):
            function()

    refused("a torch.func transform is under way", lambda: torch.func.vmap(call)(*stacked))
    refused("a torch.func transform is under way", lambda: torch.func.functionalize(torch.func.vmap(call))(*stacked))
    refused("torch.jit traces", lambda: torch.jit.trace(call, tensors, check_trace=False))
    with Doubling():
        refused("the TorchFunctionMode Doubling is on", lambda: call(*tensors))


@calls
@pytest.mark.parametrize("position", [2, 3])
def test_sparse_tensor_is_refused_by_its_layout(call: Call, position: int) -> None:
    tensors = list(inputs(6))
    tensors[position] = tensors[position].to_sparse()
    with pytest.raises(ValueError, match=r"^every tensor must be strided for backend 'numba', got torch.sparse_coo"):
        call(*tensors)


class Wrapper(torch.Tensor):
    """Has its value in another tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)  # type: ignore[attr-defined]

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        return function(*(a.value if isinstance(a, cls) else a for a in arguments), **(keywords or {}))


@calls
def test_tensor_with_a_dispatch_of_its_own_is_refused_by_its_class(call: Call) -> None:
    tensors = list(inputs(7))
    tensors[3] = Wrapper(tensors[3])
    with pytest.raises(TypeError, match=r"got Wrapper, which has a __torch_dispatch__ of its own$"):
        call(*tensors)
