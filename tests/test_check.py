"""``mlpdown check``: what it replays and reads, and that it fails when a promise is broken."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlpdown.reference import machines
from mlpdown.reference.row_sums import MIN_ROWS_PER_THREAD
from safetensors.torch import save_file

from mlpdown import accuracy, check, checkpoint, cli, golden, numba_backend, torch_backend
from mlpdown.cases import KINDS, make_case
from mlpdown.golden import Golden, GoldenCase, read_golden

SMALL = ["--hidden-dim", "96", "--intermediate-dim", "512"]
HAS_GPU = torch.cuda.is_available()


def run_check(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    report = tmp_path / "report.json"
    status = cli.main(["check", *options, "--json", str(report)])
    return status, json.loads(report.read_text()) if report.exists() else {}


# Results that were recorded on a GPU


@pytest.fixture
def goldens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the small goldens that ship, in the place of all."""
    folder = tmp_path / "goldens"
    folder.mkdir()
    for file in golden.shipped_goldens():
        case = read_golden(file).case
        if case.hidden_dim * case.intermediate_dim < 1 << 18:
            shutil.copy(str(file), folder)
    assert len(list(folder.iterdir())) >= 4
    monkeypatch.setattr(golden, "shipped_goldens", lambda: sorted(folder.iterdir()))
    monkeypatch.setattr(check, "shipped_goldens", golden.shipped_goldens)
    return folder


def test_recorded_bits_come_out_again_and_are_counted(
    goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run_check(tmp_path)
    printed = capsys.readouterr().out
    assert status == 0 and report["broken_promises"] == []
    recorded = [read_golden(file) for file in goldens.iterdir()]
    elements = sum(entry.bits.size for entry in recorded)
    (gpu,) = {entry.gpu for entry in recorded}
    torch_wrong = sum(r["wrong_bits"] for r in report["results"] if r["backend"] == "torch" and r["recorded_on"] and r["device"] == "cpu")
    assert 0 < torch_wrong <= elements
    assert (
        f"{elements:,} elements recorded on an {gpu}, replayed by numba on this CPU: 0 differ "
        f"(by PyTorch, which promises nothing: {torch_wrong:,})."
    ) in printed
    assert "No promise is broken." in printed
    replayed = [row for row in report["results"] if row["backend"] == "numba" and row["recorded_on"]]
    assert {row["wrong_bits"] for row in replayed} == {0} and all(row["promises_bits"] for row in replayed)


@pytest.mark.parametrize("element", [0, 63])
def test_changed_golden_is_exit_status_1_and_names_the_file(
    goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], element: int
) -> None:
    path = goldens / "64x264-float16-special.json"
    changed = read_golden(path)
    changed.bits[element] ^= 1
    changed.write(goldens)
    status, report = run_check(tmp_path, "--dtype", "float16")
    assert status == 1
    assert [row["wrong_bits"] for row in report["results"] if row["backend"] == "numba" and row["inputs"] == "special"] == [1]
    (complaint,) = report["broken_promises"]
    assert f"1 of 64 elements have other bits than were recorded on an {changed.gpu} ({path.name})" in complaint
    assert f"the first is [0, {element}]" in complaint
    assert f"BROKEN: numba on cpu: {complaint.partition(': ')[2]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": seed} for seed in (3, -1, 1 << 32, "16", None, True)),
        *({"intermediate_dim": size} for size in (272, "264", 264.0)),
        *({"bits": bits} for bits in ("AAAA", "?", None)),
        *({"kind": "ordinary"}, {"dtype": "float16"}, {"hidden_dim": 8}, {"gpu": None}, {"extra": 1}),
    ],
    ids=str,
)
def test_golden_whose_content_was_changed_is_exit_status_1_and_named(
    goldens: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    path = goldens / "64x264-bfloat16-special.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    status, report = run_check(tmp_path, "--dtype", "bfloat16")
    assert status == 1
    assert [complaint for complaint in report["broken_promises"] if path.name in complaint]


def test_truncated_golden_is_exit_status_1_and_named(goldens: Path, tmp_path: Path) -> None:
    path = goldens / "64x264-bfloat16-special.json"
    path.write_text(path.read_text()[:-20])
    status, report = run_check(tmp_path)
    assert status == 1 and path.name in report["broken_promises"][0]


def test_package_without_goldens_proves_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "shipped_goldens", lambda: [])
    assert cli.main(["check"]) == 2
    assert "no goldens came with this package" in capsys.readouterr().err


