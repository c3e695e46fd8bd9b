"""How results are compared: bit for bit, or within a derived bound. A failure shows the first wrong elements."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from mlpdown import accuracy
from mlpdown.cases import Case

NUM_SHOWN = 8


def bits_of(tensor: torch.Tensor) -> npt.NDArray[np.uint16]:
    """The bits of a 16-bit tensor, ``[num_tokens, hidden_dim]``."""
    return tensor.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1, tensor.shape[-1])


def assert_same_bits(actual: npt.NDArray[np.uint16], expected: npt.NDArray[np.uint16], dtype: str) -> None:
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    wrong = np.argwhere(actual != expected)
    if wrong.size == 0:
        return
    lines = [f"{len(wrong)} of {actual.size} elements have other bits:"]
    for position in wrong[:NUM_SHOWN]:
        index = tuple(position)
        values = [accuracy.bits_to_float64(bits[index][None], dtype)[0] for bits in (actual, expected)]
        with np.errstate(invalid="ignore"):
            distance = abs(values[0] - values[1]) / accuracy.ulp(np.nan_to_num(values[1:]), dtype)[0]
        lines.append(
            f"  {list(map(int, index))}: {actual[index]:#06x} = {values[0]!r}, expected {expected[index]:#06x} = {values[1]!r}, "
            f"{distance:.4g} ULP apart"
        )
    raise AssertionError("\n".join(lines))


def assert_within_bound(actual: npt.NDArray[np.uint16], case: Case) -> None:
    """Half an ULP of the result plus the summation's error bound, against float64."""
    oracle = accuracy.float64_result(case)
    wrong = np.argwhere(accuracy.outside_bound(actual, case, oracle))
    if wrong.size == 0:
        return
    bound, values = accuracy.error_bound(case), accuracy.bits_to_float64(actual, case.dtype)
    lines = [f"{len(wrong)} of {actual.size} elements are outside the bound:"]
    for position in wrong[:NUM_SHOWN]:
        index = tuple(position)
        off = abs(values[index] - oracle[index]) / accuracy.ulp(oracle[index][None], case.dtype)[0]
        lines.append(
            f"  {list(map(int, index))}: {values[index]!r}, exactly {oracle[index]!r}: {off:.4g} ULP off, "
            f"allowed half an ULP and {bound[index]:.4g}"
        )
    raise AssertionError("\n".join(lines))
