"""Backend ``native``: the production kernel. Loads its library once, registers fakes, and turns plans into the op's arguments."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from . import validate
from .plan import Device, Plan, check_plan, choose_plan

MINIMUM_COMPUTE_CAPABILITY = (9, 0)

PlanArguments = tuple[int, int, int, int, int, int, bool, bool]


# The op's overloads, once the library is loaded: globals, because a look-up in torch.ops costs more.
_mlp_down: Any = None
_mlp_down_out: Any = None
_partial_sums: Any = None


def is_loaded() -> bool:
    """Whether the library has been loaded."""
    return _mlp_down is not None


@functools.cache
def load() -> None:
    """Load (if need be, build) the library, and tell torch.compile about its ops.

    Raises:
        mlpdown.build.BuildError: there is no library for this source and none can be built; the message says why and what to do.
    """
    global _mlp_down, _mlp_down_out, _partial_sums
    from .build import library

    library.load()
    torch.library.register_fake("mlpdown::mlp_down")(_fake)
    torch.library.register_fake("mlpdown::mlp_down.out")(_fake_out)
    torch.library.register_fake("mlpdown::partial_sums")(_fake_partial_sums)
    _mlp_down = torch.ops.mlpdown.mlp_down.default
    _mlp_down_out = torch.ops.mlpdown.mlp_down.out
    _partial_sums = torch.ops.mlpdown.partial_sums.default


def _fake(hidden_states, attn_output, mlp_intermediate, weight, bias, *plan):
    return torch.empty_like(hidden_states)


def _fake_out(hidden_states, attn_output, mlp_intermediate, weight, bias, *plan, out):
    return None


def _fake_partial_sums(mlp_intermediate, weight, *plan):
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


def plan_arguments(
    hidden_dim: int, intermediate_dim: int, device_index: int, plan: Plan | None, weight_prefetch: bool
) -> PlanArguments:
    """The plan as the op takes it: the caller's, or the one chosen for the shape and device. Raises ValueError if it cannot run there."""
    return _plan_arguments(hidden_dim, intermediate_dim, device_index, plan, weight_prefetch)


# What torch.compiler.assume_constant_result does, without its import of torch.compile, which takes a second.
plan_arguments._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _plan_arguments(
    hidden_dim: int, intermediate_dim: int, device_index: int, plan: Plan | None, weight_prefetch: bool
) -> PlanArguments:
    device = device_properties(device_index)
    if plan is None:
        plan = choose_plan(hidden_dim, intermediate_dim, device, weight_prefetch=weight_prefetch)
    elif weight_prefetch:
        plan = dataclasses.replace(plan, weight_prefetch=True)
    check_plan(plan, intermediate_dim, device)
    return (
        plan.cluster_size,
        plan.rows_per_warp,
        plan.rows_per_stage,
        plan.num_stages,
        plan.num_consumer_warps,
        plan.rows_in_registers,
        plan.weight_prefetch,
        plan.dependent_launch,
    )


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
    hidden_dim, intermediate_dim = weight.shape
    if mlp_intermediate.numel() == 0:
        # Nothing to launch, so that the op cannot refuse what is wrong.
        validate.check_arguments(hidden_states, attn_output, mlp_intermediate, weight, bias, out)
        refusal = validate.native_refusal(hidden_states, attn_output, mlp_intermediate, weight, bias)
        if refusal is not None:
            raise refusal
        return torch.empty_like(hidden_states) if out is None else out
    arguments = plan_arguments(hidden_dim, intermediate_dim, weight.get_device(), plan, weight_prefetch)
    if out is None:
        return _mlp_down(hidden_states, attn_output, mlp_intermediate, weight, bias, *arguments)
    _mlp_down_out(hidden_states, attn_output, mlp_intermediate, weight, bias, *arguments, out=out)
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
    hidden_dim, intermediate_dim = weight.shape
    arguments = plan_arguments(hidden_dim, intermediate_dim, weight.get_device(), plan, weight_prefetch)
    return _partial_sums(mlp_intermediate, weight, *arguments).view(shape)
