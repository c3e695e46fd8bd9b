"""Bad input: a typed error that names the argument, what it must be, and what came. Those that take a GPU to provoke: tests/gpu/."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mlpdown
from mlpdown import native_backend
from mlpdown.plan import Device

HIDDEN_DIM, INTERMEDIATE_DIM = 24, 64
NAMES = ("hidden_states", "attn_output", "mlp_intermediate", "weight", "bias")


def good(device: str = "cpu", num_tokens: int = 1) -> dict[str, Any]:
    shapes = {
        "hidden_states": (num_tokens, HIDDEN_DIM),
        "attn_output": (num_tokens, HIDDEN_DIM),
        "mlp_intermediate": (num_tokens, INTERMEDIATE_DIM),
        "weight": (HIDDEN_DIM, INTERMEDIATE_DIM),
        "bias": (HIDDEN_DIM,),
    }
    return {name: torch.ones(shape, dtype=torch.float16, device=device) for name, shape in shapes.items()}


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=torch.float16, device="cuda")


def half(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float16)


# What is wrong, the error's type, and its words.
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "weight of rank 1": (
        {"weight": half(64)},
        ValueError,
        r"^weight must be a matrix \[hidden_dim, intermediate_dim\], got \[64\]$",
    ),
    "weight of rank 3": ({"weight": half(1, 24, 64)}, ValueError, r"^weight must be a matrix .*, got \[1, 24, 64\]$"),
    "weight transposed": (
        {"weight": half(64, 24)},
        ValueError,
        r"^weight must be \[hidden_dim, .*, 64, got \[64, 24\] \(transposed, or another tensor for mlp_intermediate\?\)$",
    ),
    "weight too long": (
        {"weight": half(24, 72)},
        ValueError,
        r"^mlp_intermediate must be \[\.\.\., intermediate_dim\] = \[\.\.\., 72\] .*got \[1, 64\]$",
    ),
    "intermediate_dim not a multiple of 8": (
        {"weight": half(24, 60), "mlp_intermediate": half(1, 60)},
        ValueError,
        r"^weight must be .* positive multiple of 8, got \[24, 60\]$",
    ),
    "empty weight": ({"weight": half(0, 64)}, ValueError, r"hidden_dim >= 1 .*, got \[0, 64\]$"),
    "empty reduction axis": (
        {"weight": half(24, 0), "mlp_intermediate": half(1, 0)},
        ValueError,
        r"positive multiple of 8, got \[24, 0\]$",
    ),
    "scalar mlp_intermediate": (
        {"mlp_intermediate": half()},
        ValueError,
        r"^mlp_intermediate must be \[\.\.\., intermediate_dim\] .*, got \[\]$",
    ),
    "scalar hidden_states": (
        {"hidden_states": half()},
        ValueError,
        r"^hidden_states must be \[\.\.\., hidden_dim\] = \[\.\.\., 24\] .*, got \[\]$",
    ),
    "hidden_states of another size": (
        {"hidden_states": half(1, 32)},
        ValueError,
        r"^hidden_states must be .* = \[\.\.\., 24\] .*, got \[1, 32\]$",
    ),
    "other number of tokens": (
        {"hidden_states": half(2, 24)},
        ValueError,
        r"^hidden_states must have as many tokens as mlp_intermediate \[1, 64\], that is 1, got \[2, 24\]$",
    ),
    "attn_output of another shape": (
        {"attn_output": half(24)},
        ValueError,
        r"^attn_output must have the shape of hidden_states, \[1, 24\], got \[24\]$",
    ),
    "bias of another size": ({"bias": half(64)}, ValueError, r"^bias must be \[hidden_dim\] = \[24\], got \[64\]$"),
    "bias of rank 2": ({"bias": half(1, 24)}, ValueError, r"^bias must be \[hidden_dim\] = \[24\], got \[1, 24\]$"),
    "float32 weight": (
        {"weight": half(24, 64).float()},
        TypeError,
        r"^weight must be float16 or bfloat16, got torch\.float32$",
    ),
    "int8 weight": (
        {"weight": half(24, 64).char()},
        TypeError,
        r"^weight must be float16 or bfloat16, got torch\.int8$",
    ),
    "weight that is no tensor": ({"weight": [[1.0]]}, TypeError, r"^weight must be a torch\.Tensor, got list$"),
    "hidden_states missing": (
        {"hidden_states": None},
        TypeError,
        r"^hidden_states must be a torch\.Tensor, got NoneType$",
    ),
    "bias that is a number": ({"bias": 0.0}, TypeError, r"^bias must be a torch\.Tensor, got float$"),
    "out of another shape": (
        {"out": half(24)},
        ValueError,
        r"^out must have the shape of hidden_states, \[1, 24\], got \[24\]$",
    ),
    "out of another dtype": (
        {"out": half(1, 24).float()},
        TypeError,
        r"^out must have the dtype of weight, torch\.float16, got torch\.float32$",
    ),
    "out not contiguous": (
        {"hidden_states": half(2, 24), "attn_output": None, "mlp_intermediate": half(2, 64), "out": half(24, 2).t()},
        ValueError,
        r"^out must be contiguous, got strides \[1, 2\]$",
    ),
    "out that is no tensor": ({"out": "result"}, TypeError, r"^out must be a torch\.Tensor, got str$"),
    "other device": (
        {"bias": half(24).to("meta")},
        ValueError,
        r"^bias must be on the device of weight, cpu, got meta$",
    ),
    "weight on another device": (
        {"weight": half(24, 64).to("meta")},
        ValueError,
        r"must be on the device of weight, meta, got cpu$",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "numba", "native"])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_argument_is_named(what: str, backend: str) -> None:
    change, error, words = WRONG[what]
    with pytest.raises(error, match=words):
        mlpdown.run(**{**good(), **change}, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "torch", "numba"])
def test_right_arguments_run(backend: str) -> None:
    assert torch.equal(mlpdown.run(**good(), backend=backend), torch.full((1, HIDDEN_DIM), 67.0, dtype=torch.float16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_mixed_dtypes(name: str, dtype: torch.dtype) -> None:
    arguments = good()
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(TypeError, match=r"must (have the dtype of weight|be float16 or bfloat16)"):
        mlpdown.run(**arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["auto", "torch", "numba", "native"])
def test_out_that_shares_memory_with_an_input(name: str, backend: str) -> None:
    arguments = good()
    arguments["weight"] = half(INTERMEDIATE_DIM, INTERMEDIATE_DIM)
    arguments["hidden_states"], arguments["attn_output"] = half(1, INTERMEDIATE_DIM), half(1, INTERMEDIATE_DIM)
    arguments["bias"] = half(INTERMEDIATE_DIM)
    out = arguments[name].view(-1)[:INTERMEDIATE_DIM].view(1, INTERMEDIATE_DIM)
    with pytest.raises(ValueError, match=rf"^out must not share memory with an input, but it does with {name}$"):
        mlpdown.run(**arguments, out=out, backend=backend)


def test_out_that_overlaps_by_one_element() -> None:
    arguments = good()
    memory = half(2 * HIDDEN_DIM - 1)
    arguments["hidden_states"] = memory[:HIDDEN_DIM].view(1, HIDDEN_DIM)
    with pytest.raises(ValueError, match="hidden_states"):
        mlpdown.run(**arguments, out=memory[HIDDEN_DIM - 1 :].view(1, HIDDEN_DIM))


def test_out_beside_an_input_is_fine() -> None:
    arguments = good()
    memory = half(2 * HIDDEN_DIM)
    arguments["hidden_states"], out = memory.view(2, 1, HIDDEN_DIM)
    assert mlpdown.run(**arguments, out=out, backend="numba") is out
    assert torch.equal(out, torch.full_like(out, 67.0))


@pytest.mark.parametrize("call", [mlpdown.run, mlpdown.partial_sums])
@pytest.mark.parametrize("name", ["cuda", "NATIVE", "", None, 3])
def test_unknown_backend_names_the_known(call: Callable[..., torch.Tensor], name: object) -> None:
    arguments = good()
    if call is mlpdown.partial_sums:
        arguments = {key: arguments[key] for key in ("mlp_intermediate", "weight")}
    with pytest.raises(
        ValueError, match=rf"^backend must be one of \['auto', 'native', 'numba', 'torch'\], got {name!r}$"
    ):
        call(**arguments, backend=name)


CPU_TENSORS = "^weight must be on a CUDA device for backend 'native', got cpu" + (
    rf"; torch {re.escape(torch.__version__)} is built without CUDA$" if torch.version.cuda is None else "$"
)


def test_native_on_cpu_tensors() -> None:
    with pytest.raises(ValueError, match=CPU_TENSORS):
        mlpdown.run(**good(), backend="native")
    with pytest.raises(ValueError, match=CPU_TENSORS):
        mlpdown.partial_sums(good()["mlp_intermediate"], good()["weight"], backend="native")


@pytest.mark.parametrize("name", NAMES)
def test_grad_mode_is_refused_where_there_is_no_derivative(name: str) -> None:
    arguments = good()
    arguments[name].requires_grad_()
    with pytest.raises(
        ValueError, match=r"^backend 'numba' has no derivative, and an argument has requires_grad=True.*torch\.no_grad"
    ):
        mlpdown.run(**arguments, backend="numba")


def test_parameters_are_fine_without_grad_mode() -> None:
    arguments = {name: torch.nn.Parameter(tensor) for name, tensor in good().items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert mlpdown.run(**arguments, backend="numba")[0, 0] == 67.0


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_torch_has_the_derivative(backend: str) -> None:
    arguments = good()
    arguments["weight"].requires_grad_()
    mlpdown.run(**arguments, backend=backend).float().sum().backward()
    assert torch.equal(arguments["weight"].grad, torch.ones_like(arguments["weight"]))


@pytest.mark.parametrize("backend", ["auto", "torch", "numba"])
def test_no_tokens_give_an_empty_result(backend: str) -> None:
    result = mlpdown.run(**good(num_tokens=0), backend=backend)
    assert result.shape == (0, HIDDEN_DIM)
    assert mlpdown.partial_sums(half(0, 64), half(24, 64), backend=backend).shape == (0, HIDDEN_DIM)


@pytest.mark.parametrize("backend", ["auto", "torch", "numba"])
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (2, 3)])
def test_leading_dimensions_are_tokens(backend: str, leading: tuple[int, ...]) -> None:
    result = mlpdown.run(half(*leading, 24), None, half(*leading, 64), half(24, 64), backend=backend)
    assert torch.equal(result, torch.full((*leading, 24), 65.0, dtype=torch.float16))
    assert mlpdown.partial_sums(half(*leading, 64), half(24, 64), backend=backend).shape == (*leading, 24)


@pytest.mark.parametrize("backend", ["auto", "torch", "numba"])
def test_strided_inputs_are_taken_where_they_can_be(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(24, 128, generator=generator).half()
    arguments = {
        **good(num_tokens=2),
        "weight": wide[:, ::2],
        "hidden_states": torch.randn(24, 2, generator=generator).half().t(),
    }
    expected = mlpdown.run(**{name: tensor.contiguous() for name, tensor in arguments.items()}, backend=backend)
    assert torch.equal(mlpdown.run(**arguments, backend=backend), expected)


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    """CUDA tensors without a GPU: what the native backend refuses before it looks at memory."""
    with FakeTensorMode():
        yield


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda: torch.ones(INTERMEDIATE_DIM, HIDDEN_DIM, dtype=torch.float16, device="cuda").t()),
        ("weight", lambda: strided((HIDDEN_DIM, INTERMEDIATE_DIM), (2 * INTERMEDIATE_DIM, 2))),
        ("mlp_intermediate", lambda: strided((1, INTERMEDIATE_DIM), (2 * INTERMEDIATE_DIM, 2))),
        ("hidden_states", lambda: strided((1, HIDDEN_DIM), (1, 3))),
        ("attn_output", lambda: strided((1, HIDDEN_DIM), (1, 3))),
        ("bias", lambda: strided((HIDDEN_DIM,), (2,))),
    ],
)
def test_native_takes_contiguous_memory_only(name: str, change: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name} must be contiguous for backend 'native', got strides \[\d+(, \d+)?\]$"
    ):
        mlpdown.run(**{**good("cuda"), name: change()}, backend="native")


@pytest.mark.usefixtures("fake_cuda")
def test_native_takes_one_token() -> None:
    words = r"^mlp_intermediate must be one token for backend 'native', got 2 tokens: \[2, 64\]$"
    with pytest.raises(ValueError, match=words):
        mlpdown.run(**good("cuda", num_tokens=2), backend="native")
    arguments = good("cuda", num_tokens=2)
    with pytest.raises(ValueError, match=words):
        mlpdown.partial_sums(arguments["mlp_intermediate"], arguments["weight"], backend="native")


@pytest.mark.usefixtures("fake_cuda")
def test_cpu_tensor_among_cuda_tensors() -> None:
    for name in NAMES:
        arguments = good("cuda")
        arguments[name] = arguments[name].to("cpu")
        with pytest.raises(ValueError, match=r"must be on the device of weight, (cpu, got cuda:0|cuda:0, got cpu)$"):
            mlpdown.run(**arguments, backend="native")


@pytest.mark.parametrize(("capability", "said"), [((7, 5), "7.5"), ((6, 1), "6.1")])
def test_gpu_too_old(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], said: str) -> None:
    monkeypatch.setattr(
        native_backend, "device_properties", lambda device_index: Device("Old GPU", capability, 100, 100_000)
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refusal = native_backend.refusal_here(0)
    assert isinstance(refusal, RuntimeError)
    assert str(refusal) == f"backend 'native' needs a GPU of compute capability 8.0 or newer, Old GPU has {said}"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert mlpdown.backends()["native"] == mlpdown.BackendStatus(False, str(refusal))


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA GPU, torch finds none" in str(native_backend.refusal_here())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "needs a torch built with CUDA, this one is" in str(native_backend.refusal_here())
