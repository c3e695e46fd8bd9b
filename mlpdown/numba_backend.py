"""Backend ``numba``: the specification itself, compiled by Numba for the device of the tensors. Exact, and not meant to be fast."""

from __future__ import annotations

import functools

import numpy as np
import torch


def run(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`mlpdown.run`, with arguments that have been checked."""
    result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format) if out is None else out
    if result.numel() == 0:
        return result
    rows = result.view(-1, weight.shape[0])
    tensors = (
        _rows(hidden_states),
        None if attn_output is None else _rows(attn_output),
        _rows(mlp_intermediate),
        _rows(weight),
        None if bias is None else bias.detach().float().contiguous(),
    )
    dtype = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[weight.dtype]
    if weight.is_cuda:
        _launch_on_gpu(*tensors, dtype=dtype, out=rows.view(torch.int16), sums=None)
    else:
        from .reference import mlp_down

        bits = mlp_down(*(None if t is None else t.numpy() for t in tensors), dtype=dtype)
        rows.copy_(torch.from_numpy(bits.view(np.int16)).view(weight.dtype))
    return result


def partial_sums(mlp_intermediate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As :func:`mlpdown.partial_sums`, with arguments that have been checked."""
    activation, matrix = _rows(mlp_intermediate), _rows(weight)
    shape = (*mlp_intermediate.shape[:-1], weight.shape[0])
    if weight.is_cuda:
        sums = torch.empty((activation.shape[0], weight.shape[0]), dtype=torch.float32, device=weight.device)
        if sums.numel():
            _launch_on_gpu(None, None, activation, matrix, None, dtype="float16", out=None, sums=sums)
    else:
        from .reference import partial_sums as reference_partial_sums

        sums = torch.from_numpy(reference_partial_sums(activation.numpy(), matrix.numpy()))
    return sums.view(shape)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).float().contiguous()


def _launch_on_gpu(hidden_states, attn_output, mlp_intermediate, weight, bias, *, dtype, out, sums) -> None:
    """Enqueue the specification's kernel on torch's current stream of the tensors' device."""
    from numba import cuda

    from .reference import kernel
    from .reference.order import DTYPES, vectors_per_segment

    device = weight.device
    with torch.cuda.device(device), cuda.gpus[device.index]:
        absent = functools.partial(torch.empty, device=device)
        arrays = [
            absent((0, 0)) if hidden_states is None else hidden_states,
            absent((0, 0)) if attn_output is None else attn_output,
            mlp_intermediate,
            weight,
            absent(0) if bias is None else bias,
            absent((0, 0)) if sums is None else sums,
            absent((0, 0), dtype=torch.int16) if out is None else out,
        ]
        views = [cuda.as_cuda_array(tensor, sync=False) for tensor in arrays]
        kernel.launch(
            views[0],
            views[1],
            attn_output is not None,
            views[2],
            views[3],
            views[4],
            bias is not None,
            DTYPES[dtype],
            vectors_per_segment(weight.shape[1]),
            views[5],
            views[6],
            stream=cuda.external_stream(torch.cuda.current_stream(device).cuda_stream),
        )
