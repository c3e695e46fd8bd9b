"""The machines that the specification runs on, and how each spells the float32 operations of IEEE 754."""

# What is compiled is Python only to look at: Numba types it, not mypy.
# mypy: ignore-errors

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
from numba import config, njit, types
from numba.extending import intrinsic

from .order import Arithmetic, Machine, arithmetic

# Grids are limited to 65535 in their second dimension. A block takes more than one token if there are more.
MAX_TOKEN_BLOCKS = 65535

_FLOAT = types.float32


@functools.cache
def on_cpu() -> Arithmetic:
    """The canonical order, compiled for this CPU."""
    return arithmetic(cpu_machine())


@functools.cache
def on_cuda() -> Arithmetic:
    """The canonical order for a CUDA kernel: on a GPU or, with ``NUMBA_ENABLE_CUDASIM=1``, in Numba's simulator."""
    return arithmetic(simulator_machine() if config.ENABLE_CUDASIM else gpu_machine())


@functools.cache
def cpu_machine() -> Machine:
    """LLVM's instructions, without any of the flags that let it rearrange them."""
    compile_function = njit(nogil=True)
    binary, ternary = _FLOAT(_FLOAT, _FLOAT), _FLOAT(_FLOAT, _FLOAT, _FLOAT)

    @intrinsic
    def add(typing_context, a, b):
        return binary, lambda context, builder, signature, arguments: builder.fadd(*arguments)

    @intrinsic
    def mul(typing_context, a, b):
        return binary, lambda context, builder, signature, arguments: builder.fmul(*arguments)

    @intrinsic
    def fma(typing_context, a, b, c):
        return ternary, lambda context, builder, signature, arguments: builder.fma(*arguments)

    @intrinsic
    def div(typing_context, a, b):
        return binary, lambda context, builder, signature, arguments: builder.fdiv(*arguments)

    @intrinsic
    def sqrt(typing_context, a):
        def generate(context, builder, signature, arguments):
            return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [arguments[0].type]), arguments)

        return _FLOAT(_FLOAT), generate

    return Machine(compile_function, add, mul, fma, div, sqrt, *_casts(intrinsic))


@functools.cache
def gpu_machine() -> Machine:
    """libdevice's functions with a rounding in their names, which no option of the compiler changes."""
    from numba import cuda
    from numba.cuda import libdevice
    from numba.cuda.extending import intrinsic as cuda_intrinsic

    def compile_function(function):
        return cuda.jit(function, device=True)

    @compile_function
    def add(a, b):
        return libdevice.fadd_rn(a, b)

    @compile_function
    def mul(a, b):
        return libdevice.fmul_rn(a, b)

    @compile_function
    def fma(a, b, c):
        return libdevice.fmaf_rn(a, b, c)

    @compile_function
    def div(a, b):
        return libdevice.fdiv_rn(a, b)

    @compile_function
    def sqrt(a):
        return libdevice.fsqrt_rn(a)

    return Machine(compile_function, add, mul, fma, div, sqrt, *_casts(cuda_intrinsic))


def _casts(make_intrinsic: Callable) -> tuple[Callable, Callable]:
    @make_intrinsic
    def float_to_bits(typing_context, value):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

        return types.uint32(_FLOAT), generate

    @make_intrinsic
    def bits_to_float(typing_context, bits):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(_FLOAT))

        return _FLOAT(types.uint32), generate

    return float_to_bits, bits_to_float


@functools.cache
def simulator_machine() -> Machine:
    """NumPy's float32 scalars."""

    def quietly(operation):
        @functools.wraps(operation)
        def on_float32(*values):
            with np.errstate(all="ignore"):
                return operation(*map(np.float32, values))

        return on_float32

    @quietly
    def fma(a, b, c):
        # The product of two float32 is exact in float64. Rounding the sum to odd there, and then to float32, rounds it once
        # (S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
        product, addend = np.float64(a) * np.float64(b), np.float64(c)
        total = product + addend
        if np.isfinite(total):
            subtrahend = total - product
            error = (product - (total - subtrahend)) + (addend - subtrahend)
            if error != 0 and not total.view(np.int64) & 1:
                total = np.nextafter(total, np.inf if error > 0 else -np.inf)
        return np.float32(total)

    return Machine(
        compile=lambda function: function,
        add=quietly(lambda a, b: a + b),
        mul=quietly(lambda a, b: a * b),
        fma=fma,
        div=quietly(lambda a, b: a / b),
        sqrt=quietly(np.sqrt),
        float_to_bits=lambda value: np.float32(value).view(np.uint32),
        bits_to_float=lambda bits: np.uint32(bits).view(np.float32),
    )


# ---- Threads of a CPU -------------------------------------------------------------------------------------------------------------------


def run_in_threads(function: Callable[[int, int], None], size: int, min_share: int) -> None:
    """Call ``function(first, end)`` for shares of ``range(size)``, of ``min_share`` or more, on every core; raise what one of them raises.

    The calling thread takes the first share, and those for which no thread can be started, as at the interpreter's end.
    """
    num_shares = max(1, min(os.cpu_count() or 1, size // min_share))
    bounds = [size * share // num_shares for share in range(num_shares + 1)]
    errors: list[BaseException] = []

    def run(share: int) -> None:
        try:
            with ieee_arithmetic():
                function(bounds[share], bounds[share + 1])
        except BaseException as error:  # noqa: BLE001  raised again by the calling thread
            errors.append(error)

    # Threads of our own, not Numba's: its threading layers do not allow two callers at once.
    threads = []
    left = [0]
    for share in range(1, num_shares):
        thread = threading.Thread(target=run, args=(share,))
        try:
            thread.start()
            threads.append(thread)
        except RuntimeError:
            left.append(share)
    for share in left:
        run(share)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def ieee_arithmetic() -> Iterator[None]:
    """Round to nearest even and keep subnormals in this thread, whatever mode others have set; their mode is back at the end.

    ``torch.set_flush_denormal(True)`` sets another mode, and so does loading a library that was built with -ffast-math.

    Raises:
        RuntimeError: this platform flushes subnormals and offers no way to change that.
    """
    saved = ctypes.create_string_buffer(
        256
    )  # a fenv_t, which takes 32 bytes or fewer where there is a default environment
    changed = _fegetenv(saved) == 0 and _fesetenv(_DEFAULT_ENVIRONMENT) == 0
    try:
        if np.float32(2.0**-140) * _ONE == 0:
            raise RuntimeError(
                "this CPU flushes subnormal numbers to zero, and its mode cannot be changed: no exact bits here"
            )
        yield
    finally:
        if changed:
            _fesetenv(saved)


_ONE = np.float32(1.0)
_C_LIBRARY = ctypes.CDLL(None)
_fegetenv, _fesetenv = _C_LIBRARY.fegetenv, _C_LIBRARY.fesetenv
_fegetenv.argtypes = _fesetenv.argtypes = [ctypes.c_void_p]
# FE_DFL_ENV: an object on macOS, a number in glibc and musl.
_DEFAULT_ENVIRONMENT = (
    ctypes.byref(ctypes.c_byte.in_dll(_C_LIBRARY, "_FE_DFL_ENV")) if sys.platform == "darwin" else ctypes.c_void_p(-1)
)
