"""Compiles the emulator and the kernel's source into a library, once for each content."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "native"

FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-U_FORTIFY_SOURCE",  # fiber.h says why
    "-fno-gnu-unique",  # several kernels in one process share nothing
    "-ffp-contract=off",  # a sum that is not a fused multiply-add in the kernel is none here
    "-Wno-unknown-pragmas",  # unroll
)
# For few and small launches, some of which go wrong: compiled in half the time. Variables that nobody has set hold the same values
# everywhere, and an index past an array in registers ends the process.
UNOPTIMISED_FLAGS = (
    "-O0",
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=bounds",
    "-fsanitize-undefined-trap-on-error",
)
MACHINE_FLAGS = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic")  # clocks are long
MACHINE_SOURCES = ("scheduler.cpp", "primitives.cpp", "memory.cpp", "reports.cpp")


def build(
    native: Path, ring: list[tuple[int, int, int]], registers: tuple[tuple[int, int], ...], *, optimise: bool = True
) -> Path:
    """The library that emulates the kernels in the folder ``native``: of the ring, these cluster sizes, rows per stage and vectors in
    registers; of registers, these numbers of rows and of vectors in flight.

    ``optimise=False`` compiles the kernels with ``UNOPTIMISED_FLAGS``.
    """
    for_each = (
        "-DMLPDOWN_FOR_EACH_RING_KERNEL(X)=" + " ".join(f"X({','.join(map(str, values))})" for values in ring),
        "-DMLPDOWN_FOR_EACH_REGISTERS_KERNEL(X)="
        + " ".join(f"X({','.join(map(str, values))})" for values in registers),
    )
    kernel = _compile(HERE / "launch.cpp", native, (*(("-O2",) if optimise else UNOPTIMISED_FLAGS), *for_each))
    # One machine for all kernels of a process: stacks for a thousand threads each would use up the mappings that Linux allows.
    machine = _link([_compile(HERE / source, NATIVE, MACHINE_FLAGS) for source in MACHINE_SOURCES])
    return _link([kernel, machine])


def _link(files: list[Path]) -> Path:
    """A library that calls its own copy of what it shares with others."""
    return _once(_cache() / f"{_digest(files)}.so", ("-shared", "-Wl,-Bsymbolic-functions", *map(str, files)))


def _compile(source: Path, native: Path, flags: tuple[str, ...]) -> Path:
    headers = [*sorted(HERE.glob("*.h")), HERE / "ptx.cuh"]
    if source.name == "launch.cpp":
        headers += sorted(native.glob("*.h")) + sorted(path for path in native.glob("*.cuh") if path.name != "ptx.cuh")
    target = _cache() / f"{_digest([source, *headers], flags)}.o"
    # This folder comes first: its ptx.cuh takes the place of the native one.
    return _once(target, ("-c", *flags, "-I", str(HERE), "-I", str(native), str(source)))


def _once(target: Path, arguments: tuple[str, ...]) -> Path:
    """Have the compiler make ``target`` unless it is there; other processes that want the same wait for the one that is at it."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            command = [_compiler(), *FLAGS, *arguments, "-o", str(unfinished)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\nfailed:\n{result.stderr[:4000]}")
            os.replace(unfinished, target)
    return target


@functools.cache
def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the emulator needs g++ on the PATH, and there is none")
    return compiler


@functools.cache
def _compiler_version() -> bytes:
    return subprocess.run([_compiler(), "--version"], capture_output=True, check=True).stdout


@functools.cache
def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"mlpdown-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else")
    return folder


def _digest(files: list[Path], flags: tuple[str, ...] = ()) -> str:
    digest = hashlib.sha256("\0".join(FLAGS + flags).encode() + _compiler_version())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:32]
