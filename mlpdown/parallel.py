"""The op over several processes, each with a slice of the reduction axis (row-parallel, as Megatron-LM calls the down-projection).

Every process sums its slice in float32. One all-reduce adds those sums in float32; then bias and residuals are added in the order of the
single-process op, and the result is rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from .ops import partial_sums
from .reference.order import CANONICAL_NAN
from .validate import needs_grad

if TYPE_CHECKING:
    from .plan import Plan


def run_row_parallel(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate_shard: torch.Tensor,
    weight_shard: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    backend: str = "auto",
    plan: Plan | None = None,
    weight_prefetch: bool = False,
) -> torch.Tensor:
    """``hidden_states + attn_output + weight @ mlp_intermediate + bias`` over the processes of ``group``, rounded once.

    All processes of ``group`` call it together; an error on one of them leaves the others waiting in the all-reduce. ``hidden_states``,
    ``attn_output`` and ``bias`` are whole, and the same on every process.

    Args:
        hidden_states: ``[..., hidden_dim]``, float16 or bfloat16.
        attn_output: as ``hidden_states``, or None.
        mlp_intermediate_shard: ``[..., shard_dim]``, this process' slice of the reduction axis.
        weight_shard: ``[hidden_dim, shard_dim]``, the same slice; ``shard_dim`` a multiple of 8. Slices may differ in length.
        bias: ``[hidden_dim]`` or None.
        group: the process group (NCCL or gloo).
        backend, plan, weight_prefetch: for the sum of the slice, as in ``mlpdown.partial_sums``.

    Returns:
        A tensor like ``hidden_states``, the same on every process as far as the group's all-reduce is (NCCL's and gloo's are). A NaN
        has the bits 0x7fff. Bits can differ from those of one process: the sums of the slices are rounded to float32 and added in the
        order of the all-reduce. With u = 2**-24, the sum before its last rounding is within (intermediate_dim + size of group + 3) * u,
        relative to the sum of all magnitudes, of the exact one.

    Raises:
        TypeError: ``group`` is not a process group, or a dtype is not as above. ValueError: a shape is not as above, or this process is
        not in ``group``. RuntimeError: as ``mlpdown.partial_sums``.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup that this process is in, got {type(group).__name__}"
        )
    if needs_grad(hidden_states, attn_output, mlp_intermediate_shard, weight_shard, bias):
        raise ValueError(
            "run_row_parallel has no derivative, and an argument needs one: call under torch.no_grad() or torch.inference_mode()"
        )
    hidden_dim = weight_shard.shape[0]
    for name, tensor, shape in (
        ("hidden_states", hidden_states, (*mlp_intermediate_shard.shape[:-1], hidden_dim)),
        ("attn_output", attn_output, hidden_states.shape),
        ("bias", bias, (hidden_dim,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != weight_shard.dtype:
            raise TypeError(f"{name} must have the dtype of weight_shard, {weight_shard.dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    total = partial_sums(
        mlp_intermediate_shard, weight_shard, backend=backend, plan=plan, weight_prefetch=weight_prefetch
    )
    dist.all_reduce(total, group=group)
    if bias is not None:
        total = total + bias
    if attn_output is not None:
        total = total + attn_output
    total = total + hidden_states
    rounded = total.to(hidden_states.dtype)
    return rounded.view(torch.int16).masked_fill(total.isnan(), CANONICAL_NAN).view(hidden_states.dtype)


def run_sharded(
    hidden_states: torch.Tensor,
    attn_output: torch.Tensor | None,
    mlp_intermediate: torch.Tensor,
    weight: DTensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str = "auto",
    plan: Plan | None = None,
    weight_prefetch: bool = False,
) -> torch.Tensor:
    """``run_row_parallel`` for a DTensor weight, sharded along the reduction axis as ``RowwiseParallel`` does it.

    Args:
        mlp_intermediate: this process' slice as a plain tensor (what a column-parallel layer leaves), or a DTensor sharded alike.
        weight: ``[hidden_dim, intermediate_dim]``, placements ``(Shard(1),)``.
        bias: a plain tensor, or a replicated DTensor, as every other argument. The rest: see :func:`run_row_parallel`.

    Returns:
        A plain tensor like ``hidden_states``, the same on every process.

    Raises:
        ValueError: a tensor is placed in another way. Other errors are those of :func:`run_row_parallel`.
    """
    if weight.device_mesh.ndim != 1 or tuple(weight.placements) != (Shard(1),):
        raise ValueError(
            f"weight must be sharded along intermediate_dim over one mesh axis, (Shard(1),), got {tuple(weight.placements)}"
        )
    if isinstance(mlp_intermediate, DTensor):
        if tuple(mlp_intermediate.placements) not in ((Shard(mlp_intermediate.dim() - 1),), (Shard(-1),)):
            raise ValueError(
                f"mlp_intermediate must be sharded along its last dimension as weight is, got {mlp_intermediate.placements}"
            )
        mlp_intermediate = mlp_intermediate.to_local()
    return run_row_parallel(
        _whole("hidden_states", hidden_states),
        None if attn_output is None else _whole("attn_output", attn_output),
        mlp_intermediate,
        weight.to_local(),
        None if bias is None else _whole("bias", bias),
        group=weight.device_mesh.get_group(),
        backend=backend,
        plan=plan,
        weight_prefetch=weight_prefetch,
    )


def _whole(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(f"{name} must be replicated, got {tuple(tensor.placements)}")
    return tensor.to_local()
