"""``mlpdown check``: what it prints, what it reads, and that it fails when a promise is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlpdown import accuracy, check, checkpoint, cli, numba_backend, torch_backend
from mlpdown.cases import KINDS, make_case

SMALL = ["--hidden-dim", "96", "--intermediate-dim", "512"]


def run_check(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    report = tmp_path / "report.json"
    status = cli.main(["check", *options, "--json", str(report)])
    return status, json.loads(report.read_text()) if report.exists() else {}


def test_one_table_and_exit_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run_check(tmp_path, *SMALL)
    printed = capsys.readouterr().out
    assert status == 0
    assert "Every promise holds." in printed and "hidden_dim 96, intermediate_dim 512" in printed
    rows = report["results"]
    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    assert {(row["dtype"], row["inputs"]) for row in rows} == {
        (dtype, kind) for dtype in ("float16", "bfloat16") for kind in KINDS
    }
    assert {(row["backend"], row["device"]) for row in rows} >= {
        (backend, device) for backend in ("numba", "torch") for device in devices
    }
    for row in rows:
        assert row["num_elements"] == 96 and row["seconds"] > 0
        assert row["promises_bits"] == (row["backend"] != "torch")
        assert not (row["promises_bits"] and row["wrong_bits"])
        if row["inputs"] == "ordinary":
            assert 0 < row["mean_error_ulps"] <= row["max_error_ulps"]
            if row["backend"] == "numba":
                assert row["max_error_ulps"] < 0.51
            assert row["backend"] in printed
    assert report["broken_promises"] == []
    if not torch.cuda.is_available():
        assert "native cannot run here: backend 'native' needs a" in printed


def test_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    printed = capsys.readouterr().out
    table = printed[: printed.index("Wrong bits:")]
    assert "…" not in table
    assert max(len(line) for line in table.splitlines()) <= 80
    assert "hidden_dim 2560, intermediate_dim 10240" in table


@pytest.mark.parametrize("element", [0, 95])
def test_one_wrong_bit_is_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], element: int
) -> None:
    right = numba_backend.run

    def one_bit_off(*arguments: Any) -> torch.Tensor:
        result = right(*arguments)
        result.view(torch.int16)[0, element] ^= 1
        return result

    monkeypatch.setattr(numba_backend, "run", one_bit_off)
    status, report = run_check(tmp_path, *SMALL, "--dtype", "float16")
    assert status == 1
    assert [row["wrong_bits"] for row in report["results"] if row["backend"] == "numba"] == [1] * len(KINDS)
    assert len(report["broken_promises"]) == len(KINDS)
    assert (
        f"1 of 96 elements have other bits than the specification (ordinary inputs, float16); the first is [0, {element}]"
        in (report["broken_promises"][0])
    )
    assert "BROKEN: numba on cpu" in capsys.readouterr().out


def test_specification_outside_its_bound_is_a_broken_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(16, 64, "float16")
    right = accuracy.float64_result
    monkeypatch.setattr(accuracy, "float64_result", lambda case: right(case) + np.float64(0.25))
    _, broken = check.check_case("ordinary", case, ["numba"])
    assert broken and broken[0].startswith("the specification is outside its error bound in ")


def test_torch_promises_no_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "run", lambda hidden_states, *rest: torch.zeros_like(hidden_states))
    status, report = run_check(tmp_path, *SMALL, "--dtype", "bfloat16")
    assert status == 0
    assert all(
        row["wrong_bits"] > 50 for row in report["results"] if row["backend"] == "torch" and row["inputs"] == "ordinary"
    )


@pytest.fixture
def layers() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {"gpt_neox.embed_in.weight": torch.zeros(4, 48, dtype=torch.float16)}
    for layer in (0, 1):
        names = checkpoint.tensor_names(layer)
        tensors[names["weight"]] = (torch.randn(48, 192, generator=generator) / 16).half()
        tensors[names["bias"]] = torch.randn(48, generator=generator).half()
    return tensors


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Weights and biases of one layer in different shards, as large checkpoints may have them."""
    shards = [{name: t for name, t in tensors.items() if name.endswith(suffix)} for suffix in ("weight", "bias")]
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-00002.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / checkpoint.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_layer_of_a_checkpoint(tmp_path: Path, layers: dict[str, torch.Tensor], sharded: bool) -> None:
    if sharded:
        save_sharded(tmp_path, layers)
    else:
        save_file(layers, tmp_path / checkpoint.SINGLE_FILE)
    weight, bias = checkpoint.read_layer(tmp_path, 1)
    assert torch.equal(weight, layers["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"])
    assert torch.equal(bias, layers["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"])
    status, report = run_check(tmp_path, "--model", str(tmp_path), "--layer", "1")
    assert status == 0
    assert (report["hidden_dim"], report["intermediate_dim"]) == (48, 192)
    assert {(row["inputs"], row["dtype"]) for row in report["results"]} == {("layer 1", "float16")}


