"""Layers that a patch must not touch, and the reason that it gives."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import mlpdown

from .conftest import NUM_LAYERS, layers_of, make_model, step


class QuantisedLinear(nn.Linear):
    """Stands for any linear of another class: of bitsandbytes, GPTQ, PEFT, FP8."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.clamp(-1, 1))


def quantise(layer: Any) -> None:
    linear = layer.mlp.dense_4h_to_h
    quantised = QuantisedLinear(linear.in_features, linear.out_features, dtype=linear.weight.dtype).eval()
    quantised.load_state_dict(linear.state_dict())
    layer.mlp.dense_4h_to_h = quantised


class Adapted(nn.Module):
    """What PEFT puts around a linear."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.base_layer(hidden_states) * 1.5


def adapt(layer: Any) -> None:
    layer.mlp.dense_4h_to_h = Adapted(layer.mlp.dense_4h_to_h).eval()


def adapt_whole_mlp(layer: Any) -> None:
    layer.mlp = Adapted(layer.mlp).eval()


def offload(module: nn.Module) -> None:
    """What accelerate does to a module that it dispatches: the class' forward moves aside, a wrapper takes its place."""
    module._old_forward = module.forward  # type: ignore[assignment]

    def new_forward(module: Any, *positional: Any, **keywords: Any) -> Any:
        return module._old_forward(*positional, **keywords)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)  # type: ignore[assignment,arg-type]


def parametrise(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer.mlp.dense_4h_to_h)


def subclass(layer: Any) -> None:
    own = type(layer)

    def forward(self: Any, hidden_states: torch.Tensor, **keywords: Any) -> Any:
        return own.forward(self, hidden_states * 2, **keywords)

    layer.__class__ = type("ScaledLayer", (own,), {"forward": forward})


CASES: dict[str, tuple[Any, str]] = {
    "quantised": (
        quantise,
        r"mlp.dense_4h_to_h is a .*\.QuantisedLinear, not a torch\.nn\.modules\.linear\.Linear \(quantised, adapted or",
    ),
    "adapted": (adapt, r"mlp.dense_4h_to_h is a .*\.Adapted, not a "),
    "adapted MLP": (
        adapt_whole_mlp,
        r"mlp: .*\.Adapted.forward is not known: it differs from .* in 'return self.base_layer",
    ),
    "parametrised": (parametrise, r"mlp.dense_4h_to_h is a .*ParametrizedLinear, not a "),
    "offloaded layer": (offload, r"it has a forward of its own \(offloaded, dispatched or wrapped\)"),
    "offloaded linear": (lambda layer: offload(layer.mlp.dense_4h_to_h), r"mlp.dense_4h_to_h has a forward of its own"),
    "hooked MLP": (lambda layer: layer.mlp.register_forward_hook(lambda *_: None), r"mlp has forward hooks"),
    "hooked linear": (
        lambda layer: layer.mlp.dense_4h_to_h.register_forward_pre_hook(lambda *_: None),
        r"dense_4h_to_h has forward hooks",
    ),
    "hooked dropout": (
        lambda layer: layer.post_mlp_dropout.register_forward_hook(lambda *_: None),
        r"post_mlp_dropout has forward hooks",
    ),
    "subclass": (subclass, r"ScaledLayer\.forward is not known: .*"),
    "other dtype": (
        lambda layer: layer.float(),
        r"mlp.dense_4h_to_h.weight is torch.float32; the op takes torch.float16 and torch.bfloat16",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_is_left_alone_and_the_reason_given(case: str, caplog: pytest.LogCaptureFixture) -> None:
    spoil, reason = CASES[case]
    model = make_model("gpt_neox_parallel")
    first, second = layers_of(model)
    spoil(first)
    class_before, attributes_before = type(first), dict(first.__dict__)
    with caplog.at_level(logging.WARNING, logger="mlpdown"):
        report = mlpdown.patch(model).report
    assert report.num_layers == NUM_LAYERS and report.num_patched == NUM_LAYERS - 1
    assert list(report.skipped) == ["gpt_neox.layers.0"]
    assert re.search(reason, report.skipped["gpt_neox.layers.0"]), report.skipped
    assert str(report).startswith("1 of 2 layers patched\n")
    assert f"\n  gpt_neox.layers.0 skipped: {report.skipped['gpt_neox.layers.0']}" in str(report)
    assert "1 of 2 layers are not patched: print the handle for the reasons" in caplog.text
    assert "skipped" not in caplog.text, "who prints the handle reads the reasons once"
    assert type(first) is class_before and first.__dict__ == attributes_before
    assert type(second) is not class_before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_of_another_dtype_is_left_alone(dtype: torch.dtype) -> None:
    model = make_model("llama", dtype)
    expected = step(model)
    report = mlpdown.patch(model).report
    assert report.num_patched == 0 and len(report.skipped) == NUM_LAYERS
    assert torch.equal(step(model), expected)


def test_intermediate_dim_that_the_op_does_not_take() -> None:
    report = mlpdown.patch(make_model("qwen2", intermediate_size=100)).report
    assert report.num_patched == 0
    assert set(report.skipped.values()) == {
        "mlp.down_proj.weight is [64, 100]; the op takes a matrix with a multiple of 8 columns"
    }


def test_tensor_parallel_weight() -> None:
    from torch import distributed
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = make_model("mistral")
        linear = layers_of(model)[1].mlp.down_proj
        sharded = DTensor.from_local(linear.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(1)])
        linear.weight = nn.Parameter(sharded)
        report = mlpdown.patch(model).report
    finally:
        distributed.destroy_process_group()
    assert report.skipped.keys() == {"model.layers.1"}
    assert re.search(r"mlp.down_proj has a .*DTensor, not a plain parameter", report.skipped["model.layers.1"])


def test_dispatching_a_patched_layer_and_unpatching_it(calls: Any) -> None:
    model = make_model("gpt_neox_parallel")
    expected = step(model)
    mlpdown.patch(model, backend="torch")
    offload(layers_of(model)[0])
    assert torch.equal(step(model), expected)
    assert calls.take() == NUM_LAYERS, "the wrapper calls the forward that it found, which is the patched one"
    assert mlpdown.unpatch(model) == NUM_LAYERS
    assert torch.equal(step(model), expected)
    assert calls.take() == 0


def test_layers_of_unknown_code_are_named_with_what_differs_and_the_way_on(calls: Any) -> None:
    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).half().eval()
    expected = step(model)
    report = mlpdown.patch(model).report
    assert (report.num_layers, report.num_patched, report.backend) == (2, 0, None)
    assert "GPT2Block.forward is not known: it differs from" in str(report)
    assert "transformer.h.0 to transformer.h.1 (2) skipped: " in str(report)
    assert torch.equal(step(model), expected) and calls.take() == 0


