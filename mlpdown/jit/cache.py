"""Where built libraries are kept: a folder private to the user, one entry a build, published by a rename.

An entry is a folder named by its key, holding the library and ``manifest.json``, which says what it was made from and its checksum.
Readers take no lock: an entry is there whole or not at all. Builders of one key hold one lock, which the operating system releases
when its holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from .errors import BuildError

LIBRARY_NAME = "libmlpdown.so"
MANIFEST_NAME = "manifest.json"
CHOOSE_ANOTHER = "choose another folder with MLPDOWN_CACHE_DIR"
LOCK_LIMIT_SECONDS = 1800.0
_LOCK_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a library was made from."""

    source_hash: str
    flags: str
    """Compiler flags and the torch headers' target."""
    compiler: str
    """nvcc's release and the host compiler's version."""
    cuda_version: tuple[int, int]
    targets: tuple[str, ...]
    checksum: str
    """SHA-256 of the library."""
    build_seconds: float
    kernels: list[dict[str, Any]]
    """ptxas' report, see :class:`mlpdown.jit.report.KernelResources`."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError unless ``text`` is a manifest."""
        try:
            values = json.loads(text)
            values["targets"] = tuple(values["targets"])
            major, minor = values["cuda_version"]
            values["cuda_version"] = int(major), int(minor)
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error


@dataclasses.dataclass(frozen=True)
class LibraryInfo:
    """A library with its manifest. Whether the two belong together, :func:`verify` says."""

    path: Path
    origin: str
    """``prebuilt`` (came with the package), ``cached``, or ``built`` (just now)."""
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path, origin: str) -> LibraryInfo:
        """The library in a folder. Raises OSError or ValueError if there is no manifest, or none that can be read."""
        return cls(folder / LIBRARY_NAME, origin, Manifest.from_json((folder / MANIFEST_NAME).read_text()))


def cache_folder() -> Path:
    """The cache folder: ``MLPDOWN_CACHE_DIR``, else ``~/.cache/mlpdown``, else, where no home folder can be used, one of this user's in
    the system's folder for temporary files. It need not exist.

    Raises:
        BuildError: ``MLPDOWN_CACHE_DIR`` is in the home folder of somebody who does not exist.
    """
    named = os.environ.get("MLPDOWN_CACHE_DIR")
    if named:
        try:
            return Path(named).expanduser().absolute()
        except RuntimeError as error:
            raise BuildError(f"the cache folder {named} cannot be: {error}; {CHOOSE_ANOTHER}") from error
    home = Path(os.path.expanduser("~"))  # "~" itself, where nobody knows of a home
    folder = home / ".cache" / "mlpdown"
    nearest = next((place for place in (folder, folder.parent, home) if os.path.isdir(place)), None)
    needed = os.R_OK | os.X_OK if nearest == folder else os.W_OK | os.X_OK
    if home.is_absolute() and nearest is not None and os.access(nearest, needed):
        return folder
    return Path(tempfile.gettempdir()) / f"mlpdown-{os.getuid()}"


def check_trust(folder: Path) -> None:
    """Raise BuildError if somebody else could have put a library there. A folder that does not exist is fine."""

    def refuse(reason: str) -> NoReturn:
        raise BuildError(f"the cache folder {folder} {reason}; {CHOOSE_ANOTHER}")

    for place in (folder, *folder.parents):
        try:
            mode = place.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            refuse(f"cannot be looked into ({place}: {error.strerror})")
        if place != folder and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            refuse(f"is not trusted: anybody can write to {place}")
    if not folder.exists():
        return
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        refuse("is not a folder: remove it")
    if status.st_uid not in (os.getuid(), 0):
        refuse(f"is not trusted: it belongs to user id {status.st_uid}, you are {os.getuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        refuse(f"is not trusted: others can write to it (mode {stat.S_IMODE(status.st_mode):o}): chmod go-w it")


def entries(folder: Path) -> list[LibraryInfo]:
    """Every readable entry, newest first. A broken one is not an entry."""
    check_trust(folder)
    found = []
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be read ({error.strerror}); {CHOOSE_ANOTHER}") from error
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            found.append((path.stat().st_mtime, LibraryInfo.read(path, "cached")))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0], reverse=True)]


def verify(entry: LibraryInfo) -> str | None:
    """What is wrong with an entry's library; None if it is the one that was built."""
    try:
        content = entry.path.read_bytes()
    except OSError as error:
        return f"{entry.path} cannot be read ({error.strerror})"
    if checksum(content) != entry.manifest.checksum:
        return f"{entry.path} is corrupted: its checksum is not its manifest's"
    return None


@contextlib.contextmanager
def building_folder(key: str) -> Iterator[Path]:
    """A folder to build ``key`` in, inside the cache folder, so that publishing is a rename. Other builders of this key wait.

    Raises:
        BuildError: the cache folder cannot be used, or the lock cannot be had (no locks in this file system, half an hour has passed).
    """
    folder = cache_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        check_trust(folder)
        with _lock(folder / f"{key}.lock"):
            prefix = f".building-{key}-"
            for leftover in folder.glob(f"{prefix}*"):  # of a killed build: we hold its lock
                shutil.rmtree(leftover, ignore_errors=True)
            building = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
            try:
                yield building
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be written ({error}); make room, or {CHOOSE_ANOTHER}") from error


def publish(building: Path, key: str, library: Path, manifest: Manifest) -> LibraryInfo:
    """Make ``library``, a file in the folder that is built in, the entry ``key``, whole or not at all."""
    whole, destination = building / "entry", building.parent / key
    whole.mkdir(mode=0o700)
    os.replace(library, whole / LIBRARY_NAME)
    (whole / MANIFEST_NAME).write_text(manifest.to_json())
    if destination.exists():
        destination.rename(building / "replaced")  # processes that have it loaded keep it
    whole.rename(destination)
    return LibraryInfo(destination / LIBRARY_NAME, "built", manifest)


def checksum(content: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(content).hexdigest()


def say(text: str) -> None:
    """What a build shows: a line on standard error, so that output can be piped."""
    print(f"mlpdown: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline, told = time.monotonic() + LOCK_LIMIT_SECONDS, False
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not told:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                say(f"another process{f' ({holder})' if holder else ''} is building {path.stem}; waiting for it")
                told = True
            if time.monotonic() > deadline:
                raise BuildError(
                    f"another process has held {path} for over {LOCK_LIMIT_SECONDS:.0f} s; end it, or {CHOOSE_ANOTHER}"
                )
            time.sleep(_LOCK_POLL_SECONDS)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # releases the lock; the file stays, because removing it would let two builders in
