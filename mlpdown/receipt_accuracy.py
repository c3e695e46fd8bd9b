"""Bits and errors at every shape that is measured: native against the specification and, beside PyTorch, against float64.

``python -m mlpdown.receipt_accuracy --json PATH`` on a machine with a GPU. Inputs are made on the GPU, where large ones take no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

import mlpdown

from . import native_backend
from .accuracy import errors_in_ulps
from .bench.chain import Chain
from .bench.peers import torch_layer
from .bench.shapes import SHAPES, Shape
from .cases import TORCH_DTYPES, Case
from .check import result_bits
from .plan import RTX_5090, choose_plan


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """One shape and dtype. Errors are in ULPs of the float64 result."""

    shape: str
    hidden_dim: int
    intermediate_dim: int
    dtype: str
    plan: dict[str, Any]
    wrong_bits: int
    """Of the native kernel under its own plan, against the specification."""
    wrong_bits_rtx_5090_plan: int
    """The same under the plan that an RTX 5090 would get: 99 KB of shared memory a block."""
    native_max_ulps: float
    native_mean_ulps: float
    torch_max_ulps: float
    torch_mean_ulps: float

    @property
    def holds(self) -> bool:
        """No wrong bit, and no larger error than PyTorch's."""
        right = self.wrong_bits == 0 and self.wrong_bits_rtx_5090_plan == 0
        return right and self.native_max_ulps <= self.torch_max_ulps and self.native_mean_ulps <= self.torch_mean_ulps


def measure_accuracy(shape: Shape, dtype: str, seed: int) -> Accuracy:
    """Run one shape on the current CUDA device."""
    device = torch.device("cuda", torch.cuda.current_device())
    chain = Chain.make(shape, TORCH_DTYPES[dtype], device, 1, seed)
    tensors = (chain.hidden_states, chain.attn_output, chain.mlp_intermediate, chain.weights[0], chain.bias)
    plan = choose_plan(shape.hidden_dim, shape.intermediate_dim, native_backend.device_properties(device.index))
    small_plan = choose_plan(shape.hidden_dim, shape.intermediate_dim, RTX_5090)
    bits = result_bits(mlpdown.run(*tensors, backend="native"))
    small_bits = result_bits(mlpdown.run(*tensors, backend="native", plan=small_plan))
    expected = Case(dtype, *(tensor.float().cpu().numpy() for tensor in tensors)).expected_bits()
    hidden_states, attn_output, mlp_intermediate, weight, bias = (tensor.double() for tensor in tensors)
    oracle = (hidden_states + attn_output + (weight @ mlp_intermediate[0] + bias)).cpu().numpy()
    native_errors = errors_in_ulps(bits, oracle, dtype)
    torch_errors = errors_in_ulps(result_bits(torch_layer(*tensors)), oracle, dtype)
    return Accuracy(
        shape.name,
        shape.hidden_dim,
        shape.intermediate_dim,
        dtype,
        dataclasses.asdict(plan),
        int((bits != expected).sum()),
        int((small_bits != expected).sum()),
        float(native_errors.max()),
        float(native_errors.mean()),
        float(torch_errors.max()),
        float(torch_errors.mean()),
    )


def main() -> int:
    """Run every shape and dtype. Returns 1 if a promise is broken somewhere, 2 without the native kernel."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpdown.receipt_accuracy", description="Bits and errors at every shape."
    )
    parser.add_argument("--json", type=Path, required=True, help="where to write them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    status = mlpdown.backends()["native"]
    if not status.available:
        print(f"this needs the native kernel: {status.reason}", file=sys.stderr)
        return 2
    rows = []
    with torch.no_grad():
        for shape in SHAPES:
            for dtype in TORCH_DTYPES:
                row = measure_accuracy(shape, dtype, arguments.seed)
                rows.append(row)
                print(f"{shape} {dtype}: {'ok' if row.holds else 'BROKEN'} {row}", flush=True)
                arguments.json.write_text(
                    json.dumps([{**dataclasses.asdict(row), "holds": row.holds} for row in rows], indent=1) + "\n"
                )
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