@pytest.mark.parametrize("element", [0, 63])
def test_backend_that_is_one_bit_off_is_exit_status_1(
    goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, element: int
) -> None:
    right = numba_backend.run

    def one_bit_off(*arguments: Any) -> torch.Tensor:
        result = right(*arguments)
        result.view(torch.int16)[0, element] ^= 1
        return result

    monkeypatch.setattr(numba_backend, "run", one_bit_off)
    status, report = run_check(tmp_path, "--dtype", "float16")
    assert status == 1
    wrong = [row["wrong_bits"] for row in report["results"] if row["promises_bits"] and row["device"] == "cpu"]
    assert wrong == [1] * len(list(goldens.glob("*-float16-*"))) and len(report["broken_promises"]) >= len(wrong)


def test_golden_survives_its_file(tmp_path: Path) -> None:
    case = GoldenCase(24, 64, "bfloat16", "cancelling", 5)
    bits = case.make().expected_bits()[0]
    path = Golden(case, "a GPU", bits).write(tmp_path)
    again = read_golden(path)
    assert (again.case, again.gpu) == (case, "a GPU") and np.array_equal(again.bits, bits)
    with pytest.raises(ValueError, match=r"other\.json holds 24x64-bfloat16-cancelling\.json"):
        read_golden(path.rename(tmp_path / "other.json"))


# Inputs of other sizes


def test_the_specification_is_never_compared_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run_check(tmp_path, *SMALL)
    printed = capsys.readouterr().out
    assert status == 0
    devices = {"cpu", "cuda"} if HAS_GPU else {"cpu"}
    rows = report["results"]
    assert {(row["dtype"], row["inputs"]) for row in rows} == {(d, kind) for d in ("float16", "bfloat16") for kind in KINDS}
    assert {(row["backend"], row["device"]) for row in rows} >= {(b, d) for b in ("numba", "torch") for d in devices}
    for row in rows:
        assert row["num_elements"] == 96 and row["size"] == "96x512"
        itself = row["backend"] == "numba" and row["device"] == "cpu"
        assert (row["wrong_bits"] is None) == itself
        assert row["promises_bits"] == (row["backend"] != "torch" and not itself)
        if row["inputs"] == "ordinary":
            assert 0 < row["mean_error_ulps"] <= row["max_error_ulps"]
            assert row["backend"] == "torch" or row["max_error_ulps"] < 0.51
    assert "within the error bound of the float64 result in every element" in printed
    if not HAS_GPU:
        assert "No bits were compared: only the specification itself runs here." in printed
        assert "native cannot run here: backend 'native' needs a" in printed


def test_table_fits_a_terminal_and_is_never_cut(
    goldens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in ("80", "30"):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main(["check", "--hidden-dim", "2560", "--intermediate-dim", "1024", "--dtype", "bfloat16"]) == 0
        printed = capsys.readouterr().out
        table = printed[: printed.index("Wrong bits:")]
        assert "…" not in table and "2560x1024" in table
        assert max(len(line) for line in table.splitlines()) <= 80


def test_specification_outside_its_bound_is_a_broken_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = check.Trial("ordinary", make_case(16, 64, "float16"))
    right = accuracy.float64_result
    monkeypatch.setattr(accuracy, "float64_result", lambda case: right(case) + np.float64(0.25))
    _, broken = check.run_trial(trial, ["numba"])
    assert broken and broken[0].startswith("the specification is outside its error bound in ")


def test_torch_promises_no_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "run", lambda hidden_states, *rest: torch.zeros_like(hidden_states))
    status, report = run_check(tmp_path, *SMALL, "--dtype", "bfloat16")
    assert status == 0
    assert all(
        row["wrong_bits"] > 50 for row in report["results"] if row["backend"] == "torch" and row["inputs"] == "ordinary"
    )


