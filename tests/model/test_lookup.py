"""What takes the place of a module, of a call or of code in Python's own lookup takes it in a patched layer too."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

import mlpdown
from mlpdown.patching import handle as handle_module
from mlpdown.patching.code import UnknownCode, unwrap
from mlpdown.patching.forms import LAYERS, MLPS, recognise
from mlpdown.patching.layer import PatchedLayer

from .conftest import NUM_LAYERS, layers_of, make_model, step


def scaled(module: Any) -> Any:
    def call(*positional: Any, **keywords: Any) -> Any:
        out = module(*positional, **keywords)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    return call


def check_that_stock_runs(model: Any, calls: Any, num_patched: int = 0) -> None:
    actual = step(model)
    assert calls.take() == num_patched
    mlpdown.unpatch(model)
    assert torch.equal(actual, step(model))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "path",
    [
        "mlp",
        "self_attn",
        "input_layernorm",
        "post_attention_layernorm",
        "mlp.act_fn",
        "mlp.gate_proj",
        "mlp.down_proj",
        "mlp.down_proj.weight",
    ],
)
def test_entry_of_the_instance_that_hides_a_part_counts(path: str, when: str, calls: Any) -> None:
    model = make_model("llama")
    if when == "after":
        mlpdown.patch(model, backend="torch")
    owner_path, _, name = path.rpartition(".")
    owner = layers_of(model)[0].get_submodule(owner_path)
    owner.__dict__[name] = owner.weight.data * 2 if name == "weight" else scaled(owner._modules[name])
    if when == "before":
        assert list(mlpdown.patch(model, backend="torch").report.skipped) == ["model.layers.0"]
    check_that_stock_runs(model, calls, NUM_LAYERS - 1)


@pytest.mark.parametrize("how", ["property", "__getattr__", "_call_impl"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_subclass_of_the_mlp_that_looks_up_or_calls_in_another_way_counts(how: str, when: str, calls: Any) -> None:
    own = modeling_llama.LlamaMLP
    content: dict[str, dict[str, Any]] = {
        "property": {"down_proj": property(lambda self: scaled(self._modules["down_proj"]))},
        "__getattr__": {"__getattr__": lambda self, name: nn.Module.__getattr__(self, name)},
        "_call_impl": {"_call_impl": lambda self, x: nn.Module._call_impl(self, x) * 2},
    }
    model = make_model("llama")
    if when == "after":
        mlpdown.patch(model, backend="torch")
    for layer in layers_of(model):
        layer.mlp.__class__ = type("Sub", (own,), content[how])
    if when == "before":
        assert mlpdown.patch(model, backend="torch").report.num_patched == 0
    check_that_stock_runs(model, calls)


def test_property_of_a_layers_class_counts(calls: Any) -> None:
    model = make_model("llama")
    for layer in layers_of(model):
        layer.__class__ = type("Sub", (type(layer),), {"mlp": property(lambda self: scaled(self._modules["mlp"]))})
    assert "attribute mlp" in str(mlpdown.patch(model, backend="torch").report)
    check_that_stock_runs(model, calls)


@pytest.mark.parametrize("name", ["input_layernorm", "attention", "post_attention_dropout", "post_mlp_dropout"])
def test_plain_callable_in_the_place_of_a_module_runs_stock(name: str, calls: Any) -> None:
    model = make_model("gpt_neox_parallel")
    mlpdown.patch(model, backend="torch")
    layer = layers_of(model)[0]
    function = scaled(layer._modules.pop(name))
    setattr(layer, name, function)
    check_that_stock_runs(model, calls, NUM_LAYERS - 1)
    assert mlpdown.patch(model).report.skipped == {"gpt_neox.layers.0": f"{name} is not a module"}


def test_deleted_mlp_raises_what_stock_raises() -> None:
    model = make_model("llama")
    mlpdown.patch(model, backend="torch")
    del layers_of(model)[0].mlp
    with pytest.raises(AttributeError, match="no attribute 'mlp'"):
        step(model)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(nn.Linear, "__call__"), (nn.Dropout, "__call__"), (nn.Module, "_call_impl"), (nn.Module, "__call__")],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_replaced_call_counts(owner: Any, name: str, when: str, monkeypatch: pytest.MonkeyPatch, calls: Any) -> None:
    model = make_model("gpt_neox_parallel")
    if when == "after":
        mlpdown.patch(model, backend="torch")
    own = getattr(owner, name)

    def call(self: Any, *positional: Any, **keywords: Any) -> Any:
        out = own(self, *positional, **keywords)
        return out * 2 if type(self) in (nn.Linear, nn.Dropout) else out

    monkeypatch.setattr(owner, name, call)
    if when == "before":
        assert mlpdown.patch(model, backend="torch").report.num_patched == 0
    check_that_stock_runs(model, calls)


@pytest.mark.parametrize("owner", [modeling_llama.LlamaMLP, modeling_llama.LlamaDecoderLayer])
def test_code_replaced_in_place_counts(owner: Any, monkeypatch: pytest.MonkeyPatch, calls: Any) -> None:
    def forward(self: Any, x: Any = None, *rest: Any, **keywords: Any) -> Any:
        return x * 2

    model = make_model("llama")
    mlpdown.patch(model, backend="torch")
    monkeypatch.setattr(unwrap(owner.forward).function, "__code__", forward.__code__)
    actual = step(model)
    assert calls.take() == 0
    mlpdown.unpatch(model)
    assert torch.equal(actual, step(model))
    assert mlpdown.patch(model, backend="torch").report.num_patched == 0


def test_interrupt_while_the_backend_is_asked_leaves_nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    model = make_model("llama")
    monkeypatch.setattr(handle_module, "_backend_of_one_token", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mlpdown.patch(model)
    assert not any(isinstance(each, PatchedLayer) for each in model.modules())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"plan": "x"}, TypeError),
        ({"plan": mlpdown.Plan}, TypeError),
        ({"weight_prefetch": "no"}, TypeError),
        ({"backend": None}, ValueError),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], error: type[Exception]) -> None:
    model, linear = make_model("llama"), nn.Linear(8, 8).half()
    for call in (
        lambda: mlpdown.patch(model, **settings),
        lambda: mlpdown.MLPDown.from_linear(linear, **settings),
        lambda: mlpdown.MLPDown(8, 8, **settings),
    ):
        with pytest.raises(error, match=f"{next(iter(settings))} must be"):
            call()
    assert mlpdown.unpatch(model) == 0


def copy_of(function: Any, defaults: Any) -> Any:
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults)


def test_defaults_that_are_not_those_in_the_source_are_not_known() -> None:
    function = unwrap(modeling_llama.LlamaDecoderLayer.forward).function
    changed = copy_of(function, (True,) * len(function.__defaults__))
    with pytest.raises(UnknownCode, match="its defaults are not those in its source"):
        recognise(type("Sub", (nn.Module,), {"forward": changed}), LAYERS)


def test_descriptor_that_says_it_equals_known_code_is_not_known() -> None:
    recognise(modeling_llama.LlamaMLP, MLPS)

    class Same:
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return hash(modeling_llama.LlamaMLP.forward)

    with pytest.raises(UnknownCode):
        recognise(type("Sub", (nn.Module,), {"forward": Same()}), MLPS)


def test_subclass_of_a_patched_layer_is_counted_as_patched(calls: Any) -> None:
    model = make_model("llama")
    mlpdown.patch(model, backend="torch")
    for layer in layers_of(model):
        layer.__class__ = type("Sub", (type(layer),), {})
    assert mlpdown.patch(model, backend="torch").report.num_patched == NUM_LAYERS
    step(model)
    assert calls.take() == NUM_LAYERS


def test_wrapper_on_a_patched_class_does_not_come_back() -> None:
    model = make_model("llama")
    with mlpdown.patch(model):
        cls = type(layers_of(model)[0])
        cls.forward = scaled(cls.forward)
    mlpdown.patch(model)
    assert type(layers_of(model)[0]) is not cls
