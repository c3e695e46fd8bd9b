"""Backend ``numba``: the specification itself, compiled by Numba for the device of the tensors. Exact, and not meant to be fast."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import validate
from .numba_refusal import numba_refusal


def run(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`mlpdown.run`."""
    validate.check_arguments(hidden_states, attn_output, mlp_intermediate, weight, bias, out)
    validate.check_no_grad("numba", hidden_states, attn_output, mlp_intermediate, weight, bias, out)
    if _is_watched(hidden_states, attn_output, mlp_intermediate, weight, bias, out):
        opaque = _numba_mlp_down(hidden_states, attn_output, mlp_intermediate, weight, bias)
        return opaque if out is None else out.copy_(opaque)
    _check_here(weight)
    result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format) if out is None else out
    if result.numel() == 0:
        return result
    addends = [_rows(tensor) for tensor in (bias, attn_output, hidden_states) if tensor is not None]
    _finish(_row_sums(_rows(mlp_intermediate), _rows(weight)), addends, result.view(-1, weight.shape[0]))
    return result


def partial_sums(mlp_intermediate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As :func:`mlpdown.partial_sums`."""
    validate.check_product(mlp_intermediate, weight)
    validate.check_no_grad("numba", mlp_intermediate, weight)
    if _is_watched(mlp_intermediate, weight):
        return _numba_partial_sums(mlp_intermediate, weight)
    _check_here(weight)
    return _row_sums(_rows(mlp_intermediate), _rows(weight)).view(*mlp_intermediate.shape[:-1], weight.shape[0])


@torch.library.custom_op("mlpdown::numba_mlp_down", mutates_args=())
def _numba_mlp_down(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return run(hidden_states, attn_output, mlp_intermediate, weight, bias, None)


@_numba_mlp_down.register_fake
def _(hidden_states: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@torch.library.custom_op("mlpdown::numba_partial_sums", mutates_args=())
def _numba_partial_sums(mlp_intermediate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return partial_sums(mlp_intermediate, weight)


@_numba_partial_sums.register_fake
def _(mlp_intermediate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    shape = (*mlp_intermediate.shape[:-1], weight.shape[0])
    return torch.empty(shape, dtype=torch.float32, device=weight.device)


def _is_watched(*tensors: torch.Tensor | None) -> bool:
    """Whether torch must see the call as one opaque op, because it traces, or has tensors without data. Numba reads memory behind
    torch's back: where that would be a wrong answer and an op none either, this raises."""
    if torch.compiler.is_compiling():
        return True
    reason = validate.beyond_an_op()
    if reason is not None:
        raise NotImplementedError(f"backend 'numba' cannot be used while {reason}: take backend='torch'")
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.maybe_current_level() is not None
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"every tensor must be on a CPU or a CUDA device for backend 'numba', got {tensor.device}")
        if tensor.layout is not torch.strided:
            raise ValueError(f"every tensor must be strided for backend 'numba', got {tensor.layout}: take its to_dense()")
        if isinstance(tensor, FakeTensor):
            watched = True
        elif (own := validate.own_protocol(tensor)) is not None and (own == "__torch_function__" or not watched):
            raise TypeError(
                f"every tensor must be a plain one for backend 'numba', got {type(tensor).__name__}, which has a {own} of its own"
            )
    return watched


def _check_here(tensor: torch.Tensor) -> None:
    refusal = numba_refusal(tensor.device.type)
    if refusal is not None:
        raise RuntimeError(f"backend 'numba' cannot run here. {refusal}")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[tokens, size]`` in float32, which Numba takes from torch as bfloat16 it does not."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).float().contiguous()


def _row_sums(activation: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from .reference import row_sums

    sums = torch.empty((activation.shape[0], weight.shape[0]), dtype=torch.float32, device=weight.device)
    if sums.numel():
        _call(row_sums, activation, weight, sums)
    return sums


def _finish(sums: torch.Tensor, addends: list[torch.Tensor], out: torch.Tensor) -> None:
    from .reference import finish
    from .reference.order import DTYPES

    bits = out.view(torch.int16) if out.is_cuda else torch.empty(out.shape, dtype=torch.int16)
    _call(finish, sums, addends, DTYPES[str(out.dtype).removeprefix("torch.")], bits)
    if bits.data_ptr() != out.data_ptr():
        out.copy_(bits.view(out.dtype))


def _call(step, first: torch.Tensor, *arguments) -> None:
    """A step of the specification on the device of its tensors; on a GPU, on torch's current stream."""

    def convert(value):
        if isinstance(value, list):
            return [convert(element) for element in value]
        if not isinstance(value, torch.Tensor):
            return value
        return cuda.as_cuda_array(value, sync=False) if value.is_cuda else value.numpy()

    if not first.is_cuda:
        step.on_cpu(*map(convert, (first, *arguments)))
        return
    from numba import cuda

    device = first.device
    with torch.cuda.device(device), cuda.gpus[device.index]:
        stream = cuda.external_stream(torch.cuda.current_stream(device).cuda_stream)
        step.on_cuda(*map(convert, (first, *arguments)), stream=stream)
