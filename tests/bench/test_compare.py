"""mlpdown bench compare: exit status 1 on a regression of ours beyond noise, and on nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlpdown.bench import e2e_timing
from mlpdown.bench.e2e_timing import Pair
from mlpdown.cli import main
from mlpdown.json_lines import write_json

Content = dict[str, Any]
Files = Callable[[Content, Content], list[str]]


def report(
    native: float | None = 12.0, torch_graph: float = 22.0, spread: float = 0.02, gpu: str = "NVIDIA H200", shapes: str = "a"
) -> Content:
    generator = random.Random(0)

    def samples(center: float) -> list[float]:
        return [center * (1 + spread * generator.uniform(-1, 1)) for _ in range(30)]

    results = []
    for shape in shapes:
        timings = {"torch_graph": samples(torch_graph), **({"native_chained": samples(native)} if native else {})}
        result = {"shape": shape, "hidden_dim": 2560, "intermediate_dim": 10240, "dtype": "float16"}
        results.append({**result, "timings": timings, "cpu_cost": {}})
    return {"benchmark": "op", "schema_version": 1, "machine": {"gpu": gpu}, "results": results}


def end_to_end(patched: float, mode: str = "loop") -> Content:
    pairs = [Pair(4 * end, 4, 3.0 + 0.001 * end, patched + 0.001 * end) for end in range(1, 21)]
    rows = [e2e_timing.row(mode, None, 80, [pairs])]
    machine = {"machine": {"gpu": None}, "model": "GPT-NeoX", "dtype": "float16"}
    return {"benchmark": "e2e", "schema_version": e2e_timing.SCHEMA_VERSION, **machine, "rows": rows}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    def write(old: Content, new: Content) -> list[str]:
        write_json(tmp_path / "old.json", old)
        write_json(tmp_path / "new.json", new)
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


def test_candidate_of_ours_that_is_gone_is_a_regression(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(report(12.0), report(None))) == 1
    printed = capsys.readouterr().out
    assert "in the old file only" in printed and "1 of ours became slower, or are no longer measured" in printed


def test_what_only_one_file_has_is_named(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """A shape that was not measured again says nothing of how fast it is."""
    assert main(files(report(shapes="ab"), report(shapes="bc"))) == 0
    printed = capsys.readouterr().out
    assert printed.count("in the old file only") == printed.count("in the new file only") == 2
    assert "No regression: 2 compared, 4 in one file only." in printed


def test_end_to_end_results_are_compared_too(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(end_to_end(2.5), end_to_end(2.5))) == 0
    assert main(files(end_to_end(2.5), end_to_end(2.0))) == 0
    assert "faster" in capsys.readouterr().out
    assert main(files(end_to_end(2.5), end_to_end(2.8))) == 1
    assert "GPT-NeoX float16, loop, 80 tokens" in capsys.readouterr().out
    assert main(files(end_to_end(2.5), end_to_end(2.5, "eager"))) == 2


@pytest.mark.parametrize(("new", "message"), [(report(gpu="NVIDIA H100"), "different machines"), (report(shapes="b"), "in common")])
def test_results_that_cannot_be_compared(files: Files, new: Content, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(report(), new)) == 2
    assert message in capsys.readouterr().err


def test_file_that_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("e2e", '{"benchmark": "e2e"}'), ("op", '{"benchmark": "op"}'), ("op", "[]"), ("op", "no JSON")):
        (tmp_path / "other.json").write_text(text)
        path = str(tmp_path / "other.json")
        assert main(["bench", "compare", path, path]) == 2
        assert f"is not a result of mlpdown bench {name}" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path / "absent.json"), path]) == 2
