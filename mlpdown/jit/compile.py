"""Runs compilers in a folder of their own, and finds the first error in what they say.

Sources are copied into the folder, torch is linked there, and both are named relative to it: so the library holds no path of this
machine, and no compiler sees the blanks, commas and letters that a user's folders may have.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from . import targets as target_names
from .cache import LIBRARY_NAME
from .errors import BuildError
from .sources import Sources
from .toolchain import Toolchain, environment

# The oldest torch whose stable ABI the op uses: 2.10.
TORCH_TARGET = "0x020a000000000000"
TORCH_LINK = "torch"  # in the build folder, a link to the torch that is installed
CUDA_FLAGS = (
    "-std=c++17",
    "-O3",
    # A product and a sum are fused where the specification says so, in so many words, and nowhere else.
    "-fmad=false",
    "-Xptxas=-v,-warn-spills",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "--threads=0",
    "-I.",
)
HOST_FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    "-DUSE_CUDA",
    "-I.",
    "-isystem",
    f"{TORCH_LINK}/include",
)
# The CUDA runtime is linked in, so that one library serves every minor release of CUDA; its symbols stay inside. Torch's are left to
# the torch that is loaded.
LINK_FLAGS = (
    "-shared",
    "-cudart=static",
    f"-L{TORCH_LINK}/lib",
    f"-Xlinker=-s,-soname={LIBRARY_NAME},--exclude-libs=ALL,--build-id=none,-z,defs,--as-needed",
    "-ltorch_cpu",
)
LIMIT_SECONDS = 1200.0
_POLL_SECONDS = 0.02
_ERROR = re.compile(
    r"(?:fatal )?error\s*(?::|#|\d)|\berror:|undefined reference|cannot find -l|No space left on device|: not found$"
)


class CompileError(BuildError):
    """A compiler failed."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log
        """All that the compilers said."""


def flags_identity() -> str:
    """Everything about the flags that a library depends on, targets apart."""
    return " ".join((*CUDA_FLAGS, *HOST_FLAGS, *LINK_FLAGS))


def compile_library(
    sources: Sources, toolchain: Toolchain, targets: Sequence[str], folder: Path
) -> tuple[Path, str]:
    """Build in ``folder``: every ``.cu`` with nvcc, every ``.cpp`` with the host compiler, side by side; then link.

    Returns:
        The library and the compilers' output.

    Raises:
        CompileError: a compiler failed; the message holds its first error, not all its output.
        BuildError: torch's headers are missing.
    """
    sources.write(folder)
    (folder / TORCH_LINK).symlink_to(_torch_folder(), target_is_directory=True)
    nvcc = [str(toolchain.nvcc), f"-ccbin={toolchain.host_compiler}"]
    compilers = {
        ".cu": [*nvcc, *CUDA_FLAGS, *target_names.nvcc_flags(targets)],
        ".cpp": [str(toolchain.host_compiler), *HOST_FLAGS],
    }
    units = sorted(path.name for path in folder.iterdir() if path.suffix in compilers)
    objects = [f"{name}.o" for name in units]
    commands = [[*compilers[Path(name).suffix], "-c", name, "-o", f"{name}.o"] for name in units]
    link = [*nvcc, *(f"-L{path}" for path in toolchain.library_folders), *LINK_FLAGS, "-o", LIBRARY_NAME, *objects]
    what = f"the native library does not compile ({toolchain.nvcc}, {toolchain.nvcc_build})"
    log = run(commands, folder, what)
    return folder / LIBRARY_NAME, log + run([link], folder, what)


def run(commands: Sequence[Sequence[str]], folder: Path, what: str) -> str:
    """Run compilers side by side in ``folder``; returns all that they said. When one fails, or the caller is interrupted, all are ended.

    Raises:
        CompileError: one failed, or they took longer than ``LIMIT_SECONDS``; its message is ``what: the first error``.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    outputs = [folder / f"{number}.output" for number in range(len(commands))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, path in zip(commands, outputs, strict=True):
            with path.open("wb") as output:
                # In a session of its own: ending it ends what it has started.
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=folder,
                        env=environment(),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        statuses = {process.poll() for process in processes}
        while None in statuses and statuses <= {None, 0} and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            statuses = {process.poll() for process in processes}
    finally:
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    log = "".join(path.read_text(errors="replace") for path in outputs)
    if statuses <= {0}:
        return log
    raise CompileError(f"{what}: {f'no end in {LIMIT_SECONDS:.0f} s' if statuses <= {None, 0} else first_error(log)}", log)


def first_error(log: str) -> str:
    """The line of the compilers' output that says what went wrong first."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = (line for line in lines if _ERROR.search(line) and not line.startswith("collect2:"))
    return next(errors, lines[-1] if lines else "the compiler said nothing")


def _torch_folder() -> Path:
    import torch

    folder = Path(torch.__path__[0])
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise BuildError(f"torch's C++ headers are not in {folder / 'include'}; reinstall torch (2.10 or newer)")
    return folder
