"""Runs ninja, and through it the compilers, in a folder of their own, and finds the first error in what they say.

Sources are copied into the folder, torch is linked there, and both are named relative to it: so the library holds no path of this
machine, and no compiler sees the blanks, commas and letters that a user's folders may have.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from . import targets as target_names
from .cache import LIBRARY_NAME
from .errors import BuildError
from .sources import Sources
from .toolchain import NINJA_STATUS, Toolchain, environment

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
_RULES = {".cu": "cuda", ".cpp": "host"}
LIMIT_SECONDS = 1200.0
_GRACE_SECONDS = 2.0
_POLL_SECONDS = 0.02
_ERROR = re.compile(
    r"(?:fatal )?error\s*(?::|#|\d)|\berror:|undefined reference|cannot find -l|No space left on device|: not found$"
)
# What ninja says at a failure: the target, and the command; what the compiler said comes next.
_FAILED = re.compile(r"^FAILED: .*\n.*\n", re.MULTILINE)


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
    sources: Sources, toolchain: Toolchain, ninja: Path, targets: Sequence[str], folder: Path
) -> tuple[Path, str]:
    """Build in ``folder``, by ninja: every ``.cu`` with nvcc, every ``.cpp`` with the host compiler, side by side; then link.

    Returns:
        The library and the compilers' output.

    Raises:
        CompileError: a compiler failed; the message holds its first error, not all its output.
        BuildError: torch's headers are missing.
    """
    sources.write(folder)
    (folder / TORCH_LINK).symlink_to(_torch_folder(), target_is_directory=True)
    (folder / "build.ninja").write_bytes(os.fsencode(_ninja_file(toolchain, targets, folder)))
    log = run([str(ninja)], folder, f"the native library does not compile ({toolchain.nvcc}, {toolchain.nvcc_build})")
    return folder / LIBRARY_NAME, log


def _ninja_file(toolchain: Toolchain, targets: Sequence[str], folder: Path) -> str:
    """A rule for each compiler, a step for each source in ``folder``, and the link."""
    nvcc = [str(toolchain.nvcc), f"-ccbin={toolchain.host_compiler}"]
    rules = {
        "cuda": ([*nvcc, *CUDA_FLAGS, *target_names.nvcc_flags(targets)], "-c $in -o $out"),
        "host": ([str(toolchain.host_compiler), *HOST_FLAGS], "-c $in -o $out"),
        "link": ([*nvcc, *(f"-L{path}" for path in toolchain.library_folders), *LINK_FLAGS], "-o $out $in"),
    }
    units = sorted(path.name for path in folder.iterdir() if path.suffix in _RULES)
    lines = [
        # Quoted for the shell, then for ninja, which has one special character.
        *(f"rule {name}\n  command = {shlex.join(words).replace('$', '$$')} {files}" for name, (words, files) in rules.items()),
        *(f"build {name}.o: {_RULES[Path(name).suffix]} {name}" for name in units),
        f"build {LIBRARY_NAME}: link {' '.join(f'{name}.o' for name in units)}",
    ]
    return "\n".join(lines) + "\n"


def run(command: Sequence[str], folder: Path, what: str) -> str:
    """Run ninja or a compiler in ``folder``; returns all that was said. At the first failure, or when the caller is interrupted, all that
    it has started is ended.

    Raises:
        CompileError: it failed, or took longer than ``LIMIT_SECONDS``; its message is ``what: the first error``.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    path = folder / "output"
    with path.open("wb") as output:
        # In a session of its own, by which all that it starts can be found.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            # Of itself ninja would wait for the other compilers when one has failed.
            while process.poll() is None and time.monotonic() < deadline and not _FAILED.search(path.read_text(errors="replace")):
                time.sleep(_POLL_SECONDS)
            late = process.returncode is None and time.monotonic() >= deadline
        finally:
            if process.returncode != 0:
                _end(process)
    log = path.read_text(errors="replace")
    if process.returncode == 0:
        return log
    raise CompileError(f"{what}: {f'no end in {LIMIT_SECONDS:.0f} s' if late else first_error(log)}", log)


def first_error(log: str) -> str:
    """The line of the compilers' output that says what went wrong first; where none has failed, ninja's own."""
    *failed, said = _FAILED.split(log, maxsplit=1)
    lines = [line.strip() for line in said.splitlines() if line.strip() and not (failed and line.startswith(NINJA_STATUS))]
    errors = (line for line in lines if _ERROR.search(line) and not line.startswith("collect2:"))
    return next(errors, lines[-1] if lines else "the compiler said nothing")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with its whole session. ninja gives each compiler a process group of its own, and ends it when it is asked to end;
    what does not end so is killed."""
    try:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(_GRACE_SECONDS)
    finally:  # at a second Ctrl-C, too
        while members := _session(process.pid):
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        process.wait()


def _session(leader: int) -> list[int]:
    """The processes of a session that have not ended."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended just now
            state, _, _, session = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                members.append(int(path.parent.name))
    return members


def _torch_folder() -> Path:
    import torch

    folder = Path(torch.__path__[0])
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise BuildError(f"torch's C++ headers are not in {folder / 'include'}; reinstall torch (2.10 or newer)")
    return folder
