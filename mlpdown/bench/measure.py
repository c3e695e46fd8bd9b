"""One shape and dtype, measured: every candidate checked, then timed in turns."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

import mlpdown

from .. import native_backend
from ..heuristics import choose_plan
from ..plan import Plan
from ..timing import Captured, Clock, time_rounds
from .baselines import COMPILED, Layer, compile_layer, torch_layer
from .inputs import Checks, Inputs, check_same_bits
from .read_only import fastest_read
from .report import Content

NUM_EAGER_ROUNDS = 10
NUM_CPU_BATCHES = 20
CALLS_PER_CPU_BATCH = 100  # fewer than the launch queue holds (1,024 kernels), or the host would wait for the GPU
COMPILE_LIMIT_SECONDS = 30.0
CUDA_ONLY = "measured on CUDA devices only"


def measure(inputs: Inputs, num_rounds: int, compile_deadline: float, tell: Callable[[str], None]) -> Content:
    """``plans``, ``timings``, ``cpu_cost`` and ``missing`` of a result.

    ``num_rounds``: samples of each candidate. ``compile_deadline``: ``time.monotonic()`` after which torch compiles nothing more.

    Raises:
        CheckError: a candidate computes something wrong; nothing was timed.
    """
    device, num_calls, backends = inputs.bias.device, len(inputs.weights), mlpdown.backends()
    on_cuda = device.type == "cuda"
    tell("oracle")
    checks = Checks(inputs)
    runs: dict[str, Callable[[], object]] = {}
    found: Content = {"plans": None, "timings": {}, "cpu_cost": {}, "missing": {}}
    missing = found["missing"]

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
        found["plans"] = {name: dataclasses.asdict(plan) for name, plan in plans.items()}
        outs = {name: add(name, native_layer(plan), bits=name == "native_isolated") for name, plan in plans.items()}
        for name in plans:
            check_same_bits(name, outs[name], outs["native_isolated"])
    else:
        missing["native"] = backends["native"].reason if on_cuda else CUDA_ONLY
    if not on_cuda:
        missing |= dict.fromkeys(("read_only", "torch_graph", *COMPILED), CUDA_ONLY)
        add("torch", torch_layer)
        add("numba", functools.partial(mlpdown.run, backend="numba"), bits=True)
        tell(f"{num_rounds} rounds")
        found["timings"] = time_rounds(runs, Clock(device, "wall"), num_rounds, num_calls)
        return found
    add("torch_graph", torch_layer)
    for name in COMPILED:
        tell(name)
        left = min(COMPILE_LIMIT_SECONDS, compile_deadline - time.monotonic())
        layer, reason = compile_layer(name, inputs.call, left) if left >= 1 else (None, "the time for torch.compile is spent")
        if layer is None:
            missing[name] = reason
        else:
            add(name, layer)
    tell("read-only kernel")
    runs["read_only"] = fastest_read(inputs.weights)[0].replay
    tell(f"{num_rounds} rounds")
    found["timings"] = time_rounds(runs, Clock(device, "device"), num_rounds, num_calls)
    eager = {"torch_eager": functools.partial(inputs.run, torch_layer)}
    found["timings"] |= time_rounds(eager, Clock(device, "wall"), NUM_EAGER_ROUNDS, num_calls)

    def call_often(layer: Layer) -> None:
        for _ in range(CALLS_PER_CPU_BATCH):
            inputs.call(layer)

    layers: dict[str, Layer] = {"torch": torch_layer, "native": functools.partial(mlpdown.run, backend="native")}
    batches = {name: functools.partial(call_often, layer) for name, layer in layers.items() if name not in missing}
    found["cpu_cost"] = time_rounds(batches, Clock(device, "host"), NUM_CPU_BATCHES, CALLS_PER_CPU_BATCH)
    return found


def native_plans(weight_shape: tuple[int, ...], device: torch.device) -> dict[str, Plan]:
    """The plans that a caller gets: by default but without dependent launch, by default, and with weight_prefetch."""
    properties = native_backend.device_properties(device.index)
    default, prefetching = (choose_plan(*weight_shape, properties, weight_prefetch=prefetch) for prefetch in (False, True))
    isolated = dataclasses.replace(default, dependent_launch=False)
    return {"native_isolated": isolated, "native_chained": default, "native_chained_prefetch": prefetching}


def native_layer(plan: Plan) -> Layer:
    """The op under a plan."""
    return functools.partial(mlpdown.run, backend="native", plan=plan)
