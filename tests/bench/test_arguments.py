"""Arguments that cannot be served are refused before anything is measured, in one line, with exit status 2."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch

from mlpdown import arguments, cli
from mlpdown.bench import e2e_timing
from mlpdown.bench.compare import main as compare
from mlpdown.bench.e2e_timing import Pair


@pytest.mark.parametrize("command", ["check", "bench op", "bench e2e"])
def test_results_that_could_not_be_written_are_not_measured(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "results.json"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command.split(), "--json", str(path)])
        assert stopped.value.code == 2
        assert "error: argument --json: cannot be written: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_file_for_results_is_kept_until_they_are_there(tmp_path: Path) -> None:
    old, new, link = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "link.json"
    old.write_text("old")
    link.symlink_to(tmp_path / "target.json")
    assert arguments.output_file(str(link)).is_symlink()
    os.mkfifo(tmp_path / "pipe")
    assert arguments.output_file(str(tmp_path / "pipe")) == tmp_path / "pipe", "nobody reads it, so to open it would not end"
    assert arguments.output_file(str(old)) == old and old.read_text() == "old"
    assert arguments.output_file(str(new)) == new and not new.exists()


@pytest.mark.parametrize("command", ["bench op", "bench e2e"])
@pytest.mark.parametrize("name", ["cuda:99", "cuda:256", "cpu:3", "meta", "gpu"])
def test_device_that_is_not_there_is_refused(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--device", name])
    assert stopped.value.code == 2
    assert f"got {name}" in capsys.readouterr().err


def test_device_of_this_machine_is_taken() -> None:
    assert arguments.device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(argparse.ArgumentTypeError, match="finds no CUDA GPU here, got cuda$"):
            arguments.device("cuda")


def test_disk_that_is_full_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--hidden-dim", "8", "--intermediate-dim", "64", "--dtype", "float16", "--json", "/dev/full"]
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert "No promise is broken." in printed.out
    assert printed.err.splitlines()[-1] == "mlpdown check: [Errno 28] No space left on device"


def test_plot_that_cannot_be_drawn_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "e2e", "--plot", str(tmp_path / "plot.foo")]) == 2
    assert "--plot must end in .svg or .png" in capsys.readouterr().err


def test_numbers_and_architectures_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "e2e", "--tokens", "4,b"]) == 2
    assert "--tokens must be positive numbers with commas, got '4,b'" in capsys.readouterr().err
    assert cli.main(["build", "--arch", "sm_10"]) == 2
    assert "arch must be sm_80 or newer, got 'sm_10'" in capsys.readouterr().err


def test_another_kind_of_result_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "check.json").write_text("{}")
    assert compare(argparse.Namespace(old=tmp_path / "check.json", new=tmp_path / "check.json")) == 2
    message = "check.json is not a result of mlpdown bench op: benchmark must be 'op' and schema_version 1, got None and None"
    assert message in capsys.readouterr().err


def test_interval_of_few_pairs_is_said_to_be_of_all() -> None:
    def cells(num_pairs: int) -> list[str]:
        pairs = [Pair(4 * end, 4, 3.0, 2.0) for end in range(1, num_pairs + 1)]
        content = {"model": "tiny", "dtype": "float16", "device": "CPU", "settings": {"backend_taken": "torch"}}
        content["rows"] = [e2e_timing.row("loop", None, 4 * num_pairs, [pairs])]
        table = e2e_timing.table(content)
        assert str(table.columns[4].header) == "mlpdown,\nbackend torch"
        return list(table.columns[5].cells)

    assert cells(5) == ["1.500\n(1.500-1.500), all"]
    assert cells(6) == ["1.500\n(1.500-1.500)"]


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("mlpdown 0.")
