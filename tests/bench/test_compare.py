"""mlpdown bench compare: exit status 1 on a regression of ours beyond noise, and on nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mlpdown.bench.results import Report, Result
from mlpdown.cli import main

Files = Callable[[Report, Report], list[str]]


def report(
    native: float | None = 12.0, torch_graph: float = 22.0, spread: float = 0.02, gpu: str = "NVIDIA H200", shape: str = "a"
) -> Report:
    generator = random.Random(0)

    def samples(center: float) -> list[float]:
        return [center * (1 + spread * generator.uniform(-1, 1)) for _ in range(30)]

    result = Result(shape, 2560, 10240, "float16", 52_428_800, 32, timings={"torch_graph": samples(torch_graph)})
    if native is not None:
        result.timings["native_chained"] = samples(native)
    return Report({"gpu": gpu}, results=[result])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    def write(old: Report, new: Report) -> list[str]:
        old.write(tmp_path / "old.json")
        new.write(tmp_path / "new.json")
        return ["bench", "compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]

    return write


def test_regression_beyond_noise(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(report(12.0), report(13.0))) == 1
    assert "1 of ours became slower" in capsys.readouterr().out


def test_change_within_noise(files: Files) -> None:
    assert main(files(report(12.0), report(12.2))) == 0
    assert main(files(report(12.0, spread=0.2), report(13.0, spread=0.2))) == 0


def test_improvement(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(report(13.0), report(12.0))) == 0
    assert "faster" in capsys.readouterr().out


def test_slower_peer_is_no_regression(files: Files) -> None:
    assert main(files(report(torch_graph=22.0), report(torch_graph=30.0))) == 0


def test_candidate_of_ours_that_is_gone_is_a_regression(files: Files) -> None:
    assert main(files(report(12.0), report(None))) == 1


@pytest.mark.parametrize(("new", "message"), [(report(gpu="NVIDIA H100"), "different machines"), (report(shape="b"), "in common")])
def test_results_that_cannot_be_compared(files: Files, new: Report, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(report(), new)) == 2
    assert message in capsys.readouterr().err


def test_file_that_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"benchmark": "e2e"}')
    path = str(tmp_path / "other.json")
    assert main(["bench", "compare", path, path]) == 2
    assert "is not a result of mlpdown bench op" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path / "absent.json"), path]) == 2
