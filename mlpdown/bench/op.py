"""``mlpdown bench op``: the op against its memory floor, a kernel that only reads, and PyTorch; checked before it is timed."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import mlpdown

from ..accuracy import CheckError
from ..arguments import device as device_argument
from ..arguments import output_file
from ..jit import BuildError
from . import machine, plans
from .measure import Settings, measure, steady_read
from .results import Report, Result, median
from .shapes import PYTHIA_2B8, Shape, parse_shapes
from .tables import detail_table, new_console, summary_table

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# What an H200's own yardsticks must say before its figures count: it is not shared, throttled or otherwise slow.
H200_STEADY_TB_PER_S = 4.4
H200_READ_ONLY_US = 13.6
H200_TORCH_US = 23.0
MAX_DETAILED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlpdown bench op``."""
    parser.add_argument("--shapes", default=PYTHIA_2B8.name, help="all, short, or names or HIDDENxINTERMEDIATE with commas (pythia-2.8b)")
    parser.add_argument("--dtypes", default="float16,bfloat16", help="with commas (float16,bfloat16)")
    parser.add_argument("--device", type=device_argument, help="cuda where there is one, else cpu")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each candidate (30)")
    parser.add_argument("--calls", type=int, help="calls of a chain (32, or more until their weights exceed L2 three times)")
    parser.add_argument(
        "--compile", choices=("first", "all", "none"), default="first", help="shapes at which torch.compile is measured (the first)"
    )
    parser.add_argument("--compile-seconds", type=float, default=45.0, help="time for all of torch.compile's compilations (45)")
    parser.add_argument("--plans", action="store_true", help="instead, look for the fastest plans of the native kernel at each shape")
    parser.add_argument("--seconds", type=float, default=200.0, help="time for --plans, shared out among shapes and dtypes (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    parser.add_argument("--commit", help="the commit to write down, where the checkout does not say")
    parser.add_argument("--json", type=output_file, metavar="PATH", help="write every sample and what it was made on")
    parser.add_argument(
        "--plot",
        type=output_file,
        metavar="PATH",
        help="draw bandwidth beside the steady read rate: PATH with .svg and .png (needs matplotlib)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns 0, 1 if a candidate computes something wrong, 2 for arguments that cannot be served here."""
    console = new_console()
    try:
        shapes = parse_shapes(arguments.shapes)
        dtypes = [DTYPES[name] for name in arguments.dtypes.split(",")]
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)
        if arguments.rounds < 1 or (arguments.calls is not None and arguments.calls < 1):
            raise ValueError(f"--rounds and --calls must be positive, got {arguments.rounds}, {arguments.calls}")
        if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise RuntimeError("matplotlib must be installed for --plot: pip install matplotlib")
        if arguments.plans:
            status = mlpdown.backends()["native"]
            if device.type != "cuda" or not status.available:
                raise ValueError(f"--plans needs the native kernel: {status.reason if not status.available else f'not on {device}'}")
    except KeyError as error:
        return _refuse(f"dtype must be one of {', '.join(DTYPES)}, got {error}")
    except (ValueError, RuntimeError) as error:
        return _refuse(str(error))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn only between measurements: a thread that draws would take its time from the host.
    with torch.no_grad(), Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        try:
            if arguments.plans:
                report = _sweep(arguments, shapes, dtypes, device, progress, console)
            else:
                report = _measure(arguments, shapes, dtypes, device, progress)
        except (CheckError, BuildError) as error:
            print(f"mlpdown bench op: {error}", file=sys.stderr)
            return 1
    if not arguments.plans:
        _print(report, arguments.rounds, console)
    if arguments.json is not None:
        report.write(arguments.json)
    if arguments.plot is not None:
        from .plot import write_plot

        write_plot(report, arguments.plot)
    return 0


def _measure(
    arguments: argparse.Namespace, shapes: list[Shape], dtypes: list[torch.dtype], device: torch.device, progress: Progress
) -> Report:
    report = Report(_machine(arguments))
    task = progress.add_task("steady read", total=len(shapes) * len(dtypes))
    if device.type == "cuda":
        progress.refresh()
        report.steady_read = {"tb_per_s": steady_read(device)}
        torch.cuda.empty_cache()
    settings = Settings(
        num_rounds=arguments.rounds,
        num_calls=arguments.calls,
        seed=arguments.seed,
        compile_deadline=time.monotonic() + arguments.compile_seconds,
        compile=False,
        progress=lambda text: None,
    )
    for shape in shapes:
        for dtype in dtypes:
            label = f"{shape} {str(dtype).removeprefix('torch.')}"
            settings.progress = lambda text, label=label: progress.update(task, description=f"{label}: {text}", refresh=True)  # type: ignore[misc]
            settings.compile = arguments.compile == "all" or (arguments.compile == "first" and shape == shapes[0])
            result = measure(shape, dtype, device, settings)
            if report.steady_read is not None:
                result.floor_us = shape.weight_bytes / median(report.steady_read["tb_per_s"]) / 1e6
            report.results.append(result)
            progress.advance(task)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    report.validity = validity(report)
    return report


def _sweep(
    arguments: argparse.Namespace,
    shapes: list[Shape],
    dtypes: list[torch.dtype],
    device: torch.device,
    progress: Progress,
    console: Console,
) -> Report:
    report = Report(_machine(arguments), plans=[])
    assert report.plans is not None
    task = progress.add_task("steady read", total=len(shapes) * len(dtypes))
    progress.refresh()
    end = time.monotonic() + arguments.seconds
    report.steady_read = {"tb_per_s": steady_read(device)}
    rate = median(report.steady_read["tb_per_s"])
    console.print(f"{report.machine['gpu']}: steady read {rate:.2f} TB/s; in brackets: over the floor, the weight at that rate")
    cells = [(shape, dtype) for shape in shapes for dtype in dtypes]
    for position, (shape, dtype) in enumerate(cells):
        torch.cuda.empty_cache()
        label = f"{shape} {str(dtype).removeprefix('torch.')}"

        def tell(text: str, label: str = label) -> None:
            progress.update(task, description=f"{label}: {text}", refresh=True)

        share = (end - time.monotonic()) / (len(cells) - position)
        rows = plans.sweep(shape, dtype, device, share, arguments.calls, arguments.seed, tell)
        measured = {"shape": shape.name, "hidden_dim": shape.hidden_dim, "intermediate_dim": shape.intermediate_dim}
        floor_us = shape.weight_bytes / rate / 1e6
        dtype_name = str(dtype).removeprefix("torch.")
        report.plans += [{**measured, "dtype": dtype_name, "floor_us": floor_us, **row} for row in rows]
        title = f"{label}: us a call, {len(rows)} plans tried, {plans.num_in_grid(shape, device)} in the grid; floor {floor_us:.2f}"
        console.print(plans.table(rows, title, floor_us))
        progress.advance(task)
    return report


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    facts = machine.describe()
    return {**facts, "commit": arguments.commit or facts["commit"]}


def validity(report: Report) -> dict[str, Any]:
    """Whether this machine's yardsticks are what they should be, where that is known: on an H200, at Pythia-2.8B's shape in float16."""
    gpu = report.machine["gpu"]
    if report.steady_read is None or gpu is None or "H200" not in gpu:
        return {"valid": None, "reasons": [f"no yardsticks are known for {gpu or 'a machine without a GPU'}"]}
    reasons = []
    steady = median(report.steady_read["tb_per_s"])
    if steady < H200_STEADY_TB_PER_S:
        reasons.append(f"steady read {steady:.2f} TB/s, should be at least {H200_STEADY_TB_PER_S}")
    size = PYTHIA_2B8.hidden_dim, PYTHIA_2B8.intermediate_dim
    rows = [row for row in report.results if (row.hidden_dim, row.intermediate_dim) == size and row.dtype == "float16"]
    if not rows:
        return {"valid": False if reasons else None, "reasons": reasons or [f"{PYTHIA_2B8} in float16 was not measured"]}
    for name, limit in (("read_only", H200_READ_ONLY_US), ("torch_graph", H200_TORCH_US)):
        value = rows[0].median(name)
        if value is None or value > limit:
            reasons.append(f"{name} {'not measured' if value is None else f'{value:.2f} us'}, should be at most {limit}")
    return {"valid": not reasons, "reasons": reasons}


def _print(report: Report, num_rounds: int, console: Console) -> None:
    if report.steady_read is not None:
        console.print(f"{report.machine['gpu']}: steady read {median(report.steady_read['tb_per_s']):.2f} TB/s", highlight=False)
    for result in report.results[: MAX_DETAILED if len(report.results) <= MAX_DETAILED else len(DTYPES)]:
        console.print(detail_table(result, num_rounds))
    if report.steady_read is not None:
        console.print(summary_table(report))
    for reason in _reasons(report.results):
        console.print(f"not measured: {reason}", highlight=False, markup=False, soft_wrap=True)
    verdict = {True: "yes", False: "NO", None: "not known"}[report.validity["valid"]]
    console.print(f"valid run: {verdict} {'; '.join(report.validity['reasons'])}", highlight=False, markup=False, soft_wrap=True)


def _reasons(results: list[Result]) -> list[str]:
    """Each reason once, with the shapes it holds for."""
    labels: dict[str, list[str]] = {}
    for result in results:
        for name, reason in result.missing.items():
            labels.setdefault(f"{name}: {reason}", []).append(result.label)
    return [f"{text} ({labels[text][0]}{f' and {len(labels[text]) - 1} more' if len(labels[text]) > 1 else ''})" for text in labels]


def _refuse(message: str) -> int:
    print(f"mlpdown bench op: {message}", file=sys.stderr)
    return 2
