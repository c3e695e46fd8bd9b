"""Calls on a GPU and what must come of them, made cheaply: rows are generated for a small prime number of outputs and repeated."""

from __future__ import annotations

import functools

import numpy as np
import torch
from assertions import assert_same_bits, bits_of

import mlpdown
from mlpdown.cases import Case, make_case
from mlpdown.plan import Plan

DEVICE = "cuda"
NUM_DISTINCT_ROWS = 127  # no stage, cluster or grid is a multiple of it: a row that lands in another's place shows
GUARD_ELEMENTS = 256
# A NaN in both dtypes, and not the one that the op writes: poison where results go, canary around them.
POISON = 0x7FAD

Tensors = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None]


@functools.lru_cache(maxsize=8)
def _base(num_rows: int, intermediate_dim: int, dtype: str, kind: str, seed: int) -> Case:
    return make_case(num_rows, intermediate_dim, dtype, kind, seed)


def gpu_case(
    hidden_dim: int,
    intermediate_dim: int,
    dtype: str,
    kind: str = "cancelling",
    *,
    absent: tuple[str, ...] = (),
    seed: int = 0,
) -> tuple[Tensors, np.ndarray]:
    """The tensors of a call on the GPU, and the bits of its result, ``[1, hidden_dim]``."""
    base = _base(min(hidden_dim, NUM_DISTINCT_ROWS), intermediate_dim, dtype, kind, seed).without(*absent)
    row = np.arange(hidden_dim) % base.weight.shape[0]
    expected = base.expected_bits()[:, row]
    hidden_states, attn_output, mlp_intermediate, weight, bias = base.tensors(DEVICE)
    assert hidden_states is not None and mlp_intermediate is not None and weight is not None
    rows = torch.from_numpy(row).to(DEVICE)
    tensors = (
        hidden_states[:, rows],
        None if attn_output is None else attn_output[:, rows],
        mlp_intermediate,
        weight[rows],
        None if bias is None else bias[rows],
    )
    return tensors, expected


def on_device(bits: np.ndarray) -> torch.Tensor:
    """Expected bits as int16 on the GPU, to compare there."""
    return torch.from_numpy(bits.view(np.int16)).to(DEVICE)


def run_guarded(tensors: Tensors, *, backend: str = "native", plan: Plan | None = None, weight_prefetch: bool = False):
    """Run into a slice of a larger buffer, all of it poisoned; the result, after a look at what stands around it."""
    hidden_states = tensors[0]
    num_elements = hidden_states.numel()
    memory = torch.full((num_elements + 2 * GUARD_ELEMENTS,), POISON, dtype=torch.int16, device=DEVICE)
    inside = slice(GUARD_ELEMENTS, GUARD_ELEMENTS + num_elements)
    out = memory.view(hidden_states.dtype)[inside].view(hidden_states.shape)
    result = mlpdown.run(*tensors, backend=backend, out=out, plan=plan, weight_prefetch=weight_prefetch)
    assert result is out
    around = torch.cat([memory[:GUARD_ELEMENTS], memory[inside.stop :]])
    assert bool((around == POISON).all()), f"written outside the result, plan {plan}"
    return out


def check_native(hidden_dim: int, intermediate_dim: int, dtype: str, kind: str, plan: Plan | None = None) -> None:
    """One shape through the native kernel, guarded, bit for bit."""
    tensors, expected = gpu_case(hidden_dim, intermediate_dim, dtype, kind)
    assert_same_bits(bits_of(run_guarded(tensors, plan=plan)), expected, dtype)
