"""Numba that cannot run the specification says why, for the CPU and for the GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mlpdown.backends import _numba_status

ASK = "from mlpdown.numba_refusal import numba_refusal; print(numba_refusal('cpu')); print(numba_refusal('cuda'))"


def ask(before: str = "", **environment: str) -> list[str]:
    """The refusals for CPU and for CUDA tensors, in a process of their own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")} | environment
    process = subprocess.run([sys.executable, "-c", before + ASK], capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_numba_can_run_here() -> None:
    assert ask() == ["None", "None"]


def test_numpy_that_numba_cuda_does_not_know() -> None:
    """NumPy 2.5 removed what numba-cuda 0.30 asks for when it first compiles; the CPU does without."""
    on_cpu, on_cuda = ask("import numpy; del numpy.row_stack\n")
    assert on_cpu == "None"
    assert on_cuda.startswith("Numba cannot be imported (AttributeError: ") and "row_stack" in on_cuda


@pytest.mark.parametrize(
    ("variable", "on_cpu", "on_cuda"),
    [
        ("NUMBA_DISABLE_JIT", "NUMBA_DISABLE_JIT keeps Numba", "NUMBA_DISABLE_JIT keeps Numba"),
        ("NUMBA_ENABLE_CUDASIM", "None", "NUMBA_ENABLE_CUDASIM puts a simulator"),
    ],
)
def test_variable_that_keeps_it_from_running_is_named(variable: str, on_cpu: str, on_cuda: str) -> None:
    said = ask(**{variable: "1"})
    assert said[0].startswith(on_cpu) and said[1].startswith(on_cuda)


@pytest.mark.parametrize("damage", ["sys.modules['numba'] = None", "import llvmlite; sys.modules['llvmlite.binding'] = None"])
def test_numba_that_cannot_be_imported(damage: str) -> None:
    for refusal in ask(f"import sys; {damage}\n"):
        assert refusal.startswith("Numba cannot be imported (")


@pytest.mark.parametrize("variable", ["NUMBA_NUM_THREADS", "NUMBA_OPT"])
def test_variable_that_keeps_numba_from_its_import_is_named(variable: str) -> None:
    for refusal in ask("import sys; sys.modules['numba'] = None\n" if variable == "NUMBA_OPT" else "", **{variable: "0"}):
        assert refusal.startswith("Numba cannot be imported (") and f": unset {variable}, or reinstall" in refusal


@pytest.mark.parametrize("cuda", [False, True])
def test_status_speaks_of_cuda_tensors_only_where_there_are_any(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    status = _numba_status()
    assert status.available and status.reason == "the specification, on CPU tensors" + " and on CUDA tensors" * cuda
