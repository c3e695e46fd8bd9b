"""``mlpdown doctor`` on machines that lack things, or have broken ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlpdown import doctor
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
    assert findings["compilers"]["host"]["path"] is None  # type: ignore[index]
    assert not (tmp_path / "cache").exists()
    for result in findings["self_test"]:  # type: ignore[attr-defined]
        assert result["wrong_bits"] == 0 or not result["promises_bits"]


def test_report_for_people_ends_with_its_verdict(
    capsys: pytest.CaptureFixture[str], fake_compilers: FakeCompilers
) -> None:
    assert doctor.main(_arguments()) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith("no problems")
    for variable in doctor.VARIABLES:
        assert variable in said
    assert str(fake_compilers.nvcc) in said


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


def test_wrong_bits_are_a_problem(fake_compilers: FakeCompilers, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "backend": "native",
        "device": "cuda",
        "elements": 96,
        "promises_bits": True,
        "wrong_bits": 2,
        "outside_bound": 1,
    }
    monkeypatch.setattr(doctor, "_self_test", lambda: [wrong])
    problems = doctor.examine()["problems"]
    assert "backend native on cuda: 2 of 96 outputs have wrong bits" in problems
    assert "backend native on cuda: 1 of 96 outputs are too far from the float64 result" in problems


def _arguments() -> doctor.argparse.Namespace:
    return doctor.argparse.Namespace(json=False)
