"""This GPU against the bits of the GPU that the goldens were made on."""

from __future__ import annotations

from pathlib import Path

import pytest
from receipt.goldens import GOLDEN_CASES

import mlpdown
from mlpdown import golden
from mlpdown.check import result_bits
from mlpdown.golden import GoldenCase, read_golden

pytestmark = pytest.mark.gpu

FOLDER = Path(golden.__file__).parent / "goldens"


@pytest.mark.parametrize("golden_case", GOLDEN_CASES, ids=lambda case: case.file_name)
def test_native_has_the_bits_of_the_golden(golden_case: GoldenCase) -> None:
    if not (FOLDER / golden_case.file_name).is_file():
        pytest.skip(f"{golden_case.file_name} has not been made yet")
    hidden_states, attn_output, mlp_intermediate, weight, bias = golden_case.make().tensors("cuda")
    assert hidden_states is not None and mlp_intermediate is not None and weight is not None
    out = mlpdown.run(hidden_states, attn_output, mlp_intermediate, weight, bias, backend="native")
    assert int((result_bits(out)[0] != read_golden(FOLDER / golden_case.file_name).bits).sum()) == 0
