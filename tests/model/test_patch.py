"""What a patched model computes, which calls the op takes, and how a patch is taken back."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mlpdown
from mlpdown import reference
from mlpdown.patching import Patch, PatchReport

from .conftest import NUM_LAYERS, greedy, layers_of, make_model, step


def test_report_names_the_numbers(model: Any) -> None:
    handle = mlpdown.patch(model)
    passed_over = "native needs CUDA tensors, the weights are on cpu"
    assert str(handle) == f"2 of 2 layers patched\n  one token takes backend 'torch' ({passed_over})"
    assert handle.report == PatchReport(2, 2, backend="torch", passed_over=passed_over, skipped={})
    assert str(mlpdown.patch(model, backend="numba")) == "2 of 2 layers patched\n  one token takes backend 'numba'"


def test_op_computes_every_decoded_token_and_no_prefill(model: Any, prompt: torch.Tensor, calls: Any) -> None:
    mlpdown.patch(model)
    greedy(model, prompt, num_tokens=8)
    # The first new token comes out of the prefill.
    assert calls.take() == 7 * NUM_LAYERS
    with torch.no_grad():
        model(prompt)
        assert calls.take() == 0
        model(prompt[:, :1].repeat(2, 1))
        assert calls.take() == 0, "two sequences of one token are two tokens"


def test_torch_backend_gives_the_bits_of_the_model_itself(model: Any, prompt: torch.Tensor) -> None:
    expected = [step(model), greedy(model, prompt)]
    with mlpdown.patch(model, backend="torch"):
        actual = [step(model), greedy(model, prompt)]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_auto_runs_the_whole_generation(family: str, dtype: torch.dtype, prompt: torch.Tensor, calls: Any) -> None:
    model = make_model(family, dtype)
    expected = greedy(model, prompt)
    with mlpdown.patch(model, backend="auto"):
        assert torch.equal(greedy(model, prompt), expected)
        assert calls.take() == 7 * NUM_LAYERS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_numba_layers_end_in_the_bits_of_the_specification(family: str, dtype: torch.dtype, calls: Any) -> None:
    model = make_model(family, dtype)
    ends: list[torch.Tensor] = []
    for layer in layers_of(model):
        layer.register_forward_hook(
            lambda module, inputs, output: ends.append(output[0] if isinstance(output, tuple) else output)
        )
    mlpdown.patch(model, backend="numba")
    step(model)
    assert len(calls.arguments) == len(ends) == NUM_LAYERS
    for (arguments, _), end in zip(calls.arguments, ends, strict=True):
        hidden_states, attn_output, mlp_intermediate, weight, bias = arguments
        expected = reference.mlp_down(
            *(float32_rows(tensor) for tensor in (hidden_states, attn_output, mlp_intermediate, weight)),
            None if bias is None else float32_rows(bias)[0],
            dtype=str(dtype).removeprefix("torch."),
        )
        assert np.array_equal(end.reshape(1, -1).view(torch.int16).numpy().view(np.uint16), expected)
        assert (attn_output is None) == (family != "gpt_neox_parallel")


def float32_rows(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().float().reshape(-1, tensor.shape[-1]).numpy()


def test_numba_decodes_what_the_model_decodes_within_its_rounding(model: Any, prompt: torch.Tensor) -> None:
    """The op rounds once where the model rounds up to three times: its logits may not be farther from float64 than the model's own,
    but for the one rounding a layer that both have and that may fall otherwise."""
    exact_model = make_model_like(model)
    with torch.no_grad():
        exact = exact_model(torch.tensor([[3]]), use_cache=False).logits
        # What one half-ULP rounding of each layer's output moves the logits by, with random signs.
        generator = torch.Generator().manual_seed(0)

        def rounded_half_an_ulp_away(module: nn.Module, inputs: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            signs = torch.randint(0, 2, states.shape, generator=generator, dtype=torch.float64) * 2 - 1
            moved = states * (1 + signs * torch.finfo(torch.float16).eps / 2)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        for layer in layers_of(exact_model):
            layer.register_forward_hook(rounded_half_an_ulp_away)
        one_rounding = (exact_model(torch.tensor([[3]]), use_cache=False).logits - exact).norm()
    own_error = (step(model).double() - exact).norm()
    with mlpdown.patch(model, backend="numba"):
        error = (step(model).double() - exact).norm()
        assert greedy(model, prompt).shape == (1, 13)
    assert error <= own_error + one_rounding


def make_model_like(model: Any) -> Any:
    exact_model = type(model)(model.config).eval().double()
    exact_model.load_state_dict(model.state_dict())
    return exact_model


# How a patch is taken back


def attributes(model: nn.Module) -> dict[str, Any]:
    """Everything that a model consists of: class and every attribute of every module, and what is in every dictionary of those.

    Values are kept themselves, so that none can be freed and another one take its address; bound methods compare by what they bind.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}: class"] = type(module)
        found[f"{name}: attributes"] = list(module.__dict__)
        for key, value in module.__dict__.items():
            found[f"{name}: {key}"] = value
            if isinstance(value, dict):
                for inner_key, inner in value.items():
                    found[f"{name}: {key}[{inner_key!r}]"] = inner
                found[f"{name}: {key} has"] = list(value)
    return found


