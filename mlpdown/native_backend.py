"""Backend ``native``: the production kernel. Loads its library once, registers fakes, and turns plans into the op's arguments."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from .plan import MINIMUM_COMPUTE_CAPABILITY, Device, Plan, check_plan, choose_plan

# The op takes its plan as one number (native/op.cpp unpacks it): so many bits for each of these, the first one lowest. They are the members
# of MlpDownPlan (native/problem.h), in its order. To torch, every number of a call is another argument to look at: one for each member took
# longer than all checks of the op.
BITS_PER_PLAN_MEMBER = 6
PLAN_MEMBERS = (
    "rows_in_registers",
    "cluster_size",
    "rows_per_stage",
    "num_stages",
    "stages_in_flight",
    "num_consumer_warps",
    "weight_prefetch",
    "dependent_launch",
    "activation_in_registers",
    "stagger_rows",
)


# The op's overloads, once the library is loaded: globals, because a look-up in torch.ops costs more.
_mlp_down: Any = None
_mlp_down_out: Any = None
_partial_sums: Any = None
# What these call: the same without the overload's own Python, which torch.compile must see and an eager call need not wait for.
_eager_mlp_down: Any = None
_eager_mlp_down_out: Any = None


def is_loaded() -> bool:
    """Whether the library has been loaded."""
    return _mlp_down is not None


@functools.cache
def load() -> None:
    """Load (if need be, build) the library, and tell torch.compile about its ops.

    Raises:
        mlpdown.jit.BuildError: there is no library for this source and none can be built; the message says why and what to do.
    """
    global _mlp_down, _mlp_down_out, _partial_sums, _eager_mlp_down, _eager_mlp_down_out
    from .jit import library

    library.load()
    torch.library.register_fake("mlpdown::mlp_down")(_fake)
    torch.library.register_fake("mlpdown::mlp_down.out")(_fake_out)
    torch.library.register_fake("mlpdown::partial_sums")(_fake_partial_sums)
    _mlp_down_out = torch.ops.mlpdown.mlp_down.out
    _partial_sums = torch.ops.mlpdown.partial_sums.default
    overload = torch.ops.mlpdown.mlp_down.default
    # The attribute is torch's own affair: without it, the overload does.
    _eager_mlp_down = getattr(overload, "_op", overload)
    _eager_mlp_down_out = getattr(_mlp_down_out, "_op", _mlp_down_out)
    _mlp_down = overload  # last: is_loaded() asks for it


def _fake(hidden_states, attn_output, mlp_intermediate, weight, bias, plan):
    return torch.empty_like(hidden_states)


def _fake_out(hidden_states, attn_output, mlp_intermediate, weight, bias, plan, out):
    return None


def _fake_partial_sums(mlp_intermediate, weight, plan):
    return mlp_intermediate.new_empty((weight.shape[0],), dtype=torch.float32)


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


def refusal_of_device(device_index: int) -> Exception | None:
    """Why the native kernel cannot run on a CUDA device; None if it can."""
    device = device_properties(device_index)
    if device.compute_capability < MINIMUM_COMPUTE_CAPABILITY:
        capability, minimum = (".".join(map(str, c)) for c in (device.compute_capability, MINIMUM_COMPUTE_CAPABILITY))
        return RuntimeError(
            f"backend 'native' needs a GPU of compute capability {minimum} or newer, {device.name} has {capability}"
        )
    return None


def pack_plan(plan: Plan) -> int:
    """The plan as the op takes it."""
    packed = 0
    for name in reversed(PLAN_MEMBERS):
        value = int(getattr(plan, name))
        if value >> BITS_PER_PLAN_MEMBER != 0:
            raise ValueError(f"plan.{name} must fit {BITS_PER_PLAN_MEMBER} bits, got {value}")
        packed = packed << BITS_PER_PLAN_MEMBER | value
    return packed


def packed_plan(shape: tuple[int, ...], device_index: int, plan: Plan | None, weight_prefetch: bool) -> int:
    """The caller's plan, or the one chosen for the weight's shape and the device, as the op takes it. Raises ValueError if it cannot run
    there."""
    return _packed_plan(shape, device_index, plan, weight_prefetch)


# What torch.compiler.assume_constant_result does, without its import of torch.compile, which takes a second.
packed_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def run(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    plan: Plan | None,
    weight_prefetch: bool,
) -> torch.Tensor:
    """As :func:`mlpdown.run`. The op itself refuses arguments that it cannot take, with a RuntimeError."""
    if _mlp_down is None:
        load()
    packed = packed_plan(weight.shape, weight.get_device(), plan, weight_prefetch)
    if out is None:
        return _mlp_down(hidden_states, attn_output, mlp_intermediate, weight, bias, packed)
    _mlp_down_out(hidden_states, attn_output, mlp_intermediate, weight, bias, packed, out=out)
    return out


def run_eagerly(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    plan: Plan | None,
    weight_prefetch: bool,
) -> torch.Tensor:
    """:func:`run` once the library is loaded and outside of torch.compile, by way of nothing that an eager call can do without."""
    packed = _packed_plan(weight.shape, weight.get_device(), plan, weight_prefetch)
    if out is None:
        return _eager_mlp_down(hidden_states, attn_output, mlp_intermediate, weight, bias, packed)
    _eager_mlp_down_out(hidden_states, attn_output, mlp_intermediate, weight, bias, packed, out=out)
    return out


def partial_sums(
    mlp_intermediate: torch.Tensor, weight: torch.Tensor, plan: Plan | None, weight_prefetch: bool
) -> torch.Tensor:
    """As :func:`mlpdown.partial_sums`, with arguments that have been checked."""
    if _partial_sums is None:
        load()
    shape = (*mlp_intermediate.shape[:-1], weight.shape[0])
    if mlp_intermediate.numel() == 0:
        return torch.empty(shape, dtype=torch.float32, device=weight.device)
    packed = packed_plan(weight.shape, weight.get_device(), plan, weight_prefetch)
    return _partial_sums(mlp_intermediate, weight, packed).view(shape)
