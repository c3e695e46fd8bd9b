"""``MLPDown``, the op as a module."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mlpdown

HIDDEN_DIM, INTERMEDIATE_DIM = 24, 40


def make_linear(bias: bool = True, dtype: torch.dtype = torch.float16) -> nn.Linear:
    return nn.Linear(INTERMEDIATE_DIM, HIDDEN_DIM, bias=bias, dtype=dtype)


def make_inputs(
    num_tokens: int = 1, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mlp_intermediate, hidden_states, attn_output."""
    return tuple(torch.randn(num_tokens, size, dtype=dtype) for size in (INTERMEDIATE_DIM, HIDDEN_DIM, HIDDEN_DIM))  # type: ignore[return-value]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "numba", "torch"])
@pytest.mark.parametrize("num_tokens", [1, 3])
@torch.no_grad()
def test_forward_is_run(bias: bool, dtype: torch.dtype, backend: str, num_tokens: int) -> None:
    linear = make_linear(bias, dtype)
    module = mlpdown.MLPDown.from_linear(linear, backend=backend)
    mlp_intermediate, hidden_states, attn_output = make_inputs(num_tokens, dtype)
    for attention in (attn_output, None):
        expected = mlpdown.run(hidden_states, attention, mlp_intermediate, linear.weight, linear.bias, backend=backend)
        assert torch.equal(module(mlp_intermediate, hidden_states, attention), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_the_linear(bias: bool) -> None:
    linear = make_linear(bias)
    module = mlpdown.MLPDown.from_linear(linear.eval())
    assert module.weight is linear.weight and module.bias is linear.bias
    assert list(module.state_dict()) == list(linear.state_dict())
    assert not module.training
    with torch.no_grad():
        linear.weight.zero_()
    assert module.weight.abs().sum() == 0


def test_checkpoint_of_a_linear_loads() -> None:
    linear = make_linear()
    module = mlpdown.MLPDown(INTERMEDIATE_DIM, HIDDEN_DIM, dtype=torch.float16)
    assert not torch.equal(module.weight, linear.weight)
    module.load_state_dict(linear.state_dict())
    assert torch.equal(module.weight, linear.weight)
    make_linear().load_state_dict(module.state_dict())


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_are_those_of_plain_torch(backend: str) -> None:
    linear = make_linear()
    module = mlpdown.MLPDown.from_linear(linear, backend=backend)
    inputs = make_inputs()
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    module(*leaves).float().square().sum().backward()
    actual = [leaf.grad for leaf in leaves] + [linear.weight.grad, linear.bias.grad]
    linear.zero_grad()
    twins = [tensor.clone().requires_grad_() for tensor in inputs]
    (linear(twins[0]) + twins[2] + twins[1]).float().square().sum().backward()
    expected = [twin.grad for twin in twins] + [linear.weight.grad, linear.bias.grad]
    for one, other in zip(actual, expected, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@torch.no_grad()
def test_copies_keep_everything() -> None:
    module = mlpdown.MLPDown.from_linear(make_linear(), backend="numba", weight_prefetch=True)
    inputs = make_inputs()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*inputs), module(*inputs))
        assert (twin.backend, twin.weight_prefetch, repr(twin)) == ("numba", True, repr(module))


