"""The package as pip and Python see it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mlpdown.golden import shipped_goldens

# What servers of models pin: vLLM 0.33 and SGLang 0.5.23.
SERVERS = {
    "vLLM": {"torch": "2.14.0", "numba": "0.65.0", "numpy": "2.3.5", "rich": "15.0.0"},
    "SGLang": {"torch": "2.14.1", "numba": "0.65.1", "numpy": "2.3.5", "rich": "15.0.0"},
}
ROOT = Path(__file__).parents[2]
IMPORT_MILLISECONDS = 50.0

_TIME_IMPORT = """
import time, torch
started = time.process_time()  # of this process alone: the machine may be busy
import mlpdown
print((time.process_time() - started) * 1e3)
import sys
assert not torch.cuda.is_initialized()
print(*sorted(name for name in ("numba", "numba_cuda", "rich", "torch._dynamo", "transformers") if name in sys.modules))
"""


def test_import_is_cheap_and_touches_neither_gpu_nor_numba() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", _TIME_IMPORT], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert [run.split("\n")[1] for run in runs] == ["", "", ""]
    assert min(float(run.split()[0]) for run in runs) <= IMPORT_MILLISECONDS


def test_every_python_package_is_listed() -> None:
    listed = re.search(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed is not None
    names = set(re.findall(r'"([\w.]+)"', listed[1]))
    folders = {path.parent for path in (ROOT / "mlpdown").rglob("*.py")}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {
        "mlpdown.native",
        "mlpdown.reference",
    }
    assert names == expected


@pytest.mark.parametrize("server", SERVERS)
def test_installs_beside_the_servers(server: str) -> None:
    """Neither they nor this package need another version of what they share; ``make compat`` runs there."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[\n(.*?)^\]$", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    requirements = {r.name: r.specifier for r in map(Requirement, re.findall(r'^ +"([^"]+)"', listed[1], re.MULTILINE))}
    assert set(requirements) == {"torch", "numpy", "numba", "numba-cuda", "ninja", "rich"}
    for package, version in SERVERS[server].items():
        assert requirements[package].contains(version), (package, version)


def test_goldens_ship_with_the_package() -> None:
    names = {file.name for file in shipped_goldens()}
    assert names == {path.name for path in (ROOT / "mlpdown" / "goldens").iterdir()}
    assert re.search(r'^mlpdown = \[.*"goldens/\*\.json".*\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
