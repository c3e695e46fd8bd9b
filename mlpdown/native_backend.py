"""Backend ``native``: the production kernel. Loads its library once, registers fakes, and turns plans into the op's arguments."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import validate
from .header import plan_members
from .heuristics import choose_plan
from .jit import BuildError
from .plan import MINIMUM_COMPUTE_CAPABILITY, Device, Plan, check_plan

# The op's overloads, once the library is loaded: globals, because a look-up in torch.ops costs more.
_run: Any = None
_run_out: Any = None
_row_sums: Any = None
# What these call: the same without the overload's own Python, which torch.compile must see and an eager call need not wait for.
_eager_run: Any = None
_eager_run_out: Any = None


class PassedOver(Exception):
    """Why ``auto`` does not ask the native kernel. A value, never raised."""


OF_NO_USE = PassedOver("no backend takes these arguments")
"""The next backend's checks say what is wrong."""
_NO_CUDA = PassedOver("native needs CUDA tensors")
_SEVERAL_TOKENS = PassedOver("native takes one token a call")
_NEEDS_GRAD = PassedOver("native has no derivative, and grad mode is on")
_OVERRIDDEN = PassedOver("an argument is a tensor subclass with a __torch_function__ of its own")
_PLAIN = frozenset((*validate.PLAIN_CLASSES, type(None)))


@functools.cache
def load() -> None:
    """Load (if need be, build) the library, and tell torch.compile about its ops.

    Raises:
        mlpdown.jit.BuildError: there is no library for this source and none can be built; the message says why and what to do.
    """
    global _run, _run_out, _row_sums, _eager_run, _eager_run_out
    from .jit import library

    library.load()
    torch.library.register_fake("mlpdown::run")(_fake)
    torch.library.register_fake("mlpdown::run.out")(_fake_out)
    torch.library.register_fake("mlpdown::row_sums")(_fake_row_sums)
    _run_out = torch.ops.mlpdown.run.out
    _row_sums = torch.ops.mlpdown.row_sums.default
    overload = torch.ops.mlpdown.run.default
    # The attribute is torch's own affair: without it, the overload does.
    _eager_run = getattr(overload, "_op", overload)
    _eager_run_out = getattr(_run_out, "_op", _run_out)
    _run = overload  # last: whether the library is loaded is asked of it


def _fake(hidden_states, attn_output, mlp_intermediate, weight, bias, plan):
    return torch.empty_like(hidden_states)


def _fake_out(hidden_states, attn_output, mlp_intermediate, weight, bias, plan, out):
    return None


def _fake_row_sums(mlp_intermediate, weight, plan):
    return mlp_intermediate.new_empty((weight.shape[0],), dtype=torch.float32)


def run(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    plan: Plan | None,
    weight_prefetch: bool,
    optional: bool,
) -> torch.Tensor | Exception:
    """The result of :func:`mlpdown.run`, or why this backend does not compute it.

    ``optional``: another backend will do, so only a call that suits is tried. Raises for arguments that no backend takes.
    """
    if optional:
        passed_over = _passed_over(hidden_states, attn_output, mlp_intermediate, weight, bias)
        if passed_over is not None:
            return passed_over
    elif torch.is_grad_enabled() or forward_ad._current_level >= 0:
        validate.check_no_grad("native", hidden_states, attn_output, mlp_intermediate, weight, bias, out)
    if is_compiling() or _run is None:  # in this order, or torch.compile would take for granted that nothing is loaded
        # Nothing is built for a call that cannot be.
        refusal = _refusal(hidden_states, attn_output, mlp_intermediate, weight, bias, out)
        if refusal is not None:
            return refusal
        if _run is None:  # not while compiling: the refusal has loaded it
            load()
        packed = packed_plan(_sizes(weight), weight.get_device(), plan, weight_prefetch)
        if out is None:
            return _run(hidden_states, attn_output, mlp_intermediate, weight, bias, packed)
        _run_out(hidden_states, attn_output, mlp_intermediate, weight, bias, packed, out=out)
        return out
    # The op checks its arguments faster than Python can. Only when it refuses are they looked at here, for the words.
    try:
        packed = _packed_plan(weight.shape, weight.get_device(), plan, weight_prefetch)
        if out is None:
            return _eager_run(hidden_states, attn_output, mlp_intermediate, weight, bias, packed)
        _eager_run_out(hidden_states, attn_output, mlp_intermediate, weight, bias, packed, out=out)
        return out
    except Exception:
        refusal = _refusal(hidden_states, attn_output, mlp_intermediate, weight, bias, out)
        if refusal is None:
            raise
        return refusal


def partial_sums(
    mlp_intermediate: torch.Tensor, weight: torch.Tensor, plan: Plan | None, weight_prefetch: bool, optional: bool
) -> torch.Tensor | Exception:
    """The result of :func:`mlpdown.partial_sums`, or why this backend does not compute it; ``optional`` as in :func:`run`."""
    validate.check_product(mlp_intermediate, weight)
    passed_over = _passed_over(None, None, mlp_intermediate, weight, None) if optional else None
    if passed_over is not None:
        return passed_over
    if not optional:
        validate.check_no_grad("native", mlp_intermediate, weight)
    refusal = validate.native_product_refusal(mlp_intermediate, weight) or _refusal_of_device(weight.get_device())
    if refusal is not None:
        return refusal
    if _row_sums is None:
        load()
    shape = (*mlp_intermediate.shape[:-1], weight.shape[0])
    if mlp_intermediate.numel() == 0:
        return torch.empty(shape, dtype=torch.float32, device=weight.device)
    packed = packed_plan(_sizes(weight), weight.get_device(), plan, weight_prefetch)
    return _row_sums(mlp_intermediate, weight, packed).view(shape)


