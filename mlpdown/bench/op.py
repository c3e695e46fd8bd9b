"""``mlpdown bench op``: the op against its memory floor, a kernel that only reads, and PyTorch; checked before it is timed."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from typing import Any

import torch

import mlpdown

from .. import arguments as argument_types
from .. import machine
from ..accuracy import CheckError
from ..cases import TORCH_DTYPES
from ..jit import BuildError
from ..json_lines import write_json
from ..plot import plot_bandwidth, require_matplotlib
from ..tables import new_console
from . import plans
from .inputs import Inputs, calls_for
from .measure import measure
from .read_only import steady_read
from .report import SCHEMA_VERSION, Content, detail_table, steady_rate, summary_table
from .shapes import PYTHIA_2B8, parse_shapes

# What a GPU must read before its figures count: then it is not shared, throttled or otherwise slow.
LEAST_TB_PER_S = {"H200": 4.4, "H100 80GB HBM3": 3.1}
MAX_DETAILED = 4
NUM_CPU_MACHINE_CALLS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlpdown bench op``."""
    add, path = parser.add_argument, dict[str, Any](type=argument_types.output_file, metavar="PATH")
    add("--shapes", default=PYTHIA_2B8.name, help="all, short, or names or HIDDENxINTERMEDIATE with commas (pythia-2.8b)")
    add("--dtypes", default=",".join(TORCH_DTYPES), help="with commas (float16,bfloat16)")
    add("--device", type=argument_types.device, help="cuda where there is one, else cpu")
    add("--rounds", type=int, default=30, help="samples of each candidate (30)")
    add("--calls", type=int, help="calls of a run (32, or more until their weights exceed L2 three times)")
    add("--compile-seconds", type=float, default=45.0, help="time for torch.compile, first shape first; 0 for none (45)")
    add("--plans", action="store_true", help="instead, look for the fastest plans of the native kernel at each shape")
    add("--seconds", type=float, default=200.0, help="time for --plans, shared out among shapes and dtypes (200)")
    add("--seed", type=int, default=0, help="of the inputs (0)")
    add("--commit", help="the commit to write down, where the checkout does not say")
    add("--json", **path, help="write every sample and what it was made on")
    add("--plot", **path, help="draw bandwidth: PATH with .svg and .png (needs matplotlib)")


def main(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns 0, 1 if a candidate computes something wrong, 2 for arguments that cannot be served here."""
    content: Content = {"benchmark": "op", "schema_version": SCHEMA_VERSION, "machine": machine.describe(arguments.commit)}
    content |= {"steady_read": None, "validity": {"valid": None, "reasons": []}, "results": [], "plans": None}
    try:
        device, status = machine.current_device(arguments.device), mlpdown.backends()["native"]
        if arguments.plans and (device.type != "cuda" or not status.available):
            raise ValueError(f"--plans needs the native kernel: {f'not on {device}' if status.available else status.reason}")
        if arguments.rounds < 1 or (arguments.calls is not None and arguments.calls < 1):
            raise ValueError(f"--rounds and --calls must be positive, got {arguments.rounds}, {arguments.calls}")
        if not set(arguments.dtypes.split(",")) <= TORCH_DTYPES.keys():
            raise ValueError(f"--dtypes must be some of {', '.join(TORCH_DTYPES)}, got {arguments.dtypes!r}")
        cells = [(shape, dtype) for shape in parse_shapes(arguments.shapes) for dtype in arguments.dtypes.split(",")]
        if arguments.plot is not None:
            require_matplotlib()
        with torch.no_grad():
            _measure(arguments, cells, device, content)
    except (ValueError, CheckError, BuildError) as error:
        print(f"mlpdown bench op: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if content["results"]:
        content["validity"] = validity(content)
        _print(content, arguments.rounds)
    if arguments.json is not None:
        write_json(arguments.json, content)
    if arguments.plot is not None and content["results"]:
        plot_bandwidth(content, arguments.plot)
    return 0


def _measure(arguments: argparse.Namespace, cells: list[Any], device: torch.device, content: Content) -> None:
    l2_bytes = 0
    if device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        content["steady_read"] = {"tb_per_s": steady_read(device)}
    rate, begin = steady_rate(content), time.monotonic()
    for position, (shape, dtype) in enumerate(cells):
        torch.cuda.empty_cache()  # nothing without a GPU
        floor_us = shape.weight_bytes / rate / 1e6 if rate else None
        sizes = {"shape": shape.name, "hidden_dim": shape.hidden_dim, "intermediate_dim": shape.intermediate_dim}
        facts, tell = {**sizes, "dtype": dtype, "floor_us": floor_us}, functools.partial(_tell, f"{shape} {dtype}")
        num_calls = arguments.calls or (calls_for(shape, l2_bytes) if l2_bytes else NUM_CPU_MACHINE_CALLS)
        inputs = Inputs(shape, TORCH_DTYPES[dtype], device, num_calls, arguments.seed)
        if not arguments.plans:
            facts |= {"weight_bytes": shape.weight_bytes, "num_calls": num_calls}
            content["results"].append({**facts, **measure(inputs, arguments.rounds, begin + arguments.compile_seconds, tell)})
            continue
        share = (begin + arguments.seconds - time.monotonic()) / (len(cells) - position)
        rows, num_in_grid = plans.sweep(inputs, share, arguments.seed, tell)
        content["plans"] = (content["plans"] or []) + [{**facts, **row} for row in rows]
        new_console().print(plans.table(rows, f"{shape} {dtype}: us a call; {len(rows)} of {num_in_grid} plans tried", floor_us or 0.0))


def validity(content: Content) -> dict[str, Any]:
    """Whether this machine reads as fast as its kind should, where that is known."""
    gpu, rate = content["machine"]["gpu"] or "a machine without a GPU", steady_rate(content)
    known = [least for name, least in LEAST_TB_PER_S.items() if name in gpu]
    if rate is None or not known:
        return {"valid": None, "reasons": [f"it is not known how fast {gpu} should read"]}
    reasons = [f"steady read {rate:.2f} TB/s, should be at least {known[0]}: shared or throttled?"] * (rate < known[0])
    return {"valid": not reasons, "reasons": reasons}


def _print(content: Content, num_rounds: int) -> None:
    console, results = new_console(), content["results"]
    for result in results[: MAX_DETAILED if len(results) <= MAX_DETAILED else len(TORCH_DTYPES)]:
        console.print(detail_table(result, num_rounds))
    if content["steady_read"]:
        console.print(summary_table(content, console.width))
        print(f"{content['machine']['gpu']}: steady read {steady_rate(content):.2f} TB/s")
    missing = [f"{name}: {reason}" for result in results for name, reason in result["missing"].items()]
    for text in dict.fromkeys(missing):
        print(f"not measured: {text} ({missing.count(text)} of {len(results)} shapes and dtypes)")
    verdict = {True: "yes", False: "NO", None: "not known"}[content["validity"]["valid"]]
    print(": ".join(["valid run", verdict, *filter(None, ["; ".join(content["validity"]["reasons"])])]))


def _tell(label: str, text: str) -> None:
    if sys.stderr.isatty():  # on a line that is written over
        print(f"\r\033[K{label}: {text}", end="\r", file=sys.stderr, flush=True)