def test_machine_on_which_nothing_promises_bits_is_exit_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none = check.BackendStatus(False, "no such thing here")
    monkeypatch.setattr(check, "backends", lambda: {"native": none, "numba": none, "torch": check.BackendStatus(True, "")})
    assert cli.main(["check"]) == 2
    assert "no backend that promises bits can run here: no such thing here" in capsys.readouterr().err


# Subnormal numbers that are flushed to zero


@pytest.mark.parametrize("kind", ["special", "subnormal"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_inputs_and_judgement_are_right_where_subnormals_are_flushed(dtype: str, kind: str) -> None:
    case = make_case(64, 264, dtype, kind, 16)
    expected, oracle, bound = case.expected_bits(), accuracy.float64_result(case), accuracy.error_bound(case)
    assert torch.set_flush_denormal(True)
    try:
        again = make_case(64, 264, dtype, kind, 16)
        for array, other in zip(case.arrays(), again.arrays(), strict=True):
            assert array is not None and other is not None
            np.testing.assert_array_equal(array.view(np.uint32), other.view(np.uint32))
        np.testing.assert_array_equal(accuracy.float64_result(again), oracle)
        np.testing.assert_array_equal(accuracy.error_bound(again), bound)
        assert not accuracy.outside_bound(expected, again, oracle).any()
    finally:
        torch.set_flush_denormal(False)


def test_specification_that_flushes_subnormals_is_a_broken_promise() -> None:
    trial = check.Trial("subnormal", make_case(*check.SUBNORMAL_SHAPE, "bfloat16", "subnormal"))
    assert check.run_trial(trial, ["numba"])[1] == []
    kept = trial.case
    zeros = {name: np.zeros_like(getattr(kept, name)) for name in ("weight", "hidden_states", "attn_output", "bias")}
    flushed = dataclasses.replace(kept, **zeros)
    oracle = accuracy.float64_result(kept)
    assert accuracy.outside_bound(flushed.expected_bits(), kept, oracle).mean() > 0.9


@pytest.mark.parametrize("first_share_flushes", [False, True])
def test_one_thread_that_flushes_subnormals_is_a_broken_promise(
    first_share_flushes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check.SUBNORMAL_SHAPE[0] > 2 * MIN_ROWS_PER_THREAD
    trial = check.Trial("subnormal", make_case(*check.SUBNORMAL_SHAPE, "bfloat16", "subnormal"))
    guard, caller = machines.ieee_arithmetic, threading.current_thread()

    @contextlib.contextmanager
    def guard_of_some_threads() -> Iterator[None]:
        if (threading.current_thread() is caller) != first_share_flushes:
            with guard():
                yield
        else:
            torch.set_flush_denormal(True)
            try:
                yield
            finally:
                torch.set_flush_denormal(False)

    monkeypatch.setattr(machines.os, "cpu_count", lambda: 4)
    assert check.run_trial(trial, ["numba"])[1] == []
    monkeypatch.setattr(machines, "ieee_arithmetic", guard_of_some_threads)
    assert check.run_trial(trial, ["numba"])[1] != []


def test_verdict_is_true_where_subnormals_are_flushed(goldens: Path) -> None:
    """Whether this process flushes them in the specification or not, check says what is."""
    recorded = next(trial for trial in check.recorded_trials()[0] if trial.file == "64x264-bfloat16-special.json")
    for trial in (recorded, check.Trial("subnormal", make_case(*check.SUBNORMAL_SHAPE, "bfloat16", "subnormal"))):
        right = trial.case.expected_bits()
        assert torch.set_flush_denormal(True)
        try:
            differs = bool((trial.case.expected_bits() != right).any())
            assert bool(check.run_trial(trial, ["numba"])[1]) == differs
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variable", ["NUMBA_OPT=0", "NUMBA_CPU_NAME=generic", "NUMBA_CPU_FEATURES=-fma,-avx2,-avx512f", "NUMBA_DEBUGINFO=1"]
)
def test_environment_changes_no_bit_of_the_specification(variable: str) -> None:
    command = ["env", variable, sys.executable, "-m", "mlpdown", "doctor", "--json"]
    findings = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert ", replayed by numba on this CPU: 0 differ" in findings["self_test"]["compared"][0]


# Weights of a checkpoint


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
@pytest.mark.parametrize("base_model", [False, True])
def test_layer_of_a_checkpoint(
    tmp_path: Path, layers: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, sharded: bool, base_model: bool
) -> None:
    stored = {name.removeprefix("gpt_neox.") if base_model else name: tensor for name, tensor in layers.items()}
    if sharded:
        save_sharded(tmp_path, stored)
    else:
        save_file(stored, tmp_path / checkpoint.SINGLE_FILE)
    weight, bias = checkpoint.read_layer(tmp_path, 1)
    assert torch.equal(weight, layers["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"])
    assert torch.equal(bias, layers["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"])
    monkeypatch.chdir(tmp_path.parent)
    status, report = run_check(tmp_path, "--model", tmp_path.name, "--layer", "1")
    assert status == 0
    assert {(row["size"], row["inputs"], row["dtype"]) for row in report["results"]} == {("48x192", "layer 1", "float16")}


@pytest.mark.parametrize("index", ["stale", "stale, its shards gone", "broken"])
def test_whole_file_comes_before_an_index_as_in_transformers(
    tmp_path: Path, layers: dict[str, torch.Tensor], index: str
) -> None:
    save_sharded(tmp_path, {name: -tensor for name, tensor in layers.items()})
    if index != "stale":
        for shard in tmp_path.glob("model-*"):
            shard.unlink()
    if index == "broken":
        (tmp_path / checkpoint.INDEX_FILE).write_text("[]")
    save_file(layers, tmp_path / checkpoint.SINGLE_FILE)
    weight, bias = checkpoint.read_layer(tmp_path, 0)
    assert torch.equal(weight, layers[checkpoint.tensor_names(0)["weight"]])
    assert torch.equal(bias, layers[checkpoint.tensor_names(0)["bias"]])


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["whole", "sharded", "sharded, then whole", "base model"])
def test_layer_is_the_one_that_transformers_loads(tmp_path: Path, saved: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)).half()
    if "sharded" in saved:
        model.save_pretrained(tmp_path, max_shard_size="100KB")
    if saved == "sharded, then whole":
        shards = {path: path.read_bytes() for path in tmp_path.glob("model-*")}
        torch.nn.init.normal_(model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight)
        model.save_pretrained(tmp_path)
        for path, content in shards.items():
            path.write_bytes(content)  # which transformers removes
    if saved in ("whole", "base model"):
        (model.gpt_neox if saved == "base model" else model).save_pretrained(tmp_path)
    loaded = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype=torch.float16).gpt_neox.layers[1].mlp.dense_4h_to_h
    weight, bias = checkpoint.read_layer(tmp_path, 1)
    assert torch.equal(weight, loaded.weight) and torch.equal(bias, loaded.bias)


