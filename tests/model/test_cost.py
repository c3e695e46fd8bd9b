"""What a patched layer costs the host, counted in calls: never more than stock where the op runs, next to nothing where it does not."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

import mlpdown
import mlpdown.ops
from mlpdown.patching import layer as layer_module

from .conftest import NUM_LAYERS, layers_of, make_model, step


def calls_of(function: Callable[[], Any]) -> Counter[str]:
    """Every call of a Python function and of a C function, by name."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            counted[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            counted[f"C {getattr(argument, '__qualname__', argument)}"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    del counted["C setprofile"]
    return counted


def layer_call(model: Any, num_sequences: int) -> Callable[[], Any]:
    """A call of the first layer as the model makes it."""
    recorded: list[Any] = []
    layer = layers_of(model)[0]
    hook = layer.register_forward_pre_hook(
        lambda module, positional, keywords: recorded.append((positional, keywords)), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.full((num_sequences, 1), 3), use_cache=False)
    hook.remove()
    positional, keywords = recorded[0]

    def call() -> Any:
        with torch.no_grad():
            return layer(*positional, **keywords)

    return call


def test_patched_call_runs_less_than_a_stock_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    call = layer_call(model, 1)
    call()
    stock = calls_of(call)
    # The op itself is not what is counted here.
    monkeypatch.setattr(mlpdown.ops, "run", lambda hidden_states, *_, **__: hidden_states)
    mlpdown.patch(model, backend="torch")
    call()
    patched = calls_of(call)
    more, less = patched - stock, stock - patched
    assert more.total() < less.total(), f"more: {more}, less: {less}"


@pytest.mark.parametrize("why", ["sequences", "train mode", "hook"])
def test_call_that_falls_through_costs_a_few_calls(why: str, family: str) -> None:
    model = make_model(family)
    if why == "hook":
        layers_of(model)[0].mlp.register_forward_hook(lambda *_: None)
    call = layer_call(model, 4 if why == "sequences" else 1)
    if why == "train mode":
        layers_of(model)[0].training = True
    call()
    stock = calls_of(call)
    if why == "hook":
        layers_of(model)[0].mlp._forward_hooks.clear()
    mlpdown.patch(model, backend="torch")
    if why == "hook":
        layers_of(model)[0].mlp.register_forward_hook(lambda *_: None)
    call()
    patched = calls_of(call)
    assert not stock - patched, "the model's own code runs, all of it"
    more = patched - stock
    assert more.total() <= (20 if why == "hook" else 9), more
    assert all(
        name.startswith("C ") or "torch/" in name or layer_module.__file__ in name or "module.py" in name
        for name in more
    )


def test_counts_of_a_handle(family: str) -> None:
    model = make_model(family)
    handle = mlpdown.patch(model, backend="torch")
    assert handle.calls == {}
    for _ in range(3):
        step(model)
    with torch.no_grad():
        model(torch.tensor([[3, 4]]), use_cache=False)
    model(torch.tensor([[3]]), use_cache=False)
    with mlpdown.patch(model, backend="numba") as inner:
        step(model)
    assert inner.calls == {"numba": NUM_LAYERS}
    assert handle.calls == {
        "torch": 3 * NUM_LAYERS,
        "there is more than one token": NUM_LAYERS,
        "grad mode is on": NUM_LAYERS,
    }


@torch.no_grad()
def test_graphs_are_not_counted() -> None:
    torch._dynamo.reset()
    model = make_model("llama")
    handle = mlpdown.patch(model, backend="torch")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(3):
        compiled(torch.tensor([[3]]), use_cache=False)
    assert handle.calls == {}


def test_the_log_names_each_reason_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "_said", set())
    model = make_model("llama")
    with caplog.at_level(logging.INFO, logger="mlpdown"):
        mlpdown.patch(model, backend="torch")
        assert caplog.messages == ["2 of 2 layers patched\n  one token takes backend 'torch'"]
        caplog.clear()
        for _ in range(2):
            with torch.no_grad():
                model(torch.tensor([[3, 4]]), use_cache=False)
            model(torch.tensor([[3]]), use_cache=False)
            step(model.train())
            step(model.eval().float())
            model.half()
    assert caplog.messages == [
        f"a patched layer runs the model's own code: {reason}"
        for reason in (
            "there is more than one token",
            "grad mode is on",
            "the layer is in train mode",
            "mlp.down_proj.weight is torch.float32; the op takes torch.float16 and torch.bfloat16",
        )
    ]
