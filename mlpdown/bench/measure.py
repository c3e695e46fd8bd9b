"""One shape and dtype, measured: every candidate checked, then timed in turns."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

import mlpdown

from .. import native_backend
from ..plan import Plan, choose_plan
from .chain import Captured, Chain, Layer, Oracle, calls_for, check_same_bits
from .peers import COMPILED, compile_layer, torch_layer
from .results import Result, median
from .shapes import Shape
from .timing import time_enqueueing, time_replays, time_wall
from .yardstick import CONFIGURATIONS, ReadConfiguration, read

STEADY_READ_BYTES = 4 << 30
NUM_STEADY_READS = 5
NUM_READ_TRIALS = 5
NUM_EAGER_ROUNDS = 10
NUM_CPU_BATCHES = 20
CALLS_PER_CPU_BATCH = 100
NUM_CPU_MACHINE_CALLS = 3
COMPILE_LIMIT_SECONDS = 30.0

# In the order in which they are shown.
CANDIDATES = {
    "read_only": "a kernel that only reads these bytes",
    "native_chained_prefetch": "native, dependent launch and weight prefetch",
    "native_chained": "native, dependent launch",
    "native_isolated": "native, isolated",
    "native": "native",
    "numba": "numba (the specification)",
    "torch_graph": "PyTorch in a CUDA graph",
    "torch_eager": "PyTorch, eager, wall time",
    "compile_multiply_and_sum": "torch.compile of multiply and sum, coordinate descent",
    "compile_default": "torch.compile",
    "compile_max_autotune": "torch.compile, max-autotune",
    "torch": "PyTorch",
}


@dataclasses.dataclass
class Settings:
    """What one measurement is to do."""

    num_rounds: int
    num_calls: int | None
    """Calls of a chain; None: as many as it takes to outgrow the L2 cache."""
    seed: int
    compile_deadline: float
    """``time.monotonic()`` after which nothing more is compiled by torch."""
    compile: bool
    """Whether torch.compile is measured for this shape."""
    progress: Callable[[str], None]
    """Told what is being done."""


def steady_read(device: torch.device) -> list[float]:
    """TB/s of reads of 4 GiB by the read-only kernel, in its fastest configuration."""
    data = torch.empty(STEADY_READ_BYTES // 4, dtype=torch.int32, device=device).random_()
    graphs = {
        str(index): Captured(functools.partial(_read_all, [data], configuration))
        for index, configuration in enumerate(CONFIGURATIONS)
    }
    samples = time_replays(graphs, NUM_STEADY_READS, 1)
    fastest = min(samples.values(), key=median)
    return [STEADY_READ_BYTES / microseconds / 1e6 for microseconds in fastest]


def measure(shape: Shape, dtype: torch.dtype, device: torch.device, settings: Settings) -> Result:
    """Everything about one shape and dtype.

    Raises:
        CheckError: a candidate computes something wrong; nothing was timed.
    """
    if device.type != "cuda":
        return _measure_on_cpu(shape, dtype, device, settings)
    num_calls = settings.num_calls or calls_for(shape, torch.cuda.get_device_properties(device).L2_cache_size)
    result = _result(shape, dtype, num_calls)
    settings.progress("inputs and oracle")
    chain = Chain.make(shape, dtype, device, num_calls, settings.seed)
    oracle = Oracle(chain)
    graphs: dict[str, Captured] = {}

    status = mlpdown.backends()["native"]
    if status.available:
        settings.progress("native")
        plans = native_plans(shape, device)
        result.plans = {name: dataclasses.asdict(plan) for name, plan in plans.items()}
        graphs.update(_native_graphs(chain, oracle, plans))
    else:
        result.missing["native"] = status.reason

    settings.progress("PyTorch")
    graphs["torch_graph"] = Captured(functools.partial(chain.run, torch_layer))
    graphs["torch_graph"].replay()
    oracle.check("torch_graph", graphs["torch_graph"].outs)
    for name in COMPILED:
        if not settings.compile:
            result.missing[name] = "not asked for at this shape"
            continue
        left = min(COMPILE_LIMIT_SECONDS, settings.compile_deadline - time.monotonic())
        if left < 1:
            result.missing[name] = "the time for torch.compile is spent"
            continue
        settings.progress(name)
        layer, reason = compile_layer(name, chain.run_first, left)
        if layer is None:
            result.missing[name] = reason
            continue
        graphs[name] = Captured(functools.partial(chain.run, layer))
        graphs[name].replay()
        oracle.check(name, graphs[name].outs)

    settings.progress("read-only kernel")
    graphs["read_only"] = _fastest_read(chain.weights, num_calls)
    settings.progress(f"{settings.num_rounds} rounds")
    result.timings.update(time_replays(graphs, settings.num_rounds, num_calls))
    eager = {"torch_eager": functools.partial(chain.run, torch_layer)}
    result.timings.update(time_wall(eager, NUM_EAGER_ROUNDS, num_calls, device))
    settings.progress("CPU cost")
    result.cpu_cost.update(_cpu_cost(chain, status.available, device))
    return result


def native_plans(shape: Shape, device: torch.device) -> dict[str, Plan]:
    """The plans that a caller gets: by default, with weight_prefetch, and by default but without dependent launch."""
    properties = native_backend.device_properties(device.index)
    default = choose_plan(shape.hidden_dim, shape.intermediate_dim, properties)
    return {
        "native_isolated": dataclasses.replace(default, dependent_launch=False),
        "native_chained": default,
        "native_chained_prefetch": choose_plan(shape.hidden_dim, shape.intermediate_dim, properties, weight_prefetch=True),
    }


def native_layer(plan: Plan) -> Layer:
    """The op under a plan."""
    return functools.partial(mlpdown.run, backend="native", plan=plan)


def _native_graphs(chain: Chain, oracle: Oracle, plans: dict[str, Plan]) -> dict[str, Captured]:
    graphs = {name: Captured(functools.partial(chain.run, native_layer(plan))) for name, plan in plans.items()}
    for graph in graphs.values():
        graph.replay()
    first = graphs["native_isolated"].outs
    oracle.check("native_isolated", first)
    oracle.check_bits("native_isolated", first)
    for name, graph in graphs.items():
        check_same_bits(name, graph.outs, first)
    return graphs


def _read_all(tensors: list[torch.Tensor], configuration: ReadConfiguration) -> list[torch.Tensor]:
    for tensor in tensors:
        read(tensor, configuration)
    return []


def _fastest_read(weights: list[torch.Tensor], num_calls: int) -> Captured:
    graphs = {
        str(index): Captured(functools.partial(_read_all, weights, configuration))
        for index, configuration in enumerate(CONFIGURATIONS)
    }
    samples = time_replays(graphs, NUM_READ_TRIALS, num_calls)
    return graphs[min(samples, key=lambda name: median(samples[name]))]


def _cpu_cost(chain: Chain, native_available: bool, device: torch.device) -> dict[str, list[float]]:
    tensors = (chain.hidden_states, chain.attn_output, chain.mlp_intermediate, chain.weights[0], chain.bias)
    calls: dict[str, Callable[[], object]] = {"torch": lambda: torch_layer(*tensors)}
    if native_available:
        calls["native"] = lambda: mlpdown.run(*tensors, backend="native")
    return time_enqueueing(calls, NUM_CPU_BATCHES, CALLS_PER_CPU_BATCH, device)


def _measure_on_cpu(shape: Shape, dtype: torch.dtype, device: torch.device, settings: Settings) -> Result:
    num_calls = settings.num_calls or NUM_CPU_MACHINE_CALLS
    result = _result(shape, dtype, num_calls)
    settings.progress("inputs and oracle")
    chain = Chain.make(shape, dtype, device, num_calls, settings.seed)
    oracle = Oracle(chain)
    candidates: dict[str, Callable[[], object]] = {}
    for name, status in mlpdown.backends().items():
        if name == "native" or not status.available:
            result.missing[name] = "measured on CUDA devices only" if status.available else status.reason
            continue
        settings.progress(name)
        layer: Layer = functools.partial(mlpdown.run, backend=name)
        outs = chain.run(layer)
        oracle.check(name, outs)
        if name == "numba":
            oracle.check_bits(name, outs)
        candidates[name] = functools.partial(chain.run, layer)
    for name in ("read_only", "torch_graph", *COMPILED):
        result.missing[name] = "measured on CUDA devices only"
    settings.progress(f"{settings.num_rounds} rounds")
    result.timings.update(time_wall(candidates, settings.num_rounds, num_calls, device))
    return result


def _result(shape: Shape, dtype: torch.dtype, num_calls: int) -> Result:
    return Result(
        shape=shape.name,
        hidden_dim=shape.hidden_dim,
        intermediate_dim=shape.intermediate_dim,
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=shape.weight_bytes,
        num_calls=num_calls,
    )
