"""Where built libraries are kept: a folder private to the user, one entry a build, published by a rename.

An entry is a folder named by its key, holding the library and ``manifest.json``, which says what it was made from and its checksum.
Readers take no lock: an entry is there whole or not at all. Builders of one key hold one lock, which the operating system releases
when its holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
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
from typing import Any

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
class Entry:
    """A library with its manifest. Whether the two belong together, :func:`verify` says."""

    folder: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        return self.folder / LIBRARY_NAME


def cache_folder() -> Path:
    """The cache folder: ``MLPDOWN_CACHE_DIR``, else ``~/.cache/mlpdown``, else, where no home folder can be used, one of this user's in
    the system's folder for temporary files. It need not exist.

    Raises:
        BuildError: ``MLPDOWN_CACHE_DIR`` is ``~somebody`` who does not exist.
    """
    named = os.environ.get("MLPDOWN_CACHE_DIR")
    if named:
        try:
            return Path(named).expanduser().absolute()
        except RuntimeError as error:
            raise BuildError(f"the cache folder {named} cannot be: {error}; {CHOOSE_ANOTHER}") from error
    folder = Path(os.path.expanduser("~"), ".cache", "mlpdown")  # "~" itself, where nobody knows of a home
    if folder.is_absolute() and _can_be_used(folder):
        return folder
    return Path(tempfile.gettempdir()) / f"mlpdown-{os.getuid()}"


def _can_be_used(folder: Path) -> bool:
    """Whether a folder is there, or can be made inside the home folder that is."""
    if os.path.isdir(folder):
        return os.access(folder, os.R_OK | os.X_OK)
    home = folder.parents[1]
    nearest = next((place for place in (folder.parent, home) if os.path.isdir(place)), None)
    return nearest is not None and os.access(nearest, os.W_OK | os.X_OK)


def check_trust(folder: Path) -> None:
    """Raise BuildError if somebody else could have put a library there. A folder that does not exist is fine."""
    for place in (folder, *folder.parents):
        try:
            status = place.lstat() if place == folder else place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            raise BuildError(
                f"the cache folder {folder} cannot be looked into ({place}: {error.strerror}); {CHOOSE_ANOTHER}"
            ) from error
        writable_by_all = bool(status.st_mode & stat.S_IWOTH)
        if place != folder:
            if writable_by_all and not status.st_mode & stat.S_ISVTX:
                raise BuildError(
                    f"the cache folder {folder} is not trusted: anybody can write to {place}; {CHOOSE_ANOTHER}"
                )
            continue
        if stat.S_ISLNK(status.st_mode):
            status = place.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise BuildError(f"the cache folder {folder} is not a folder; remove it, or {CHOOSE_ANOTHER}")
        if status.st_uid not in (os.getuid(), 0):
            raise BuildError(
                f"the cache folder {folder} is not trusted: it belongs to user id {status.st_uid}, you are {os.getuid()}; {CHOOSE_ANOTHER}"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            raise BuildError(
                f"the cache folder {folder} is not trusted: others can write to it (mode {mode:o}); chmod go-w it, or {CHOOSE_ANOTHER}"
            )


def entries(folder: Path) -> list[Entry]:
    """Every readable entry, newest first. A broken one is not an entry."""
    check_trust(folder)
    found = []
    try:
        paths = [path for path in folder.iterdir() if (path / MANIFEST_NAME).is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise BuildError(f"the cache folder {folder} cannot be read ({error.strerror}); {CHOOSE_ANOTHER}") from error
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            found.append((path.stat().st_mtime, Entry(path, Manifest.from_json((path / MANIFEST_NAME).read_text()))))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0], reverse=True)]


def verify(entry: Entry) -> str | None:
    """What is wrong with an entry's library; None if it is the one that was built."""
    try:
        content = entry.library.read_bytes()
    except OSError as error:
        return f"{entry.library} cannot be read ({error.strerror})"
    if checksum(content) != entry.manifest.checksum:
        return f"{entry.library} is corrupted: its checksum is not its manifest's"
    return None


def say(text: str) -> None:
    """What a build shows: a line on standard error, so that output can be piped."""
    print(f"mlpdown: {text}", file=sys.stderr, flush=True)


def checksum(content: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def building_folder(key: str) -> Iterator[Path]:
    """A folder to build ``key`` in, inside the cache folder, so that publishing is a rename. Other builders of this key wait.

    Raises:
        BuildError: the cache folder cannot be used, or the lock cannot be had (no locks in this file system, half an hour has passed).
    """
    folder = cache_folder()
    with _report_os_errors(folder):
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


def publish(building: Path, key: str, library: Path, manifest: Manifest) -> Entry:
    """Make ``library``, a file in the folder that is built in, the entry ``key``, whole or not at all."""
    whole, destination = building / "entry", building.parent / key
    whole.mkdir(mode=0o700)
    os.replace(library, whole / LIBRARY_NAME)
    (whole / MANIFEST_NAME).write_text(manifest.to_json())
    if destination.exists():
        destination.rename(building / "replaced")  # processes that have it loaded keep it
    whole.rename(destination)
    return Entry(destination, manifest)


@contextlib.contextmanager
def _report_os_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError in the cache folder into a BuildError that says what to do."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.EROFS: "is on a read-only file system",
            errno.EACCES: "cannot be written",
            errno.EPERM: "cannot be written",
            errno.ENOSPC: "has no space left",
            errno.EDQUOT: "has no space left (quota)",
            errno.ENOTDIR: "lies under a file",
            errno.EEXIST: "is not a folder",
        }
        reason = reasons.get(error.errno or 0, "cannot be used")
        raise BuildError(f"the cache folder {folder} {reason} ({error}); make room, or {CHOOSE_ANOTHER}") from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _acquire(descriptor, path)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # releases the lock; the file stays, because removing it would let two builders in


def _acquire(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_LIMIT_SECONDS
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise BuildError(
                f"{path} cannot be locked ({error.strerror}): the file system has no locks; {CHOOSE_ANOTHER}"
            ) from error
        if not told:
            told = True
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            say(f"another process{f' ({holder})' if holder else ''} is building {path.stem}; waiting for it")
        if time.monotonic() > deadline:
            raise BuildError(
                f"another process has held {path} for over {LOCK_LIMIT_SECONDS:.0f} s; end it, or {CHOOSE_ANOTHER}"
            )
        time.sleep(_LOCK_POLL_SECONDS)
