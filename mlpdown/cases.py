"""Inputs for checks, tests and goldens: a function of a seed alone, the same in every version of every library.

The numbers come from a hash of (seed, tensor, position), worked out in integers, and reach floating point by exact steps and one
rounding that IEEE 754 fixes. No library's random generator takes part.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from .reference.order import VECTOR_SIZE

KINDS = ("ordinary", "cancelling", "special", "subnormal")
TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Float32Array = npt.NDArray[np.float32]

_BLOCK_ELEMENTS = 1 << 20

# Cancelling inputs: exponents of two between which magnitudes lie. Products of large terms are about 2**18 times those of small ones;
# their rounding errors in float32, 2**-24 of them, are then about 2**-6 of what is left when they have cancelled: many units in the
# last place of either dtype.
_LARGE_WEIGHT, _LARGE_ACTIVATION = 4, 6
_SMALL_WEIGHT, _SMALL_ACTIVATION = -5, -3


@dataclasses.dataclass(frozen=True)
class Case:
    """The tensors of one call as float32 arrays that hold values of ``dtype``: what ``mlpdown.reference`` takes."""

    dtype: str
    hidden_states: Float32Array
    """``[num_tokens, hidden_dim]``."""
    attn_output: Float32Array | None
    mlp_intermediate: Float32Array
    """``[num_tokens, intermediate_dim]``."""
    weight: Float32Array
    """``[hidden_dim, intermediate_dim]``."""
    bias: Float32Array | None

    def arrays(self) -> tuple[Float32Array, Float32Array | None, Float32Array, Float32Array, Float32Array | None]:
        """The tensors in the order of the op's arguments."""
        return self.hidden_states, self.attn_output, self.mlp_intermediate, self.weight, self.bias

    def tensors(self, device: str | torch.device = "cpu") -> tuple[torch.Tensor | None, ...]:
        """The same as torch tensors of ``dtype`` on ``device``."""
        dtype = TORCH_DTYPES[self.dtype]
        return tuple(None if a is None else torch.from_numpy(a).to(dtype).to(device) for a in self.arrays())

    def expected_bits(self) -> npt.NDArray[np.uint16]:
        """What the specification says, ``[num_tokens, hidden_dim]``."""
        from . import reference

        return reference.mlp_down(*self.arrays(), dtype=self.dtype)

    def without(self, *names: str) -> Case:
        """The same case with ``attn_output`` and/or ``bias`` absent."""
        return Case(
            self.dtype,
            self.hidden_states,
            None if "attn_output" in names else self.attn_output,
            self.mlp_intermediate,
            self.weight,
            None if "bias" in names else self.bias,
        )


def make_case(
    hidden_dim: int, intermediate_dim: int, dtype: str, kind: str = "ordinary", seed: int = 0, num_tokens: int = 1
) -> Case:
    """The inputs of one call.

    Args:
        hidden_dim, intermediate_dim: at least 1, and a multiple of 8.
        dtype: ``"float16"`` or ``"bfloat16"``.
        kind: ``"ordinary"``: bell-shaped values of the sizes that a model has. ``"cancelling"``: large terms in pairs that cancel, small
            ones that remain, no residuals, so that the bits of the result hang on the order of summation. ``"special"``: rows that take
            turns in signed zeros, overflow, subnormal results, infinities and NaNs. ``"subnormal"``: weights, bias and residuals are
            subnormal, so that a machine that flushes such numbers to zero gives zero everywhere.
        seed: any integer in [0, 2**32).
        num_tokens: tokens of the call.

    Raises:
        ValueError: an argument is not as above.
    """
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"dtype must be one of {sorted(TORCH_DTYPES)}, got {dtype!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    if hidden_dim < 1 or intermediate_dim < VECTOR_SIZE or intermediate_dim % VECTOR_SIZE:
        raise ValueError(
            f"hidden_dim must be >= 1 and intermediate_dim a positive multiple of 8, got {hidden_dim}, {intermediate_dim}"
        )
    if num_tokens < 0 or not 0 <= seed < 1 << 32:
        raise ValueError(f"num_tokens must be >= 0 and seed in [0, 2**32), got {num_tokens}, {seed}")
    if kind == "cancelling":
        return _cancelling(hidden_dim, intermediate_dim, dtype, seed, num_tokens)
    case = Case(
        dtype=dtype,
        hidden_states=_bell(seed, "hidden_states", (num_tokens, hidden_dim), 0, dtype),
        attn_output=_bell(seed, "attn_output", (num_tokens, hidden_dim), -2, dtype),
        mlp_intermediate=_after_gelu(_bell(seed, "mlp_intermediate", (num_tokens, intermediate_dim), 0, dtype), dtype),
        weight=_bell(seed, "weight", (hidden_dim, intermediate_dim), -5, dtype),
        bias=_bell(seed, "bias", (hidden_dim,), -3, dtype),
    )
    changes = {"ordinary": lambda case: case, "special": _make_special, "subnormal": _make_subnormal}
    return changes[kind](case)