class Stage(nn.Module):
    """Somebody's part of a model: layers within a list within an item of a list."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, 8)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) + x


def test_known_layers_are_found_wherever_they_are() -> None:
    model = nn.Module()
    layers = list(layers_of(make_model("llama")))
    model.stages = nn.ModuleList([Stage(layers[:1]), Stage(layers[1:]), Unknown(), Unknown()])
    handle = mlpdown.patch(model)
    reason = f"{__name__}.Unknown.forward is not known: no code like it is known"
    assert handle.report.skipped == {"stages.2": reason, "stages.3": reason}
    assert (handle.report.num_layers, handle.report.num_patched) == (4, 2)
    assert str(handle).splitlines()[2:] == [
        f"  stages.2 to stages.3 (2) skipped: {reason}",
        "  A line in mlpdown/patching/forms.py makes code known: send the project this report, or the line.",
    ]
    assert mlpdown.unpatch(model) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_mlp_that_is_called_in_another_way(when: str, calls: Any) -> None:
    model = make_model("llama")
    if when == "after":
        mlpdown.patch(model, backend="torch")
    mlp = layers_of(model)[0].mlp
    own = type(mlp)
    mlp.__class__ = type("Doubled", (own,), {"__call__": lambda self, x: own.__call__(self, x) * 2})
    if when == "before":
        report = mlpdown.patch(model, backend="torch").report
        assert report.skipped == {"model.layers.0": "mlp is called in another way than a torch.nn.Module"}
    actual = step(model)
    assert calls.take() == NUM_LAYERS - 1
    mlpdown.unpatch(model)
    assert torch.equal(actual, step(model))


@pytest.mark.parametrize("case", CASES)
def test_what_changes_after_the_patch_is_noticed(case: str, calls: Any) -> None:
    model = make_model("gpt_neox_parallel")
    mlpdown.patch(model, backend="torch")
    if case in ("subclass", "offloaded layer"):
        pytest.skip("these are put around the patched forward, and call it")
    spoil, _ = CASES[case]
    spoil(layers_of(model)[0])
    if case == "other dtype":
        model.float()
    actual = step(model)
    assert calls.take() == (0 if case == "other dtype" else NUM_LAYERS - 1)
    mlpdown.unpatch(model)
    assert torch.equal(actual, step(model))