# ---- What this backend takes ----------------------------------------------------------------------------------------------------------


def _passed_over(
    hidden_states: torch.Tensor | None,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> Exception | None:
    """Why ``auto`` should not try: no GPU that the kernel runs on, not one token, something to differentiate."""
    # Asked at every call, one by one, since Python takes its time over tuples and loops.
    if not (
        type(weight) in _PLAIN
        and type(mlp_intermediate) in _PLAIN
        and type(hidden_states) in _PLAIN
        and type(attn_output) in _PLAIN
        and type(bias) in _PLAIN
    ):
        if not isinstance(weight, torch.Tensor) or not isinstance(mlp_intermediate, torch.Tensor):
            return OF_NO_USE
        if validate.overrides_torch(hidden_states, attn_output, mlp_intermediate, weight, bias):
            return _OVERRIDDEN
    if weight is None or mlp_intermediate is None or weight.dim() != 2:
        return OF_NO_USE
    if not weight.is_cuda:
        return _NO_CUDA
    if mlp_intermediate.numel() != weight.shape[1]:
        return _SEVERAL_TOKENS
    if (torch.is_grad_enabled() or forward_ad._current_level >= 0) and validate.needs_grad(
        hidden_states, attn_output, mlp_intermediate, weight, bias
    ):
        return _NEEDS_GRAD
    if not is_compiling() and _cached_refusal_of_device(weight.get_device()) is None:
        return None
    return _refusal_of_device(weight.get_device())


def _refusal(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> Exception | None:
    """Raise for arguments that no backend takes; return what only the native kernel refuses."""
    validate.check_arguments(hidden_states, attn_output, mlp_intermediate, weight, bias, out)
    refusal = validate.native_refusal(hidden_states, attn_output, mlp_intermediate, weight, bias)
    return refusal if refusal is not None else _refusal_of_device(weight.get_device())


def refusal_here(device_index: int | None = None) -> Exception | None:
    """Why ``native`` cannot run on a CUDA device (the current one) of this machine; None if it can. Loads the library."""
    if torch.version.cuda is None:
        return RuntimeError("backend 'native' needs a torch built with CUDA, this one is " + torch.__version__)
    if not torch.cuda.is_available():
        return RuntimeError(
            "backend 'native' needs a CUDA GPU, torch finds none (no GPU, no driver, or CUDA_VISIBLE_DEVICES hides it)"
        )
    refusal = refusal_of_device(torch.cuda.current_device() if device_index is None else device_index)
    if refusal is not None:
        return refusal
    try:
        load()
    except BuildError as error:
        return error
    return None


def refusal_of_device(device_index: int) -> RuntimeError | None:
    """Why the native kernel cannot run on a CUDA device; None if it can."""
    device = device_properties(device_index)
    if device.compute_capability < MINIMUM_COMPUTE_CAPABILITY:
        capability, minimum = (".".join(map(str, c)) for c in (device.compute_capability, MINIMUM_COMPUTE_CAPABILITY))
        return RuntimeError(
            f"backend 'native' needs a GPU of compute capability {minimum} or newer, {device.name} has {capability}"
        )
    return None


@functools.cache
def _cached_refusal_of_device(device_index: int) -> tuple[type[Exception], str] | None:
    refusal = refusal_here(device_index)
    return None if refusal is None else (type(refusal), str(refusal))


def _refusal_of_device(device_index: int) -> Exception | None:
    # A new exception each time: one that is raised again keeps every caller's frames, and their tensors, alive.
    cached = _cached_refusal_of_device(device_index)
    return None if cached is None else cached[0](cached[1])


@functools.cache
def device_properties(device_index: int) -> Device:
    """What plans need to know of a CUDA device."""
    properties = torch.cuda.get_device_properties(device_index)
    return Device(
        name=properties.name,
        compute_capability=(properties.major, properties.minor),
        num_sms=properties.multi_processor_count,
        shared_memory_per_block=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


# ---- Plans ----------------------------------------------------------------------------------------------------------------------------


def pack_plan(plan: Plan) -> int:
    """The plan as the op takes it: one number (``native/plan.h``)."""
    packed = shift = 0
    for name, bits in plan_members().items():
        packed |= int(getattr(plan, name)) << shift
        shift += bits
    return packed


def packed_plan(shape: tuple[int, ...], device_index: int, plan: Plan | None, weight_prefetch: bool) -> int:
    """The caller's plan, or the one chosen for the weight's shape and the device, as the op takes it. Raises ValueError if it cannot run
    there."""
    return _packed_plan(shape, device_index, plan, weight_prefetch)


@functools.lru_cache(maxsize=4096)
def _packed_plan(shape: tuple[int, ...], device_index: int, plan: Plan | None, weight_prefetch: bool) -> int:
    hidden_dim, intermediate_dim = shape
    device = device_properties(device_index)
    if plan is None:
        plan = choose_plan(hidden_dim, intermediate_dim, device, weight_prefetch=weight_prefetch)
    elif weight_prefetch:
        plan = dataclasses.replace(plan, weight_prefetch=True)
    check_plan(plan, intermediate_dim, device)
    return pack_plan(plan)


def _sizes(weight: torch.Tensor) -> tuple[int, ...]:
    # A weight that is an input of a compiled graph may have symbolic sizes: the plan is for these sizes.
    return tuple(int(size) for size in weight.shape)


# What torch.compiler.assume_constant_result does, without its import of torch.compile, which takes a second. On functions of ours, not on
# the caches: torch.compile looks through those, and would trace the loading of the library.
packed_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]
_refusal_of_device._dynamo_marked_constant = True  # type: ignore[attr-defined]