def test_float32_checkpoint_needs_a_dtype(
    tmp_path: Path, layers: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({name: tensor.float() for name, tensor in layers.items()}, tmp_path / checkpoint.SINGLE_FILE)
    assert run_check(tmp_path, "--model", str(tmp_path))[0] == 2
    assert "holds torch.float32: say with --dtype what to round it to" in capsys.readouterr().err
    status, report = run_check(tmp_path, "--model", str(tmp_path), "--dtype", "bfloat16")
    assert status == 0 and report["results"][0]["dtype"] == "bfloat16"


def test_checkpoint_that_is_not_one(tmp_path: Path, layers: dict[str, torch.Tensor]) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors is not there"):
        checkpoint.read_layer(tmp_path, 0)
    (tmp_path / checkpoint.SINGLE_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(checkpoint.CheckpointError, match="is not a safetensors file"):
        checkpoint.read_layer(tmp_path, 0)
    save_file(layers, tmp_path / checkpoint.SINGLE_FILE)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"has no tensor gpt_neox\.layers\.2\.mlp\.dense_4h_to_h\.weight"
    ):
        checkpoint.read_layer(tmp_path, 2)
    transposed = {**layers, checkpoint.tensor_names(0)["weight"]: torch.zeros(192, 48, dtype=torch.float16)}
    save_file(transposed, tmp_path / checkpoint.SINGLE_FILE)
    with pytest.raises(checkpoint.CheckpointError, match=r"got \[192, 48\] and \[48\]"):
        checkpoint.read_layer(tmp_path, 0)
    (tmp_path / checkpoint.INDEX_FILE).write_text("[]")
    with pytest.raises(checkpoint.CheckpointError, match="is not the index of a sharded checkpoint"):
        checkpoint.read_layer(tmp_path, 0)
    save_sharded(tmp_path, layers)
    with pytest.raises(checkpoint.CheckpointError, match=r"index\.json has no tensor gpt_neox\.layers\.7"):
        checkpoint.read_layer(tmp_path, 7)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"model-00002-of-00002\.safetensors is not there"):
        checkpoint.read_layer(tmp_path, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hidden-dim", "0"], "hidden_dim must be >= 1"),
        (["--intermediate-dim", "12"], "intermediate_dim a positive multiple of 8, got 2560, 12"),
        (["--layer", "3"], "--layer needs --model"),
        (["--model", "nowhere", "--hidden-dim", "8"], "leave them out"),
        (["--seed", "-1"], "seed in [0, 2**32)"),
    ],
)
def test_wrong_options_are_exit_status_2(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("float16", 1.0, 2.0**-10),
        ("float16", -1.9999, 2.0**-10),
        ("float16", 2.0**-14, 2.0**-24),
        ("float16", 0.0, 2.0**-24),
        ("bfloat16", 1.5, 2.0**-7),
        ("bfloat16", 2.0**-130, 2.0**-133),
    ],
)
def test_units_in_the_last_place(dtype: str, value: float, expected: float) -> None:
    assert accuracy.ulp(np.array([value]), dtype)[0] == expected