@pytest.mark.parametrize("backend", ["auto", "numba", "torch"])
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_compiles_to_one_graph(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    module = mlpdown.MLPDown.from_linear(make_linear(), backend=backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (1, 2, 5):
        inputs = make_inputs(num_tokens)
        assert torch.equal(compiled(*inputs), module(*inputs))


def test_only_a_plain_linear_is_taken_over() -> None:
    class Quantised(nn.Linear):
        pass

    for wrong in (Quantised(8, 8), nn.Identity(), make_linear().weight):
        with pytest.raises(
            TypeError, match=r"linear must be a torch\.nn\.Linear, got .*(Quantised|Identity|Parameter)"
        ):
            mlpdown.MLPDown.from_linear(wrong)  # type: ignore[arg-type]


def with_own_forward(linear: nn.Linear) -> None:
    own = linear.forward
    linear.forward = lambda input: 2 * own(input)  # type: ignore[method-assign]


class Doubled(nn.Parameter):
    """A parameter that is not plain data."""


OBSTACLES: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "forward hook": (lambda linear: linear.register_forward_hook(lambda *_: None), "has forward hooks"),
    "forward pre-hook": (lambda linear: linear.register_forward_pre_hook(lambda *_: None), "has forward hooks"),
    "forward of its own": (with_own_forward, "has a forward of its own"),
    "compiled": (lambda linear: linear.compile(backend="eager"), "has been compiled by itself"),
    "pruned weight": (
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        "derives its weight from other parameters",
    ),
    "pruned bias": (
        lambda linear: prune.l1_unstructured(linear, "bias", 0.5),
        "derives its bias from other parameters",
    ),
    "weight norm": (nn.utils.weight_norm, "derives its weight from other parameters"),
    "spectral norm": (nn.utils.spectral_norm, "derives its weight from other parameters"),
    "other parameter": (
        lambda linear: setattr(linear, "weight", Doubled(linear.weight.data)),
        "has a weight that is a .*Doubled, not a torch.nn.Parameter",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_linear_that_computes_more_than_its_parameters_say_is_refused(obstacle: str) -> None:
    spoil, reason = OBSTACLES[obstacle]
    linear = make_linear(dtype=torch.float32)
    spoil(linear)
    with pytest.raises(ValueError, match=f"linear must compute what its parameters say, but it {reason}"):
        mlpdown.MLPDown.from_linear(linear)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_linear_is_refused(norm: Callable[[nn.Linear], nn.Module]) -> None:
    with pytest.raises(TypeError, match="linear must be a torch.nn.Linear, got .*ParametrizedLinear"):
        mlpdown.MLPDown.from_linear(norm(make_linear(dtype=torch.float32)))  # type: ignore[arg-type]


def test_pruning_that_has_been_made_permanent_is_taken_over() -> None:
    linear = make_linear()
    prune.random_unstructured(linear, "weight", 0.5)
    prune.remove(linear, "weight")
    module = mlpdown.MLPDown.from_linear(linear)
    assert module.weight is linear.weight and (module.weight == 0).any()


def test_errors_are_those_of_run() -> None:
    module: Any = mlpdown.MLPDown.from_linear(make_linear())
    mlp_intermediate, hidden_states, attn_output = make_inputs()
    with torch.no_grad(), pytest.raises(ValueError, match="attn_output must"):
        mlpdown.MLPDown.from_linear(make_linear(), backend="numba")(mlp_intermediate, hidden_states, attn_output[:, 1:])
    with torch.no_grad(), pytest.raises(ValueError, match="backend must be one of"):
        mlpdown.MLPDown.from_linear(make_linear(), backend="cuda")(mlp_intermediate, hidden_states, attn_output)
    assert "intermediate_dim=40, hidden_dim=24, bias=True" in repr(module)


def test_importing_the_package_imports_no_transformers() -> None:
    program = (
        "import sys, mlpdown; mlpdown.MLPDown; mlpdown.patch; mlpdown.unpatch; sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


class Harmless(nn.Parameter):
    """A parameter that only has another class."""


@pytest.mark.parametrize("make", [lambda weight: weight.data, lambda weight: Harmless(weight.data)])
@torch.no_grad()
def test_weight_that_is_its_data_is_taken_by_a_named_backend(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    module = mlpdown.MLPDown.from_linear(make_linear(), backend="numba")
    inputs = make_inputs()
    expected = module(*inputs)
    del module._parameters["weight"]
    module.__dict__["weight"] = make(make_linear().weight)
    assert module(*inputs).shape == expected.shape


def replace_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: own(self, input) * 2)


@pytest.mark.parametrize("how", ["backward hook", "hidden weight", "replaced forward", "hook of all modules"])
def test_from_linear_refuses_what_patch_refuses(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make_linear()
    handle: Any = None
    if how == "backward hook":
        linear.register_full_backward_hook(lambda *_: None)
    elif how == "hidden weight":
        linear.__dict__["weight"] = linear.weight.data * 2
    elif how == "replaced forward":
        replace_forward(monkeypatch)
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="linear must compute what its parameters say"):
            mlpdown.MLPDown.from_linear(linear)
    finally:
        if handle is not None:
            handle.remove()
