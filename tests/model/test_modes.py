"""Patched layers and ``MLPDown`` in torch's other modes: export, meta, forward-mode differentiation, torch.func, autocast, tracing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import mlpdown

from .conftest import NUM_LAYERS, layers_of, make_model, step


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("axis", ["length", "sequences"])
@torch.no_grad()
def test_export_keeps_dynamic_sizes(axis: str, strict: bool) -> None:
    model = make_model("gpt_neox_parallel")
    dim = torch.export.Dim(axis, min=2, max=32)
    tokens = {"length": torch.tensor([[3, 4, 5]]), "sequences": torch.tensor([[3], [4], [5]])}[axis]
    more = {"length": torch.tensor([[3, 4, 5, 6, 7]]), "sequences": torch.tensor([[3], [4], [5], [6], [7]])}[axis]
    expected = Logits(model)(more)
    mlpdown.patch(model, backend="numba")
    program = torch.export.export(
        Logits(model), (tokens,), dynamic_shapes={"tokens": {int(axis == "length"): dim}}, strict=strict
    )
    assert torch.equal(program.module()(more), expected)


@torch.no_grad()
def test_compiled_with_a_length_that_varies_compiles_twice(calls: Any) -> None:
    torch._dynamo.reset()
    model = make_model("llama")
    mlpdown.patch(model, backend="torch")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in range(2, 9):
        compiled(torch.full((1, length), 3), use_cache=False)
    assert counter.frame_count <= 2, "one for the first length, one for every other"


def test_compiled_model_stays_when_another_is_patched() -> None:
    torch._dynamo.reset()
    model, other = make_model("llama"), make_model("gpt_neox_parallel")
    mlpdown.patch(model, backend="torch")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    step(compiled)
    with mlpdown.patch(other, backend="torch"):
        step(other)
        step(compiled)
    assert counter.frame_count == 1


@torch.no_grad()
def test_symbolic_tracing_by_make_fx_does_not_guard_on_the_length() -> None:
    model = make_model("llama")
    mlpdown.patch(model, backend="torch")
    traced = make_fx(Logits(model), tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.tensor([[3, 4, 5]]))
    more = torch.tensor([[3, 4, 5, 6, 7]])
    assert torch.equal(traced(more), Logits(model)(more))


def call_layer(model: Any, device: str) -> torch.Tensor:
    """One token through the first layer; a whole model asks for values, which some tensors do not have."""
    states = torch.randn(1, 1, 64, device=device).half()
    cos, sin = torch.ones(2, 1, 1, 4 if model.config.model_type == "gpt_neox" else 16, device=device).half()
    return first(layers_of(model)[0](states, attention_mask=None, position_embeddings=(cos, sin)))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@torch.no_grad()
def test_meta_device(family: str, backend: str, calls: Any) -> None:
    model = make_model(family).to("meta")
    handle = mlpdown.patch(model, backend=backend)
    assert call_layer(model, "meta").shape == (1, 1, 64) and calls.take() == 1
    assert backend == "torch" or "the weights are on meta" in str(handle)


@torch.no_grad()
def test_fake_tensors(family: str, calls: Any) -> None:
    model = make_model(family)
    mlpdown.patch(model, backend="torch")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert call_layer(model, "cpu").shape == (1, 1, 64)
    assert calls.take() == 0, "a fake tensor is not plain data"


def tangent_of_logits(model: Any) -> torch.Tensor:
    embeddings = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).half()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(embeddings, torch.ones_like(embeddings))
        tangent = forward_ad.unpack_dual(model(inputs_embeds=dual, use_cache=False).logits).tangent
    assert tangent is not None
    return tangent


def test_forward_mode_differentiation_of_a_patched_model(family: str, calls: Any) -> None:
    model = make_model(family, attn_implementation="eager")
    expected = tangent_of_logits(model)
    mlpdown.patch(model, backend="numba")
    assert torch.equal(tangent_of_logits(model), expected) and calls.take() == 0


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad"])
def test_transforms_of_torch_func(transform: str, calls: Any) -> None:
    model = make_model("gpt_neox_parallel", attn_implementation="eager")
    embeddings = torch.randn(3, 1, 1, 64, generator=torch.Generator().manual_seed(1)).half()

    def logits(states: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=states, use_cache=False).logits

    def answer() -> Any:
        with torch.no_grad():
            if transform == "jvp":
                return torch.func.jvp(logits, (embeddings[0],), (torch.ones_like(embeddings[0]),))[1]
            if transform == "vmap":
                layer = layers_of(model)[0]
                position_embeddings = model.gpt_neox.rotary_emb(embeddings[0], torch.tensor([[0]]))
                return torch.vmap(lambda states: first(layer(states, position_embeddings=position_embeddings)))(
                    embeddings
                )
            return torch.func.grad(lambda states: logits(states).float().sum())(embeddings[0])

    expected = answer()
    mlpdown.patch(model, backend="torch")
    assert torch.equal(answer(), expected) and calls.take() == 0


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_autocast(family: str, calls: Any) -> None:
    model = make_model(family, torch.bfloat16)
    mlpdown.patch(model, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model)
    assert calls.take() == 0
    with torch.autocast("cpu", enabled=False):
        step(model)
    assert calls.take() == NUM_LAYERS


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_torch_jit_trace(calls: Any) -> None:
    model = make_model("gpt_neox_parallel").requires_grad_(False)
    mlpdown.patch(model, backend="numba")
    layer = layers_of(model)[0]
    states = torch.randn(1, 1, 64).half()
    cos, sin = model.gpt_neox.rotary_emb(states, torch.tensor([[0]]))
    traced = torch.jit.trace(
        lambda states: first(layer(states, attention_mask=None, position_embeddings=(cos, sin))),
        (states,),
        check_trace=False,  # which calls it once more, without tracing
    )
    assert calls.take() == 0, "what it computed once would be all that it ever computes"
    mlpdown.unpatch(model)
    other = torch.randn(1, 1, 64).half()
    assert torch.equal(traced(other), first(layer(other, attention_mask=None, position_embeddings=(cos, sin))))


def test_symbolic_tracing_of_a_patched_layer() -> None:
    layer = layers_of(make_model("llama"))[0]
    expected = str(torch.fx.symbolic_trace(layer.mlp).graph)
    mlpdown.patch(layer)
    assert str(torch.fx.symbolic_trace(layer.mlp).graph) == expected


class Loud(torch.Tensor):
    """Not plain data: it hears what is done to it."""

    heard: list[str] = []  # noqa: RUF012 - one list for all, so that every operation is heard

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


class LoudParameter(Loud, nn.Parameter):
    pass


def make_loud(linear: nn.Linear) -> None:
    linear._parameters["weight"] = torch.Tensor._make_subclass(LoudParameter, linear.weight.data, False)


@pytest.mark.parametrize("when", ["before", "after"])
def test_parameter_that_is_not_plain_data(when: str, calls: Any) -> None:
    model = make_model("llama")
    expected = step(model)
    if when == "after":
        mlpdown.patch(model, backend="torch")
    make_loud(layers_of(model)[0].mlp.down_proj)
    if when == "before":
        report = mlpdown.patch(model, backend="torch").report
        assert "LoudParameter, not a plain parameter" in report.skipped["model.layers.0"]
    Loud.heard.clear()
    assert torch.equal(step(model), expected)
    assert calls.take() == NUM_LAYERS - 1 and "linear" in Loud.heard


@torch.no_grad()
def test_hidden_states_of_a_class_of_their_own(calls: Any) -> None:
    model = make_model("llama")
    embeddings = torch.randn(1, 1, 64).half()
    expected = model(inputs_embeds=embeddings, use_cache=False).logits
    mlpdown.patch(model, backend="torch")
    Loud.heard.clear()
    actual = model(inputs_embeds=embeddings.as_subclass(Loud), use_cache=False).logits
    assert torch.equal(actual.as_subclass(torch.Tensor), expected)
    assert calls.take() == 0 and Loud.heard.count("linear") > NUM_LAYERS


# MLPDown


def inputs(dtype: torch.dtype = torch.float16, num_tokens: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda size: torch.randn(num_tokens, size, generator=generator).to(dtype)  # noqa: E731
    return draw(40), draw(24), draw(24)


def module(backend: str, dtype: torch.dtype = torch.float16) -> mlpdown.MLPDown:
    torch.manual_seed(4)
    return mlpdown.MLPDown(40, 24, dtype=dtype, backend=backend)


def plain(
    module: mlpdown.MLPDown, intermediate: torch.Tensor, hidden: torch.Tensor, attn: torch.Tensor
) -> torch.Tensor:
    return nn.functional.linear(intermediate, module.weight, module.bias) + attn + hidden


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_float32_is_pytorchs(backend: str, num_tokens: int) -> None:
    one = module(backend, torch.float32)
    assert torch.equal(one(*inputs(torch.float32, num_tokens)), plain(one, *inputs(torch.float32, num_tokens)))
    one(*inputs(torch.float32, num_tokens)).sum().backward()
    assert one.weight.grad is not None


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_float32_weights_under_autocast(backend: str) -> None:
    one = module(backend, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = one(*inputs(torch.float32)), plain(one, *inputs(torch.float32))
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    actual.sum().backward()
    assert one.weight.grad is not None and one.weight.grad.dtype == torch.float32


@torch.no_grad()
def test_a_named_backend_takes_16_bits_only_and_its_own_under_autocast() -> None:
    with pytest.raises(TypeError, match="float16 or bfloat16, got torch.float32"):
        module("numba", torch.float32)(*inputs(torch.float32))
    one = module("numba")
    expected = one(*inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(one(*inputs()), expected)


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_a_named_backend_that_has_no_derivative_raises(backend: str) -> None:
    one = module(backend)
    with pytest.raises(ValueError, match=f"backend '{backend}' has no derivative"):
        one(*inputs())
    one.requires_grad_(False)
    leaf = inputs()[0].requires_grad_()
    with pytest.raises(ValueError, match=f"backend '{backend}' has no derivative"):
        one(leaf, *inputs()[1:])


def duals() -> Iterator[torch.Tensor]:
    for tensor in inputs():
        yield forward_ad.make_dual(tensor, torch.ones_like(tensor))


@torch.no_grad()
def test_tangents_are_kept_or_refused() -> None:
    with forward_ad.dual_level():
        expected = forward_ad.unpack_dual(plain(module("torch"), *duals())).tangent
        for backend in ("auto", "torch"):
            tangent = forward_ad.unpack_dual(module(backend)(*duals())).tangent
            assert tangent is not None and torch.equal(tangent, expected)
        for backend in ("numba", "native"):
            with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot be used while forward-mode"):
                module(backend)(*duals())


@torch.no_grad()
def test_vmap_of_the_module() -> None:
    many = [torch.stack([tensor] * 4) for tensor in inputs()]
    for backend in ("auto", "torch"):
        torch.testing.assert_close(
            torch.vmap(module(backend))(*many)[0], plain(module(backend), *inputs()), rtol=2**-9, atol=2**-9
        )
    with pytest.raises(RuntimeError, match="backend 'numba' cannot be used while a torch.func transform"):
        torch.vmap(module("numba"))(*many)


def test_meta_device_of_the_module_and_initialisation_afterwards() -> None:
    one = mlpdown.MLPDown(40, 24, dtype=torch.float16, device="meta")
    meta = [tensor.to("meta") for tensor in inputs()]
    with torch.no_grad():
        assert one(*meta).shape == (1, 24)
    one.to_empty(device="cpu")
    torch.manual_seed(9)
    one.reset_parameters()
    torch.manual_seed(9)
    linear = nn.Linear(40, 24, dtype=torch.float16)
    assert torch.equal(one.weight, linear.weight) and torch.equal(one.bias, linear.bias)  # type: ignore[arg-type]


def test_the_log_says_once_why_pytorch_computes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["mlpdown.backends"], "_said", set())
    one = module("auto", torch.float32)
    with caplog.at_level(logging.INFO, logger="mlpdown"):
        for _ in range(3):
            one(*inputs(torch.float32))
    assert [record.message for record in caplog.records] == ["MLPDown is computed by PyTorch: weight is torch.float32"]