def test_float32_checkpoint_needs_a_dtype(
    tmp_path: Path, layers: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({name: tensor.float() for name, tensor in layers.items()}, tmp_path / checkpoint.SINGLE_FILE)
    assert run_check(tmp_path, "--model", str(tmp_path))[0] == 2
    assert "holds torch.float32: say with --dtype what to round it to" in capsys.readouterr().err
    status, report = run_check(tmp_path, "--model", str(tmp_path), "--dtype", "bfloat16")
    assert status == 0 and report["results"][0]["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["a[red]b", "[/]", "[link=x]", "ümlaut [0]", "%s {0}"])
def test_paths_are_no_markup(
    tmp_path: Path, layers: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    save_file(layers, folder / checkpoint.SINGLE_FILE)
    assert run_check(tmp_path, "--model", str(folder))[0] == 0
    printed = "".join(capsys.readouterr().out.split())
    assert "".join(f"weights of {folder}".split()) in printed


def test_checkpoint_that_is_not_one(tmp_path: Path, layers: dict[str, torch.Tensor]) -> None:
    def refused(match: str, layer: int = 0) -> None:
        with pytest.raises(checkpoint.CheckpointError, match=match):
            checkpoint.read_layer(tmp_path, layer)

    refused(r"has neither model\.safetensors nor model\.safetensors\.index\.json")
    (tmp_path / checkpoint.SINGLE_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused("is not a safetensors file")
    save_file(layers, tmp_path / checkpoint.SINGLE_FILE)
    refused(r"has no tensors gpt_neox\.layers\.2\.mlp\.dense_4h_to_h\.weight and .*: its layers are 0 to 1", 2)
    save_file({"model.layers.0.mlp.down_proj.weight": torch.zeros(8, 8)}, tmp_path / checkpoint.SINGLE_FILE)
    refused("it is no GPT-NeoX")
    transposed = {**layers, checkpoint.tensor_names(0)["weight"]: torch.zeros(192, 48, dtype=torch.float16)}
    save_file(transposed, tmp_path / checkpoint.SINGLE_FILE)
    refused(r"got \[192, 48\] and \[48\]")
    (tmp_path / checkpoint.SINGLE_FILE).unlink()
    for text in ("[]", "{", '{"weight_map": 3}', "{}"):
        (tmp_path / checkpoint.INDEX_FILE).write_text(text)
        refused("is not the index of a sharded checkpoint")
    save_sharded(tmp_path, layers)
    refused(r"index\.json has no tensors gpt_neox\.layers\.7", 7)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(r"model-00002-of-00002\.safetensors is not there, which holds")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", "is not there, and no name on the hub"),
        ("/nowhere/at/all", "is not there, and no name on the hub"),
        (__file__, "is a file; a checkpoint is the folder that holds it"),
    ],
)
def test_model_that_is_neither_a_folder_nor_a_name(model: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--model", model]) == 2
    assert words in capsys.readouterr().err


def test_name_on_the_hub_fetches_only_the_files_of_the_layer(
    tmp_path: Path, layers: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    save_sharded(tmp_path, layers)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00003-of-00003.safetensors")
    asked: list[str] = []

    def download(name: str, file: str) -> str:
        asked.append(f"{name}: {file}")
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    weight, _ = checkpoint.read_layer("owner/model", 1)
    assert torch.equal(weight, layers[checkpoint.tensor_names(1)["weight"]])
    assert {line.partition(": ")[2] for line in asked} == {
        checkpoint.SINGLE_FILE,
        checkpoint.INDEX_FILE,
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }

    def unreachable(name: str, file: str) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(checkpoint.CheckpointError, match="owner/model is no folder here, and the hub cannot be reached"):
        checkpoint.read_layer("owner/model", 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hidden-dim", "0"], "hidden_dim must be >= 1"),
        (["--intermediate-dim", "12"], "intermediate_dim a positive multiple of 8, got 2560, 12"),
        (["--layer", "3"], "--layer needs --model"),
        (["--model", "nowhere", "--hidden-dim", "8"], "leave them out"),
        (["--seed", "5000000000"], "seed in [0, 2**32)"),
        (["--hidden-dim", "1000000", "--intermediate-dim", "8000000"], "needs about 448000 GB of memory"),
    ],
)
def test_wrong_options_are_exit_status_2(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--layer", "--seed", "--hidden-dim", "--intermediate-dim"])
@pytest.mark.parametrize("value", ["-1", "1.5", "x", "9" * 30])
def test_number_that_is_none_is_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["check", option, value])
    assert exit_status.value.code == 2
    assert f"argument {option}: must be a whole number, 0 or more, got {value}" in capsys.readouterr().err


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


@pytest.mark.parametrize("option", [[], ["--dtype", "float16"]])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_quantised_tensors_are_no_weights(
    tmp_path: Path, layers: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str], option: list[str], part: str
) -> None:
    name = checkpoint.tensor_names(0)[part]
    save_file({**layers, name: layers[name].to(torch.int8)}, tmp_path / checkpoint.SINGLE_FILE)
    assert cli.main(["check", "--model", str(tmp_path), *option]) == 2
    assert "torch.int8" in capsys.readouterr().err
