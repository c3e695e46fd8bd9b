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
from ..timing import Captured, Clock, time_rounds
from .baselines import COMPILED, compile_layer, torch_layer
from .inputs import Checks, Inputs, Layer, calls_for, check_same_bits
from .read_only import fastest_read
from .report import Content
from .shapes import Shape

NUM_EAGER_ROUNDS = 10
NUM_CPU_BATCHES = 20
CALLS_PER_CPU_BATCH = 100  # fewer than the launch queue holds (1,024 kernels), or the host would wait for the GPU
NUM_CPU_MACHINE_CALLS = 3
COMPILE_LIMIT_SECONDS = 30.0
CUDA_ONLY = "measured on CUDA devices only"


def measure(inputs: Inputs, num_rounds: int, compile_deadline: float, tell: Callable[[str], None]) -> Content:
    """The times of one shape and dtype: ``plans``, ``timings``, ``cpu_cost`` and ``missing`` of a result.

    Args:
        num_rounds: samples of each candidate. compile_deadline: ``time.monotonic()`` after which nothing more is compiled by torch.
        tell: is told what is being done.

    Raises:
        CheckError: a candidate computes something wrong; nothing was timed.
    """
    device, num_calls = inputs.bias.device, len(inputs.weights)
    on_cuda = device.type == "cuda"
    tell("oracle")
    checks = Checks(inputs)
    runs: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    backends = mlpdown.backends()
    plans = None

    def add(name: str, layer: Layer, *, bits: bool = False) -> list[torch.Tensor]:
        """Check a candidate, which is timed from then on."""
        tell(name)
        runs[name] = run = functools.partial(inputs.run, layer)
        if on_cuda:
            graph = Captured(run)
            graph.replay()
            runs[name] = graph.replay
        outs = graph.outs if on_cuda else run()
        checks.check(name, outs, bits=bits)
        return outs

    if on_cuda and backends["native"].available:
        plans = native_plans(inputs.weights[0].shape, device)
        outs = {name: add(name, native_layer(plan), bits=name == "native_isolated") for name, plan in plans.items()}
        for name in plans:
            check_same_bits(name, outs[name], outs["native_isolated"])
    else:
        missing["native"] = backends["native"].reason if on_cuda else CUDA_ONLY
    if on_cuda:
        add("torch_graph", torch_layer)
        for name in COMPILED:
            tell(name)
            left = min(COMPILE_LIMIT_SECONDS, compile_deadline - time.monotonic())
            layer, missing[name] = compile_layer(name, inputs.call, left) if left >= 1 else (None, "the time for torch.compile is spent")
            if layer is not None:
                del missing[name]
                add(name, layer)
        tell("read-only kernel")
        runs["read_only"] = fastest_read(inputs.weights)[0].replay
    else:
        missing |= dict.fromkeys(("read_only", "torch_graph", *COMPILED), CUDA_ONLY)
        add("torch", torch_layer)
        add("numba", functools.partial(mlpdown.run, backend="numba"), bits=True)
    tell(f"{num_rounds} rounds")
    timings = time_rounds(runs, Clock(device, "device" if on_cuda else "wall"), num_rounds, num_calls)
    cpu_cost: dict[str, list[float]] = {}
    if on_cuda:
        eager = {"torch_eager": functools.partial(inputs.run, torch_layer)}
        timings |= time_rounds(eager, Clock(device, "wall"), NUM_EAGER_ROUNDS, num_calls)
        layers = {"torch": torch_layer, "native": functools.partial(mlpdown.run, backend="native")}
        batches = {name: functools.partial(_call_often, layer, inputs) for name, layer in layers.items() if name not in missing}
        cpu_cost = time_rounds(batches, Clock(device, "host"), NUM_CPU_BATCHES, CALLS_PER_CPU_BATCH)
    facts = plans and {name: dataclasses.asdict(plan) for name, plan in plans.items()}
    return {"plans": facts, "timings": timings, "cpu_cost": cpu_cost, "missing": missing}


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, num_calls: int | None, seed: int) -> Inputs:
    """With as many calls as it takes to outgrow the L2 cache, unless told how many; a few on a CPU."""
    if num_calls is None and device.type == "cuda":
        num_calls = calls_for(shape, torch.cuda.get_device_properties(device).L2_cache_size)
    return Inputs(shape, dtype, device, num_calls or NUM_CPU_MACHINE_CALLS, seed)


def native_plans(weight_shape: tuple[int, ...], device: torch.device) -> dict[str, Plan]:
    """The plans that a caller gets: by default but without dependent launch, by default, and with weight_prefetch."""
    properties = native_backend.device_properties(device.index)
    default, prefetching = (choose_plan(*weight_shape, properties, weight_prefetch=prefetch) for prefetch in (False, True))
    isolated = dataclasses.replace(default, dependent_launch=False)
    return {"native_isolated": isolated, "native_chained": default, "native_chained_prefetch": prefetching}


def native_layer(plan: Plan) -> Layer:
    """The op under a plan."""
    return functools.partial(mlpdown.run, backend="native", plan=plan)


def _call_often(layer: Layer, inputs: Inputs) -> None:
    for _ in range(CALLS_PER_CPU_BATCH):
        inputs.call(layer)
