"""``mlpdown doctor`` on machines that lack things, or have broken ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from mlpdown import backends, cli, doctor, numba_backend, numba_refusal
from mlpdown.jit import library, toolchain

from .conftest import ONE_TARGET, FakeCompilers


def run_doctor(**environment: str) -> tuple[int, dict[str, object]]:
    process = subprocess.run(
        [sys.executable, "-m", "mlpdown", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )
    assert "Traceback" not in process.stderr
    return process.returncode, json.loads(process.stdout)


def test_machine_without_gpu_compiler_and_home(tmp_path: Path) -> None:
    status, findings = run_doctor(
        PATH=str(tmp_path),
        CUDA_VISIBLE_DEVICES="",
        HOME=str(tmp_path / "nobody"),
        MLPDOWN_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert status == 0, findings["problems"]
    assert findings["gpus"] == []
    assert findings["backends"]["auto_takes"] == "torch"  # type: ignore[index]
    assert findings["backends"]["native"]["available"] is False  # type: ignore[index]
    assert findings["backends"]["native"]["reason"]  # type: ignore[index]
    assert findings["compilers"]["host"] == []  # type: ignore[index]
    assert findings["compilers"]["taken"] is None  # type: ignore[index]
    assert findings["headline"].startswith("The native kernel does not run here: auto takes PyTorch; numba gives the exact bits")  # type: ignore[attr-defined]
    assert findings["plan"] == {}  # and of no GPU that is not here
    assert not (tmp_path / "cache").exists()
    (compared,) = findings["self_test"]["compared"]  # type: ignore[index]
    assert re.fullmatch(r"[\d,]+ elements recorded on an NVIDIA .*, replayed by numba on this CPU: 0 differ\.", compared)


def test_report_for_people_begins_with_its_headline_and_ends_with_its_verdict(
    capsys: pytest.CaptureFixture[str], fake_compilers: FakeCompilers
) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("The native kernel ")
    assert said.rstrip().endswith("no problems")
    for variable in doctor.VARIABLES:
        assert variable in said
    assert str(fake_compilers.nvcc) in said
    for word in ("True", "False", "None", "H200: ", "wrong_bits"):
        assert word not in said


def test_at_most_three_variables_are_read_and_doctor_lists_them() -> None:
    assert len(doctor.VARIABLES) <= 3
    package = Path(doctor.__file__).parent
    text = "".join(path.read_text() for path in package.rglob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", text))
    assert {name for name in read if name.startswith("MLPDOWN_")} == set(doctor.VARIABLES)


def test_untrusted_cache_and_corrupted_library_are_problems(fake_compilers: FakeCompilers, tmp_path: Path) -> None:
    built = library.build(ONE_TARGET)
    built.path.write_bytes(b"")
    assert any("corrupted" in problem for problem in doctor.examine()["problems"])
    (tmp_path / "cache").chmod(0o777)
    assert any("not trusted" in problem for problem in doctor.examine()["problems"])


def test_driver_that_is_too_old(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch) -> None:
    library.build(ONE_TARGET)
    monkeypatch.setattr(toolchain, "supported_cuda", lambda: (12, 4))
    findings = doctor.examine()
    assert findings["driver"]["supports_cuda"] == "12.4"
    assert "needs driver 580 or newer" in findings["library"]["passed_over"][0]
    assert "needs driver 580 or newer" in findings["compilers"]["nvcc"][0]["refusal"]


def test_a_probe_that_fails_is_a_finding_not_a_crash(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> bool:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    findings = doctor.examine()
    assert findings["gpus"] == {"error": "RuntimeError: CUDA driver initialization failed"}
    assert any("CUDA driver initialization failed" in problem for problem in findings["problems"])
    assert findings["versions"]["torch"] == torch.__version__


def test_wrong_bits_are_a_broken_promise(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = numba_backend.run

    def one_bit_off(*arguments: Any) -> torch.Tensor:
        result = right(*arguments)
        result.view(torch.int16)[0, 0] ^= 1
        return result

    monkeypatch.setattr(numba_backend, "run", one_bit_off)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"numba on cpu: 1 of 64 elements have other bits than were recorded on an NVIDIA .* \(64x264-.*\.json\)", said)


def test_what_is_broken_but_no_promise_is_status_2(fake_compilers: FakeCompilers, tmp_path: Path) -> None:
    library.build(ONE_TARGET)
    (tmp_path / "cache").chmod(0o777)
    assert cli.main(["doctor", "--json"]) == 2


@pytest.mark.parametrize("damage", ["not installed", "not importable", "not to compile"])
def test_specification_that_cannot_run_is_a_problem(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, damage: str
) -> None:
    numba_refusal.numba_refusal.cache_clear()
    request.addfinalizer(numba_refusal.numba_refusal.cache_clear)
    reasons = {
        "not installed": "Numba cannot be imported (ModuleNotFoundError",
        "not importable": "Numba cannot be imported (AttributeError: module 'numpy' has no attribute 'row_stack')",
        "not to compile": "NUMBA_DISABLE_JIT keeps Numba from compiling",
    }
    if damage == "not to compile":
        monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    elif damage == "not installed":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:

        def refuse(name: str) -> None:
            raise AttributeError("module 'numpy' has no attribute 'row_stack'")

        monkeypatch.setattr(numba_refusal.importlib, "import_module", refuse)
    states = backends()
    assert not states["numba"].available and states["numba"].reason.startswith(reasons[damage])
    findings = doctor.examine()
    assert any(f"the specification cannot run here: {reasons[damage]}" in problem for problem in findings["problems"])
    assert "nothing gives the exact bits" in findings["headline"]


def test_ninja_is_named_or_missed(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = doctor.examine()["compilers"]
    assert re.fullmatch(r"1\.\d+\.\d+\S*", found["ninja"][0]["version"])
    assert found["taken"] == f"{fake_compilers.nvcc} with {fake_compilers.folder / 'g++'}, run by {found['ninja'][0]['path']}"
    monkeypatch.setattr(toolchain, "ninjas", lambda: iter(()))
    cli.main(["doctor"])
    said = capsys.readouterr().out
    assert "  ninja: none\n" in said and "  refusal: no ninja, which runs the compilers: pip install ninja\n" in said


def test_flags_of_the_environment_are_named_and_not_used(
    fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-use_fast_math")
    assert doctor.examine()["environment"]["NVCC_APPEND_FLAGS"] == "-use_fast_math (not used: it could change bits)"
