"""mlpdown bench op on a machine without a GPU: what it measures, checks, writes and refuses."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import mlpdown
from mlpdown import timing
from mlpdown.accuracy import CheckError
from mlpdown.bench import baselines, measure
from mlpdown.bench.baselines import multiply_and_sum, torch_layer
from mlpdown.bench.inputs import Checks, Inputs, calls_for, check_same_bits
from mlpdown.bench.op import validity
from mlpdown.bench.report import detail_table, label_of, summary_table
from mlpdown.bench.shapes import PYTHIA_2B8, SHAPES, Shape, parse_shapes
from mlpdown.cli import main
from mlpdown.json_lines import read_json, to_json
from mlpdown.timing import TimeLimitExpired, time_limit

TINY = Shape("tiny", 48, 256)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "op.json"
    arguments = ["bench", "op", "--device", "cpu", "--shapes", "48x256,40x64", "--rounds", "3", "--calls", "2"]
    assert main([*arguments, "--json", str(path), "--plot", str(path.with_name("plot"))]) == 0
    return path


def test_without_a_gpu_torch_and_the_specification_are_timed_and_the_rest_is_said_to_be_missing(report_path: Path) -> None:
    content = read_json(report_path, "op", 1)
    labels = ["48x256 float16", "48x256 bfloat16", "40x64 float16", "40x64 bfloat16"]
    assert [label_of(result) for result in content["results"]] == labels
    for result in content["results"]:
        assert set(result["timings"]) == {"torch", "numba"}
        assert all(len(samples) == 3 and min(samples) > 0 for samples in result["timings"].values())
        assert {"native", "read_only", "torch_graph", "compile_default"} <= result["missing"].keys()
        assert all(result["missing"].values())
        assert result["floor_us"] is None and result["plans"] is None
    assert content["steady_read"] is None and content["validity"]["valid"] is None


def test_file_has_the_documented_members(report_path: Path) -> None:
    content = json.loads(report_path.read_text())
    assert set(content) == {"benchmark", "schema_version", "machine", "steady_read", "validity", "results", "plans"}
    assert {"date", "commit", "command", "platform", "python", "torch", "cuda", "gpu"} <= content["machine"].keys()
    members = {"shape", "hidden_dim", "intermediate_dim", "dtype", "weight_bytes", "num_calls", "floor_us"}
    assert set(content["results"][0]) == members | {"plans", "timings", "cpu_cost", "missing"}
    assert content["results"][0]["weight_bytes"] == 2 * 48 * 256


def test_plot_is_written_as_svg_and_png(report_path: Path) -> None:
    assert report_path.with_name("plot.svg").read_text().lstrip().startswith("<?xml")
    assert report_path.with_name("plot.png").read_bytes().startswith(b"\x89PNG")


def test_json_has_a_line_for_each_candidate_and_loses_nothing() -> None:
    timings = {name: [0.1 * index for index in range(90)] for name in "abc"}
    content = {"results": [{"timings": timings, "plans": None}], "few": {"a": [1, 2]}}
    text = to_json(content)
    assert json.loads(text) == content
    lines = text.splitlines()
    assert sum(line.count("8.9") for line in lines) == 3 and not any(line.count("8.9") > 1 for line in lines)
    assert ' "few": {"a": [1, 2]}' in lines


def test_nothing_is_printed_when_a_candidate_computes_something_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "torch_layer", lambda *tensors: torch_layer(*tensors) * 1.5)
    arguments = ["--shapes", "48x256", "--rounds", "1", "--calls", "2", "--json", str(tmp_path / "op.json")]
    assert main(["bench", "op", "--device", "cpu", *arguments]) == 1
    captured = capsys.readouterr()
    assert "torch: " in captured.err and "further from float64" in captured.err
    assert captured.out == "" and not (tmp_path / "op.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "48x250"], "multiple of 8"),
        (["--shapes", "gpt-5"], "pythia-2.8b"),
        (["--dtypes", "float32"], "float16, bfloat16"),
        (["--rounds", "0"], "must be positive"),
        (["--device", "cpu", "--plans"], "needs the native kernel"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "op", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_all_shapes_are_known_by_name_and_by_size() -> None:
    assert parse_shapes("all") == list(SHAPES)
    assert parse_shapes("2560x10240,llama-3-8b") == [PYTHIA_2B8, next(shape for shape in SHAPES if shape.name == "llama-3-8b")]
    assert PYTHIA_2B8.weight_bytes == 52_428_800
    short = ["up-2.8b 10240x2560", "qkv-2.8b 7680x2560", "proj-2.8b 2560x2560", "4096x4096"]
    assert [str(shape) for shape in parse_shapes("short")] == short


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_of_a_run_exceed_the_cache_three_times(shape: Shape) -> None:
    l2_bytes = 60 << 20
    assert calls_for(shape, l2_bytes) * shape.weight_bytes >= 3 * l2_bytes
    assert calls_for(shape, l2_bytes) >= 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [torch_layer, multiply_and_sum])
def test_oracle_takes_every_baseline_and_no_other_weight(dtype: torch.dtype, layer: Any) -> None:
    inputs = Inputs(TINY, dtype, CPU, 3, seed=0)
    checks = Checks(inputs)
    outs = inputs.run(layer)
    checks.check("baseline", outs)
    spoilt = [outs[0].clone(), *outs[1:]]
    spoilt[0][0, 5] = float("nan")
    with pytest.raises(CheckError, match="baseline: 1 of 48 elements of the first call"):
        checks.check("baseline", spoilt)
    inputs.weights[1], inputs.weights[2] = inputs.weights[2], inputs.weights[1]
    with pytest.raises(CheckError, match="last call"):
        checks.check("baseline", inputs.run(layer))


def test_bit_check_sees_one_flipped_bit() -> None:
    inputs = Inputs(TINY, torch.float16, CPU, 3, seed=0)
    checks = Checks(inputs)
    outs = inputs.run(functools.partial(mlpdown.run, backend="numba"))
    checks.check("numba", outs, bits=True)
    flipped = [out.clone() for out in outs]
    flipped[-1].view(torch.int16)[0, 7] ^= 1
    checks.check("numba", flipped)
    with pytest.raises(CheckError, match="1 of 48 elements of the last call have other bits"):
        checks.check("numba", flipped, bits=True)
    with pytest.raises(CheckError, match="1 elements"):
        check_same_bits("numba", flipped, outs)


def test_time_limit_is_not_swallowed_by_a_compiler_that_catches_exceptions() -> None:
    def body() -> None:
        try:
            while True:
                pass
        except Exception:  # noqa: BLE001
            return

    with pytest.raises(TimeLimitExpired), time_limit(0.05):
        body()


def test_baseline_that_does_not_compile_is_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(baselines.COMPILED, "broken", (broken, {"backend": "eager"}))
    layer, reason = baselines.compile_layer("broken", Inputs(TINY, torch.float16, CPU, 1, seed=0).call, 30)
    assert layer is None and reason.startswith("torch.compile: ")


def h200_report(steady: float = 4.49, **medians: float) -> dict[str, Any]:
    timings = {name: [value] * 3 for name, value in {"read_only": 13.3, "torch_graph": 22.0, **medians}.items()}
    result = {"shape": "pythia-2.8b", "hidden_dim": 2560, "intermediate_dim": 10240, "dtype": "float16", "timings": timings}
    result |= {"weight_bytes": PYTHIA_2B8.weight_bytes, "num_calls": 32, "floor_us": 11.68, "cpu_cost": {"torch": [50.0]}}
    return {"machine": {"gpu": "NVIDIA H200"}, "steady_read": {"tb_per_s": [steady] * 3}, "results": [result]}


def test_run_counts_only_if_the_gpu_reads_as_fast_as_it_should() -> None:
    assert validity(h200_report())["valid"] is True
    slow = validity(h200_report(4.3))
    assert slow["valid"] is False and "4.30 TB/s, should be at least 4.4" in slow["reasons"][0]
    unknown = {**h200_report(), "machine": {"gpu": "NVIDIA A100"}}
    assert validity(unknown)["valid"] is None and "A100" in validity(unknown)["reasons"][0]


def test_tables_fit_a_terminal_of_80_columns_and_cut_nothing() -> None:
    content = h200_report(native_chained_prefetch=11.79, native_isolated=14.3, native_chained=13.4, compile_default=20.1, torch_eager=52.0)
    text = io.StringIO()
    console = Console(file=text, width=80)
    console.print(detail_table(content["results"][0], 30))
    console.print(summary_table(content, 80))
    printed = text.getvalue()
    assert "…" not in printed
    assert any(line.split()[:2] == ["pythia-2.8b", "11.68"] for line in printed.splitlines())
    row = next(line for line in printed.splitlines() if line.startswith("PyTorch in a CUDA graph"))
    assert row.split()[-6:] == ["22.00", "22.00-22.00", "1.88", "1.87", "/", "1.54"]
    assert "Above 1 native is faster." in printed


def test_every_candidate_has_its_turn_in_every_round() -> None:
    calls: list[str] = []

    class Counter:
        def time(self, work: Any) -> None:
            work()

        def milliseconds(self) -> list[float]:
            return [float(len(name) * (1 + index // 2)) for index, name in enumerate(calls)]

    works = {name: functools.partial(calls.append, name) for name in ("a", "bb")}
    samples = timing.time_rounds(works, Counter(), 4, num_calls=10)  # type: ignore[arg-type]
    first_round = timing.NUM_WARM_UP_ROUNDS
    rounds = [calls[index : index + 2] for index in range(0, len(calls), 2)]
    assert rounds == [["a", "bb"] if index % 2 == 0 else ["bb", "a"] for index in range(first_round + 4)]
    assert samples["a"] == [100.0 * (1 + index) for index in range(first_round, first_round + 4)]
    assert samples["bb"] == [200.0 * (1 + index) for index in range(first_round, first_round + 4)]


def test_wall_clock_tells_milliseconds() -> None:
    clock = timing.Clock(CPU, "wall")
    clock.time(lambda: None)
    clock.time(lambda: sum(range(300_000)))
    short, long = clock.milliseconds()
    assert 0 <= short < long < 1000


def test_quartiles_of_few_samples() -> None:
    assert timing.quartiles([3.0]) == (3.0, 3.0)
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
