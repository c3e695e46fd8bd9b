"""The package as pip and Python see it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
