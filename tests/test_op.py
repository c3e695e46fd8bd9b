"""The native op as torch sees it: schema, fakes, torch's own checks, and what it answers without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mlpdown
from mlpdown import native_backend
from mlpdown.header import plan_members
from mlpdown.plan import H200, Device, Plan

TENSORS = "Tensor hidden_states, Tensor? attn_output, Tensor mlp_intermediate, Tensor weight, Tensor? bias"
PLAN = native_backend.pack_plan(Plan(1, 1, 4, 4, 8))
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    native_backend.load()


def arguments(
    device: str, dtype: torch.dtype = torch.float16, *, optional: bool = True
) -> tuple[torch.Tensor | None, ...]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return (
        empty(1, 96),
        empty(1, 96) if optional else None,
        empty(1, 512),
        empty(96, 512),
        empty(96) if optional else None,
    )


def test_schemas() -> None:
    assert str(torch.ops.mlpdown.run.default._schema) == f"mlpdown::run({TENSORS}, int plan) -> Tensor"
    assert str(torch.ops.mlpdown.run.out._schema) == f"mlpdown::run.out({TENSORS}, int plan, *, Tensor(a!) out) -> ()"
    assert (
        str(torch.ops.mlpdown.row_sums.default._schema)
        == "mlpdown::row_sums(Tensor mlp_intermediate, Tensor weight, int plan) -> Tensor"
    )


def test_packed_plan_unpacks_to_itself_in_the_layout_of_the_header() -> None:
    """Member by member, in the header's order; every value that a plan may have fits its bits."""
    activation = Plan(1, 1, 5, 2, 8, activation_in_registers=True, stagger_rows=63)
    largest = Plan(8, 4, 16, 16, 16, True, True, 2, vectors_in_flight=7, activation_in_registers=True, stagger_rows=63)
    for plan in (Plan(4, 1, 4, 3, 8), activation, largest, Plan.in_registers(2, weight_prefetch=True)):
        packed, values = native_backend.pack_plan(plan), {}
        for name, bits in plan_members().items():
            packed, values[name] = divmod(packed, 1 << bits)
        assert (values, packed) == (dataclasses.asdict(plan), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("optional", [True, False])
def test_opcheck_on_meta_tensors(dtype: torch.dtype, optional: bool) -> None:
    tensors = arguments("meta", dtype, optional=optional)
    checked = torch.library.opcheck(torch.ops.mlpdown.run.default, (*tensors, PLAN), test_utils=CHECKS)
    assert checked == dict.fromkeys(CHECKS, "SUCCESS")
    product = (tensors[2], tensors[3], PLAN)
    checked = torch.library.opcheck(torch.ops.mlpdown.row_sums.default, product, test_utils=CHECKS)
    assert checked == dict.fromkeys(CHECKS, "SUCCESS")


def test_opcheck_of_the_overload_that_writes_into_out() -> None:
    tensors = arguments("meta")
    out = torch.empty(1, 96, dtype=torch.float16, device="meta")
    checks = ("test_schema", "test_faketensor")
    checked = torch.library.opcheck(torch.ops.mlpdown.run.out, (*tensors, PLAN), {"out": out}, test_utils=checks)
    assert checked == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96)])
