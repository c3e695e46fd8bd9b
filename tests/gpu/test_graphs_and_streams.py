"""The op as part of a program: streams, graphs, threads, torch.compile; what it allocates and what it waits for."""

from __future__ import annotations

import threading

import pytest
import torch
from assertions import assert_same_bits, bits_of
from gpu_cases import DEVICE, POISON, gpu_case, on_device, run_guarded

import mlpdown
from mlpdown import native_backend

pytestmark = pytest.mark.gpu

SLEEP_CYCLES = 20_000_000  # about 10 ms: time enough for a call that does not wait to go wrong


def test_waits_for_the_stream_that_is_current() -> None:
    tensors, expected = gpu_case(2560, 10240, "float16")
    hidden_states, attn_output, mlp_intermediate, weight, bias = tensors
    late = torch.full_like(mlp_intermediate, float("nan"))
    run_guarded(tensors)  # loads the library
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        late.copy_(mlp_intermediate)
        out = mlpdown.run(hidden_states, attn_output, late, weight, bias, backend="native")
    stream.synchronize()
    assert_same_bits(bits_of(out), expected, "float16")


def test_does_not_wait_for_the_device() -> None:
    tensors, expected = gpu_case(512, 2048, "float16")
    run_guarded(tensors)
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * SLEEP_CYCLES)
    out = mlpdown.run(*tensors, backend="native")
    assert not torch.cuda.current_stream().query(), "the call has waited for the kernel before it"
    assert_same_bits(bits_of(out), expected, "float16")


def test_allocates_the_result_and_nothing_else() -> None:
    tensors, _ = gpu_case(512, 2048, "float16")
    out = torch.empty_like(tensors[0])
    run_guarded(tensors)

    def allocations() -> int:
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    before = allocations()
    kept = [mlpdown.run(*tensors, backend="native") for _ in range(10)]
    assert allocations() - before == len(kept)
    before, free = allocations(), torch.cuda.mem_get_info()[0]
    for _ in range(10):
        mlpdown.run(*tensors, backend="native", out=out)
    assert allocations() == before
    assert torch.cuda.mem_get_info()[0] == free


@pytest.mark.parametrize("weight_prefetch", [False, True])
def test_graph_replays_with_new_inputs(weight_prefetch: bool) -> None:
    cases = [gpu_case(2560, 10240, "bfloat16", seed=seed) for seed in (0, 1, 2)]
    inputs = [torch.empty_like(tensor) for tensor in cases[0][0] if tensor is not None]
    out = torch.empty_like(cases[0][0][0])
    _fill(inputs, cases[0][0])
    mlpdown.run(*inputs, backend="native", out=out)  # as torch asks: once before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mlpdown.run(*inputs, backend="native", out=out, weight_prefetch=weight_prefetch)
    for tensors, expected in [*cases, *cases]:
        _fill(inputs, tensors)
        out.view(torch.int16).fill_(POISON)
        torch.cuda.synchronize()
        graph.replay()
        assert_same_bits(bits_of(out), expected, "bfloat16")


def test_graph_of_a_chain() -> None:
    """Each call's result is the next one's residual, as in a model: a chain of dependent launches inside a graph."""
    num_layers = 16
    layers = [gpu_case(768, 3072, "float16", "ordinary", seed=seed)[0] for seed in range(num_layers)]

    def chain(backend: str) -> torch.Tensor:
        hidden_states = layers[0][0]
        for _, attn_output, mlp_intermediate, weight, bias in layers:
            hidden_states = mlpdown.run(hidden_states, attn_output, mlp_intermediate, weight, bias, backend=backend)
        return hidden_states

    expected = bits_of(chain("numba"))
    assert_same_bits(bits_of(chain("native")), expected, "float16")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain("native")
    for _ in range(50):
        out.view(torch.int16).fill_(POISON)
        graph.replay()
        assert_same_bits(bits_of(out), expected, "float16")


def test_two_streams_at_once() -> None:
    cases = [gpu_case(2560, 10240, "float16", seed=1), gpu_case(1024, 4096, "bfloat16", seed=2)]
    expected = [on_device(bits) for _, bits in cases]
    num_wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(300):
        for stream, (tensors, _), bits, wrong in zip(streams, cases, expected, num_wrong, strict=True):
            with torch.cuda.stream(stream):
                out = mlpdown.run(*tensors, backend="native")
                wrong += (out.view(torch.int16) != bits).sum()
    torch.cuda.synchronize()
    assert [int(wrong) for wrong in num_wrong] == [0, 0]


def test_threads_with_streams_of_their_own() -> None:
    cases = [gpu_case(512 + 64 * index, 2048, "float16", seed=index) for index in range(4)]
    num_wrong = [-1] * len(cases)

    def work(index: int) -> None:
        tensors, bits = cases[index]
        with torch.cuda.stream(torch.cuda.Stream()):
            expected = on_device(bits)
            wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
            for _ in range(200):
                wrong += (mlpdown.run(*tensors, backend="native").view(torch.int16) != expected).sum()
            num_wrong[index] = int(wrong)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert num_wrong == [0] * len(cases)


@pytest.mark.parametrize(("backend", "compiler"), [("native", "inductor"), ("auto", "inductor"), ("auto", "aot_eager")])
def test_compiled_in_one_graph(backend: str, compiler: str) -> None:
    tensors, expected = gpu_case(512, 2048, "float16")
    torch._dynamo.reset()

    def function(*arguments: torch.Tensor | None) -> torch.Tensor:
        return mlpdown.run(*arguments, backend=backend) * 1  # type: ignore[arg-type]

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        assert_same_bits(bits_of(compiled(*tensors)), expected, "float16")
        assert_same_bits(bits_of(compiled(*tensors)), expected, "float16")


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(optional: bool) -> None:
    native_backend.load()
    absent = () if optional else ("attn_output", "bias")
    tensors, _ = gpu_case(96, 512, "float16", absent=absent)
    plan = native_backend.packed_plan((96, 512), torch.cuda.current_device(), None, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, arguments in [
        (torch.ops.mlpdown.run.default, (*tensors, plan)),
        (torch.ops.mlpdown.row_sums.default, (tensors[2], tensors[3], plan)),
    ]:
        assert torch.library.opcheck(op, arguments, test_utils=checks) == dict.fromkeys(checks, "SUCCESS")
    out = torch.empty_like(tensors[0])
    checked = torch.library.opcheck(
        torch.ops.mlpdown.run.out, (*tensors, plan), {"out": out}, test_utils=checks[:1]
    )
    assert checked == {"test_schema": "SUCCESS"}


def test_tensors_of_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    tensors, expected = gpu_case(512, 2048, "float16")
    elsewhere = tuple(None if tensor is None else tensor.to("cuda:1") for tensor in tensors)
    out = mlpdown.run(*elsewhere, backend="native")  # type: ignore[arg-type]
    assert (out.device.index, torch.cuda.current_device()) == (1, 0)
    assert_same_bits(bits_of(out), expected, "float16")


def _fill(inputs: list[torch.Tensor], tensors: tuple[torch.Tensor | None, ...]) -> None:
    for own, tensor in zip(inputs, tensors, strict=True):
        assert tensor is not None
        own.copy_(tensor)
