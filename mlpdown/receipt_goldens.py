"""Goldens: what the native kernel gave on a GPU, bit for bit, kept so that a machine without one can hold the specification to it.

``python -m mlpdown.receipt_goldens --out DIR`` makes them on a GPU. One JSON file a case: the arguments of
:func:`mlpdown.cases.make_case`, the GPU, and the output's bits (base64 of little-endian 16-bit words).
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .cases import Case, make_case


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """The arguments of :func:`mlpdown.cases.make_case`."""

    hidden_dim: int
    intermediate_dim: int
    dtype: str
    kind: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.hidden_dim}x{self.intermediate_dim}-{self.dtype}-{self.kind}.json"

    def make(self) -> Case:
        return make_case(self.hidden_dim, self.intermediate_dim, self.dtype, self.kind, self.seed)


# Cancelling inputs without residuals show every change of order; ragged sizes leave segments, lanes and tiles partly empty.
GOLDEN_CASES = tuple(
    GoldenCase(hidden_dim, intermediate_dim, dtype, kind, seed)
    for hidden_dim, intermediate_dim, kind, seed in (
        (2560, 10240, "cancelling", 11),
        (2560, 10240, "ordinary", 12),
        (512, 2048, "cancelling", 13),
        (333, 11008, "cancelling", 14),
        (77, 1000, "cancelling", 15),
        (64, 264, "special", 16),
    )
    for dtype in ("float16", "bfloat16")
)


@dataclasses.dataclass(frozen=True)
class Golden:
    """A case and its output on a GPU."""

    case: GoldenCase
    gpu: str
    bits: npt.NDArray[np.uint16]
    """``[hidden_dim]``."""

    def write(self, folder: Path) -> Path:
        """Write to ``folder`` under the case's own name."""
        encoded = base64.b64encode(self.bits.astype("<u2").tobytes()).decode()
        content = {**dataclasses.asdict(self.case), "gpu": self.gpu, "bits": encoded}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.case.file_name
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    def num_wrong_bits(self) -> int:
        """Elements in which the specification, run here, differs."""
        return int((self.case.make().expected_bits()[0] != self.bits).sum())


def read_golden(path: Path) -> Golden:
    """Read what :meth:`Golden.write` wrote. Raises ValueError if it is something else."""
    try:
        content = json.loads(path.read_text())
        bits = np.frombuffer(base64.b64decode(content.pop("bits"), validate=True), "<u2").astype(np.uint16)
        golden = Golden(gpu=content.pop("gpu"), bits=bits, case=GoldenCase(**content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a golden: {error}") from error
    if bits.shape != (golden.case.hidden_dim,):
        raise ValueError(f"{path} must hold {golden.case.hidden_dim} elements, got {bits.size}")
    return golden


def main() -> int:
    """Make every golden on this GPU. Returns 1 if one differs from the specification (it is written all the same), 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpdown.receipt_goldens", description="Make the goldens on this machine's GPU."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for them")
    arguments = parser.parse_args()
    import torch

    import mlpdown

    from .check import result_bits

    status = mlpdown.backends()["native"]
    if not status.available:
        print(f"goldens need the native kernel: {status.reason}", file=sys.stderr)
        return 2
    wrong = 0
    for golden_case in GOLDEN_CASES:
        hidden_states, attn_output, mlp_intermediate, weight, bias = golden_case.make().tensors("cuda")
        assert hidden_states is not None and mlp_intermediate is not None and weight is not None
        out = mlpdown.run(hidden_states, attn_output, mlp_intermediate, weight, bias, backend="native")
        golden = Golden(golden_case, torch.cuda.get_device_name(), result_bits(out)[0])
        num_wrong = golden.num_wrong_bits()
        wrong += num_wrong
        print(f"{golden.write(arguments.out)}: {num_wrong} wrong bits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
