"""The op: picks a backend, and calls it. Nothing is computed or checked here: every backend checks what it is given."""

from __future__ import annotations

import torch

from . import native_backend, validate
from .backends import fall_back, other_than_native
from .plan import Plan


def run(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str = "auto",
    out: torch.Tensor | None = None,
    plan: Plan | None = None,
    weight_prefetch: bool = False,
) -> torch.Tensor:
    """``hidden_states + attn_output + weight @ mlp_intermediate + bias``: the tail of a decoder layer.

    Backends ``native`` and ``numba`` accumulate in float32 in one fixed order and round once; their results have the same bits on every
    GPU, under every plan, and on a CPU (``mlpdown/reference/order.py`` states the order). ``torch`` is plain PyTorch.

    Args:
        hidden_states: ``[..., hidden_dim]``, float16 or bfloat16, like every other tensor of the call. The leading dimensions make up
            the tokens.
        attn_output: as ``hidden_states``, or None for models without a parallel residual.
        mlp_intermediate: ``[..., intermediate_dim]``, the activation, for the same number of tokens.
        weight: ``[hidden_dim, intermediate_dim]``, row-major; ``intermediate_dim`` a multiple of 8.
        bias: ``[hidden_dim]`` or None.
        backend: ``"native"`` (one token, CUDA tensors, compute capability 8.0 or newer), ``"numba"`` (the specification, CPU or CUDA),
            ``"torch"``, or ``"auto"``: native where it can run, else torch. A named backend runs or raises.
        out: where to write the result; contiguous, apart from every input.
        plan: how the native kernel is to run; by default chosen from the shape and the device. Never changes a bit.
        weight_prefetch: lets the native kernel read the weight before the kernels ahead of it in the stream have finished. Only for
            weights that none of those still writes: the caller promises that every write to the weight has completed.

    Returns:
        A tensor of the shape of ``hidden_states`` (``out`` if that was given). On the current stream; nothing is synchronised.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.
        RuntimeError: the named backend cannot run on this machine, or CUDA reported an error.
    """
    if plan is not None:
        validate.check_plan_type(plan)
    if backend == "native" or backend == "auto":
        result = native_backend.run(
            hidden_states, attn_output, mlp_intermediate, weight, bias, out, plan, weight_prefetch, backend == "auto"
        )
        if not isinstance(result, Exception):
            return result
        if backend == "native":
            raise result
        backend = fall_back(result)
    return other_than_native(backend).run(hidden_states, attn_output, mlp_intermediate, weight, bias, out)


def partial_sums(
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    *,
    backend: str = "auto",
    plan: Plan | None = None,
    weight_prefetch: bool = False,
) -> torch.Tensor:
    """``weight @ mlp_intermediate`` in float32, unrounded: what a rank contributes when the reduction axis is split over ranks.

    Args:
        mlp_intermediate: ``[..., intermediate_dim]``, float16 or bfloat16.
        weight: ``[hidden_dim, intermediate_dim]``, of the same dtype and device.
        backend, plan, weight_prefetch: as in :func:`run`.

    Returns:
        float32 ``[..., hidden_dim]``. With ``native`` and ``numba`` the bits are those of the canonical order.

    Raises:
        As :func:`run`.
    """
    if plan is not None:
        validate.check_plan_type(plan)
    if backend == "native" or backend == "auto":
        result = native_backend.partial_sums(mlp_intermediate, weight, plan, weight_prefetch, backend == "auto")
        if not isinstance(result, Exception):
            return result
        if backend == "native":
            raise result
        backend = fall_back(result)
    return other_than_native(backend).partial_sums(mlp_intermediate, weight)


def pythia_2b8_mlp_only(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor,
    mlp_intermediate: torch.Tensor,
    mlp_down_weight: torch.Tensor,
    mlp_down_bias: torch.Tensor,
) -> torch.Tensor:
    """The op at Pythia-2.8B's size, with the argument list of ClusterFusion's kernel of this name.

    Args:
        hidden_states, attn_output: ``[..., 2560]``, one token: ``[2560]``, ``[1, 2560]``, ``[1, 1, 2560]``.
        mlp_intermediate: ``[..., 10240]``, one token.
        mlp_down_weight: ``[2560, 10240]``.
        mlp_down_bias: ``[2560]``. All float16 or all bfloat16.

    Returns:
        A tensor of the shape of ``hidden_states``, as :func:`run` with ``backend="auto"``.

    Raises:
        ValueError: a shape is another one. Otherwise as :func:`run`.
    """
    expected = {
        "hidden_states": (hidden_states, 2560, None),
        "attn_output": (attn_output, 2560, None),
        "mlp_intermediate": (mlp_intermediate, 10240, None),
        "mlp_down_weight": (mlp_down_weight, 10240, (2560, 10240)),
        "mlp_down_bias": (mlp_down_bias, 2560, (2560,)),
    }
    for name, (tensor, size, shape) in expected.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if shape is not None and tensor.shape != shape:
            transposed = " (it looks transposed)" if tuple(tensor.shape) == shape[::-1] else ""
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}{transposed}")
        if shape is None and (tensor.dim() == 0 or tensor.shape[-1] != size or tensor.numel() != size):
            raise ValueError(f"{name} must be one token, [..., {size}], got {list(tensor.shape)}")
    return run(hidden_states, attn_output, mlp_intermediate, mlp_down_weight, mlp_down_bias)
