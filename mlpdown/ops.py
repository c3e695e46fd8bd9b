"""The op: validates, picks a backend, dispatches. Nothing is computed here."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch
from torch.compiler import is_compiling

from . import native_backend, torch_backend, validate
from .backends import BACKENDS, native_refusal_here, say_once
from .plan import Plan

if TYPE_CHECKING:
    import torch.distributed


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
    group: torch.distributed.ProcessGroup | None = None,
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
        group: a process group over which the reduction axis is split (row parallel); ``weight`` and ``mlp_intermediate`` are this
            rank's slices. See :func:`mlpdown.parallel.run_row_parallel`.

    Returns:
        A tensor of the shape of ``hidden_states`` (``out`` if that was given). On the current stream; nothing is synchronised.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was expected and what came.
        RuntimeError: the named backend cannot run on this machine, or CUDA reported an error.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a mlpdown.Plan or None, got {type(plan).__name__}")
    if group is not None:
        from .parallel import run_row_parallel

        validate.check_no_grad(backend, hidden_states, attn_output, mlp_intermediate, weight, bias, out)
        if out is not None:
            validate.check_arguments(hidden_states, attn_output, mlp_intermediate, weight, bias, out)
        result = run_row_parallel(
            hidden_states,
            attn_output,
            mlp_intermediate,
            weight,
            bias,
            group=group,
            backend=backend,
            plan=plan,
            weight_prefetch=weight_prefetch,
        )
        return result if out is None else out.copy_(result)

    tensors = (hidden_states, attn_output, mlp_intermediate, weight, bias)
    if backend == "native" or (backend == "auto" and _prefers_native(tensors)):
        if is_compiling() or not native_backend.is_loaded():
            # Nothing is compiled for a call that cannot be.
            if backend == "native":
                validate.check_no_grad(backend, *tensors, out)
            refusal = _refusal(tensors, out)
            if refusal is None:
                return native_backend.run(*tensors, out, plan, weight_prefetch)
        else:
            # The op checks its arguments faster than Python can. Only when it refuses are they looked at here, for the words. They are
            # handed on one by one, since Python takes its time over `*tensors`.
            try:
                if backend == "native" and torch.is_grad_enabled():
                    validate.check_none_requires_grad(
                        backend, hidden_states, attn_output, mlp_intermediate, weight, bias, out
                    )
                return native_backend.run_eagerly(
                    hidden_states, attn_output, mlp_intermediate, weight, bias, out, plan, weight_prefetch
                )
            except Exception:
                refusal = _refusal(tensors, out)
                if refusal is None:
                    raise
        if backend == "native":
            raise refusal
        say_once(f"mlpdown takes backend 'torch': {refusal}")
        return torch_backend.run(*tensors, out)

    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {backend!r}")
    validate.check_arguments(*tensors, out)
    if backend == "numba":
        from . import numba_backend

        validate.check_no_grad(backend, *tensors, out)
        return numba_backend.run(*tensors, out)
    return torch_backend.run(*tensors, out)


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
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {backend!r}")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a mlpdown.Plan or None, got {type(plan).__name__}")
    validate.check_product(mlp_intermediate, weight)
    if backend == "native" or (backend == "auto" and _prefers_native((None, None, mlp_intermediate, weight, None))):
        if backend == "native":
            validate.check_no_grad(backend, mlp_intermediate, weight)
        refusal = validate.native_product_refusal(mlp_intermediate, weight) or _refusal_of_device(weight.get_device())
        if refusal is None:
            return native_backend.partial_sums(mlp_intermediate, weight, plan, weight_prefetch)
        if backend == "native":
            raise refusal
        say_once(f"mlpdown takes backend 'torch': {refusal}")
    if backend == "numba":
        from . import numba_backend

        validate.check_no_grad(backend, mlp_intermediate, weight)
        return numba_backend.partial_sums(mlp_intermediate, weight)
    return torch_backend.partial_sums(mlp_intermediate, weight)


def pythia_2b8_mlp_only(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor,
    mlp_intermediate: torch.Tensor,
    mlp_down_weight: torch.Tensor,
    mlp_down_bias: torch.Tensor,
) -> torch.Tensor:
    """The op at Pythia-2.8B's size, with the argument list of ClusterFusion's kernel of this name.

    Args:
        hidden_states, attn_output: ``[1, 2560]``. mlp_intermediate: ``[1, 10240]``. mlp_down_weight: ``[2560, 10240]``.
        mlp_down_bias: ``[2560]``. All float16 or all bfloat16.

    Returns:
        ``[1, 2560]``, as :func:`run` with ``backend="auto"``.

    Raises:
        ValueError: a shape is another one. Otherwise as :func:`run`.
    """
    expected = {
        "hidden_states": (hidden_states, (1, 2560)),
        "attn_output": (attn_output, (1, 2560)),
        "mlp_intermediate": (mlp_intermediate, (1, 10240)),
        "mlp_down_weight": (mlp_down_weight, (2560, 10240)),
        "mlp_down_bias": (mlp_down_bias, (2560,)),
    }
    for name, (tensor, shape) in expected.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    return run(hidden_states, attn_output, mlp_intermediate, mlp_down_weight, mlp_down_bias)


def _prefers_native(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether ``auto`` should try the native kernel: a GPU that it runs on, one token, nothing to differentiate."""
    mlp_intermediate, weight = tensors[2], tensors[3]
    if not isinstance(weight, torch.Tensor) or not isinstance(mlp_intermediate, torch.Tensor) or weight.dim() != 2:
        return False  # of no use to any backend; the checks that follow say so
    passed_over = None
    if not weight.is_cuda:
        passed_over = "native needs CUDA tensors"
    elif mlp_intermediate.numel() != weight.shape[1]:
        passed_over = "native takes one token a call"
    elif validate.needs_grad(*tensors):
        passed_over = "native has no derivative, and grad mode is on"
    if passed_over is not None:
        say_once(f"mlpdown takes backend 'torch': {passed_over}", level=logging.INFO)
        return False
    refusal = _refusal_of_device(weight.get_device())
    if refusal is not None:
        say_once(f"mlpdown takes backend 'torch': {refusal}")
    return refusal is None


def _refusal(tensors: tuple[torch.Tensor | None, ...], out: torch.Tensor | None) -> Exception | None:
    """Raise for arguments that no backend takes; return what only the native kernel refuses."""
    hidden_states, attn_output, mlp_intermediate, weight, bias = tensors
    validate.check_arguments(hidden_states, attn_output, mlp_intermediate, weight, bias, out)  # type: ignore[arg-type]
    assert (
        isinstance(hidden_states, torch.Tensor)
        and isinstance(mlp_intermediate, torch.Tensor)
        and isinstance(weight, torch.Tensor)
    )
    refusal = validate.native_refusal(hidden_states, attn_output, mlp_intermediate, weight, bias)
    return refusal if refusal is not None else _refusal_of_device(weight.get_device())


@functools.cache
def _cached_refusal_of_device(device_index: int) -> tuple[type[Exception], str] | None:
    refusal = native_refusal_here(device_index)
    return None if refusal is None else (type(refusal), str(refusal))


def _refusal_of_device(device_index: int) -> Exception | None:
    # A new exception each time: one that is raised again keeps every caller's frames, and their tensors, alive.
    cached = _cached_refusal_of_device(device_index)
    return None if cached is None else cached[0](cached[1])


# What torch.compiler.assume_constant_result does, without its import of torch.compile, which takes a second. On a function of ours, not on
# the cache: torch.compile looks through that, and would trace the loading of the library.
_refusal_of_device._dynamo_marked_constant = True  # type: ignore[attr-defined]
