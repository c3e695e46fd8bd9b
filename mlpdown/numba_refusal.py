"""Whether Numba can run the specification here. Asked before it is used, so that where it cannot, the reason is a sentence."""

from __future__ import annotations

import functools
import importlib
import os


@functools.cache
def numba_refusal(device_type: str) -> str | None:
    """Why the specification cannot run on ``"cpu"`` or ``"cuda"`` tensors here: Numba is not installed, cannot be imported with the
    NumPy that is here, or is told not to compile. None if it can."""
    try:
        config = importlib.import_module("numba").config
        if device_type == "cuda" and not config.ENABLE_CUDASIM:
            target = importlib.import_module("numba.cuda.descriptor").cuda_target
            for context in (target.typing_context, target.target_context):
                context.refresh()  # which the first compilation would do: with a NumPy that it does not know, it fails here
    except Exception as error:  # noqa: BLE001 (of another package's import)
        variables = sorted(name for name in os.environ if name.startswith("NUMBA_"))
        advice = f"unset {', '.join(variables)}, or " if variables else ""
        return f"Numba cannot be imported ({type(error).__name__}: {error}): {advice}reinstall mlpdown's dependencies"
    if config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT keeps Numba from compiling the specification: unset it"
    if device_type == "cuda" and config.ENABLE_CUDASIM:
        return "NUMBA_ENABLE_CUDASIM puts a simulator in the GPU's place: unset it"
    return None
