"""Bad input that takes a GPU to provoke. After each error the process and the CUDA context live on: a good call gives its bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from assertions import assert_same_bits, bits_of
from gpu_cases import DEVICE, gpu_case, run_guarded

import mlpdown
from mlpdown import native_backend
from mlpdown.header import plan_members
from mlpdown.plan import Plan

pytestmark = pytest.mark.gpu

HIDDEN_DIM, INTERMEDIATE_DIM = 96, 512
NAMES = ("hidden_states", "attn_output", "mlp_intermediate", "weight", "bias")


@pytest.fixture(autouse=True)
def _context_lives_on() -> Iterator[None]:
    tensors, expected = gpu_case(HIDDEN_DIM, INTERMEDIATE_DIM, "float16")
    yield
    torch.cuda.synchronize()
    assert_same_bits(bits_of(run_guarded(tensors)), expected, "float16")


def good() -> dict[str, Any]:
    tensors, _ = gpu_case(HIDDEN_DIM, INTERMEDIATE_DIM, "float16", "ordinary")
    arguments = dict(zip(NAMES, tensors, strict=True))
    return {name: tensor for name, tensor in arguments.items() if tensor is not None}


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, two bytes off."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


@pytest.mark.parametrize("name", ["weight", "mlp_intermediate"])
def test_misaligned_is_refused_by_native_and_left_to_torch_by_auto(name: str) -> None:
    arguments = good()
    arguments[name] = misaligned(arguments[name])
    message = rf"^{name} must be 16-byte aligned for backend 'native' \({name}.clone\(\) is\), got address 0x\w+2$"
    with pytest.raises(ValueError, match=message):
        mlpdown.run(**arguments, backend="native")
    assert torch.equal(mlpdown.run(**arguments), mlpdown.run(**arguments, backend="torch"))


@pytest.mark.parametrize("name", ["hidden_states", "attn_output", "bias"])
def test_residuals_need_no_alignment(name: str) -> None:
    arguments = good()
    expected = mlpdown.run(**arguments, backend="native")
    arguments[name] = misaligned(arguments[name])
    assert torch.equal(mlpdown.run(**arguments, backend="native"), expected)


@pytest.mark.parametrize("name", NAMES)
def test_not_contiguous(name: str) -> None:
    arguments = good()
    wide = torch.stack([arguments[name], arguments[name]], -1)
    arguments[name] = wide[..., 0]
    with pytest.raises(ValueError, match=rf"^{name} must be contiguous for backend 'native', got strides \["):
        mlpdown.run(**arguments, backend="native")
    assert torch.equal(mlpdown.run(**arguments), mlpdown.run(**arguments, backend="torch"))


@pytest.mark.parametrize("name", NAMES)
def test_cpu_tensor_among_cuda_tensors(name: str) -> None:
    arguments = good()
    arguments[name] = arguments[name].cpu()
    for backend in ("native", "auto"):
        with pytest.raises(ValueError, match=r"must be on the device of weight, (cpu, got cuda:0|cuda:0, got cpu)$"):
            mlpdown.run(**arguments, backend=backend)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes(name: str) -> None:
    arguments = good()
    arguments[name] = arguments[name].bfloat16()
    for backend in ("native", "auto"):
        with pytest.raises(TypeError, match=r"must have the dtype of weight, torch\.\w+, got torch\.\w+$"):
            mlpdown.run(**arguments, backend=backend)


def test_wrong_shapes() -> None:
    changes = {
        r"\(transposed, or another tensor for mlp_intermediate\?\)$": {"weight": good()["weight"].t().contiguous()},
        r"^weight must be a matrix": {"weight": good()["weight"][0].contiguous()},
        r"^bias must be \[hidden_dim\] = \[96\], got \[8\]$": {"bias": good()["bias"][:8]},
        r"^attn_output must have the shape": {"attn_output": good()["attn_output"][0]},
        r"positive multiple of 8": {
            "weight": torch.zeros(96, 508, dtype=torch.float16, device=DEVICE),
            "mlp_intermediate": torch.zeros(1, 508, dtype=torch.float16, device=DEVICE),
        },
        r"^bias must be \[hidden_dim\] = \[96\], got \[1, 96\]$": {"bias": good()["bias"][None]},
        r"^hidden_states must be .*, got \[96, 1\]$": {"hidden_states": good()["hidden_states"].view(96, 1)},
        r"^mlp_intermediate must be .*, got \[512, 1\]$": {"mlp_intermediate": good()["mlp_intermediate"].view(512, 1)},
        r"^hidden_states must be .*, got \[1, 95\]$": {
            "hidden_states": torch.zeros(1, 95, dtype=torch.float16, device=DEVICE)
        },
    }
    for words, change in changes.items():
        for backend in ("native", "auto"):
            with pytest.raises(ValueError, match=words):
                mlpdown.run(**{**good(), **change}, backend=backend)


def test_native_takes_one_token() -> None:
    arguments = good()
    for name in ("hidden_states", "attn_output", "mlp_intermediate"):
        arguments[name] = arguments[name].expand(2, -1).contiguous()
    with pytest.raises(
        ValueError, match=r"^mlp_intermediate must be one token for backend 'native', got 2 tokens: \[2, 512\]$"
    ):
        mlpdown.run(**arguments, backend="native")


@pytest.mark.parametrize("backend", ["native", "numba", "torch", "auto"])
def test_no_tokens_give_an_empty_result(backend: str) -> None:
    arguments = good()
    for name in ("hidden_states", "attn_output", "mlp_intermediate"):
        arguments[name] = arguments[name][:0]
    assert mlpdown.run(**arguments, backend=backend).shape == (0, HIDDEN_DIM)
    arguments["bias"] = arguments["bias"][:8]
    with pytest.raises(ValueError, match="^bias must be"):
        mlpdown.run(**arguments, backend=backend)


@pytest.mark.parametrize("name", NAMES)
def test_out_that_shares_memory_with_an_input(name: str) -> None:
    arguments = good()
    if arguments[name].numel() == HIDDEN_DIM:
        out = arguments[name].view(1, HIDDEN_DIM)
    else:
        out = arguments[name].view(-1)[-HIDDEN_DIM:].view(1, HIDDEN_DIM)
    for backend in ("native", "auto"):
        with pytest.raises(ValueError, match=rf"^out must not share memory with an input, but it does with {name}$"):
            mlpdown.run(**arguments, out=out, backend=backend)


def test_out_of_another_shape_or_stride() -> None:
    arguments = good()
    with pytest.raises(ValueError, match=r"^out must have the shape of hidden_states, \[1, 96\], got \[96\]$"):
        mlpdown.run(**arguments, out=torch.empty(96, dtype=torch.float16, device=DEVICE), backend="native")
    strided = torch.empty(1, 192, dtype=torch.float16, device=DEVICE)[:, ::2]
    with pytest.raises(ValueError, match=r"^out must be contiguous"):
        mlpdown.run(**arguments, out=strided, backend="native")


@pytest.mark.parametrize("name", NAMES)
def test_grad_mode(name: str) -> None:
    arguments = good()
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=r"^backend 'native' has no derivative.*torch\.no_grad"):
        mlpdown.run(**arguments, backend="native")
    assert mlpdown.run(**arguments).requires_grad  # auto takes torch, which has one
    with torch.no_grad():
        assert torch.equal(mlpdown.run(**arguments), mlpdown.run(**arguments, backend="native"))


def test_plans_that_do_not_fit_the_call() -> None:
    words = {
        Plan(4, 1, 2, 1, 1): r"^plan\.cluster_size must be at most 1",
        Plan(1, 2, 3, 2, 2): r"^plan\.num_consumer_warps must be 1",
        Plan(1, 2, 2, 2, 1, activation_in_registers=True): None,
    }
    for plan, message in words.items():
        if message is None:
            mlpdown.run(**good(), backend="native", plan=plan)
        else:
            with pytest.raises(ValueError, match=message):
                mlpdown.run(**good(), backend="native", plan=plan)
    large = torch.zeros(8, 32768, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match=r"^plan needs \d+ bytes of shared memory a block at intermediate_dim 32768"):
        mlpdown.run(
            large[:, 0].view(1, 8).contiguous(), None, large[:1], large, backend="native", plan=Plan(1, 4, 8, 8, 8)
        )


def test_op_itself_refuses_what_python_would_have() -> None:
    """torch.ops.mlpdown can be called by anybody: no bad argument may reach the kernel."""
    native_backend.load()
    arguments = good()
    ring = Plan(cluster_size=1, rows_per_stage=4, num_stages=4, stages_in_flight=2, num_consumer_warps=2)
    plan = native_backend.pack_plan(ring)
    for name, tensor in arguments.items():
        for wrong in (tensor.float(), tensor.cpu(), tensor[..., :8], torch.stack([tensor, tensor], -1)[..., 0]):
            with pytest.raises(RuntimeError, match="must"):
                torch.ops.mlpdown.run(*{**arguments, name: wrong}.values(), plan)
    shifts = dict(zip(plan_members(), itertools.accumulate(plan_members().values(), initial=0), strict=False))

    def with_member(name: str, value: int) -> int:
        mask = (1 << plan_members()[name]) - 1 << shifts[name]
        return plan & ~mask | value << shifts[name]

    assert with_member("num_stages", 4) == plan
    changes = {
        "cluster_size": 3,
        "rows_per_stage": 7,
        "num_stages": 0,
        "stages_in_flight": 5,
        "num_consumer_warps": 3,
        "rows_in_registers": 3,
    }
    for wrong_plan in (*(with_member(*change) for change in changes.items()), -1, 1 << 62):
        with pytest.raises(RuntimeError, match="plan|instantiat|compiled"):
            torch.ops.mlpdown.run(*arguments.values(), wrong_plan)
    with pytest.raises(RuntimeError, match="out must not overlap an input"):
        torch.ops.mlpdown.run.out(*arguments.values(), plan, out=arguments["hidden_states"])