def assert_same_attributes(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        same = actual[key] is value or (isinstance(value, types.MethodType | list | int | str) and actual[key] == value)
        assert same, f"{key}: {actual[key]!r} instead of {value!r}"


def test_unpatch_is_exact_attribute_by_attribute(model: Any, prompt: torch.Tensor) -> None:
    # Recording of hidden states leaves its own traces in a model, in every version of transformers other ones.
    step(model, output_hidden_states=True)
    greedy(model, prompt, 2)
    before = attributes(model)

    handle = mlpdown.patch(model)
    during = attributes(model)
    assert {key for key in during if during[key] is not before.get(key)} >= {
        f"{name}: class" for name, module in model.named_modules() if module in list(layers_of(model))
    }
    step(model, output_hidden_states=True)
    greedy(model, prompt, 2)
    assert handle.unpatch() == NUM_LAYERS
    assert_same_attributes(attributes(model), before)

    mlpdown.patch(model)
    assert mlpdown.unpatch(model) == NUM_LAYERS
    assert_same_attributes(attributes(model), before)

    with pytest.raises(KeyError), mlpdown.patch(model):
        raise KeyError
    assert_same_attributes(attributes(model), before)
    assert mlpdown.unpatch(model) == 0


def test_recording_hidden_states_while_patched_leaves_no_patched_forward_behind(model: Any, calls: Any) -> None:
    with mlpdown.patch(model):
        step(model, output_hidden_states=True)
        assert calls.take() == NUM_LAYERS
    expected = step(make_model_twin(model))
    assert torch.equal(step(model), expected)
    step(model, output_hidden_states=True)
    assert calls.take() == 0
    mlpdown.patch(model)
    step(model)
    assert calls.take() == NUM_LAYERS, "what recording left in the instance must not hide the patch"


def make_model_twin(model: Any) -> Any:
    twin = type(model)(model.config).to(model.dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def test_patching_twice_is_patching_once(model: Any, calls: Any) -> None:
    own_classes = [type(layer) for layer in layers_of(model)]
    outer = mlpdown.patch(model)
    classes = [type(layer) for layer in layers_of(model)]
    with mlpdown.patch(model) as inner:
        assert str(inner).startswith("2 of 2 layers patched")
        assert [type(layer) for layer in layers_of(model)] == classes
        step(model)
        assert calls.take() == NUM_LAYERS
    assert [type(layer) for layer in layers_of(model)] == classes, "the outer patch still holds the layers"
    assert outer.unpatch() == NUM_LAYERS
    assert outer.unpatch() == 0
    assert [type(layer) for layer in layers_of(model)] == own_classes


def test_handles_that_nobody_keeps_do_not_pile_up(model: Any) -> None:
    for _ in range(20):
        mlpdown.patch(model, backend="torch")
        mlpdown.patch(model, backend="numba")
    kept = mlpdown.patch(model, backend="torch")
    for layer in layers_of(model):
        assert [record.settings.backend for record in layer._mlpdown] == ["numba", "torch"]
    kept.unpatch()
    assert mlpdown.unpatch(model) == NUM_LAYERS


def test_inner_settings_end_with_the_inner_handle(model: Any, calls: Any) -> None:
    with mlpdown.patch(model, backend="torch"):
        with mlpdown.patch(model, backend="numba", weight_prefetch=True):
            step(model)
            assert {(k["backend"], k["weight_prefetch"]) for _, k in calls.arguments} == {("numba", True)}
            calls.take()
        step(model)
        assert {(k["backend"], k["weight_prefetch"]) for _, k in calls.arguments} == {("torch", False)}


def test_handles_may_end_in_any_order(model: Any, calls: Any) -> None:
    own_classes = [type(layer) for layer in layers_of(model)]
    outer = mlpdown.patch(model, backend="torch")
    inner = mlpdown.patch(model, backend="numba")
    assert outer.unpatch() == 0, "the inner patch still holds the layers"
    step(model)
    assert {keywords["backend"] for _, keywords in calls.arguments} == {"numba"}
    assert inner.unpatch() == NUM_LAYERS
    assert [type(layer) for layer in layers_of(model)] == own_classes


def test_part_of_a_model_can_be_patched(model: Any, calls: Any) -> None:
    handle: Patch = mlpdown.patch(layers_of(model)[1])
    assert handle.report.num_layers == 1
    step(model)
    assert calls.take() == 1


def test_errors_name_the_argument(model: Any) -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        mlpdown.patch([model])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        mlpdown.unpatch("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', 'native', 'numba', 'torch'\], got 'cuda'"):
        mlpdown.patch(model, backend="cuda")
    with pytest.raises(ValueError, match=r"model must contain the layers of a transformer, .*got Linear without any"):
        mlpdown.patch(nn.Linear(8, 8))
    if not mlpdown.backends()["native"].available:
        with pytest.raises(RuntimeError, match="backend 'native' cannot run here: "):
            mlpdown.patch(model, backend="native")
    assert mlpdown.unpatch(model) == 0, "a patch that raises patches nothing"
