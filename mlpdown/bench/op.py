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
from . import plans
from .measure import make_inputs, measure
from .plot import plot_bandwidth, require_matplotlib
from .read_only import steady_read
from .report import SCHEMA_VERSION, Content, detail_table, label_of, median_of, new_console, steady_rate, summary_table
from .shapes import PYTHIA_2B8, parse_shapes

# What an H200 must reach before its figures count: then it is not shared, throttled or otherwise slow.
H200_STEADY_TB_PER_S = 4.4
H200_MOST_US = {"read_only": 13.6, "torch_graph": 23.0}
MAX_DETAILED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlpdown bench op``."""
    add, path = parser.add_argument, {"type": argument_types.output_file, "metavar": "PATH"}
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
    try:
        device = machine.current_device(arguments.device)
        status = mlpdown.backends()["native"]
        if arguments.plans and (device.type != "cuda" or not status.available):
            raise ValueError(f"--plans needs the native kernel: {f'not on {device}' if status.available else status.reason}")
        if arguments.rounds < 1 or (arguments.calls is not None and arguments.calls < 1):
            raise ValueError(f"--rounds and --calls must be positive, got {arguments.rounds}, {arguments.calls}")
        dtypes = arguments.dtypes.split(",")
        if not set(dtypes) <= TORCH_DTYPES.keys():
            raise ValueError(f"--dtypes must be some of {', '.join(TORCH_DTYPES)}, got {arguments.dtypes!r}")
        cells = [(shape, dtype) for shape in parse_shapes(arguments.shapes) for dtype in dtypes]
        if arguments.plot is not None:
            require_matplotlib()
    except (ValueError, RuntimeError) as error:
        print(f"mlpdown bench op: {error}", file=sys.stderr)
        return 2
    content: Content = {"benchmark": "op", "schema_version": SCHEMA_VERSION, "machine": machine.describe(arguments.commit)}
    content |= {"steady_read": None, "validity": {"valid": None, "reasons": []}, "results": [], "plans": None}
    try:
        with torch.no_grad():
            _measure(arguments, cells, device, content)
    except (CheckError, BuildError) as error:
        print(f"mlpdown bench op: {error}", file=sys.stderr)
        return 1
    if content["results"]:
        content["validity"] = validity(content)
        _print(content, arguments.rounds)
    if arguments.json is not None:
        write_json(arguments.json, content)
    if arguments.plot is not None and content["results"]:
        plot_bandwidth(content, arguments.plot)
    return 0


def _measure(arguments: argparse.Namespace, cells: list[Any], device: torch.device, content: Content) -> None:
    if device.type == "cuda":
        content["steady_read"] = {"tb_per_s": steady_read(device)}
    rate, begin = steady_rate(content), time.monotonic()
    for position, (shape, dtype) in enumerate(cells):
        if device.type == "cuda":
            torch.cuda.empty_cache()
        floor_us = rate and shape.weight_bytes / rate / 1e6
        sizes = {"shape": shape.name, "hidden_dim": shape.hidden_dim, "intermediate_dim": shape.intermediate_dim}
        facts = {**sizes, "dtype": dtype, "floor_us": floor_us}
        tell = functools.partial(_tell, f"{shape} {dtype}")
        inputs = make_inputs(shape, TORCH_DTYPES[dtype], device, arguments.calls, arguments.seed)
        if not arguments.plans:
            facts |= {"weight_bytes": shape.weight_bytes, "num_calls": len(inputs.weights)}
            content["results"].append({**facts, **measure(inputs, arguments.rounds, begin + arguments.compile_seconds, tell)})
            continue
        share = (begin + arguments.seconds - time.monotonic()) / (len(cells) - position)
        rows, num_in_grid = plans.sweep(inputs, share, arguments.seed, tell)
        content["plans"] = (content["plans"] or []) + [{**facts, **row} for row in rows]
        title = f"{shape} {dtype}: us a call (over the floor of {floor_us:.2f}); {len(rows)} of {num_in_grid} plans tried"
        new_console().print(plans.table(rows, title, floor_us))


def validity(content: Content) -> dict[str, Any]:
    """Whether this machine is as fast as it should be, where that is known: on an H200, at Pythia-2.8B's shape in float16."""
    gpu, rate = content["machine"]["gpu"] or "a machine without a GPU", steady_rate(content)
    results = [result for result in content["results"] if label_of(result) == f"{PYTHIA_2B8} float16"]
    if rate is None or "H200" not in gpu or not results:
        return {"valid": None, "reasons": [f"it is not known how fast {gpu} should be at these shapes"]}
    reasons = []
    if rate < H200_STEADY_TB_PER_S:
        reasons.append(f"steady read {rate:.2f} TB/s, should be at least {H200_STEADY_TB_PER_S}")
    for name, limit in H200_MOST_US.items():
        value = median_of(results[0], name)
        if value is None or value > limit:
            reasons.append(f"{name} {'not measured' if value is None else f'{value:.2f} us'}, should be at most {limit}")
    return {"valid": not reasons, "reasons": reasons}


def _print(content: Content, num_rounds: int) -> None:
    console, results = new_console(), content["results"]
    for result in results[: MAX_DETAILED if len(results) <= MAX_DETAILED else len(TORCH_DTYPES)]:
        console.print(detail_table(result, num_rounds))
    if content["steady_read"]:
        console.print(summary_table(content, console.width))
        print(f"{content['machine']['gpu']}: steady read {steady_rate(content):.2f} TB/s")
    labels: dict[str, list[str]] = {}
    for result in results:
        for name, reason in result["missing"].items():
            labels.setdefault(f"not measured: {name}: {reason}", []).append(label_of(result))
    for text, names in labels.items():
        print(f"{text} ({names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)})")
    verdict = {True: "yes", False: "NO", None: "not known"}[content["validity"]["valid"]]
    print(": ".join(["valid run", verdict, *filter(None, ["; ".join(content["validity"]["reasons"])])]))


def _tell(label: str, text: str) -> None:
    """For whoever waits: on a line that is written over, and only on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{label}: {text}", end="\r", file=sys.stderr, flush=True)
