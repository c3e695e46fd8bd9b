"""Seeded inputs, and what the specification makes of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlpdown import reference

from .launch import Bits, Inputs

DTYPES = ("float16", "bfloat16")


def widen(bits: Bits, dtype: str) -> npt.NDArray[np.float32]:
    """float32 values of 16-bit floats; exact."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: npt.NDArray[np.float32], dtype: str) -> Bits:
    """Bits of 16-bit floats near the values: float16 rounds, bfloat16 cuts off, which is as good for inputs."""
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def make_inputs(
    hidden_dim: int, intermediate_dim: int, dtype: str, seed: int, *, attn_output: bool = True, bias: bool = True
) -> Inputs:
    """Normally distributed inputs, the weight scaled so that the sum is of the residuals' size."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return random.standard_normal(shape, np.float32)

    return Inputs(
        dtype,
        mlp_intermediate=narrow(normal(intermediate_dim), dtype),
        weight=narrow(normal(hidden_dim, intermediate_dim) / np.float32(intermediate_dim**0.5), dtype),
        hidden_states=narrow(normal(hidden_dim), dtype),
        attn_output=narrow(normal(hidden_dim), dtype) if attn_output else None,
        bias=narrow(normal(hidden_dim), dtype) if bias else None,
    )


def make_negative_zeros(hidden_dim: int, intermediate_dim: int) -> Inputs:
    """Products too small for float32, which leave an accumulator of -0, and so a result of -0."""
    tiny, negative_zero = 0x0001, 0x8000
    return Inputs(
        "bfloat16",
        mlp_intermediate=np.full(intermediate_dim, tiny, np.uint16),
        weight=np.full((hidden_dim, intermediate_dim), negative_zero | tiny, np.uint16),
        hidden_states=np.full(hidden_dim, negative_zero, np.uint16),
        attn_output=None,
        bias=None,
    )


def expected_bits(inputs: Inputs) -> Bits:
    """The specification's result, ``[hidden_dim]``."""
    dtype = inputs.dtype
    return reference.mlp_down(
        widen(inputs.hidden_states, dtype)[None],
        None if inputs.attn_output is None else widen(inputs.attn_output, dtype)[None],
        widen(inputs.mlp_intermediate, dtype)[None],
        widen(inputs.weight, dtype),
        None if inputs.bias is None else widen(inputs.bias, dtype),
        dtype=dtype,
    )[0]


def expected_partial_sums(inputs: Inputs) -> npt.NDArray[np.float32]:
    """The specification's partial sums, ``[hidden_dim]``."""
    return reference.partial_sums(
        widen(inputs.mlp_intermediate, inputs.dtype)[None], widen(inputs.weight, inputs.dtype)
    )[0]


def assert_same_bits(actual: npt.NDArray, expected: npt.NDArray, what: str) -> None:
    """Fail with the first wrong elements, unless all bits are alike."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    as_bits = {2: np.uint16, 4: np.uint32}[actual.dtype.itemsize]
    wrong = np.flatnonzero(actual.view(as_bits) != expected.view(as_bits))
    first = [f"[{i}] {actual.view(as_bits)[i]:#x} instead of {expected.view(as_bits)[i]:#x}" for i in wrong[:5]]
    assert not wrong.size, f"{what}: {wrong.size} of {actual.size} elements are wrong: {', '.join(first)}"
