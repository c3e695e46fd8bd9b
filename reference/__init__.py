"""The executable specification: NumPy arrays in, the exact bits out.

``order.py`` says what is computed, in prose and as arithmetic. ``row_sums.py`` (steps 1 to 7) and ``finish.py`` (steps
8 and 9) run it on a CPU, on a GPU, or in Numba's simulator; ``machines.py`` holds what these spell differently. Inputs
are float32 arrays that hold float16 or bfloat16 values (both convert exactly), results are the 16 bits as uint16.
Nothing here knows of torch or of the rest of the package.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt

from .order import DTYPES, VECTOR_SIZE

__all__ = ["mlp_down", "partial_sums"]

Float32Array = npt.NDArray[np.float32]

MACHINES = ("cpu", "simulator")


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
        TypeError: an array is not float32. ValueError: a shape, ``dtype`` or ``machine`` is not as above. RuntimeError: the machine is not
        there: the simulator was not asked for in time, or this CPU cannot keep subnormals.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    sums = partial_sums(mlp_intermediate, weight, machine=machine)
    _check("hidden_states", hidden_states, sums.shape)
    addends = []
    if bias is not None:
        _check("bias", bias, sums.shape[1:])
        addends.append(bias[None])
    if attn_output is not None:
        _check("attn_output", attn_output, sums.shape)
        addends.append(attn_output)
    out = np.empty(sums.shape, np.uint16)
    if out.size:
        from . import finish

        _on(machine, finish)(sums, [*addends, hidden_states], DTYPES[dtype], out)
    return out


def partial_sums(activation: Float32Array, weight: Float32Array, *, machine: str = "cpu") -> Float32Array:
    """``weight @ activation`` in the canonical order, steps 1 to 7: float32 ``[num_tokens, num_rows]``, unrounded.

    Args:
        activation: ``[num_tokens, row_length]``, ``row_length`` a positive multiple of 8.
        weight: ``[num_rows, row_length]``.
        machine, errors: as in :func:`mlp_down`.
    """
    if machine not in MACHINES:
        raise ValueError(f"machine must be 'cpu' or 'simulator', got {machine!r}")
    if weight.ndim != 2 or weight.shape[1] % VECTOR_SIZE or weight.shape[1] == 0:
        raise ValueError(
            f"weight must be [num_rows, row_length], a multiple of {VECTOR_SIZE}, got {list(weight.shape)}"
        )
    _check("weight", weight, weight.shape)
    _check("activation", activation, (len(activation), weight.shape[1]))
    sums = np.empty((activation.shape[0], weight.shape[0]), np.float32)
    if sums.size:
        from . import row_sums

        _on(machine, row_sums)(activation, weight, sums)
    return sums


def _check(name: str, array: Float32Array, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name} must be float32 (16-bit values convert exactly), got {got}")
    if array.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(array.shape)}")


def _on(machine: str, module: ModuleType):
    """``module``'s function for a machine."""
    if machine == "cpu":
        return module.on_cpu
    from numba import config

    if not getattr(config, "ENABLE_CUDASIM", False):
        raise RuntimeError(
            "machine='simulator' needs NUMBA_ENABLE_CUDASIM=1 in the environment before Numba is imported"
        )
    return module.on_cuda
