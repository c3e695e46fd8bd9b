"""``mlpdown bench e2e`` on a tiny model, in every mode that a CPU allows, and the checks that come before its times."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mlpdown.ops
from mlpdown.bench import e2e, e2e_models
from mlpdown.bench.e2e_check import CheckError, Oracle
from mlpdown.bench.e2e_decode import EagerDecoder, LoopDecoder, StaticDecoder, forced_logits, not_patched, patcher
from mlpdown.bench.e2e_loop import LoopModel, torch_mlp_down

CPU = torch.device("cpu")
TINY = e2e_models.SIZES["tiny"]
PROMPT = torch.tensor([[7, 30, 2, 91, 4]])


def run_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    e2e.add_arguments(parser)
    return e2e.main(parser.parse_args(["--device", "cpu", *words]))


def make(dtype: torch.dtype) -> tuple[Any, LoopModel]:
    weights = e2e_models.random_weights(TINY, dtype, CPU, seed=3)
    return e2e_models.build(TINY, weights, 64), LoopModel(weights, TINY.num_heads, 64)


def test_modes_of_a_cpu_are_checked_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, plot = tmp_path / "e2e.json", tmp_path / "e2e.svg"
    words = [
        "--size",
        "tiny",
        "--modes",
        "loop,graph,eager",
        "--tokens",
        "4,16",
        "--repeats",
        "2",
        "--backend",
        "numba",
    ]
    assert run_command(*words, "--json", str(results), "--plot", str(plot)) == 0
    content = json.loads(results.read_text())
    assert content["model"] == "GPT-NeoX tiny (random weights)"
    assert [(row["mode"], row["num_tokens"]) for row in content["rows"]] == [
        ("loop", 4),
        ("loop", 16),
        ("eager", 4),
        ("eager", 16),
    ]
    for row in content["rows"]:
        # A machine that is slow enough gets no second run.
        assert 1 <= len(row["stock_ms"]) == len(row["patched_ms"]) <= 2
        assert min(*row["stock_ms"], *row["patched_ms"], row["ratio"]) > 0
    assert [check["name"] for check in content["logits"]] == ["transformers", "loop"]
    assert all(0 < check["patched"] <= check["bound"] for check in content["logits"])
    assert [check["name"] for check in content["tokens"]] == ["loop", "eager"]
    assert content["not_run"] == ["graph, 4 to 16 tokens: a CUDA graph needs a CUDA device"]
    assert "<svg" in plot.read_text()
    printed = capsys.readouterr().out
    assert "2 of 2 layers patched" in printed
    assert printed.index("from float64") < printed.index("ms per output token")


@pytest.mark.slow
def test_compile_mode(tmp_path: Path) -> None:
    results = tmp_path / "e2e.json"
    assert run_command("--modes", "compile", "--tokens", "8", "--repeats", "1", "--json", str(results)) == 0
    (row,) = json.loads(results.read_text())["rows"]
    assert (row["mode"], row["num_tokens"]) == ("compile", 8)


def test_checkpoint_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(torch.float16)[0].save_pretrained(tmp_path)
    assert run_command("--model", str(tmp_path), "--modes", "loop", "--tokens", "4", "--repeats", "1") == 0
    assert f"{tmp_path}"[-20:] in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("wrong", ["no bias", "no residual", "bfloat16 residual"])
def test_wrong_op_is_never_timed(
    wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mlpdown.ops.run

    def spoilt(
        hidden_states: Any, attn_output: Any, mlp_intermediate: Any, weight: Any, bias: Any, **keywords: Any
    ) -> torch.Tensor:
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
    assert "ms per output token" not in captured.out
    assert "transformers: patched logits are" in captured.err and "from float64, must be at most" in captured.err


def test_arguments_that_do_not_go_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command("--model", str(tmp_path), "--size", "tiny") == 2
    assert "--model and --size exclude each other" in capsys.readouterr().err
    assert run_command("--backend", "cuda") == 2
    assert "backend 'cuda' cannot run here: there is none of that name" in capsys.readouterr().err
    for words in (["--modes", "quick"], ["--tokens", "0"], ["--repeats", "-1"]):
        with pytest.raises(SystemExit):
            run_command(*words)


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    results = tmp_path / "e2e.json"
    assert run_command("--modes", "loop", "--tokens", "4,8", "--seconds", "0", "--json", str(results)) == 0
    content = json.loads(results.read_text())
    assert content["rows"] == []
    assert len(content["not_run"]) == 1 and content["not_run"][0].startswith("loop, 4 to 8 tokens: ")


@torch.no_grad()
def test_hand_written_loop_is_gpt_neox() -> None:
    model, loop = make(torch.float32)
    tokens = torch.randint(TINY.vocabulary, (20,))
    expected = model(tokens[None], use_cache=False).logits[0]
    prefill = loop.forward(tokens[:12], 0, torch_mlp_down)
    steps = [loop.forward(tokens[index : index + 1], index, torch_mlp_down) for index in range(12, 20)]
    torch.testing.assert_close(torch.cat((prefill, *steps)), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="position must be 0 where several tokens come at once, got 3 with 2 tokens"):
        loop.forward(tokens[:2], 3, torch_mlp_down)


def test_every_decoder_decodes_the_same_tokens_again_after_rewind() -> None:
    model, loop = make(torch.float16)
    settings = {"backend": "torch"}
    decoders = [
        EagerDecoder(model, PROMPT, not_patched),
        EagerDecoder(model, PROMPT, patcher(model, settings)),
        StaticDecoder(model, PROMPT, not_patched, 32, compile=False, graph=False),
        StaticDecoder(model, PROMPT, patcher(model, settings), 32, compile=False, graph=False),
        LoopDecoder(loop, PROMPT, torch_mlp_down),
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
            with decoder.patch():
                for _ in range(11):
                    decoder.step()
            assert decoder.tokens() == expected
    assert mlpdown.unpatch(model) == 0


class Recited:
    """A decoder that says what it was told to."""

    patch = staticmethod(not_patched)

    def __init__(self, tokens: list[int]) -> None:
        self.said = tokens

    def rewind(self) -> None: ...

    def step(self) -> None: ...

    def tokens(self) -> list[int]:
        return self.said


def test_difference_in_tokens_needs_a_reason() -> None:
    model, _ = make(torch.float16)
    decoder = EagerDecoder(model, PROMPT, not_patched)
    decoder.rewind()
    for _ in range(5):
        decoder.step()
    own = decoder.tokens()
    continuation = torch.tensor(own)
    oracle = Oracle(model, PROMPT, continuation)
    logits = forced_logits(model, PROMPT, continuation)
    oracle.check_logits("own", logits, logits)
    assert oracle.check_tokens("alike", Recited(own), Recited(list(own)), 6).first_difference is None

    far = int(oracle.exact[2].argmin())
    with pytest.raises(CheckError, match="differ from token 3 of 6, .* rounding does not explain that"):
        oracle.check_tokens("far", Recited(own), Recited([*own[:3], far, 0, 0]), 6)
    with pytest.raises(CheckError, match="the first greedy token is"):
        oracle.check_tokens("first", Recited(own), Recited([own[0] + 1, *own[1:]]), 6)
    oracle.largest_error = 100.0  # of a model that errs more than any two logits are apart
    check = oracle.check_tokens("near", Recited(own), Recited([*own[:3], far, 0, 0]), 6)
    assert check.first_difference == 3 and check.margin is not None and 0 < check.margin < 200
    assert "differ from token 3 of 6" in str(check)


def test_not_finite_logits_are_no_logits() -> None:
    model, _ = make(torch.float16)
    continuation = torch.tensor([1, 2])
    oracle = Oracle(model, PROMPT, continuation)
    logits = forced_logits(model, PROMPT, continuation)
    spoilt = logits.clone()
    spoilt[1, 3] = torch.nan
    with pytest.raises(CheckError, match="patched logits are nan"):
        oracle.check_logits("spoilt", logits, spoilt)
