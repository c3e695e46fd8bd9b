"""The executable specification of the op: NumPy arrays in, the exact bits out.

``order.py`` says what is computed, in prose and as arithmetic; ``cpu.py`` runs that on a CPU, ``kernel.py`` on a GPU or in Numba's
simulator. Inputs are float32 arrays that hold float16 or bfloat16 values (both convert exactly), results are the 16 bits as uint16.
Nothing here knows of torch or of the rest of the package.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .order import DTYPES, VECTOR_SIZE, vectors_per_segment

__all__ = ["mlp_down", "partial_sums"]

Float32Array = npt.NDArray[np.float32]


def mlp_down(
    hidden_states: Float32Array,
    attn_output: Float32Array | None,
    mlp_intermediate: Float32Array,
    weight: Float32Array,
    bias: Float32Array | None = None,
    *,
    dtype: str,
    machine: str = "cpu",
) -> npt.NDArray[np.uint16]:
    """``hidden_states + attn_output + weight @ mlp_intermediate + bias`` in the canonical order, as bits of ``dtype``.

    Args:
        hidden_states, attn_output: ``[num_tokens, hidden_dim]``; ``attn_output`` may be None.
        mlp_intermediate: ``[num_tokens, intermediate_dim]``, ``intermediate_dim`` a multiple of 8.
        weight: ``[hidden_dim, intermediate_dim]``.
        bias: ``[hidden_dim]`` or None.
        dtype: ``"float16"`` or ``"bfloat16"``, what the float32 arrays hold and what the result is rounded to.
        machine: ``"cpu"``, or ``"simulator"`` for the CUDA kernel in Numba's simulator (``NUMBA_ENABLE_CUDASIM=1`` set before Numba
            is imported; tiny sizes only).

    Returns:
        ``[num_tokens, hidden_dim]`` uint16, the bits of the result.

    Raises:
        TypeError: an array is not float32. ValueError: a shape, ``dtype`` or ``machine`` is not as above.
    """
    if hidden_states is None:
        raise TypeError("hidden_states must be an array, got None")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    out = np.zeros((mlp_intermediate.shape[0], weight.shape[0]), np.uint16)
    _launch(
        machine,
        hidden_states,
        attn_output,
        mlp_intermediate,
        weight,
        bias,
        DTYPES[dtype],
        np.empty((0, 0), np.float32),
        out,
    )
    return out


def partial_sums(mlp_intermediate: Float32Array, weight: Float32Array, *, machine: str = "cpu") -> Float32Array:
    """Steps 1 to 7 alone: ``weight @ mlp_intermediate`` in the canonical order, float32 ``[num_tokens, hidden_dim]``, unrounded.

    Arguments and errors are those of :func:`mlp_down`.
    """
    sums = np.zeros((mlp_intermediate.shape[0], weight.shape[0]), np.float32)
    if sums.size:
        _launch(machine, None, None, mlp_intermediate, weight, None, 0, sums, np.empty((0, 0), np.uint16))
    return sums


def _launch(
    machine: str,
    hidden_states: Float32Array | None,
    attn_output: Float32Array | None,
    mlp_intermediate: Float32Array,
    weight: Float32Array,
    bias: Float32Array | None,
    dtype: int,
    sums: Float32Array,
    out: npt.NDArray[np.uint16],
) -> None:
    num_tokens = mlp_intermediate.shape[0]
    if weight.ndim != 2 or weight.shape[1] % VECTOR_SIZE or weight.shape[1] == 0:
        raise ValueError(
            f"weight must be [hidden_dim, intermediate_dim], a multiple of {VECTOR_SIZE}, got {list(weight.shape)}"
        )
    hidden_dim, intermediate_dim = weight.shape
    expected: list[tuple[str, Any, tuple[int, ...]]] = [
        ("hidden_states", hidden_states, (num_tokens, hidden_dim)),
        ("attn_output", attn_output, (num_tokens, hidden_dim)),
        ("mlp_intermediate", mlp_intermediate, (num_tokens, intermediate_dim)),
        ("weight", weight, (hidden_dim, intermediate_dim)),
        ("bias", bias, (hidden_dim,)),
    ]
    for name, array, shape in expected:
        if array is not None and array.dtype != np.float32:
            raise TypeError(f"{name} must be float32 (16-bit values convert exactly), got {array.dtype}")
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(array.shape)}")
    if num_tokens == 0 or hidden_dim == 0:
        return
    if machine == "cpu":
        from . import cpu

        cpu.launch(hidden_states, attn_output, mlp_intermediate, weight, bias, dtype, sums, out)
    elif machine == "simulator":
        from numba import config

        from . import kernel

        if not getattr(config, "ENABLE_CUDASIM", False):
            raise RuntimeError(
                "machine='simulator' needs NUMBA_ENABLE_CUDASIM=1 in the environment before Numba is imported"
            )
        absent_states, absent_bias = np.empty((0, 0), np.float32), np.empty(0, np.float32)
        kernel.launch(
            absent_states if hidden_states is None else hidden_states,
            absent_states if attn_output is None else attn_output,
            attn_output is not None,
            mlp_intermediate,
            weight,
            absent_bias if bias is None else bias,
            bias is not None,
            dtype,
            vectors_per_segment(intermediate_dim),
            sums,
            out,
        )
    else:
        raise ValueError(f"machine must be 'cpu' or 'simulator', got {machine!r}")
