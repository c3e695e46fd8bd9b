"""mlpdown bench op on a machine without a GPU: what it measures, checks, writes and refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import mlpdown
from mlpdown import torch_backend
from mlpdown.bench import peers
from mlpdown.bench.chain import Chain, CheckError, Oracle, calls_for, check_same_bits
from mlpdown.bench.op import validity
from mlpdown.bench.peers import TimeLimitExpired, multiply_and_sum_layer, time_limit, torch_layer
from mlpdown.bench.results import Report, Result, quartiles, read_report
from mlpdown.bench.shapes import PYTHIA_2B8, SHAPES, Shape, parse_shapes
from mlpdown.cli import main

TINY = Shape("tiny", 48, 256)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "op.json"
    arguments = ["bench", "op", "--device", "cpu", "--shapes", "48x256,40x64", "--rounds", "3", "--calls", "2"]
    assert main([*arguments, "--json", str(path), "--plot", str(path.with_name("plot"))]) == 0
    return path


def test_without_a_gpu_torch_and_the_specification_are_timed_and_the_rest_is_said_to_be_missing(report_path: Path) -> None:
    report = read_report(report_path)
    assert [result.label for result in report.results] == ["48x256 float16", "48x256 bfloat16", "40x64 float16", "40x64 bfloat16"]
    for result in report.results:
        assert set(result.timings) == {"torch", "numba"}
        assert all(len(samples) == 3 and min(samples) > 0 for samples in result.timings.values())
        assert {"native", "read_only", "torch_graph", "compile_default"} <= result.missing.keys()
        assert all(result.missing.values())
        assert result.floor_us is None and result.plans is None
    assert report.steady_read is None and report.validity["valid"] is None


def test_file_has_the_documented_members(report_path: Path) -> None:
    content = json.loads(report_path.read_text())
    assert content["benchmark"] == "op" and content["schema_version"] == 1
    assert set(content) == {"benchmark", "schema_version", "machine", "steady_read", "validity", "results", "plans"}
    assert {"date", "commit", "command", "platform", "python", "torch", "cuda", "gpu"} <= content["machine"].keys()
    assert content["results"][0]["weight_bytes"] == 2 * 48 * 256


def test_plot_is_written_as_svg_and_png(report_path: Path) -> None:
    assert report_path.with_name("plot.svg").read_text().lstrip().startswith("<?xml")
    assert report_path.with_name("plot.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_printed_when_a_candidate_computes_something_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = torch_backend.run
    monkeypatch.setattr(torch_backend, "run", lambda *tensors: right(*tensors) * 1.5)
    assert main(["bench", "op", "--device", "cpu", "--shapes", "48x256", "--rounds", "1", "--calls", "2"]) == 1
    captured = capsys.readouterr()
    assert "torch" in captured.err and "further from float64" in captured.err
    assert "us a call" not in captured.out


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
    assert [str(shape) for shape in parse_shapes("short")] == [
        "up-2.8b 10240x2560",
        "qkv-2.8b 7680x2560",
        "proj-2.8b 2560x2560",
        "4096x4096",
    ]
    assert parse_shapes("2560x10240,llama-3-8b") == [PYTHIA_2B8, next(shape for shape in SHAPES if shape.name == "llama-3-8b")]
    assert PYTHIA_2B8.weight_bytes == 52_428_800


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_of_a_chain_exceed_the_cache_three_times(shape: Shape) -> None:
    l2_bytes = 60 << 20
    assert calls_for(shape, l2_bytes) * shape.weight_bytes >= 3 * l2_bytes
    assert calls_for(shape, l2_bytes) >= 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [torch_layer, multiply_and_sum_layer])
def test_oracle_takes_every_peer_and_no_other_weight(dtype: torch.dtype, layer) -> None:
    chain = Chain.make(TINY, dtype, CPU, 3, seed=0)
    oracle = Oracle(chain)
    outs = chain.run(layer)
    oracle.check("peer", outs)
    swapped = [chain.weights[0], chain.weights[2], chain.weights[1]]
    wrong = dataclasses.replace(chain, weights=swapped)
    with pytest.raises(CheckError, match="last call"):
        oracle.check("peer", wrong.run(layer))
    outs[0][0, 5] = float("nan")
    with pytest.raises(CheckError, match="1 of 48 elements of the chain's first call"):
        oracle.check("peer", outs)


def test_bit_check_sees_one_flipped_bit() -> None:
    chain = Chain.make(TINY, torch.float16, CPU, 3, seed=0)
    oracle = Oracle(chain)
    outs = chain.run(lambda *tensors: mlpdown.run(*tensors, backend="numba"))
    oracle.check_bits("numba", outs)
    flipped = [out.clone() for out in outs]
    flipped[-1].view(torch.int16)[0, 7] ^= 1
    with pytest.raises(CheckError, match="1 of 48"):
        oracle.check_bits("numba", flipped)
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


def test_peer_that_does_not_compile_is_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(peers.COMPILED, "broken", (broken, {"backend": "eager"}))
    chain = Chain.make(TINY, torch.float16, CPU, 1, seed=0)
    layer, reason = peers.compile_layer("broken", chain.run_first, 30)
    assert layer is None and reason.startswith("torch.compile failed")


def h200_report(steady: float, read_only: float, torch_graph: float) -> Report:
    result = Result("pythia-2.8b", 2560, 10240, "float16", PYTHIA_2B8.weight_bytes, 32)
    result.timings = {"read_only": [read_only] * 3, "torch_graph": [torch_graph] * 3}
    return Report({"gpu": "NVIDIA H200"}, {"tb_per_s": [steady] * 3}, results=[result])


def test_run_counts_only_if_the_yardsticks_of_the_machine_are_right() -> None:
    assert validity(h200_report(4.49, 13.3, 22.0))["valid"] is True
    for slow in (h200_report(4.3, 13.3, 22.0), h200_report(4.49, 13.7, 22.0), h200_report(4.49, 13.3, 23.1)):
        assert validity(slow)["valid"] is False
        assert validity(slow)["reasons"]


def test_quartiles_of_few_samples() -> None:
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
