"""Other modes of torch: what differentiates, traces or overrides is never taken for plain data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import mlpdown

NAMES = ("hidden_states", "attn_output", "mlp_intermediate", "weight", "bias")
BACKENDS = ("auto", "torch", "numba")


def good(num_tokens: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((num_tokens, 24), (num_tokens, 24), (num_tokens, 64), (24, 64), (24,))
    return {name: torch.randn(shape, generator=generator).half() for name, shape in zip(NAMES, shapes, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_tangents_are_carried_or_refused(name: str) -> None:
    """Under no_grad too, which does not turn forward-mode AD off."""
    with torch.no_grad(), forward_ad.dual_level():
        arguments = good()
        arguments[name] = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        for backend in ("auto", "torch"):
            tangent = forward_ad.unpack_dual(mlpdown.run(**arguments, backend=backend)).tangent
            assert tangent is not None and bool((tangent != 0).any()), backend
        for backend in ("numba", "native"):
            with pytest.raises(ValueError, match=rf"^backend '{backend}' has no derivative, and an argument has a tangent"):
                mlpdown.run(**arguments, backend=backend)


def test_calls_without_tangents_are_fine_within_a_dual_level() -> None:
    with forward_ad.dual_level():
        assert mlpdown.run(**good(), backend="numba").shape == (1, 24)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_out_of_fake_tensors(backend: str) -> None:
    """Fake tensors have no memory that they could share."""
    with FakeTensorMode() as mode:
        arguments = {name: mode.from_tensor(tensor) for name, tensor in good().items()}
        out = torch.empty_like(arguments["hidden_states"])
        assert mlpdown.run(**arguments, out=out, backend=backend) is out
        with pytest.raises(ValueError, match=r"^out must not share memory with an input, but it does with hidden_states$"):
            mlpdown.run(**arguments, out=arguments["hidden_states"], backend=backend)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_meta_tensors_give_a_meta_result(backend: str) -> None:
    arguments = {name: tensor.to("meta") for name, tensor in good(3).items()}
    result = mlpdown.run(**arguments, backend=backend)
    assert (result.device.type, result.shape, result.dtype) == ("meta", (3, 24), torch.float16)


def test_numba_refuses_meta_tensors() -> None:
    arguments = {name: tensor.to("meta") for name, tensor in good().items()}
    words = r"^every tensor must be on a CPU or a CUDA device for backend 'numba', got meta$"
    with pytest.raises(ValueError, match=words):
        mlpdown.run(**arguments, backend="numba")
    with pytest.raises(ValueError, match=words):
        mlpdown.partial_sums(arguments["mlp_intermediate"], arguments["weight"], backend="numba")


class Doubled(torch.nn.Parameter):
    """A parameter whose value is twice its data, as a quantised one is its data times a scale."""

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        if function is torch.nn.functional.linear:
            arguments = tuple(a.data.as_subclass(torch.Tensor) * 2 if isinstance(a, cls) else a for a in arguments)
        return super().__torch_function__(function, kinds, arguments, keywords or {})


def test_a_parameter_with_functions_of_its_own_is_not_read_as_plain_data() -> None:
    arguments = good()
    plain = {**arguments, "weight": arguments["weight"] * 2}
    arguments["weight"] = Doubled(arguments["weight"], requires_grad=False)
    with torch.no_grad():
        assert torch.equal(mlpdown.run(**arguments).as_subclass(torch.Tensor), mlpdown.run(**plain, backend="torch"))
        with pytest.raises(TypeError, match=r"^every tensor must be a plain one for backend 'numba', got Doubled"):
            mlpdown.run(**arguments, backend="numba")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_with_dynamic_shapes_and_the_weight_as_an_input(backend: str) -> None:
    torch._dynamo.reset()

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return mlpdown.run(*tensors, backend=backend)

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
        for hidden_dim, intermediate_dim, num_tokens in ((24, 64, 1), (40, 128, 3), (56, 72, 2)):
            generator = torch.Generator().manual_seed(hidden_dim)
            shapes = ((num_tokens, hidden_dim), (num_tokens, hidden_dim), (num_tokens, intermediate_dim))
            tensors = [torch.randn(shape, generator=generator).half() for shape in (*shapes, (hidden_dim, intermediate_dim), (hidden_dim,))]
            assert torch.equal(compiled(*tensors), function(*tensors))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_neither_dtype_nor_bits(backend: str, autocast_dtype: torch.dtype) -> None:
    arguments = good(3)
    product = arguments["mlp_intermediate"], arguments["weight"]

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return mlpdown.run(**arguments, backend=backend), mlpdown.partial_sums(*product, backend=backend)

    right = both()
    assert [tensor.dtype for tensor in right] == [torch.float16, torch.float32]
    with torch.autocast("cpu", dtype=autocast_dtype):
        for got, expected in zip(both(), right, strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)
        if backend != "numba":
            torch._dynamo.reset()
            compiled = torch.compile(both, backend="eager", fullgraph=True)()
            assert [tensor.dtype for tensor in compiled] == [torch.float16, torch.float32]
