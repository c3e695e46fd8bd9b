"""The wheel and the source archive, as users get them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from mlpdown import golden
from mlpdown.jit import cache, sources, targets

ROOT = Path(__file__).parents[2]
MAX_WHEEL_BYTES = 4_000_000

pytestmark = pytest.mark.slow


def build_wheel(folder: Path) -> Path:
    """By a compiler run of its own, in a cache of its own."""
    subprocess.run(
        [sys.executable, ROOT / ".ci" / "wheel.py", "--output-dir", folder / "dist"],
        env={**os.environ, "MLPDOWN_CACHE_DIR": str(folder / "cache")},
        check=True,
        capture_output=True,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_two_builds_give_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    other = build_wheel(tmp_path / "another place, with blanks")
    assert other.name == wheel.name
    assert other.read_bytes() == wheel.read_bytes()


def test_wheel_is_for_any_python_and_small(wheel: Path) -> None:
    assert wheel.name.startswith("mlpdown-")
    assert "-py3-none-manylinux_2_" in wheel.name
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES


def test_wheel_holds_every_target_and_the_hash_of_its_sources(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        manifest = cache.Manifest.from_json(archive.read(f"mlpdown/native/prebuilt/{cache.MANIFEST_NAME}").decode())
        library = archive.read(f"mlpdown/native/prebuilt/{cache.LIBRARY_NAME}")
        goldens = {name for name in archive.namelist() if re.fullmatch(r"mlpdown/goldens/.+", name)}
    assert goldens == {f"mlpdown/goldens/{file.name}" for file in golden.shipped_goldens()}
    assert manifest.targets == targets.ALL_TARGETS
    assert manifest.source_hash == sources.embedded_hash(library) == sources.read_sources().source_hash
    assert manifest.checksum == cache.checksum(library)


def test_installed_wheel_needs_no_compiler(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    (purelib,) = environment.glob("lib/python*/site-packages")
    # torch and the rest from here; what is installed here in editable mode does not come along.
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path), "MLPDOWN_NVCC": "/nowhere/nvcc"}
    code = (
        "import torch; from mlpdown.jit import library; info = library.load(); print(info.origin, info.path)\n"
        "op = torch.ops.mlpdown.mlp_down.default\n"
        "tensors = [torch.zeros(8, dtype=torch.float16)] * 5\n"
        "plan = [False if str(value.type) == 'bool' else 1 for value in op._schema.arguments[5:]]\n"
        "try: op(*tensors, *plan)\n"
        "except RuntimeError as error: print(error)\n"
    )
    process = subprocess.run([python, "-c", code], env=bare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    loaded, said = process.stdout.splitlines()[:2]
    assert loaded == f"prebuilt {purelib / 'mlpdown' / 'native' / 'prebuilt' / cache.LIBRARY_NAME}"
    assert "weight must be on a CUDA device" in said  # raised inside the op, caught by Python
    doctor = subprocess.run(
        [python, "-m", "mlpdown", "doctor", "--json"],
        env=bare,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    findings = json.loads(doctor.stdout)
    assert findings["library"]["origin"] == "prebuilt"
    assert "replayed by numba on this CPU: 0 differ" in findings["self_test"]["compared"][0]
    build = [python, "-m", "mlpdown", "build"]
    process = subprocess.run(build, env=bare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0 and "nothing to build" in process.stdout, process.stderr
    assert not (tmp_path / ".cache").exists()


def test_source_archive_holds_what_a_build_needs(tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    expected = {f"native/{path.name}" for path in (ROOT / "native").iterdir() if path.suffix in sources.SOURCE_SUFFIXES}
    expected |= {
        str(path.relative_to(ROOT)) for folder in ("mlpdown", "reference") for path in (ROOT / folder).rglob("*.py")
    }
    expected |= {f"mlpdown/goldens/{file.name}" for file in golden.shipped_goldens()}
    assert expected <= names
    assert not {name for name in names if name.endswith(".so")}