def to_float64(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """float32 or float64 values in float64, exactly, even where this thread takes subnormal float32 numbers for zero."""
    wide = values.astype(np.float64)
    if values.dtype == np.float32:
        bits = values.view(np.uint32)
        places = bits & np.uint32(0x7F800000) == 0
        subnormal = bits[places]
        magnitudes = np.ldexp((subnormal & np.uint32(0x7FFFFF)).astype(np.float64), -149)
        wide[places] = np.where(subnormal >> np.uint32(31), -magnitudes, magnitudes)
    return wide


def round_to(values: Float32Array, dtype: str) -> Float32Array:
    """Finite float32 values rounded to nearest even in ``dtype``, as float32."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _cancelling(hidden_dim: int, intermediate_dim: int, dtype: str, seed: int, num_tokens: int) -> Case:
    # Three quarters of the columns are large, in pairs at random places: the same activation, opposite weights.
    order = np.argsort(_random_bits(seed, "order", 0, intermediate_dim), kind="stable")
    num_pairs = 3 * intermediate_dim // 8
    small, large, partners = np.split(order, [intermediate_dim - 2 * num_pairs, intermediate_dim - num_pairs])
    exponents = np.full(intermediate_dim, _LARGE_ACTIVATION)
    exponents[small] = _SMALL_ACTIVATION
    activation = _spread(seed, "mlp_intermediate", (num_tokens, intermediate_dim), exponents, dtype)
    activation[:, partners] = activation[:, large]
    exponents = np.full(intermediate_dim, _LARGE_WEIGHT)
    exponents[small] = _SMALL_WEIGHT
    weight = _spread(seed, "weight", (hidden_dim, intermediate_dim), exponents, dtype)
    weight[:, partners] = -weight[:, large]
    zeros = np.zeros((num_tokens, hidden_dim), np.float32)
    return Case(dtype, zeros, zeros.copy(), activation, weight, np.zeros(hidden_dim, np.float32))


def _make_special(case: Case) -> Case:
    assert case.attn_output is not None and case.bias is not None
    row = np.arange(case.weight.shape[0]) % 8
    last = case.weight.shape[1] - 1
    for residual in (case.hidden_states, case.attn_output):
        residual[:, row < 3] = -0.0
    case.bias[row < 3] = -0.0
    case.weight[row == 0] = -0.0
    huge, tiny = (18, -19) if case.dtype == "float16" else (130, -124)  # sums beyond the largest number, and subnormal
    case.weight[row == 1] = np.ldexp(case.weight[row == 1], huge)
    case.weight[row == 2] = _scaled(case.weight[row == 2], tiny, case.dtype)
    case.weight[row == 3, 0] = np.inf
    case.weight[row == 4, 0], case.weight[row == 4, last] = np.inf, -np.inf
    case.weight[row == 5, last] = np.nan
    case.hidden_states[:, row == 6] = -np.inf
    return case


def _make_subnormal(case: Case) -> Case:
    """The ordinary case with everything but the activation scaled down, each tensor to just below the smallest normal number."""
    lowest = -12 if case.dtype == "float16" else -124  # what brings numbers below 1/4 below it
    tensors = {"hidden_states": -5, "attn_output": -3, "bias": -2, "weight": 0}
    scaled = {name: _scaled(getattr(case, name), lowest + shift, case.dtype) for name, shift in tensors.items()}
    return dataclasses.replace(case, **scaled)  # type: ignore[arg-type]


def _scaled(values: Float32Array, exponent: int, dtype: str) -> Float32Array:
    """``values * 2**exponent`` rounded to nearest even in ``dtype``, where that is subnormal. In float64 and integers alone: whether
    float32's subnormals are flushed to zero in this thread makes no difference."""
    if dtype == "float16":  # whose subnormals are normal numbers in float32
        return round_to(np.ldexp(values, exponent), dtype)
    multiples = np.rint(np.ldexp(values.astype(np.float64), exponent + 133))  # of the smallest bfloat16
    magnitudes = np.abs(multiples).astype(np.uint32) << np.uint32(16)
    return (magnitudes | np.signbit(values).astype(np.uint32) << np.uint32(31)).view(np.float32)


def _after_gelu(values: Float32Array, dtype: str) -> Float32Array:
    return round_to(np.where(values < 0, values * np.float32(0.0625), values), dtype)


def _bell(seed: int, name: str, shape: tuple[int, ...], log2_scale: int, dtype: str) -> Float32Array:
    """Sums of four uniform numbers, of variance 4/3 * 4**log2_scale, bell-shaped and bounded by 2 * 2**(log2_scale + 1)."""
    values = np.empty(int(np.prod(shape)), np.float32)
    for part, bits in _blocks(seed, name, values.size):
        total = sum(((bits >> np.uint64(16 * field)) & np.uint64(0xFFFF)).astype(np.int32) for field in range(4))
        # 131070 is the mean of the sum, which takes 18 bits: exact in float32, and so is the scale.
        values[part] = round_to((total - 131070).astype(np.float32) * np.float32(2.0 ** (log2_scale - 15)), dtype)
    return values.reshape(shape)


def _spread(seed: int, name: str, shape: tuple[int, ...], exponents: npt.NDArray[np.int64], dtype: str) -> Float32Array:
    """Random signs and mantissas, magnitudes in ``[2**exponent / 4, 2**exponent)``, an exponent for each column."""
    values = np.empty(int(np.prod(shape)), np.float32)
    for part, bits in _blocks(seed, name, values.size):
        significand = ((bits & np.uint64(0x3FF)) | np.uint64(0x400)).astype(np.float32) * np.float32(2.0**-11)
        halved = np.where(bits >> np.uint64(62) & np.uint64(1), np.float32(0.5), np.float32(1.0))
        signed = np.where(bits >> np.uint64(63), -significand, significand) * halved
        values[part] = round_to(signed, dtype)
    matrix = values.reshape(shape)
    matrix *= np.ldexp(np.float32(1.0), exponents).astype(np.float32)
    return matrix


def _blocks(seed: int, name: str, size: int) -> Iterator[tuple[slice, npt.NDArray[np.uint64]]]:
    for begin in range(0, size, _BLOCK_ELEMENTS):
        end = min(begin + _BLOCK_ELEMENTS, size)
        yield slice(begin, end), _random_bits(seed, name, begin, end)


def _random_bits(seed: int, name: str, begin: int, end: int) -> npt.NDArray[np.uint64]:
    """64 bits for each position: the output function of SplitMix64 (G. Steele, D. Lea and C. Flood, "Fast splittable pseudorandom
    number generators", 2014) over a counter that starts where the seed and the tensor's name say."""
    stream = np.uint64(seed << 32 | zlib.crc32(name.encode()))
    with np.errstate(over="ignore"):
        mixed = (np.arange(begin, end, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + _mix(stream)
        return _mix(mixed)


def _mix(bits):
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
