"""One build, in one folder: writes build.ninja, runs ninja, follows its progress, finds the first error.

Sources are copied into the folder, torch is linked there, and both are named relative to it: so the library holds no path of this
machine, and no compiler sees the blanks, commas and letters that a user's folders may have.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from . import targets as target_names
from .cache import LIBRARY_NAME
from .errors import BuildError
from .sources import Sources
from .toolchain import Toolchain

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


class CompileError(BuildError):
    """A compiler failed."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log
        """All that the compilers said."""


Progress = Callable[[int, int, str], None]
"""Called with steps finished, steps in all, and what was just done."""

_STATUS = "@step "
_ERROR = re.compile(
    r"(?:fatal )?error\s*(?::|#|\d)|\berror:|undefined reference|cannot find -l|ninja: (?:error|fatal)|No space left on device|: not found$"
)


def flags_identity() -> str:
    """Everything about the flags that a library depends on, targets apart."""
    return " ".join((*CUDA_FLAGS, *HOST_FLAGS, *LINK_FLAGS))


def compile_library(
    sources: Sources, toolchain: Toolchain, targets: Sequence[str], folder: Path, progress: Progress
) -> tuple[Path, str]:
    """Build in ``folder``; returns the library and the compilers' output.

    Raises:
        CompileError: a compiler failed; the message holds its first error, not all its output.
        BuildError: ninja or torch's headers are missing.
    """
    sources.write(folder)
    (folder / TORCH_LINK).symlink_to(_torch_folder(), target_is_directory=True)
    (folder / "build.ninja").write_text(_ninja_file(toolchain, targets))
    log, status = _run_ninja(folder, progress)
    if status != 0:
        raise CompileError(
            f"the native library does not compile ({toolchain.nvcc}, {toolchain.nvcc_build}): {first_error(log)}", log
        )
    return folder / LIBRARY_NAME, log


def first_error(log: str) -> str:
    """The line of the compilers' output that says what went wrong first."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        if _ERROR.search(line) and not line.startswith(("FAILED:", "collect2:")):
            return line
    failed = next((position for position, line in enumerate(lines) if line.startswith("FAILED:")), None)
    if failed is not None and failed + 2 < len(lines):  # FAILED:, the command, and then what it said
        return lines[failed + 2]
    return lines[-1] if lines else "ninja said nothing"


def _ninja_file(toolchain: Toolchain, targets: Sequence[str]) -> str:
    host_compiler = str(toolchain.host_compiler)
    cuda = [str(toolchain.nvcc), f"-ccbin={host_compiler}", *CUDA_FLAGS, *target_names.nvcc_flags(targets)]
    host = [host_compiler, *HOST_FLAGS]
    link_folders = [f"-L{folder}" for folder in toolchain.library_folders]
    link = [str(toolchain.nvcc), f"-ccbin={host_compiler}", *link_folders, *LINK_FLAGS]
    return "\n".join(
        [
            "ninja_required_version = 1.5",
            f"rule cuda\n  command = {_command(cuda)} -c $in -o $out\n  description = compiled $in for {', '.join(targets)}",
            f"rule host\n  command = {_command(host)} -c $in -o $out\n  description = compiled $in",
            f"rule link\n  command = {_command(link)} -o $out $in\n  description = linked $out",
            "build launcher.o: cuda launcher.cu",
            "build op.o: host op.cpp",
            "build source_hash.o: host source_hash.cpp",
            f"build {LIBRARY_NAME}: link launcher.o op.o source_hash.o",
            f"default {LIBRARY_NAME}",
            "",
        ]
    )


def _run_ninja(folder: Path, progress: Progress) -> tuple[str, int]:
    command = [str(_ninja()), "-C", str(folder), "-f", "build.ninja"]
    # The C locale, so that errors can be recognised; the build folder for what nvcc leaves when it is killed.
    environment = {**os.environ, "NINJA_STATUS": f"{_STATUS}%f %t ", "LC_ALL": "C", "TMPDIR": "."}
    log = []
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        text=True,
        errors="replace",
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_STATUS):
                finished, total, what = line[len(_STATUS) :].strip().split(" ", 2)
                progress(int(finished), int(total), what)
            else:
                log.append(line)
        return "".join(log), process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            threading.Timer(5, process.kill).start()
            process.wait()


def _ninja() -> Path:
    """ninja from its wheel, or the one on PATH."""
    candidates = [Path(sysconfig.get_path("scripts")) / "ninja"]
    try:
        import ninja
    except ImportError:
        pass
    else:
        candidates.append(Path(ninja.BIN_DIR) / "ninja")
    on_path = shutil.which("ninja")
    if on_path is not None:
        candidates.append(Path(on_path))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise BuildError("ninja is missing: pip install ninja")


def _torch_folder() -> Path:
    import torch

    folder = Path(torch.__path__[0])
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise BuildError(f"torch's C++ headers are not in {folder / 'include'}; reinstall torch (2.10 or newer)")
    return folder


def _command(words: Sequence[str]) -> str:
    """Words quoted for the shell, then for ninja, which has one special character."""
    return " ".join(shlex.quote(word).replace("$", "$$") for word in words)
