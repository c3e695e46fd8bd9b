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
from .cache import Entry, Manifest
from .errors import BuildError
from .sources import Sources, embedded_hash, native_folder, package_sources

logger = logging.getLogger("mlpdown")

NUM_DTYPES = 2
FAILURE_LOG = "last-failure.log"


@dataclasses.dataclass(frozen=True)
class LibraryInfo:
    """The native library in use."""

    path: Path
    origin: str
    """``prebuilt`` (came with the package), ``cached``, or ``built`` (just now)."""
    manifest: Manifest


_loaded: LibraryInfo | None = None
_failure: BuildError | None = None
_load_lock = threading.Lock()


def load() -> LibraryInfo:
    """Find or build the library and register its ops with torch, once a process; a failure is remembered too.

    Raises:
        BuildError: there is no library for this source and machine, and none could be built.
    """
    global _loaded, _failure
    with _load_lock:
        if _loaded is not None:
            return _loaded
        if _failure is not None:
            raise _failure
        try:
            info = find_or_build()
            _register(info.path)
        except BuildError as error:
            _failure = error
            raise
        except OSError as error:  # whatever it is: there are other backends
            _failure = BuildError(f"the native library cannot be found or built: {error}")
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
    prebuilt = _prebuilt(sources)
    if prebuilt is not None:
        refusal = _refusal(prebuilt, sources, capabilities)
        if refusal is None:
            return LibraryInfo(prebuilt.library, "prebuilt", prebuilt.manifest), refusals
        refusals.append(f"the prebuilt library is not used: {refusal}")
    compiler = _compiler_identity()
    for entry in cache.entries(cache.cache_folder()):
        manifest = entry.manifest
        if manifest.source_hash != sources.source_hash or manifest.flags != compile.flags_identity():
            continue  # of another version: nothing to say
        if compiler is not None and manifest.compiler != compiler:
            refusals.append(
                f"the cached library in {entry.folder} is not used: made by {manifest.compiler}, here is {compiler}"
            )
            continue
        refusal = _refusal(entry, sources, capabilities)
        if refusal is None:
            return LibraryInfo(entry.library, "cached", manifest), refusals
        refusals.append(f"the cached library in {entry.folder} is not used: {refusal}")
    return None, refusals


def build(
    requested_targets: Sequence[str],
    *,
    force: bool = False,
    for_this_machine: bool = True,
    sources: Sources | None = None,
) -> LibraryInfo:
    """Build for these targets into the cache, and say so; an entry that is there already is taken, unless ``force``.

    Args:
        requested_targets: as :data:`mlpdown.jit.targets.ALL_TARGETS`. Those that the compiler does not know yet are left out.
        for_this_machine: pass over a compiler whose libraries the installed driver cannot run.

    Raises:
        BuildError: no compiler, a compile error, a kernel that spills, a cache folder that cannot be used.
    """
    sources = package_sources() if sources is None else sources
    tools = toolchain.find_toolchain(for_this_machine=for_this_machine)
    built_targets = targets.targets_for_compiler(requested_targets, tools.nvcc_version)
    key = build_key(sources, tools.identity, built_targets)
    with cache.building_folder(key) as building:
        folder = building.parent
        existing = next((entry for entry in cache.entries(folder) if entry.folder.name == key), None)
        if existing is not None and not force and _refusal(existing, sources, []) is None:
            return LibraryInfo(existing.library, "cached", existing.manifest)
        cache.say(
            f"building the native library for {', '.join(built_targets)} with {tools.nvcc} ({tools.nvcc_build}, from {tools.origin})"
        )
        started = time.monotonic()
        try:
            library, log = compile.compile_library(sources, tools, built_targets, building)
        except compile.CompileError as error:
            raise BuildError(f"{error}{_keep_log(folder, error.log)}") from error
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
        entry = cache.publish(building, key, library, manifest)
    cache.say(f"built in {manifest.build_seconds:.1f} s: {entry.library}")
    return LibraryInfo(entry.library, "built", manifest)


def build_key(sources: Sources, compiler: str, built_targets: Sequence[str]) -> str:
    """The name of a build: a hash of all that it depends on."""
    text = "\n".join([sources.source_hash, compile.flags_identity(), compiler, *built_targets])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def num_kernels(sources: Sources) -> int:
    """Kernels that each target must have: every instantiation, for each dtype."""
    return NUM_DTYPES * sources.files["instantiations.h"].decode().count(" X(")


def prebuilt_folder() -> Path:
    """Where a wheel carries its library."""
    return native_folder() / "prebuilt"


def _prebuilt(sources: Sources) -> Entry | None:
    folder = prebuilt_folder()
    if not (folder / cache.LIBRARY_NAME).is_file():
        return None
    try:
        return Entry(folder, Manifest.from_json((folder / cache.MANIFEST_NAME).read_text()))
    except (OSError, ValueError) as error:
        raise BuildError(
            f"the prebuilt library in {folder} has no readable manifest ({error}); reinstall mlpdown"
        ) from error


def _refusal(entry: Entry, sources: Sources, capabilities: Sequence[targets.ComputeCapability]) -> str | None:
    """Why a library cannot be used for these sources on these GPUs; None if it can."""
    manifest = entry.manifest
    if manifest.source_hash != sources.source_hash:
        return (
            f"it was made from other sources (hash {manifest.source_hash[:12]}, the sources here have {sources.source_hash[:12]}); "
            "build anew, or reinstall mlpdown"
        )
    unserved = [capability for capability in capabilities if capability >= targets.MINIMUM_COMPUTE_CAPABILITY]
    unserved = [capability for capability in unserved if not targets.serves(manifest.targets, capability)]
    if unserved:
        return (
            f"it holds {', '.join(manifest.targets)}, the GPU has compute capability {unserved[0][0]}.{unserved[0][1]}"
        )
    refusal = (toolchain.driver_refusal(manifest.cuda_version) if capabilities else None) or cache.verify(entry)
    if refusal is not None:
        return refusal
    if embedded_hash(entry.library.read_bytes()) != sources.source_hash:
        return "the hash inside it is not that of the sources"
    return None


def _compiler_identity() -> str | None:
    try:
        return toolchain.find_toolchain().identity
    except BuildError:
        return None  # nothing to build with: a library made elsewhere, of the same source, is as good


def _keep_log(folder: Path, log: str) -> str:
    """Keep the whole output of a failed build; says where."""
    path = folder / FAILURE_LOG
    with contextlib.suppress(OSError):  # the error itself matters more than its log
        path.write_text(log)
        return f"\nThe whole output: {path}"
    return ""


def _register(path: Path) -> None:
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"the native library {path} does not load: {error}") from error
