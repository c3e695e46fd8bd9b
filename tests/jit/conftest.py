"""Fake compilers: shell scripts that answer as nvcc and g++ do, in milliseconds, so that every fault of a build can be arranged."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlpdown import plan
from mlpdown.jit import library, targets, toolchain

ONE_TARGET = ("sm_90",)

_NVCC = """#!/bin/sh
here="$(dirname "$0")"
if [ "$1" = --version ]; then
    cat "$here/nvcc-version"
    exit 0
fi
previous=; output=; inputs=
for word in "$@"; do
    [ "$previous" = -o ] && output="$word"
    case "$word" in *.o|*.cu) [ "$previous" = -o ] || inputs="$inputs $word" ;; esac
    previous="$word"
done
case " $* " in
    *" -E "*) . "$here/on-trial.sh"; exit 0 ;;
    *" -c "*)
        echo compiled >> "$here/compiled"
        . "$here/on-compile.sh"
        cat "$here/ptxas"
        ;;
esac
cat $inputs > "$output"
"""

_HOST_COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo "g++ (fake) 12.2.0"; exit 0; }
previous=; output=; input=
for word in "$@"; do
    [ "$previous" = -o ] && output="$word"
    [ "$previous" = -c ] && input="$word"
    previous="$word"
done
cp "$input" "$output"
"""


@dataclasses.dataclass
class FakeCompilers:
    """Scripts in a folder of their own, first on PATH."""

    folder: Path

    @property
    def nvcc(self) -> Path:
        return self.folder / "nvcc"

    def set_version(self, version: str) -> None:
        """What nvcc says it is, e.g. ``13.0.88``."""
        release = ".".join(version.split(".")[:2])
        (self.folder / "nvcc-version").write_text(f"Cuda compilation tools, release {release}, V{version}\n")

    def set_report(self, stack_bytes: int = 0, names: Sequence[str] = targets.MACHINE_TARGETS) -> None:
        """What ptxas says: every kernel for each target."""
        lines = []
        for target in names:
            for dtype in ("7Float16", "8BFloat16"):
                for symbol in _kernel_symbols(dtype):
                    lines += [
                        f"ptxas info    : Compiling entry function '{symbol}' for '{target}'",
                        f"    {stack_bytes} bytes stack frame, {stack_bytes} bytes spill stores, 0 bytes spill loads",
                        "ptxas info    : Used 64 registers, used 1 barriers",
                    ]
        (self.folder / "ptxas").write_text("\n".join(lines) + "\n")

    def on_compile(self, script: str) -> None:
        """Shell commands that nvcc runs before it compiles."""
        (self.folder / "on-compile.sh").write_text(script)

    def on_trial(self, script: str) -> None:
        """Shell commands that nvcc runs when it is tried with the host compiler ``$2``."""
        (self.folder / "on-trial.sh").write_text(script)

    @property
    def num_compilations(self) -> int:
        counted = self.folder / "compiled"
        return len(counted.read_text().splitlines()) if counted.exists() else 0


def _kernel_symbols(dtype: str) -> list[str]:
    """Every kernel of one dtype, as the compiler names it."""
    kernels = [("4ring", values) for values in plan.instantiations()] + [("9registers", values) for values in plan.REGISTERS_KERNELS]
    return [
        f"_Z{name}I{dtype}{''.join(f'Lj{value}E' for value in values)}Ev14MlpDownProblem11MlpDownPlan8Geometry"
        for name, values in kernels
    ]


@pytest.fixture
def fake_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCompilers:
    """An nvcc 13.0 and a g++ that work; the cache in a folder of the test's own."""
    folder = tmp_path / "compilers"
    folder.mkdir()
    for name, script in (("nvcc", _NVCC), ("g++", _HOST_COMPILER)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    fake = FakeCompilers(folder)
    fake.set_version("13.0.88")
    fake.set_report(names=ONE_TARGET)
    fake.on_compile("")
    fake.on_trial("")
    for variable in (*toolchain.HOST_VARIABLES, *toolchain.IGNORED_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("MLPDOWN_NVCC", str(fake.nvcc))
    monkeypatch.setenv("MLPDOWN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "prebuilt_folder", lambda: tmp_path / "no-prebuilt")
    monkeypatch.setattr(targets, "present_capabilities", lambda: [(9, 0)])
    monkeypatch.setattr(toolchain, "supported_cuda", lambda: None)
    return fake


BUILD_IN_A_PROCESS = """
from mlpdown.jit import library
print(library.build(("sm_90",)).origin)
"""


def start_python(code: str, **environment: str) -> subprocess.Popen[str]:
    """A Python of its own, with the test's environment."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
