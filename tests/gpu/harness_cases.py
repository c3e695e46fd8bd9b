"""The cases that the harness over the C launcher runs (``harness.cu``), and the bits that must come of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlpdown.reference.order import num_segments

from mlpdown import reference
from mlpdown.cases import make_case
from mlpdown.plan import REGISTERS_KERNELS, Plan

NUM_DISTINCT_ROWS = 127  # no stage, cluster or grid is a multiple of it: a row that lands in another's place shows
NUM_CALLS = 2  # each may start while the one before drains
TENSORS = ("hidden_states", "attn_output", "mlp_intermediate", "weight", "bias")
RESIDUALS = ("attn_output", "bias")


@dataclasses.dataclass(frozen=True)
class HarnessCase:
    """One case of the harness. ``absent`` names residuals that are not given."""

    hidden_dim: int
    intermediate_dim: int
    dtype: str
    plan: Plan
    absent: tuple[str, ...] = ()
    is_partial_sums: bool = False

    def make(self) -> tuple[list[bytes], bytes]:
        """The bits of :data:`TENSORS`, empty where one is absent; and those of the result."""
        base = make_case(min(self.hidden_dim, NUM_DISTINCT_ROWS), self.intermediate_dim, self.dtype)
        base = base.without(*RESIDUALS) if self.is_partial_sums else base.without(*self.absent)
        rows = np.arange(self.hidden_dim) % base.weight.shape[0]
        tensors = dict(zip(TENSORS, base.tensors(), strict=True))
        if self.is_partial_sums:
            expected = reference.partial_sums(base.mlp_intermediate, base.weight)
            tensors["hidden_states"] = None
        else:
            expected = base.expected_bits()
        for name in set(TENSORS) - {"mlp_intermediate"}:
            tensor = tensors[name]
            if tensor is not None:
                tensors[name] = tensor[rows] if name in ("weight", "bias") else tensor[:, rows]
        bits = [b"" if tensor is None else tensor.contiguous().view(torch.int16).numpy().tobytes() for tensor in tensors.values()]
        return bits, np.ascontiguousarray(expected[:, rows]).tobytes()

    def write(self, path: Path, num_calls: int = NUM_CALLS) -> None:
        """Write the file that the harness reads."""
        bits, expected = self.make()
        values = {"hidden_dim": self.hidden_dim, "intermediate_dim": self.intermediate_dim, "num_calls": num_calls}
        values |= {"is_bfloat16": self.dtype == "bfloat16", "is_partial_sums": self.is_partial_sums, "out_bytes": len(expected)}
        values |= {f"{name}_bytes": len(one) for name, one in zip(TENSORS, bits, strict=True)} | dataclasses.asdict(self.plan)
        line = " ".join(f"{name}={int(value)}" for name, value in values.items())
        path.write_bytes(b"\n".join([line.encode(), b"".join(bits)]))

    def num_wrong(self, path: Path) -> int:
        """Elements of what the harness wrote that the specification has otherwise."""
        element = np.uint32 if self.is_partial_sums else np.uint16
        _, expected = self.make()
        return int((np.fromfile(f"{path}.out", element) != np.frombuffer(expected, element)).sum())


def ring_case(sizes: tuple[int, int], dtype: str, ring: tuple[int, int, int, int], groups: int = 1, **options: Any) -> HarnessCase:
    """``ring``: cluster size, rows a stage, stages, stages in flight. ``options``: members of the plan, and of the case."""
    warps = groups * num_segments(sizes[1]) // ring[0]
    of_case = {name: options.pop(name) for name in ("absent", "is_partial_sums") if name in options}
    return HarnessCase(*sizes, dtype, Plan(*ring, warps, **options), **of_case)


# Over 114 KB of shared memory a CTA in the large cases, so that an SM holds one: then a cluster walks more stages than the ring has, and
# than there are slots for partial sums, and both wrap. Ragged sizes leave rows, segments, lanes and slices partly or wholly empty. In some
# cases several CTAs share an SM.
RING_CASES = (
    ring_case((2400, 4096), "float16", (1, 1, 14, 4), groups=2),
    ring_case((2400, 8192), "bfloat16", (2, 2, 7, 3), weight_prefetch=True),
    ring_case((2400, 8192), "float16", (4, 4, 8, 5), groups=4),
    ring_case((1100, 16384), "bfloat16", (8, 4, 8, 8), groups=2, weight_prefetch=True, absent=RESIDUALS),
    ring_case((333, 5000), "float16", (4, 1, 2, 1), groups=2, weight_prefetch=True, dependent_launch=False),
    ring_case((77, 8200), "float16", (8, 1, 2, 2), groups=2),
    ring_case((1, 4096), "bfloat16", (4, 1, 2, 1)),
    ring_case((512, 4096), "float16", (4, 2, 5, 5)),
    ring_case((512, 2048), "float16", (2, 1, 4, 3), groups=2, is_partial_sums=True),
    ring_case((77, 8), "float16", (1, 1, 2, 2)),
    ring_case((2560, 2048), "bfloat16", (1, 1, 2, 1), weight_prefetch=True),
    ring_case((2400, 4096), "float16", (1, 1, 14, 4), groups=2, activation_in_registers=True, stagger_rows=1, weight_prefetch=True),
    ring_case((2401, 3848), "bfloat16", (1, 1, 16, 5), activation_in_registers=True),
    ring_case((4600, 2048), "bfloat16", (1, 2, 14, 7), activation_in_registers=True, weight_prefetch=True, absent=RESIDUALS),
    ring_case((4601, 2312), "float16", (1, 2, 14, 13), groups=2, activation_in_registers=True, dependent_launch=False),
    ring_case((200, 16328), "bfloat16", (1, 1, 3, 2), activation_in_registers=True),
    ring_case((333, 1000), "float16", (1, 2, 4, 1), groups=2, activation_in_registers=True, stagger_rows=3, is_partial_sums=True),
)
REGISTERS_CASES = tuple(
    case
    for kernel in REGISTERS_KERNELS
    for dtype in ("float16", "bfloat16")
    for case in (
        HarnessCase(512, 2048, dtype, Plan.in_registers(*kernel, weight_prefetch=True)),
        HarnessCase(333, 11008, dtype, Plan.in_registers(*kernel), absent=RESIDUALS),
        HarnessCase(77, 1000, dtype, Plan.in_registers(*kernel, dependent_launch=False), is_partial_sums=True),
    )
)
# For racecheck, which takes seconds for these and counts hazards up to a limit: one CTA an SM, one group of warps, and hardly more stages
# than it takes for the slots to wrap, in a cluster of one and in clusters, with stores to other CTAs. All rings wrap.
RACECHECK_CASES = (
    ring_case((2250, 3584), "float16", (1, 1, 16, 8)),
    ring_case((2390, 3584), "bfloat16", (1, 1, 16, 8), activation_in_registers=True, stagger_rows=1, weight_prefetch=True),
    ring_case((2400, 3584), "float16", (1, 2, 8, 4), activation_in_registers=True, absent=RESIDUALS),
    ring_case((1150, 7168), "bfloat16", (2, 1, 16, 8)),
    ring_case((580, 14336), "float16", (4, 1, 16, 8), weight_prefetch=True),
    ring_case((290, 28672), "float16", (8, 1, 16, 8), weight_prefetch=True),
    *(HarnessCase(333, 1000, "float16", Plan.in_registers(*kernel)) for kernel in REGISTERS_KERNELS),
)
