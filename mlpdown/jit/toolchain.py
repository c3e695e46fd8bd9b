"""Which compilers there are: nvcc, wherever it may be, and the host compiler that it needs."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from . import driver
from .errors import BuildError

MINIMUM_NVCC = (12, 8)  # the first that knows sm_100 and sm_120
HOST_COMPILERS = ("g++", "c++", "clang++")
INSTALL_NVCC = "pip install 'mlpdown[nvcc]'"
_VERSION_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """An nvcc that can build the library, and its host compiler."""

    nvcc: Path
    nvcc_version: tuple[int, int]
    nvcc_build: str
    """The full release, e.g. ``13.0.88``: part of what names a build."""
    origin: str
    """Where nvcc was found: ``MLPDOWN_NVCC``, ``CUDA_HOME``, ``PATH``, ``/usr/local/cuda`` or ``PyPI``."""
    host_compiler: Path
    host_version: str

    @property
    def library_folders(self) -> list[Path]:
        """Where the CUDA runtime is in PyPI's layout, which nvcc does not look into by itself."""
        folder = self.nvcc.resolve().parent.parent / "lib"
        return [folder] if (folder / "libcudart_static.a").is_file() else []

    @property
    def identity(self) -> str:
        """What a build depends on."""
        return f"nvcc {self.nvcc_build}, {self.host_version}"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A place where nvcc was looked for, and what came of it."""

    origin: str
    path: Path
    version: tuple[int, int] | None
    build: str
    refusal: str | None
    """Why it cannot be taken; None if it can."""


def candidates() -> list[Candidate]:
    """Every nvcc there is on this machine, in the order in which they are tried."""
    found: dict[Path, Candidate] = {}
    for origin, path in _places():
        if path not in found:
            found[path] = _examine(origin, path, for_this_machine=True)
    return list(found.values())


def find_toolchain(*, for_this_machine: bool = True) -> Toolchain:
    """The first usable nvcc: ``MLPDOWN_NVCC`` (then no other), ``CUDA_HOME``, ``PATH``, ``/usr/local/cuda``, PyPI's wheels.

    Args:
        for_this_machine: pass over a compiler whose libraries the installed driver cannot run.

    Raises:
        BuildError: there is none, or no host compiler; the message lists what was tried and what to install.
    """
    tried = []
    for origin, path in _places():
        candidate = _examine(origin, path, for_this_machine)
        if candidate.refusal is None:
            assert candidate.version is not None
            host_compiler, host_version = find_host_compiler()
            return Toolchain(path, candidate.version, candidate.build, origin, host_compiler, host_version)
        tried.append(f"  {path} ({origin}): {candidate.refusal}")
    minimum = ".".join(map(str, MINIMUM_NVCC))
    if not tried:
        raise BuildError(
            f"no CUDA compiler: no nvcc in CUDA_HOME, on PATH, in /usr/local/cuda or in the wheels of this environment. "
            f"Install one ({INSTALL_NVCC}) or name it in MLPDOWN_NVCC (nvcc {minimum} or newer)"
        )
    raise BuildError(
        "\n".join(
            [f"no usable CUDA compiler (nvcc {minimum} or newer is needed; {INSTALL_NVCC} brings one). Tried:", *tried]
        )
    )


def find_host_compiler() -> tuple[Path, str]:
    """The C++ compiler on PATH and the first line of what it says of its version.

    Raises:
        BuildError: there is none, or it does not run.
    """
    for name in HOST_COMPILERS:
        found = shutil.which(name)
        if found is not None:
            version, refusal = _ask_version(Path(found))
            if refusal is not None:
                raise BuildError(f"the C++ compiler {found} does not run: {refusal}")
            return Path(found), version.splitlines()[0] if version else name
    raise BuildError(
        f"no C++ compiler: nvcc needs one of {', '.join(HOST_COMPILERS)} on PATH "
        "(Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"
    )


def _places() -> Iterator[tuple[str, Path]]:
    named = os.environ.get("MLPDOWN_NVCC")
    if named:
        yield "MLPDOWN_NVCC", Path(named)
        return
    cuda_home = os.environ.get("CUDA_HOME")
    if cuda_home:
        yield "CUDA_HOME", Path(cuda_home) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        yield "PATH", Path(on_path)
    toolkit = Path("/usr/local/cuda/bin/nvcc")
    if toolkit.is_file():
        yield "/usr/local/cuda", toolkit
    for wheel in _wheel_compilers():
        yield "PyPI", wheel


def _wheel_compilers() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    return [
        path for folder in folders for path in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True) if path.is_file()
    ]


def _examine(origin: str, path: Path, for_this_machine: bool) -> Candidate:
    if not path.is_file():
        return Candidate(origin, path, None, "", "there is no such file")
    output, refusal = _ask_version(path)
    if refusal is not None:
        return Candidate(origin, path, None, "", refusal)
    match = re.search(r"release (\d+)\.(\d+)(?:, V([\d.]+))?", output)
    if match is None:
        return Candidate(origin, path, None, "", f"its --version is not nvcc's: {output.strip()[:80]!r}")
    version = int(match[1]), int(match[2])
    build = match[3] or f"{match[1]}.{match[2]}"
    if version < MINIMUM_NVCC:
        return Candidate(origin, path, version, build, f"it is too old: {build}")
    driver_refusal = driver.refusal(version) if for_this_machine else None
    if driver_refusal is not None:
        return Candidate(
            origin,
            path,
            version,
            build,
            f"its libraries would not run here: {driver_refusal}".replace("it was made by", "one made by", 1),
        )
    return Candidate(origin, path, version, build, None)


def _ask_version(program: Path) -> tuple[str, str | None]:
    """What ``program --version`` prints, and why it could not be asked (None if it could)."""
    try:
        process = subprocess.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_VERSION_SECONDS,
            check=False,
        )
    except OSError as error:
        return "", f"it cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        return "", f"it did not answer --version in {_VERSION_SECONDS} s"
    if process.returncode != 0:
        said = (process.stderr or process.stdout).strip().splitlines()
        return "", f"--version ended with status {process.returncode}" + (f": {said[0]}" if said else "")
    return process.stdout, None
