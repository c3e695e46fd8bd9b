"""Patched models on a GPU: the native op within eager code, CUDA graphs and compiled code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mlpdown
from mlpdown import gpt_neox as models
from mlpdown.bench import e2e
from mlpdown.bench.e2e_check import Oracle
from mlpdown.bench.e2e_decode import Decoder, EagerDecoder, StaticDecoder, forced_logits, has_inductor_pdl

from .conftest import NUM_LAYERS, greedy, make_model, step

pytestmark = pytest.mark.gpu

NATIVE: dict[str, Any] = {"backend": "native"}


def decode(decoder: Decoder, num_tokens: int = 12) -> list[int]:
    decoder.rewind()
    for _ in range(num_tokens - 1):
        decoder.step()
    return decoder.tokens()


@pytest.fixture
def gpt_neox() -> Any:
    return models.random_model((256, 3, 4, 512), torch.float16, torch.device("cuda"), seed=3)


@pytest.fixture
def cuda_prompt() -> torch.Tensor:
    return torch.tensor([[7, 30, 2, 91, 4]], device="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_native_layers_give_the_bits_of_the_specification(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype).cuda()
    token = torch.tensor([[3]], device="cuda")
    logits = {}
    for backend in ("native", "numba"):
        with mlpdown.patch(model, backend=backend):
            logits[backend] = model(token, use_cache=False).logits
    assert torch.equal(logits["native"].view(torch.int16), logits["numba"].view(torch.int16))


def test_auto_takes_native_for_every_decoded_token(family: str, calls: Any) -> None:
    model = make_model(family).cuda()
    prompt = torch.tensor([[5, 6, 7]], device="cuda")
    expected = greedy(model, prompt)
    with mlpdown.patch(model, weight_prefetch=True) as handle:
        assert greedy(model, prompt).shape == expected.shape
        assert calls.take() == 7 * NUM_LAYERS
    assert (handle.report.backend, handle.report.passed_over) == ("native", None)
    assert handle.calls == {"auto": 7 * NUM_LAYERS, "there is more than one token": NUM_LAYERS}


@pytest.mark.parametrize("weight_prefetch", [False, True])
def test_cuda_graph_decodes_what_eager_code_decodes(
    gpt_neox: Any, cuda_prompt: torch.Tensor, weight_prefetch: bool
) -> None:
    mlpdown.patch(gpt_neox, **NATIVE, weight_prefetch=weight_prefetch)
    static = decode(StaticDecoder(gpt_neox, cuda_prompt, 32, compile=False, graph=False))
    captured = StaticDecoder(gpt_neox, cuda_prompt, 32, compile=False, graph=True)
    assert decode(captured) == static
    assert decode(captured) == static, "a graph replays as often as one likes"


def test_compiled_model_with_the_native_op_in_a_cuda_graph(gpt_neox: Any, cuda_prompt: torch.Tensor) -> None:
    torch._dynamo.reset()
    stock = models.twin(gpt_neox)
    eager = EagerDecoder(stock, cuda_prompt)
    continuation = torch.tensor(decode(eager), device="cuda")
    oracle = Oracle(stock, cuda_prompt, continuation)
    mlpdown.patch(gpt_neox, **NATIVE)
    oracle.check_logits("eager", *(forced_logits(model, cuda_prompt, continuation) for model in (stock, gpt_neox)))
    compiled = StaticDecoder(gpt_neox, cuda_prompt, 32, compile=True, graph=True)
    assert compiled.calls_of_op() == {e2e.NATIVE_OP: 3}
    assert oracle.check_tokens("compiled", eager, compiled, 12)["num_alike"] > 0  # or CheckError


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_torch_compile_without_graph_breaks(mode: str) -> None:
    torch._dynamo.reset()
    model = make_model("gpt_neox_parallel").cuda()
    token = torch.tensor([[3]], device="cuda")
    with mlpdown.patch(model, **NATIVE):
        expected = model(token, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(4):
            actual = compiled(token, use_cache=False).logits.clone()
        # Inductor keeps float32 between fused operations where eager code rounds.
        torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-5)


def test_generate_with_static_cache_compiles_itself(gpt_neox: Any, cuda_prompt: torch.Tensor) -> None:
    torch._dynamo.reset()
    keywords: dict[str, Any] = dict(cache_implementation="static", eos_token_id=None, pad_token_id=0)
    with mlpdown.patch(gpt_neox, **NATIVE):
        assert greedy(gpt_neox, cuda_prompt, 12, **keywords).shape == (1, 17)


def test_training_and_prefill_do_not_touch_the_op(family: str, calls: Any) -> None:
    model = make_model(family).cuda()
    with mlpdown.patch(model, **NATIVE):
        model.train()
        model(torch.tensor([[3]], device="cuda"), use_cache=False).logits.float().sum().backward()
        model.eval()
        with torch.no_grad():
            model(torch.tensor([[3, 4]], device="cuda"), use_cache=False)
        assert calls.take() == 0


def test_model_moved_to_the_cpu_while_patched_with_auto(family: str) -> None:
    model = make_model(family)
    expected = step(model)
    mlpdown.patch(model.cuda())
    assert torch.equal(step(model.cpu()), expected)


def test_e2e_command_in_every_mode(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    e2e.add_arguments(parser)
    results = tmp_path / "e2e.json"
    words = ["--size", "70m", "--tokens", "16,64", "--pairs", "8", "--weight-prefetch", "--json", str(results)]
    assert e2e.main(parser.parse_args(words)) == 0
    content = json.loads(results.read_text())
    modes = set(e2e.MODES) - (set() if has_inductor_pdl() else {"compile-pdl"})
    assert {row["mode"] for row in content["rows"]} == modes
    assert len(content["not_run"]) == len(e2e.MODES) - len(modes) and content["failed"] == []
    num_layers = models.SIZES["70m"][1]
    assert [calls["patched"] for calls in content["calls_of_op"].values()] == [{e2e.NATIVE_OP: num_layers}] * len(modes)
