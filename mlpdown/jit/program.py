"""Small sources beside the package's library (benchmarks, test kernels): compiled on demand, kept in the cache by their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import cache, compile, targets
from .toolchain import find_toolchain

RESULT = "result"
_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-fmad=false", "-cudart=static", "-Xcompiler=-fPIC,-Wall", "--threads=0", "-I.")


def compile_cuda(
    name: str,
    files: Mapping[str, bytes],
    sources: Sequence[str],
    *,
    shared: bool,
    built_targets: Sequence[str] | None = None,
) -> Path:
    """Compile and link with the nvcc that builds the library.

    Args:
        name: of the result, for people.
        files: name -> content of everything that the compiler may read; ``sources`` are those it is given.
        shared: make a shared library; else a program.
        built_targets: as :data:`mlpdown.jit.targets.ALL_TARGETS`; by default this machine's GPUs.

    Returns:
        The path of the library or program, in the cache folder.

    Raises:
        BuildError: no compiler, a compile error, a cache folder that cannot be used.
    """
    tools = find_toolchain(for_this_machine=built_targets is None)
    if built_targets is None:
        built_targets = targets.targets_for_devices(targets.present_capabilities())
    flags = [*_FLAGS, *targets.nvcc_flags(built_targets), *(["-shared"] if shared else [])]
    folders = [f"-L{path}" for path in tools.library_folders]
    command = [str(tools.nvcc), f"-ccbin={tools.host_compiler}", *flags, *folders, "-o", RESULT, *sources]
    identity = [tools.identity, *flags, *sources]
    return compile_once(name, ".so" if shared else ".program", files, command, identity)


def compile_once(name: str, suffix: str, files: Mapping[str, bytes], command: Sequence[str], identity: Sequence[str]) -> Path:
    """What a compiler makes of files, from the cache if it is there.

    Args:
        name, suffix: of the result, for people.
        files: name -> content of everything that the compiler may read. It runs in a folder that has them and nothing else.
        command: writes the file ``RESULT``.
        identity: all that the result depends on beside the files: the compiler's version, its flags.

    Returns:
        The path of the result, in the cache folder.

    Raises:
        BuildError: a compile error, a cache folder that cannot be used.
    """
    digest = hashlib.sha256("\n".join(identity).encode())
    for file_name, content in sorted(files.items()):
        digest.update(f"\n{file_name} {len(content)}\n".encode() + content)
    key = f"{name}-{digest.hexdigest()[:24]}"
    with cache.building_folder(key) as building:
        result = building.parent / f"{key}{suffix}"
        if not result.is_file():
            for file_name, content in files.items():
                (building / file_name).write_bytes(content)
            compile.run(command, building, f"{name} does not compile ({command[0]})")
            os.replace(building / RESULT, result)
    return result
