"""Bits and errors at every shape that is measured: native against the specification and, beside PyTorch, against float64.

``python -m tests.receipt.accuracy --json PATH`` on a machine with a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

import mlpdown
from mlpdown import native_backend
from mlpdown.accuracy import errors_in_ulps, float64_result
from mlpdown.bench.baselines import torch_layer
from mlpdown.bench.inputs import Inputs
from mlpdown.bench.measure import native_layer
from mlpdown.bench.shapes import SHAPES, SHORT_SHAPES, Shape
from mlpdown.cases import TORCH_DTYPES
from mlpdown.check import result_bits
from mlpdown.heuristics import choose_plan
from mlpdown.json_lines import write_json
from mlpdown.plan import RTX_5090


def measure_accuracy(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """One shape on the current CUDA device, under the plan that it gets there and under an RTX 5090's. Errors are in ULPs of the float64
    result; ``holds`` says that no bit is wrong and no error larger than PyTorch's."""
    device = torch.device("cuda", torch.cuda.current_device())
    inputs = Inputs(shape, TORCH_DTYPES[dtype], device, 1, seed)
    case = inputs.case(0, inputs.hidden_states)
    expected, oracle = case.expected_bits(), float64_result(case)
    plans = [choose_plan(*shape[1:], target) for target in (native_backend.device_properties(device.index), RTX_5090)]
    bits = [result_bits(inputs.call(native_layer(plan))) for plan in plans]
    wrong = [int((one != expected).sum()) for one in bits]
    facts = {"shape": shape.name, "hidden_dim": shape.hidden_dim, "intermediate_dim": shape.intermediate_dim, "dtype": dtype}
    facts |= {"plan": dataclasses.asdict(plans[0]), "wrong_bits": wrong[0], "wrong_bits_rtx_5090_plan": wrong[1]}
    for name, one in (("native", bits[0]), ("torch", result_bits(inputs.call(torch_layer)))):
        errors = errors_in_ulps(one, oracle, dtype)
        facts |= {f"{name}_max_ulps": float(errors.max()), f"{name}_mean_ulps": float(errors.mean())}
    no_worse = all(facts[f"native_{kind}_ulps"] <= facts[f"torch_{kind}_ulps"] for kind in ("max", "mean"))
    return {**facts, "holds": wrong == [0, 0] and no_worse}


def main() -> int:
    """Run every shape and dtype. Returns 1 if a promise is broken somewhere, 2 without the native kernel."""
    parser = argparse.ArgumentParser(prog="python -m tests.receipt.accuracy", description="Bits and errors at every shape.")
    parser.add_argument("--json", type=Path, required=True, help="where to write them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    status = mlpdown.backends()["native"]
    if not status.available:
        print(f"this needs the native kernel: {status.reason}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for shape in (*SHAPES, *SHORT_SHAPES):
            for dtype in TORCH_DTYPES:
                rows.append(measure_accuracy(shape, dtype, arguments.seed))
                print(f"{shape} {dtype}: {'ok' if rows[-1]['holds'] else 'BROKEN'} {rows[-1]}", flush=True)
                write_json(arguments.json, rows)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
