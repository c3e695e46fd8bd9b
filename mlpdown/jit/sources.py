"""What is compiled: the sources in ``native/``, the headers made from the plan, and the hash that names both."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
from pathlib import Path

from .. import plan
from .errors import BuildError

SOURCE_SUFFIXES = (".cu", ".cuh", ".cpp", ".h")
HASH_SYMBOL = "mlpdown_source_hash"
# Stands before the hash in the library, so that it can be read without loading (and thereby registering) anything.
HASH_MARK = b"mlpdown-source-hash:"
HASH_DIGITS = 64


@dataclasses.dataclass(frozen=True)
class Sources:
    """A snapshot of everything that is compiled: what is hashed is what is built, even if a file changes meanwhile."""

    files: dict[str, bytes]
    """Name in the build folder -> content."""
    source_hash: str
    """SHA-256 over names and contents, 64 hex digits."""

    def write(self, folder: Path) -> None:
        """Write every file, and the source that carries the hash into the library, to ``folder``."""
        for name, content in {**self.files, "source_hash.cpp": _hash_source(self.source_hash)}.items():
            (folder / name).write_bytes(content)


def native_folder() -> Path:
    """The folder of the native sources: ``native/`` of a checkout, ``mlpdown/native/`` of an installation.

    Raises:
        BuildError: it is no folder (the package is imported from a zip file).
    """
    # The package's metadata maps mlpdown.native to native/, in editable installations too.
    folder = Path(next(iter(importlib.import_module("mlpdown.native").__path__)))
    if not folder.is_dir():
        raise BuildError(f"the native sources must be files in a folder, got {folder}: install mlpdown unpacked, not as a zip file")
    return folder


def read_sources(folder: Path | None = None) -> Sources:
    """Read the sources in ``folder`` (by default the package's own) and add the generated headers.

    Raises:
        BuildError: there is no folder, or there are no sources in it.
    """
    folder = native_folder() if folder is None else folder
    paths = sorted(path for path in folder.iterdir() if path.suffix in SOURCE_SUFFIXES)
    if not any(path.suffix == ".cu" for path in paths):
        raise BuildError(f"the package's CUDA sources are missing from {folder}; reinstall mlpdown")
    files = {path.name: path.read_bytes() for path in paths}
    files["instantiations.h"] = instantiations_header(plan.instantiations(), plan.REGISTERS_KERNELS)
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return Sources(files, digest.hexdigest())


@functools.cache
def package_sources() -> Sources:
    """:func:`read_sources` of the package, read once a process."""
    return read_sources()


def instantiations_header(instantiations: list[tuple[int, int, int]], registers: tuple[tuple[int, int], ...]) -> bytes:
    """``<instantiations.h>``: macros that apply another one to each of :func:`mlpdown.plan.instantiations`, each of
    :data:`mlpdown.plan.REGISTERS_KERNELS`."""
    ring = " ".join(f"X({', '.join(map(str, values))})" for values in instantiations)
    others = " ".join(f"X({', '.join(map(str, values))})" for values in registers)
    return (
        "// Made from mlpdown/plan.py by the build.\n#pragma once\n"
        f"#define MLPDOWN_FOR_EACH_RING_KERNEL(X) {ring}\n#define MLPDOWN_FOR_EACH_REGISTERS_KERNEL(X) {others}\n"
    ).encode()


def embedded_hash(library: bytes) -> str | None:
    """The source hash that a library (its bytes) carries; None if it carries none."""
    start = library.find(HASH_MARK)
    if start < 0:
        return None
    start += len(HASH_MARK)
    return library[start : start + HASH_DIGITS].decode("ascii", errors="replace")


def _hash_source(source_hash: str) -> bytes:
    mark = HASH_MARK.decode()
    return (
        "// Made by the build.\n"
        f'extern "C" __attribute__((visibility("default"), used)) const char {HASH_SYMBOL}[] = "{mark}{source_hash}";\n'
    ).encode()
