"""``python -m tests.receipt.goldens --out mlpdown/goldens`` makes the goldens (``mlpdown/golden.py``) on a GPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import mlpdown
from mlpdown.check import result_bits
from mlpdown.golden import Golden, GoldenCase

# Cancelling inputs without residuals show every change of order; ragged sizes leave segments, lanes and stages partly empty.
GOLDEN_CASES = tuple(
    GoldenCase(hidden_dim, intermediate_dim, dtype, kind, seed)
    for hidden_dim, intermediate_dim, kind, seed in (
        (2560, 10240, "cancelling", 11),
        (2560, 10240, "ordinary", 12),
        (512, 2048, "cancelling", 13),
        (333, 11008, "cancelling", 14),
        (77, 1000, "cancelling", 15),
        (64, 264, "special", 16),
        (64, 264, "subnormal", 17),
        (192, 4096, "cancelling", 18),
        (160, 2568, "cancelling", 19),
    )
    for dtype in ("float16", "bfloat16")
)


def main() -> int:
    """Make every golden on this GPU. Returns 1 if one differs from the specification (it is written all the same), 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.receipt.goldens", description="Make the goldens on this machine's GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for them")
    arguments = parser.parse_args()
    status = mlpdown.backends()["native"]
    if not status.available:
        print(f"goldens need the native kernel: {status.reason}", file=sys.stderr)
        return 2
    wrong = 0
    for golden_case in GOLDEN_CASES:
        hidden_states, attn_output, mlp_intermediate, weight, bias = golden_case.make().tensors("cuda")
        assert hidden_states is not None and mlp_intermediate is not None and weight is not None
        golden, num_wrong = None, 0
        for weight_prefetch in (False, True):  # weights in registers, and through the ring where that is faster
            out = mlpdown.run(
                hidden_states, attn_output, mlp_intermediate, weight, bias, backend="native", weight_prefetch=weight_prefetch
            )
            golden = Golden(golden_case, torch.cuda.get_device_name(), result_bits(out)[0])
            num_wrong += golden.num_wrong_bits()
        assert golden is not None
        wrong += num_wrong
        print(f"{golden.write(arguments.out)}: {num_wrong} wrong bits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