def test_fake_results_are_like_real_ones(shape: tuple[int, ...]) -> None:
    with FakeTensorMode():
        _, _, mlp_intermediate, weight, _ = arguments("cuda")
        hidden_states = torch.empty(shape, dtype=torch.float16, device="cuda")
        result = torch.ops.mlpdown.run(hidden_states, None, mlp_intermediate, weight, None, PLAN)
        assert (result.shape, result.dtype, result.device) == (
            hidden_states.shape,
            hidden_states.dtype,
            hidden_states.device,
        )
        sums = torch.ops.mlpdown.row_sums(mlp_intermediate, weight, PLAN)
        assert (sums.shape, sums.dtype, sums.device) == ((96,), torch.float32, hidden_states.device)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_eager_call_is_one_op_to_the_modes_of_torch(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    """What torch runs under a mode (fake tensors, tracing) without compiling goes past torch.compile's own way through Python."""
    monkeypatch.setattr(native_backend, "device_properties", lambda device_index: H200)
    native_backend._packed_plan.cache_clear()
    try:
        with FakeTensorMode():
            shapes = ((num_tokens, 96), (num_tokens, 96), (num_tokens, 512), (96, 512), (96,))
            tensors = [torch.empty(shape, dtype=torch.float16, device="cuda") for shape in shapes]
            result = mlpdown.run(*tensors, backend="native")
            out = torch.empty_like(result)
            assert mlpdown.run(*tensors, backend="native", out=out) is out
            traced = make_fx(functools.partial(mlpdown.run, backend="native"))(*tensors)
    finally:
        native_backend._packed_plan.cache_clear()
    assert (result.shape, result.dtype, result.device.type) == ((num_tokens, 96), torch.float16, "cuda")
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.mlpdown.run.default]


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("backend", ["native", "auto"])
def test_compiled_call_is_one_op(monkeypatch: pytest.MonkeyPatch, backend: str, loaded: bool) -> None:
    """Nothing that loads the library or asks the device is traced: fake CUDA tensors show it without a GPU."""
    native_backend.load()
    run = native_backend._run
    if not loaded:
        monkeypatch.setattr(native_backend, "_run", None)

    def load_without_refusal(device_index: int) -> None:
        native_backend._run = run

    monkeypatch.setattr(native_backend, "device_properties", lambda device_index: H200)
    monkeypatch.setattr(native_backend, "_cached_refusal_of_device", load_without_refusal)
    native_backend._packed_plan.cache_clear()
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            tensors = [
                torch.empty(shape, dtype=torch.float16, device="cuda")
                for shape in ((1, 96), (1, 96), (1, 512), (96, 512), (96,))
            ]
            compiled = torch.compile(functools.partial(mlpdown.run, backend=backend), fullgraph=True, backend=keep)
            assert compiled(*tensors).shape == (1, 96)
    finally:
        native_backend._packed_plan.cache_clear()
        torch._dynamo.reset()
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [torch.ops.mlpdown.run.default]


