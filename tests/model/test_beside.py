"""A patch beside what other people do to the same model at the same time: threads, wrappers, classes of their own, empty parameters."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import mlpdown
from mlpdown.patching import handle as handle_module

from .conftest import NUM_LAYERS, layers_of, make_model, step

PROMPT = torch.tensor([[3, 4, 5, 6, 7]])


@torch.no_grad()
def prefill(model: Any) -> torch.Tensor:
    return model(PROMPT, use_cache=False).logits


def test_threads_that_patch_and_call_one_model(family: str) -> None:
    model = make_model(family)
    expected = step(model)
    own_classes = [type(layer) for layer in layers_of(model)]
    failures: Counter[str] = Counter()

    def serve() -> None:
        for _ in range(40):
            try:
                with mlpdown.patch(model, backend="torch"):
                    if not torch.equal(step(model), expected):
                        failures["other logits"] += 1
            except Exception as error:  # noqa: BLE001 - whatever a thread raises is the failure
                failures[f"{type(error).__name__}: {error}"] += 1

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [type(layer) for layer in layers_of(model)] == own_classes
    assert not any("_mlpdown" in layer.__dict__ for layer in layers_of(model))


@pytest.mark.parametrize("where", ["before the op", "in the attention"])
def test_call_under_way_ends_well_when_the_patch_ends(where: str, family: str) -> None:
    model = make_model(family)
    expected = step(model)
    handle = mlpdown.patch(model, backend="torch")
    layer = layers_of(model)[0]

    def undo(*_: Any) -> None:
        handle.unpatch()

    if where == "in the attention":
        (layer.attention if hasattr(layer, "attention") else layer.self_attn).register_forward_hook(undo)
    else:
        layer.register_forward_pre_hook(undo)
    assert torch.equal(step(model), expected)
    assert handle.unpatch() == 0
    assert torch.equal(step(model), expected)


def test_one_block_ends_while_another_is_in_its_own(family: str, calls: Any) -> None:
    model = make_model(family)
    first, second = mlpdown.patch(model, backend="torch"), mlpdown.patch(model, backend="torch")
    with second:
        first.unpatch()
        step(model)
        assert calls.take() == NUM_LAYERS
    step(model)
    assert calls.take() == 0


@pytest.mark.parametrize("again", [False, True])
def test_wrapper_made_while_patched_outlives_the_patch(
    family: str, again: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(family)
    expected = step(model), prefill(model)
    heard: list[nn.Module] = []

    def wrap(layer: nn.Module) -> None:
        inner = layer.forward

        def forward(*positional: Any, **keywords: Any) -> Any:
            heard.append(layer)
            return inner(*positional, **keywords)

        layer.forward = forward  # type: ignore[method-assign]

    with caplog.at_level(logging.WARNING, logger="mlpdown"), mlpdown.patch(model, backend="torch"):
        for layer in layers_of(model):
            wrap(layer)
        assert torch.equal(step(model), expected[0])
    assert caplog.text.count("keeps the forward that it was given while patched") == NUM_LAYERS
    if again:
        report = mlpdown.patch(model, backend="torch").report
        assert report.num_patched == 0
        assert set(report.skipped.values()) == {"it has a forward of its own (offloaded, dispatched or wrapped)"}
    heard.clear()
    assert torch.equal(step(model), expected[0]) and torch.equal(prefill(model), expected[1])
    assert len(heard) == 2 * NUM_LAYERS


def test_wrapper_keeps_gradient_checkpointing(family: str) -> None:
    model = make_model(family)
    with mlpdown.patch(model):
        for layer in layers_of(model):
            inner = layer.forward
            layer.forward = lambda *positional, inner=inner, **keywords: inner(*positional, **keywords)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    computed: list[nn.Module] = []
    for layer in layers_of(model):
        layer.post_attention_layernorm.register_forward_hook(lambda module, *_: computed.append(module))
    model(PROMPT, use_cache=False).logits.float().sum().backward()
    assert len(computed) >= NUM_LAYERS
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.fixture
def process_group() -> Any:
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_fully_sharded_after_the_patch(family: str, process_group: Any, caplog: pytest.LogCaptureFixture) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = make_model(family)
    expected = step(model)
    handle = mlpdown.patch(model, backend="torch")
    layer = layers_of(model)[0]
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    sharded_class = type(layer)
    assert torch.equal(step(model), expected)
    with caplog.at_level(logging.WARNING, logger="mlpdown"):
        assert handle.unpatch() == NUM_LAYERS
    assert "layers.0 keeps its class" in caplog.text and "runs the model's own code" in caplog.text
    assert type(layer) is sharded_class and isinstance(layer, FSDPModule)
    assert torch.equal(step(model), expected)
    layer.reshard()
    assert not any("_mlpdown" in each.__dict__ for each in layers_of(model))


def test_class_that_somebody_makes_of_a_patched_one_stays_and_is_not_patched_again(family: str, calls: Any) -> None:
    model = make_model(family)
    layer = layers_of(model)[0]
    with mlpdown.patch(model, backend="torch"):
        theirs = layer.__class__ = type("Theirs", (type(layer),), {})
        step(model)
        assert calls.take() == NUM_LAYERS
    assert type(layer) is theirs
    expected = step(model)
    assert calls.take() == 0
    with mlpdown.patch(model, backend="torch") as handle:
        assert [
            reason.startswith(f"{__name__}.Theirs.forward is not known") for reason in handle.report.skipped.values()
        ] == [True]
        assert torch.equal(step(model), expected)
        assert calls.take() == NUM_LAYERS - 1


def test_subclass_of_a_known_layer_is_patched_and_gets_its_class_back(family: str, calls: Any) -> None:
    model = make_model(family)
    layer = layers_of(model)[0]
    layer.__class__ = type("Theirs", (type(layer),), {})
    theirs = type(layer)
    with mlpdown.patch(model, backend="torch") as handle:
        assert handle.report.num_patched == NUM_LAYERS
        step(model)
        assert calls.take() == NUM_LAYERS
    assert type(layer) is theirs


def test_class_changed_to_another_while_patched_is_left(family: str) -> None:
    model = make_model(family)
    layer = layers_of(model)[0]
    own = type(layer)
    handle = mlpdown.patch(model)
    layer.__class__ = own
    assert handle.unpatch() == NUM_LAYERS
    assert type(layer) is own and "_mlpdown" not in layer.__dict__


@pytest.mark.parametrize("shape", [(0,), (0, 160), (64, 0), (64, 2, 80)])
def test_parameter_that_is_no_matrix_now(shape: tuple[int, ...]) -> None:
    """ZeRO-3 and FSDP leave parameters of shape (0,) between calls."""
    model = make_model("llama")
    layers_of(model)[1].mlp.down_proj.weight.data = torch.empty(shape, dtype=torch.float16)
    report = mlpdown.patch(model).report
    assert report.skipped == {
        "model.layers.1": f"mlp.down_proj.weight is {list(shape)}; the op takes a matrix with a multiple of 8 columns"
    }


def test_patch_that_raises_patches_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [(type(layer), dict(layer.__dict__)) for layer in layers_of(model)]
    own, held = handle_module._hold, []

    def fails_at_the_last(layer: nn.Module, *rest: Any) -> None:
        own(layer, *rest)
        held.append(layer)
        if len(held) == NUM_LAYERS:
            raise KeyboardInterrupt

    monkeypatch.setattr(handle_module, "_hold", fails_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        mlpdown.patch(model)
    assert len(held) == NUM_LAYERS
    assert [(type(layer), dict(layer.__dict__)) for layer in layers_of(model)] == before


def test_copy_of_a_patched_model_is_not_the_handles(model: Any, calls: Any) -> None:
    handle = mlpdown.patch(model, backend="torch")
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    handle.unpatch()
    for twin in twins:
        step(twin)
        assert calls.take() == NUM_LAYERS
        assert [type(layer).__mro__[2] for layer in layers_of(twin)] == [type(layer) for layer in layers_of(model)]
        assert mlpdown.unpatch(twin) == NUM_LAYERS
        assert [type(layer) for layer in layers_of(twin)] == [type(layer) for layer in layers_of(model)]


def test_unpickled_where_the_code_is_not_known(monkeypatch: pytest.MonkeyPatch, calls: Any) -> None:
    model = make_model("llama")
    expected = step(model)
    mlpdown.patch(model, backend="torch")
    pickled = pickle.dumps(model)
    mlpdown.unpatch(model)
    own_class = type(layers_of(model)[0])
    own = own_class.forward
    monkeypatch.setattr(own_class, "forward", lambda self, *positional, **keywords: own(self, *positional, **keywords))
    loaded = pickle.loads(pickled)
    assert torch.equal(step(loaded), expected) and calls.take() == 0
    assert type(layers_of(loaded)[0]) is own_class
