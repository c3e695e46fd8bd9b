"""``mlpdown bench e2e`` on a tiny model, in every mode that a CPU allows, and the checks that come before its times."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import mlpdown.ops
from mlpdown import gpt_neox
from mlpdown.accuracy import CheckError
from mlpdown.bench import e2e
from mlpdown.bench.baselines import torch_layer
from mlpdown.bench.e2e_check import Oracle
from mlpdown.bench.e2e_decode import EagerDecoder, StaticDecoder, forced_logits, has_inductor_pdl
from mlpdown.gpt_neox import LoopModel

CPU = torch.device("cpu")
PROMPT = torch.tensor([[7, 30, 2, 91, 4]])


def run_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    e2e.add_arguments(parser)
    return e2e.main(parser.parse_args(["--device", "cpu", *words]))


def make(dtype: torch.dtype) -> tuple[Any, LoopModel]:
    model = gpt_neox.random_model(gpt_neox.SIZES["tiny"], dtype, CPU, seed=3)
    return model, LoopModel(model, 64, torch_layer)


def test_modes_of_a_cpu_are_checked_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, plot = tmp_path / "e2e.json", tmp_path / "e2e.svg"
    words = ["--size", "tiny", "--modes", "loop,graph,eager", "--tokens", "4,16", "--backend", "numba"]
    words += ["--pairs", "8", "--commit", "abc"]
    assert run_command(*words, "--json", str(results), "--plot", str(plot)) == 0
    content = json.loads(results.read_text())
    assert content["model"] == "GPT-NeoX tiny (random weights)" and content["machine"]["commit"] == "abc"
    rows = content["rows"]
    assert [(row["mode"], row["num_tokens"]) for row in rows] == [
        ("loop", 4),
        ("loop", 16),
        ("eager", 4),
        ("eager", 16),
    ]
    for row in rows:
        # The short decode is repeated, of the long one every pass is a part.
        assert row["num_pairs"] == 8
        for name in ("stock_ms", "patched_ms", "ratio"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert min(row["total_stock_ms"], row["total_patched_ms"], row["total_ratio"]) > 0
    assert [pair[:2] for pair in content["passes"][0]["pairs"]] == [[4, 4], [8, 4], [12, 4], [16, 4]]
    assert [check["name"] for check in content["logits"]] == ["transformers", "loop"]
    assert all(0 < check["patched"] <= check["bound"] for check in content["logits"])
    assert [check["name"] for check in content["tokens"]] == ["loop", "eager"]
    assert content["not_run"] == ["graph, cache of 48, to 16 tokens: a CUDA graph needs a CUDA device"]
    assert content["failed"] == []
    assert "<svg" in plot.read_text()
    captured = capsys.readouterr()
    printed = captured.out
    assert "USDT" not in captured.err and "Warning" not in captured.err
    assert "2 of 2 layers patched, backend numba" in printed and "backend numba" in printed[printed.index("PyTorch over mlpdown") :]
    assert printed.index("from float64") < printed.index("ms a token, medians")
    assert content["settings"]["backend_taken"] == "numba"


@pytest.mark.slow
def test_compile_mode(tmp_path: Path) -> None:
    results = tmp_path / "e2e.json"
    assert run_command("--modes", "compile", "--tokens", "4,8", "--backend", "numba", "--pairs", "1", "--json", str(results)) == 0
    content = json.loads(results.read_text())
    (row,) = content["rows"]
    assert (row["mode"], row["cache_length"], row["num_tokens"]) == ("compile", 48, 8)
    assert content["calls_of_op"] == {"compile, cache of 48": {"stock": {}, "patched": {"mlpdown::numba_mlp_down": 2}}}
    assert len(content["build_seconds"]["compile, cache of 48"]) == 2


def test_checkpoint_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(torch.float16)[0].save_pretrained(tmp_path)
    assert run_command("--model", str(tmp_path), "--modes", "loop", "--tokens", "4", "--pairs", "1") == 0
    assert f"{tmp_path}"[-20:] in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("wrong", ["no bias", "no residual", "bfloat16 residual"])
def test_wrong_op_is_never_timed(wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = mlpdown.ops.run

    def spoilt(hidden_states: Any, attn_output: Any, mlp_intermediate: Any, weight: Any, bias: Any, **keywords: Any) -> torch.Tensor:
        if wrong == "no bias":
            bias = None
        elif wrong == "no residual":
            attn_output = None
        else:
            hidden_states = hidden_states.bfloat16().to(hidden_states.dtype)
        return run(hidden_states, attn_output, mlp_intermediate, weight, bias, **keywords)

    monkeypatch.setattr(mlpdown.ops, "run", spoilt)
    results = tmp_path / "e2e.json"
    assert run_command("--modes", "eager", "--tokens", "4", "--json", str(results)) == 1
    assert not results.exists()
    captured = capsys.readouterr()
    assert "a token" not in captured.out
    assert "transformers: patched logits are" in captured.err and "from float64, must be at most" in captured.err


def test_arguments_that_do_not_go_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command("--model", str(tmp_path), "--size", "tiny") == 2
    assert "--model and --size exclude each other" in capsys.readouterr().err
    assert run_command("--backend", "cuda") == 2
    assert "backend 'cuda' cannot run here: there is none of that name" in capsys.readouterr().err
    for words, message in ((["--modes", "quick"], "--modes must be some of graph,"), (["--tokens", "0"], "--tokens must be positive")):
        assert run_command(*words) == 2
        assert message in capsys.readouterr().err
    assert run_command("--model", str(tmp_path / "nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err


def test_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unreachable(*arguments: Any) -> None:
        raise OSError("no network today")

    monkeypatch.setattr(gpt_neox.socket, "getaddrinfo", unreachable)
    begin = time.monotonic()
    assert run_command("--model", "nobody/has-such-a-model") == 2
    assert time.monotonic() - begin < 5
    assert "cannot be reached (no network today), got nobody/has-such-a-model" in capsys.readouterr().err


def test_another_family_is_refused_before_its_weights_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    assert run_command("--model", str(tmp_path)) == 2
    assert "--model must be a GPT-NeoX with parallel residual, got a llama" in capsys.readouterr().err


def test_mode_that_cannot_run_leaves_no_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--modes", "graph", "--tokens", "4") == 1
    printed = capsys.readouterr().out
    assert "not run: graph" in printed and "pairs" not in printed
    assert "native is not taken: " in printed, "auto says why it does not take the better backend"


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    results = tmp_path / "e2e.json"
    assert run_command("--modes", "loop", "--tokens", "4,8", "--seconds", "0", "--json", str(results)) == 1
    content = json.loads(results.read_text())
    assert content["rows"] == []
    assert len(content["not_run"]) == 1 and content["not_run"][0].startswith("loop, to 8 tokens: ")


def test_mode_that_fails_costs_only_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(e2e, "StaticDecoder", fail)
    results = tmp_path / "e2e.json"
    assert run_command("--modes", "compile,loop", "--tokens", "4", "--pairs", "1", "--json", str(results)) == 1
    content = json.loads(results.read_text())
    assert content["failed"] == ["compile, cache of 48, to 4 tokens: RuntimeError: no such kernel"]
    assert [row["mode"] for row in content["rows"]] == ["loop"]
    assert "FAILED: compile" in capsys.readouterr().out


def test_compiler_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(e2e, "StaticDecoder", lambda *arguments, **keywords: time.sleep(30))
    monkeypatch.setattr(e2e, "BUILD_LIMIT_SECONDS", 0.1)
    results = tmp_path / "e2e.json"
    assert run_command("--modes", "compile", "--tokens", "4", "--json", str(results)) == 1
    assert "TimeLimitExpired: not done in 0.1 s" in json.loads(results.read_text())["failed"][0]


@pytest.mark.skipif(not has_inductor_pdl(), reason="this torch's compiler does not know dependent launch")
@pytest.mark.parametrize("pdl", [False, True])
def test_compiler_writes_dependent_launch_where_it_is_asked_to_and_only_there(pdl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[bool] = []
    monkeypatch.setattr(StaticDecoder, "_warm_up", lambda decoder: settings.append(inductor.triton.enable_pdl))
    with inductor.patch({"triton.enable_pdl": not pdl}):
        StaticDecoder(make(torch.float16)[0], PROMPT, 32, compile=False, graph=False, pdl=pdl)
        assert settings == [pdl] and inductor.triton.enable_pdl is not pdl


def test_dependent_launch_of_compiled_kernels_is_not_run_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = tmp_path / "e2e.json"
    words = ["--modes", "compile-pdl", "--tokens", "4", "--json", str(results)]
    assert run_command(*words) == 1, "nothing could run"
    label = "compile-pdl, cache of 48, to 4 tokens"
    reason = "dependent launch needs a GPU of compute capability 9.0 or newer"
    assert json.loads(results.read_text())["not_run"] == [f"{label}: {reason}"]
    monkeypatch.setattr(e2e, "has_inductor_pdl", lambda: False)
    assert run_command(*words) == 1, "nothing could run"
    reason = f"the compiler of torch {torch.__version__} has no triton.enable_pdl"
    assert json.loads(results.read_text())["not_run"] == [f"{label}: {reason}"]


def test_what_is_decoded_first_comes_first() -> None:
    parser = argparse.ArgumentParser()
    e2e.add_arguments(parser)
    bench = e2e.Benchmark(parser.parse_args(["--device", "cpu", "--tokens", "2048,16,256"]))
    assert bench.stages() == [
        ("graph", [256]),
        ("compile", [256]),
        ("compile-pdl", [256]),
        ("loop", [16, 256, 2048]),
        ("graph", [2048]),
        ("compile", [2048]),
        ("compile-pdl", [2048]),
        ("eager", [16, 256, 2048]),
    ]


@pytest.mark.parametrize("is_patched", [False, True])
def test_static_step_reads_no_value(is_patched: bool) -> None:
    """While a CUDA graph is captured nobody can wait for a value; a fake tensor has none."""
    real, _ = make(torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {name: torch.empty_like(tensor) for name, tensor in real.state_dict().items()}
        model = gpt_neox.assemble(type(real), real.config, weights)
        if is_patched:
            mlpdown.patch(model, backend="torch")
        decoder = StaticDecoder(model, torch.zeros(1, 5, dtype=torch.long), 32, compile=False, graph=False)
        decoder.step()
        with pytest.raises(DataDependentOutputException):
            decoder.tokens()


@torch.no_grad()
def test_hand_written_loop_is_gpt_neox() -> None:
    model, loop = make(torch.float32)
    tokens = torch.randint(256, (1, 20))
    expected = model(tokens, use_cache=False).logits
    prefill = loop(tokens[:, :12])
    steps = [loop(tokens[:, index : index + 1], index) for index in range(12, 20)]
    torch.testing.assert_close(torch.cat((prefill, *steps), 1), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="position must be 0 where several tokens come at once, got 3 with 2 tokens"):
        loop(tokens[:, :2], 3)


def test_every_decoder_decodes_the_same_tokens_again_after_rewind() -> None:
    model, loop = make(torch.float16)
    patched = gpt_neox.twin(model)
    mlpdown.patch(patched, backend="torch")
    decoders = [
        EagerDecoder(model, PROMPT),
        EagerDecoder(patched, PROMPT),
        StaticDecoder(model, PROMPT, 32, compile=False, graph=False),
        StaticDecoder(patched, PROMPT, 32, compile=False, graph=False),
        EagerDecoder(loop, PROMPT),
    ]
    expected = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 5:].tolist()
    for decoder in decoders:
        for _ in range(2):
            decoder.rewind()
            for _ in range(11):
                decoder.step()
            assert decoder.tokens() == expected


def test_twin_shares_weights_and_nothing_else() -> None:
    model, _ = make(torch.float16)
    twin = gpt_neox.twin(model)
    mlpdown.patch(twin, backend="torch")
    assert mlpdown.unpatch(model) == 0
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()


class Recited:
    """A decoder that says what it was told to."""

    def __init__(self, tokens: list[int]) -> None:
        self.said = tokens

    def rewind(self) -> None: ...

    def step(self) -> None: ...

    def tokens(self) -> list[int]:
        return self.said

    def calls_of_op(self) -> dict[str, int]:
        return {}


def test_token_that_float64_would_not_say_needs_a_reason() -> None:
    model, _ = make(torch.float16)
    decoder = EagerDecoder(model, PROMPT)
    decoder.rewind()
    for _ in range(5):
        decoder.step()
    own = decoder.tokens()
    continuation = torch.tensor(own)
    oracle = Oracle(model, PROMPT, continuation)
    logits = forced_logits(model, PROMPT, continuation)
    oracle.check_logits("own", logits, logits)
    check = oracle.check_tokens("alike", Recited(own), Recited(list(own)), 6)
    assert check["num_alike"] == 6 and check["stock"] == check["patched"] == 0

    far = int(oracle.exact[2].argmin())
    with pytest.raises(CheckError, match="far: .* 3 of 6 alike: rounding does not explain that"):
        oracle.check_tokens("far", Recited(own), Recited([*own[:3], far, 0, 0]), 6)
    # Nor do two that agree: both could have lost their cache.
    with pytest.raises(CheckError, match="first: .* 6 of 6 alike: rounding does not explain that"):
        oracle.check_tokens("first", *(Recited([own[0] + 1, *own[1:]]) for _ in range(2)), 6)
    oracle.largest_error = 100.0  # of a model that errs more than any two logits are apart
    check = oracle.check_tokens("near", Recited(own), Recited([*own[:3], far, 0, 0]), 6)
    assert check["num_alike"] == 3 and 0 == check["stock"] < check["patched"] < 200


def test_not_finite_logits_are_no_logits() -> None:
    model, _ = make(torch.float16)
    continuation = torch.tensor([1, 2])
    oracle = Oracle(model, PROMPT, continuation)
    logits = forced_logits(model, PROMPT, continuation)
    spoilt = logits.clone()
    spoilt[1, 3] = torch.nan
    with pytest.raises(CheckError, match="patched logits are nan"):
        oracle.check_logits("spoilt", logits, spoilt)
