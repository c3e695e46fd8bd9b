"""Which compilers there are (nvcc, wherever it may be, the host compiler that it needs, and ninja, which runs them), and which CUDA the
driver can run."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import BuildError

MINIMUM_NVCC = (12, 8)  # the first that knows sm_100 and sm_120
HOST_COMPILERS = ("g++", "c++", "clang++")
# Where build systems name the host compiler: nvcc's own variable, CMake's, and everybody's.
HOST_VARIABLES = ("NVCC_CCBIN", "CUDAHOSTCXX", "CXX")
# nvcc and clang take flags from these. They can change bits (-use_fast_math), and no key would name them.
IGNORED_VARIABLES = ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "CCC_OVERRIDE_OPTIONS")
NINJA_STATUS = "ninja: "  # begins each line of ninja's own, of progress too
INSTALL_NVCC = "pip install 'mlpdown[nvcc]'"
# The oldest driver for each major version of CUDA: a library made by that CUDA needs it.
MINIMUM_DRIVER = {12: "525", 13: "580"}
_ANSWER_SECONDS = 30

CudaVersion = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A compiler that was found, and whether it can be used."""

    origin: str
    """For nvcc ``MLPDOWN_NVCC``, ``CUDA_HOME``, ``PATH``, ``/usr/local/cuda`` or ``PyPI``; for others a variable, ``PyPI`` or ``PATH``."""
    path: Path
    version: str = ""
    """nvcc's release, e.g. ``13.0.88``; of others the first line of what they say."""
    refusal: str | None = None
    """Why it cannot be used; None if it can."""

    def __str__(self) -> str:
        return f"{self.path} ({self.origin}): {self.refusal or self.version}"


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """An nvcc that can build the library, and its host compiler."""

    nvcc: Path
    nvcc_version: CudaVersion
    nvcc_build: str
    origin: str
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


def find_toolchain(*, for_this_machine: bool = True) -> Toolchain:
    """The first usable nvcc (``MLPDOWN_NVCC``, then no other; else ``CUDA_HOME``, ``PATH``, ``/usr/local/cuda``, PyPI's wheels) with the
    first host compiler that it takes (``NVCC_CCBIN``, ``CUDAHOSTCXX``, ``CXX``, ``PATH``).

    Args:
        for_this_machine: pass over a compiler whose libraries the installed driver cannot run.

    Raises:
        BuildError: there is none, or no host compiler; the message lists what was tried and what to install.
    """
    minimum = ".".join(map(str, MINIMUM_NVCC))
    hosts = list(host_compilers())
    tried = []
    for nvcc in nvcc_compilers(for_this_machine=for_this_machine):
        if nvcc.refusal is not None:
            tried.append(f"  {nvcc}")
            continue
        for host in hosts:
            # Its headers may not be found, or refuse the host compiler's version.
            trial = [str(nvcc.path), f"-ccbin={host.path}", "-E", "-x", "cu", "-"]
            refusal = host.refusal or _ask(trial, "#include <cuda_runtime.h>\n")[1]
            if refusal is None:
                return Toolchain(nvcc.path, _release(nvcc.version), nvcc.version, nvcc.origin, host.path, host.version)
            tried.append(f"  {nvcc.path} ({nvcc.origin}) with {host.path} ({host.origin}): {refusal}")
        if not hosts:
            raise BuildError(
                f"no C++ compiler: nvcc needs one of {', '.join(HOST_COMPILERS)} on PATH, or named by {' or '.join(HOST_VARIABLES)} "
                "(Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"
            )
    if not tried:
        raise BuildError(
            f"no CUDA compiler: no nvcc in CUDA_HOME, on PATH, in /usr/local/cuda or in the wheels of this environment. "
            f"Install one ({INSTALL_NVCC}) or name it in MLPDOWN_NVCC (nvcc {minimum} or newer)"
        )
    needed = f"no usable CUDA compiler (nvcc {minimum} or newer is needed; {INSTALL_NVCC} brings one). Tried:"
    raise BuildError("\n".join([needed, *tried]))


def nvcc_compilers(*, for_this_machine: bool = True) -> Iterator[Compiler]:
    """Every nvcc on this machine, in the order in which they are tried."""
    seen = set()
    for origin, place in _nvcc_places():
        # nvcc finds its headers beside its own file, whatever link led there. Of a link to something else (ccache), the name matters.
        real = Path(os.path.realpath(place))
        path = real if real.name == place.name else place.absolute()
        if path not in seen:
            seen.add(path)
            yield _examine_nvcc(origin, path, for_this_machine)


def host_compilers() -> Iterator[Compiler]:
    """Every C++ compiler that is named or on PATH, in the order in which they are tried."""
    seen = set()
    for origin, path in _host_places():
        if path not in seen:
            seen.add(path)
            yield _examine(origin, path)


