"""What a patch must leave as it was: one test for each thing."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mlpdown

from .conftest import NUM_LAYERS, greedy, layers_of, make_model, step

TOKENS = torch.tensor([[5, 9, 2, 7]])


def down_projection(layer: Any) -> nn.Linear:
    return layer.mlp.dense_4h_to_h if hasattr(layer.mlp, "dense_4h_to_h") else layer.mlp.down_proj


def test_state_dict(model: Any) -> None:
    before = model.state_dict(keep_vars=True)
    with mlpdown.patch(model):
        during = model.state_dict(keep_vars=True)
        assert list(during) == list(before)
        assert all(during[key] is before[key] for key in before)
        model.load_state_dict(model.state_dict())


def test_repr_and_layer_class_names(model: Any) -> None:
    before = repr(model), [type(layer).__name__ for layer in layers_of(model)]
    with mlpdown.patch(model):
        assert (repr(model), [type(layer).__name__ for layer in layers_of(model)]) == before


def test_pickling(model: Any, calls: Any) -> None:
    mlpdown.patch(model, backend="torch")
    expected = step(model)
    calls.take()
    copies = [pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    for loaded in copies:
        assert torch.equal(step(loaded), expected)
        assert calls.take() == NUM_LAYERS
        assert mlpdown.unpatch(loaded) == NUM_LAYERS
        assert torch.equal(step(loaded), expected)
        assert calls.take() == 0


def test_deepcopy(model: Any, calls: Any) -> None:
    handle = mlpdown.patch(model)
    twin = copy.deepcopy(model)
    handle.unpatch()
    step(twin)
    assert calls.take() == NUM_LAYERS, "the copy of a patched model is patched, and stays so"
    step(model)
    assert calls.take() == 0
    assert down_projection(layers_of(twin)[0]).weight is not down_projection(layers_of(model)[0]).weight


def test_save_pretrained_and_from_pretrained(model: Any, tmp_path: Path) -> None:
    expected = step(model)
    with mlpdown.patch(model):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float16).eval()
    assert torch.equal(step(loaded), expected)
    with mlpdown.patch(loaded, backend="torch"):
        assert torch.equal(step(loaded), expected)


def test_hooks_on_layers_and_on_what_the_op_leaves_alone(model: Any, calls: Any) -> None:
    heard: list[str] = []
    for number, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(lambda module, inputs, number=number: heard.append(f"before {number}"))
        layer.register_forward_hook(lambda module, inputs, output, number=number: heard.append(f"after {number}"))
        layer.mlp.register_full_backward_hook(lambda module, *gradients: None)
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(layer, name).register_forward_hook(lambda module, inputs, output, name=name: heard.append(name))
    step(model)
    expected = list(heard)
    heard.clear()
    with mlpdown.patch(model):
        step(model)
    assert heard == expected
    assert calls.take() == NUM_LAYERS


def test_hook_that_changes_a_layers_output(model: Any) -> None:
    def scale(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    layers_of(model)[0].register_forward_hook(scale)
    expected = step(model)
    with mlpdown.patch(model, backend="torch"):
        assert torch.equal(step(model), expected)


@pytest.mark.parametrize("where", ["mlp", "linear"])
def test_hook_added_later_on_what_the_op_steps_over(model: Any, where: str, calls: Any) -> None:
    expected = step(model)
    mlpdown.patch(model)
    heard: list[nn.Module] = []
    layer = layers_of(model)[1]
    module = layer.mlp if where == "mlp" else down_projection(layer)
    hook = module.register_forward_hook(lambda module, inputs, output: heard.append(module))
    assert torch.equal(step(model), expected)
    assert heard == [module]
    assert calls.take() == NUM_LAYERS - 1
    hook.remove()
    step(model)
    assert calls.take() == NUM_LAYERS


def test_hooks_for_all_modules(model: Any, calls: Any) -> None:
    def names_heard() -> list[str]:
        heard: list[str] = []
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: heard.append(type(module).__name__)
        )
        step(model)
        hook.remove()
        return heard

    expected = names_heard()
    with mlpdown.patch(model):
        assert names_heard() == expected
        assert calls.take() == 0


def test_hidden_states_and_attentions(family: str, calls: Any) -> None:
    model = make_model(family, attn_implementation="eager")
    expected = model(TOKENS[:, :1], output_hidden_states=True, output_attentions=True, use_cache=False)
    with mlpdown.patch(model, backend="torch"), torch.no_grad():
        actual = model(TOKENS[:, :1], output_hidden_states=True, output_attentions=True, use_cache=False)
        assert calls.take() == NUM_LAYERS
    assert len(actual.hidden_states) == len(expected.hidden_states) == NUM_LAYERS + 1
    assert len(actual.attentions) == len(expected.attentions) == NUM_LAYERS
    for one, other in zip(
        (*actual.hidden_states, *actual.attentions), (*expected.hidden_states, *expected.attentions), strict=True
    ):
        assert torch.equal(one, other)


def loss_and_gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(TOKENS[:, :1], labels=TOKENS[:, :1], use_cache=False).logits.float().square().mean()
    loss.backward()
    return [loss, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_training_and_gradient_checkpointing(model: Any, training: bool, checkpointing: bool, calls: Any) -> None:
    model.train(training)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = loss_and_gradients(model)
    with mlpdown.patch(model):
        actual = loss_and_gradients(model)
    assert len(actual) == len(expected) > 10
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert calls.take() == 0


def test_checkpointing_still_computes_each_layer_twice(model: Any) -> None:
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    counts: list[nn.Module] = []
    for layer in layers_of(model):
        layer.post_attention_layernorm.register_forward_hook(lambda module, inputs, output: counts.append(module))
    with mlpdown.patch(model):
        loss_and_gradients(model)
    assert len(counts) == 2 * NUM_LAYERS


def test_gradient_that_only_the_input_needs(model: Any, calls: Any) -> None:
    model.requires_grad_(False)
    embeddings = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).half()

    def gradient() -> torch.Tensor:
        leaf = embeddings.clone().requires_grad_()
        model(inputs_embeds=leaf, use_cache=False).logits.float().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = gradient()
    with mlpdown.patch(model):
        assert torch.equal(gradient(), expected)
        assert calls.take() == 0


def test_train_mode_without_gradients_keeps_its_dropout(calls: Any) -> None:
    model = make_model("gpt_neox_parallel", hidden_dropout=0.5)
    with mlpdown.patch(model):
        model.train()
        step(model)
        assert calls.take() == 0
        model.eval()
        layers_of(model)[0].post_mlp_dropout.train()  # Monte Carlo dropout
        step(model)
        assert calls.take() == NUM_LAYERS - 1


def test_change_of_dtype_and_autocast(model: Any, calls: Any) -> None:
    mlpdown.patch(model)
    step(model.float())
    assert calls.take() == 0
    step(model.bfloat16())
    assert calls.take() == NUM_LAYERS
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model)
    assert calls.take() == 0


def test_modules_replaced_while_patched(model: Any, calls: Any) -> None:
    mlpdown.patch(model)
    layer = layers_of(model)[0]
    linear = down_projection(layer)

    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    doubled = Doubled(
        linear.in_features, linear.out_features, linear.bias is not None, dtype=linear.weight.dtype
    ).eval()
    doubled.load_state_dict(linear.state_dict())
    setattr(layer.mlp, "dense_4h_to_h" if hasattr(layer.mlp, "dense_4h_to_h") else "down_proj", doubled)
    with_patch = step(model)
    assert calls.take() == NUM_LAYERS - 1
    mlpdown.unpatch(model)
    assert torch.equal(with_patch, step(model))


def test_inference_mode_and_left_padding(model: Any, calls: Any) -> None:
    padded = torch.tensor([[0, 0, 5, 9], [3, 4, 5, 6]])
    attention_mask = (padded != 0).long()
    attention_mask[1] = 1
    keywords: dict[str, Any] = dict(
        attention_mask=attention_mask[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    expected = model.generate(padded[:1], **keywords)
    with mlpdown.patch(model, backend="torch"), torch.inference_mode():
        assert torch.equal(model.generate(padded[:1], **keywords), expected)
        assert calls.take() == 3 * NUM_LAYERS


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_either_cache(model: Any, prompt: torch.Tensor, cache: str, calls: Any) -> None:
    expected = greedy(model, prompt, cache_implementation=cache, disable_compile=True)
    with mlpdown.patch(model, backend="torch"):
        assert torch.equal(greedy(model, prompt, cache_implementation=cache, disable_compile=True), expected)
        assert calls.take() == 7 * NUM_LAYERS