def test_auto_sums_by_torch_what_native_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is not contiguous; by name, the same refusal is raised."""
    monkeypatch.setattr(native_backend, "device_properties", lambda device_index: H200)
    monkeypatch.setattr(native_backend, "_cached_refusal_of_device", lambda device_index: None)
    with FakeTensorMode(), torch.no_grad():
        activation = torch.empty(1, 512, dtype=torch.float16, device="cuda")
        weight = torch.empty(512, 96, dtype=torch.float16, device="cuda").t()
        with pytest.raises(ValueError, match=r"^weight must be contiguous for backend 'native'"):
            mlpdown.partial_sums(activation, weight, backend="native")
        sums = mlpdown.partial_sums(activation, weight)
    assert (sums.shape, sums.dtype, sums.device.type) == ((1, 96), torch.float32, "cuda")


def test_op_on_cpu_tensors_says_that_it_needs_cuda() -> None:
    tensors = arguments("cpu")
    with pytest.raises(RuntimeError, match="weight must be on a CUDA device"):
        torch.ops.mlpdown.run(*tensors, PLAN)
    with pytest.raises(RuntimeError, match="weight must be on a CUDA device"):
        torch.ops.mlpdown.run.out(*tensors, PLAN, out=torch.empty(1, 96, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="weight must be on a CUDA device"):
        torch.ops.mlpdown.row_sums(tensors[2], tensors[3], PLAN)


PYTHIA_NAMES = ("hidden_states", "attn_output", "mlp_intermediate", "mlp_down_weight", "mlp_down_bias")


def pythia_tensors(leading: tuple[int, ...], intermediate_leading: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(*leading, 2560), (*leading, 2560), (*intermediate_leading, 10240), (2560, 10240), (2560,)]
    return [torch.randn(shape, generator=generator).to(torch.float16) for shape in shapes]


@pytest.mark.parametrize("leading", [(), (1,), (1, 1)])
@pytest.mark.parametrize("intermediate_leading", [(), (1,), (1, 1)])
def test_published_call_is_the_op_at_its_size(leading: tuple[int, ...], intermediate_leading: tuple[int, ...]) -> None:
    """ClusterFusion documents ``mlp_intermediate`` as [10240], and its tests pass residuals of [1, 1, 2560]."""
    tensors = pythia_tensors(leading, intermediate_leading)
    result = mlpdown.pythia_2b8_mlp_only(*tensors)
    assert result.shape == (*leading, 2560)
    assert torch.equal(result, mlpdown.run(*tensors))


@pytest.mark.parametrize("position", range(5))
def test_published_call_names_what_is_wrong(position: int) -> None:
    tensors, name = pythia_tensors((1,), ()), PYTHIA_NAMES[position]
    size = (2560, 2560, 10240, 10240, 2560)[position]
    for wrong in (torch.zeros(3), torch.zeros(2, size), torch.zeros(()), torch.zeros(0, size)):
        arguments: list[object] = [*tensors[:position], wrong.half(), *tensors[position + 1 :]]
        with pytest.raises(ValueError, match=rf"^{name} must be .*\[.*\], got \[.*\]$"):
            mlpdown.pythia_2b8_mlp_only(*arguments)  # type: ignore[arg-type]
    arguments = [*tensors[:position], [1.0], *tensors[position + 1 :]]
    with pytest.raises(TypeError, match=rf"^{name} must be a torch.Tensor, got list$"):
        mlpdown.pythia_2b8_mlp_only(*arguments)  # type: ignore[arg-type]


def test_published_call_knows_a_transposed_weight() -> None:
    tensors = pythia_tensors((1,), ())
    words = r"^mlp_down_weight must be \[2560, 10240\], got \[10240, 2560\] \(it looks transposed\)$"
    with pytest.raises(ValueError, match=words):
        mlpdown.pythia_2b8_mlp_only(*tensors[:3], tensors[3].t().contiguous(), tensors[4])


def test_backends_say_why_they_cannot_run() -> None:
    states = mlpdown.backends()
    assert list(states) == ["native", "numba", "torch"]
    assert states["numba"].available and states["torch"].available
    if not torch.cuda.is_available():
        assert not states["native"].available
        assert states["native"].reason.startswith("backend 'native' needs a")


def test_what_is_asked_of_the_device_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the library takes locks and starts compilers: torch.compile must take the answer, not look how it comes about."""
    lock = threading.Lock()

    @functools.cache
    def refusal_under_a_lock(device_index: int) -> Exception | None:
        with lock:
            return None

    @functools.cache
    def properties_under_a_lock(device_index: int) -> Device:
        with lock:
            return H200

    monkeypatch.setattr(native_backend, "_cached_refusal_of_device", refusal_under_a_lock)
    monkeypatch.setattr(native_backend, "device_properties", properties_under_a_lock)
    plan = Plan(1, 2, 4, 2, 8)

    def function(values: torch.Tensor) -> torch.Tensor:
        packed = native_backend.packed_plan((8, 2048), 0, plan, True)
        return values * packed if native_backend._refusal_of_device(0) is None else values

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    packed = native_backend.pack_plan(dataclasses.replace(plan, weight_prefetch=True))
    assert torch.equal(compiled(torch.ones(3, dtype=torch.int64)), torch.full((3,), packed))


def test_auto_says_once_why_native_was_passed_over(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The function mlpdown.backends hides the module of that name.
    monkeypatch.setattr(importlib.import_module("mlpdown.backends"), "_said", set())
    tensors = [torch.randn(1, 8, dtype=torch.float16) for _ in range(3)]
    weight = torch.randn(8, 8, dtype=torch.float16)
    with caplog.at_level(logging.INFO, logger="mlpdown"):
        for _ in range(3):
            mlpdown.run(*tensors, weight)
    assert ["needs CUDA tensors" in record.message for record in caplog.records] == [True]


def test_nothing_is_built_for_a_call_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> None:
        raise AssertionError("the library was loaded")

    monkeypatch.setattr(native_backend, "_run", None)
    monkeypatch.setattr(native_backend, "load", build)
    tensors = [torch.randn(1, 8, dtype=torch.float16) for _ in range(3)]
    with pytest.raises(ValueError, match="^weight must be on a CUDA device"):
        mlpdown.run(*tensors, torch.randn(8, 8, dtype=torch.float16), backend="native")


@pytest.mark.parametrize("backend", ["auto", "native", "numba", "torch"])
def test_plan_of_another_type(backend: str) -> None:
    tensors = [torch.randn(1, 8, dtype=torch.float16) for _ in range(3)]
    with pytest.raises(TypeError, match=r"^plan must be a mlpdown\.Plan or None, got dict$"):
        mlpdown.run(*tensors, torch.randn(8, 8, dtype=torch.float16), backend=backend, plan={})  # type: ignore[arg-type]