def find_ninja() -> Path:
    """The first usable ninja: its wheel's, then the one on PATH.

    Raises:
        BuildError: there is none; the message says how to install it.
    """
    found = list(ninjas())
    usable = [ninja.path for ninja in found if ninja.refusal is None]
    if not usable:
        raise BuildError("\n".join(["no ninja, which runs the compilers: pip install ninja", *(f"  {ninja}" for ninja in found)]))
    return usable[0]


def ninjas() -> Iterator[Compiler]:
    """Every ninja of this environment, in the order in which they are tried."""
    folder = None
    with contextlib.suppress(ImportError):
        folder = getattr(importlib.import_module("ninja"), "BIN_DIR", None)
    if folder:
        yield _examine("PyPI", Path(folder, "ninja"))
    on_path = shutil.which("ninja")
    if on_path and Path(on_path).absolute() != Path(folder or "", "ninja"):
        yield _examine("PATH", Path(on_path).absolute())


def environment() -> dict[str, str]:
    """What ninja and a compiler find in their environment: nothing that changes what they make; the C locale and no colours, so that their
    errors can be recognised; their own folder for what they leave when they are killed."""
    kept = {name: value for name, value in os.environ.items() if name not in IGNORED_VARIABLES}
    return {**kept, "LC_ALL": "C", "CLICOLOR_FORCE": "0", "NINJA_STATUS": NINJA_STATUS, "TMPDIR": "."}


@functools.cache
def supported_cuda() -> CudaVersion | None:
    """The newest CUDA that the installed driver supports, asked without torch and without touching a GPU; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def driver_refusal(library_cuda: CudaVersion) -> str | None:
    """Why the installed driver cannot run a library made by this CUDA; None if it can, or if there is no driver to ask."""
    supported = supported_cuda()
    if supported is None or supported[0] >= library_cuda[0]:
        return None
    made_by, offered = (".".join(map(str, version)) for version in (library_cuda, supported))
    needed = MINIMUM_DRIVER.get(library_cuda[0], "newer")
    return f"CUDA {made_by} needs driver {needed} or newer; the installed driver supports CUDA {offered}"


def _nvcc_places() -> Iterator[tuple[str, Path]]:
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
    spec = None
    with contextlib.suppress(ValueError):  # a module of this name that Python did not find itself
        spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True):
            yield "PyPI", path


def _host_places() -> Iterator[tuple[str, Path]]:
    for variable in HOST_VARIABLES:
        named = os.environ.get(variable)
        if named and os.path.isdir(named):  # as nvcc takes it, too
            yield from ((variable, Path(named, name)) for name in HOST_COMPILERS if os.path.isfile(Path(named, name)))
        elif named:
            found = shutil.which(named)
            yield variable, Path(found).absolute() if found else Path(named)
    for name in HOST_COMPILERS:
        found = shutil.which(name)
        if found is not None:
            yield "PATH", Path(found)


def _examine(origin: str, path: Path) -> Compiler:
    said, refusal = _ask([str(path), "--version"])
    return Compiler(origin, path, said.splitlines()[0] if said else path.name, refusal)


def _examine_nvcc(origin: str, path: Path, for_this_machine: bool) -> Compiler:
    said, refusal = _ask([str(path), "--version"])
    if refusal is not None:
        return Compiler(origin, path, refusal=refusal)
    match = re.search(r"release (\d+\.\d+)(?:, V([\d.]+))?", said)
    if match is None:
        return Compiler(origin, path, refusal=f"its --version is not nvcc's: {said.strip()[:80]!r}")
    version = match[2] or match[1]
    if _release(version) < MINIMUM_NVCC:
        return Compiler(origin, path, version, f"it is too old: {version}")
    refusal = driver_refusal(_release(version)) if for_this_machine else None
    return Compiler(origin, path, version, refusal and f"its libraries would not run here: {refusal}")


def _release(version: str) -> CudaVersion:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _ask(command: Sequence[str], text: str = "") -> tuple[str, str | None]:
    """What a command that reads ``text`` prints, and why it could not be run (None if it could)."""
    if not os.path.isfile(command[0]):
        return "", "there is no such file"
    try:
        process = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_SECONDS,
            check=False,
            env={**environment(), "TMPDIR": tempfile.gettempdir()},
        )
    except OSError as error:
        return "", f"it cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        return "", f"it did not answer in {_ANSWER_SECONDS} s"
    if process.returncode != 0:
        said = (process.stderr or process.stdout).strip().splitlines()
        wrong = next((line for line in said if "error" in line), said[0] if said else "")
        return "", f"{command[-1] if text == '' else 'a trial'} ended with status {process.returncode}" + (wrong and f": {wrong}")
    return process.stdout, None
