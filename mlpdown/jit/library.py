"""The ladder: the library that came with the package, else a cached build, else a build with the nvcc that is found."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from . import cache, compile, report, targets, toolchain
from .cache import LibraryInfo, Manifest
from .errors import BuildError
from .sources import Sources, embedded_hash, native_folder, package_sources

logger = logging.getLogger("mlpdown")

NUM_DTYPES = 2
FAILURE_LOG = "last-failure.log"

_loaded: LibraryInfo | None = None
_failure: BuildError | None = None
_load_lock = threading.Lock()


def load() -> LibraryInfo:
    """Find or build the library and register its ops with torch, once a process; a failure is remembered too.

    Raises:
        BuildError: there is no library for this source and machine, and none could be built.
    """
    import torch

    global _loaded, _failure
    with _load_lock:
        if _loaded is not None:
            return _loaded
        if _failure is not None:
            raise _failure
        try:
            info = find_or_build()
            torch.ops.load_library(str(info.path))
        except BuildError as error:
            _failure = error
            raise
        except OSError as error:  # whatever it is: there are other backends
            _failure = BuildError(f"the native library cannot be found, built or loaded: {error}")
            raise _failure from error
        _loaded = info
        return info


def find_or_build() -> LibraryInfo:
    """The first rung of the ladder that holds. Raises BuildError if none does."""
    found, refusals = find()
    for refusal in refusals:
        logger.info("%s", refusal)
    if found is not None:
        return found
    try:
        return build(targets.targets_for_devices(targets.present_capabilities()))
    except BuildError as error:
        if not refusals:
            raise
        raise BuildError(
            "\n".join([str(error), "Libraries that were passed over:", *(f"  {refusal}" for refusal in refusals)])
        ) from error


def find() -> tuple[LibraryInfo | None, list[str]]:
    """A library that is there already, and why others that are there were passed over. Builds nothing."""
    sources = package_sources()
    capabilities = targets.present_capabilities()
    refusals: list[str] = []
    folder = prebuilt_folder()
    if (folder / cache.LIBRARY_NAME).is_file():
        try:
            prebuilt = LibraryInfo.read(folder, "prebuilt")
            refusal = _refusal(prebuilt, sources, capabilities)
        except (OSError, ValueError) as error:
            refusal = f"its manifest cannot be read ({error}); reinstall mlpdown"
        if refusal is None:
            return prebuilt, refusals
        refusals.append(f"the prebuilt library is not used: {refusal}")
    compiler = None  # with nothing to build with, a library made elsewhere, of the same source, is as good
    with contextlib.suppress(BuildError):
        toolchain.find_ninja()
        compiler = toolchain.find_toolchain().identity
    for entry in cache.entries(cache.cache_folder()):
        manifest = entry.manifest
        if manifest.source_hash != sources.source_hash or manifest.flags != compile.flags_identity():
            continue  # of another version: nothing to say
        if compiler not in (None, manifest.compiler):
            refusal = f"made by {manifest.compiler}, here is {compiler}"
        else:
            refusal = _refusal(entry, sources, capabilities)
        if refusal is None:
            return entry, refusals
        refusals.append(f"the cached library in {entry.path.parent} is not used: {refusal}")
    return None, refusals


def build(
    requested_targets: Sequence[str],
    *,
    force: bool = False,
    for_this_machine: bool = True,
) -> LibraryInfo:
    """Build for these targets into the cache, and say so; an entry that is there already is taken, unless ``force``.

    Args:
        requested_targets: as :data:`mlpdown.jit.targets.ALL_TARGETS`. Those that the compiler does not know yet are left out.
        for_this_machine: pass over a compiler whose libraries the installed driver cannot run.

    Raises:
        BuildError: no compiler, no ninja, a compile error, a kernel that spills, a cache folder that cannot be used.
    """
    sources = package_sources()
    tools = toolchain.find_toolchain(for_this_machine=for_this_machine)
    built_targets = targets.targets_for_compiler(requested_targets, tools.nvcc_version)
    depends_on = [sources.source_hash, compile.flags_identity(), tools.identity, *built_targets]
    key = hashlib.sha256("\n".join(depends_on).encode()).hexdigest()[:32]
    with cache.building_folder(key) as building:
        folder = building.parent
        existing = next((entry for entry in cache.entries(folder) if entry.path.parent.name == key), None)
        if existing is not None and not force and _refusal(existing, sources, []) is None:
            return existing
        ninja = toolchain.find_ninja()
        cache.say(
            f"building the native library for {', '.join(built_targets)} with {tools.nvcc} ({tools.nvcc_build}, from {tools.origin})"
        )
        started = time.monotonic()
        try:
            library, log = compile.compile_library(sources, tools, ninja, built_targets, building)
        except compile.CompileError as error:
            path = folder / FAILURE_LOG
            path.write_text(error.log)
            raise BuildError(f"{error}\nThe whole output: {path}") from error
        kernels = report.parse(log)
        report.check(kernels, built_targets, num_kernels(sources))
        manifest = Manifest(
            source_hash=sources.source_hash,
            flags=compile.flags_identity(),
            compiler=tools.identity,
            cuda_version=tools.nvcc_version,
            targets=built_targets,
            checksum=cache.checksum(library.read_bytes()),
            build_seconds=round(time.monotonic() - started, 2),
            kernels=[dataclasses.asdict(kernel) for kernel in kernels],
        )
        info = cache.publish(building, key, library, manifest)
    cache.say(f"built in {manifest.build_seconds:.1f} s: {info.path}")
    return info


def num_kernels(sources: Sources) -> int:
    """Kernels that each target must have: every instantiation, for each dtype."""
    return NUM_DTYPES * sources.files["instantiations.h"].decode().count(" X(")


def prebuilt_folder() -> Path:
    """Where a wheel carries its library."""
    return native_folder() / "prebuilt"


def _refusal(entry: LibraryInfo, sources: Sources, capabilities: Sequence[targets.ComputeCapability]) -> str | None:
    """Why a library cannot be used for these sources on these GPUs; None if it can."""
    manifest = entry.manifest
    if manifest.source_hash != sources.source_hash:
        return (
            f"it was made from other sources (hash {manifest.source_hash[:12]}, the sources here have {sources.source_hash[:12]}); "
            "build anew, or reinstall mlpdown"
        )
    for capability in capabilities:
        if capability >= targets.MINIMUM_COMPUTE_CAPABILITY and not targets.serves(manifest.targets, capability):
            return f"it holds {', '.join(manifest.targets)}, the GPU has compute capability {'.'.join(map(str, capability))}"
    refusal = (toolchain.driver_refusal(manifest.cuda_version) if capabilities else None) or cache.verify(entry)
    if refusal is not None:
        return refusal
    if embedded_hash(entry.path.read_bytes()) != sources.source_hash:
        return "the hash inside it is not that of the sources"
    return None
