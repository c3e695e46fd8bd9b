"""The op over two and four gloo processes, against one process and against float64."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

import mlpdown
from mlpdown.parallel import run_row_parallel

HIDDEN_DIM, INTERMEDIATE_DIM = 48, 512
UNIT_ROUNDOFF = 2.0**-24
Case = tuple[torch.dtype, bool, bool, str]


def cases(world_size: int) -> list[Case]:
    """dtype, whether there is an attn_output, whether there is a bias, backend. Each process that uses Numba compiles for seconds."""
    backends = ("auto", "torch", "numba") if world_size == 2 else ("auto", "torch")
    return [
        (dtype, residual_and_bias, residual_and_bias, backend)
        for dtype in (torch.float16, torch.bfloat16)
        for residual_and_bias in (True, False)
        for backend in backends
    ]


# Slices of unlike length, all multiples of 8, for the last case of every run.
UNEVEN = {2: (120, 392), 4: (8, 248, 136, 120)}


def make_case(dtype: torch.dtype, attn_output: bool, bias: bool) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": draw(1, HIDDEN_DIM),
        "attn_output": draw(1, HIDDEN_DIM) if attn_output else None,
        "mlp_intermediate": draw(1, INTERMEDIATE_DIM),
        "weight": draw(HIDDEN_DIM, INTERMEDIATE_DIM),
        "bias": draw(HIDDEN_DIM) if bias else None,
    }


def slices(world_size: int, even: bool = True) -> list[slice]:
    lengths = [INTERMEDIATE_DIM // world_size] * world_size if even else UNEVEN[world_size]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def run_slice(case: dict[str, Any], part: slice, group: Any, backend: str) -> torch.Tensor:
    return run_row_parallel(
        case["hidden_states"],
        case["attn_output"],
        case["mlp_intermediate"][:, part].contiguous(),
        case["weight"][:, part].contiguous(),
        case["bias"],
        group=group,
        backend=backend,
    )


def case_name(dtype: torch.dtype, attn_output: bool, bias: bool, backend: str) -> str:
    return f"{dtype}, attn_output {attn_output}, bias {bias}, {backend}"


def work(rank: int, world_size: int, port: int, folder: str) -> None:
    """One process: every case, and what each gave, into a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    group = dist.group.WORLD
    results: dict[str, Any] = {}
    with torch.no_grad():
        for dtype, attn_output, bias, backend in cases(world_size):
            case: Any = make_case(dtype, attn_output, bias)
            results[case_name(dtype, attn_output, bias, backend)] = run_slice(
                case, slices(world_size)[rank], group, backend
            )
        case = make_case(torch.float16, True, True)
        part = slices(world_size)[rank]
        shard = case["mlp_intermediate"][:, part].contiguous(), case["weight"][:, part].contiguous()
        results["uneven"] = run_slice(case, slices(world_size, even=False)[rank], group, "torch")
        spoilt = dict(case, hidden_states=case["hidden_states"].clone())
        spoilt["hidden_states"][0, 3] = torch.nan
        results["nan"] = run_slice(spoilt, part, group, "torch")

        mesh = init_device_mesh("cpu", (world_size,))
        linear = torch.nn.Linear(INTERMEDIATE_DIM, HIDDEN_DIM, dtype=torch.float16)
        linear.weight = torch.nn.Parameter(DTensor.from_local(shard[1], mesh, [Shard(1)]))
        linear.bias = torch.nn.Parameter(DTensor.from_local(case["bias"], mesh, [Replicate()]))
        module = mlpdown.MLPDown.from_linear(linear, backend="torch")
        results["module"] = module(shard[0], case["hidden_states"], case["attn_output"])
        sharded = DTensor.from_local(shard[0], mesh, [Shard(1)])
        results["module, sharded activation"] = module(sharded, case["hidden_states"], case["attn_output"])
        linear.weight = torch.nn.Parameter(DTensor.from_local(case["weight"], mesh, [Replicate()]))
        replicated = mlpdown.MLPDown.from_linear(linear)
        try:
            replicated(shard[0], case["hidden_states"], case["attn_output"])
        except ValueError as error:
            results["error"] = str(error)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank got for every case."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(request.param, port, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def exact_and_bound(case: dict[str, Any], world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 result, and how far a result with one rounding to the dtype may be from it.

    Float32 sums of n terms in any order, products exact: (n - 1) u / (1 - (n - 1) u) of the sum of magnitudes (N. Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, section 4.2). Terms: the products, one zero a slice, bias and residuals. Then half an ULP.
    """
    terms = [case["weight"].double() * case["mlp_intermediate"].double()]
    terms += [
        case[name].double().reshape(-1, 1)
        for name in ("bias", "attn_output", "hidden_states")
        if case[name] is not None
    ]
    products = torch.cat(terms, 1)
    exact = products.sum(1)
    additions = (products.shape[1] + world_size) * UNIT_ROUNDOFF
    in_float32 = additions / (1 - additions) * products.abs().sum(1)
    half_ulp = torch.finfo(case["weight"].dtype).eps / 2 * (exact.abs() + in_float32)
    return exact, in_float32 + half_ulp


def test_results_are_within_the_bound_and_near_that_of_one_process(results: list[dict[str, Any]]) -> None:
    for dtype, attn_output, bias, backend in cases(len(results)):
        name = case_name(dtype, attn_output, bias, backend)
        case: Any = make_case(dtype, attn_output, bias)
        exact, bound = exact_and_bound(case, len(results))
        single = mlpdown.run(*case.values(), backend="numba")[0].double()
        for rank, result in enumerate(each[name] for each in results):
            assert result.dtype == dtype and result.shape == (1, HIDDEN_DIM)
            assert ((result[0].double() - exact).abs() <= bound).all(), f"{name}, rank {rank}"
            assert ((result[0].double() - single).abs() <= 2 * bound).all(), f"{name}, rank {rank}"
            assert torch.equal(result.view(torch.int16), results[0][name].view(torch.int16)), (
                f"{name}: ranks must agree in every bit"
            )


def test_slices_of_unlike_length_are_within_the_bound(results: list[dict[str, Any]]) -> None:
    exact, bound = exact_and_bound(make_case(torch.float16, True, True), len(results))
    for result in results:
        assert ((result["uneven"][0].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", ["module", "module, sharded activation"])
def test_every_entrance_gives_the_same_bits(name: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        assert torch.equal(result[name], result[case_name(torch.float16, True, True, "torch")])


def test_nan_has_the_canonical_bits(results: list[dict[str, Any]]) -> None:
    for result in results:
        bits = result["nan"].view(torch.int16)[0]
        assert bits[3] == 0x7FFF
        assert not result["nan"].isnan()[0, [0, 1, 2, 4]].any()


def test_weight_that_is_not_sharded_along_the_reduction_axis(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["error"].startswith(
            "weight must be sharded along intermediate_dim over one mesh axis, (Shard(1),), got (Replicate(),)"
        )


@pytest.fixture
def alone() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_group_of_one_is_the_single_process_op(alone: Any) -> None:
    case: Any = make_case(torch.bfloat16, True, True)
    assert torch.equal(run_slice(case, slice(None), alone, "numba"), mlpdown.run(*case.values(), backend="numba"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool, alone: Any) -> None:
    torch._dynamo.reset()
    case: Any = make_case(torch.bfloat16, True, True)
    compiled = torch.compile(run_slice, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(case, slice(None), alone, "torch"), run_slice(case, slice(None), alone, "torch"))


def test_errors_name_the_argument(alone: Any) -> None:
    case: Any = make_case(torch.float16, True, True)
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup .* got NoneType"):
        run_slice(case, slice(None), None, "auto")
    with pytest.raises(ValueError, match=r"hidden_states must be \[1, 48\], got \[1, 40\]"):
        run_slice(dict(case, hidden_states=case["hidden_states"][:, :40]), slice(None), alone, "auto")
    with pytest.raises(ValueError, match=r"attn_output must be \[1, 48\], got \[48\]"):
        run_slice(dict(case, attn_output=case["attn_output"][0]), slice(None), alone, "auto")
    with pytest.raises(TypeError, match=r"bias must have the dtype of weight_shard, torch.float16, got torch.float32"):
        run_slice(dict(case, bias=case["bias"].float()), slice(None), alone, "auto")


@pytest.mark.parametrize("name", ["hidden_states", "attn_output", "mlp_intermediate", "weight", "bias"])
def test_gradients_are_refused_not_lost(alone: Any, name: str) -> None:
    case: Any = make_case(torch.float16, True, True)
    case[name].requires_grad_()
    with pytest.raises(ValueError, match=r"^run_row_parallel has no derivative.*torch\.no_grad\(\)"):
        run_slice(case, slice(None), alone, "torch")
    with torch.no_grad():
        assert run_slice(case, slice(None), alone, "torch").shape == (1, HIDDEN_DIM)
