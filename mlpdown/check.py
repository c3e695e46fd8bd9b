"""Hold what runs here to what is promised.

Promises: ``native`` and ``numba`` give the bits of the specification, on every device; the specification is within its bound of the
exact result. Without options the inputs are those of the goldens, and the bits those that a GPU gave: a machine without one replays
them. ``torch`` promises nothing: its wrong bits and its error are what the others are to be seen beside.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import accuracy, ops
from .arguments import natural_number, output_file
from .backends import BackendStatus, backends
from .cases import KINDS, TORCH_DTYPES, Case, make_case
from .checkpoint import CheckpointError, read_layer
from .golden import read_golden, shipped_goldens
from .numba_refusal import numba_refusal
from .reference.order import VECTOR_SIZE

PROMISE_BITS = ("native", "numba")
PYTHIA_SHAPE = (2560, 10240)
SUBNORMAL_SHAPE = (192, 264)  # rows for several threads, each of which keeps subnormals or does not
TABLE_COLUMNS = 80  # in narrower terminals, whole lines that wrap say more than columns that are cut
BYTES_A_WEIGHT = 56  # of memory, at most at once: measured, most of it for the float64 result
CAPTION = (
    "Wrong bits: elements unlike the recorded ones, or else unlike the specification's. -: the specification itself ran, and only its "
    "error bound was tested. In brackets: torch, which promises no bits. ULPs off: from the float64 result; many where inputs cancel, "
    "because float32 itself is far off there."
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """Inputs, and the bits that are promised for them."""

    inputs: str
    case: Case
    recorded: npt.NDArray[np.uint16] | None = None
    """``[1, hidden_dim]``, as a GPU gave them; None: the specification's, run here, are promised."""
    gpu: str | None = None
    """On which they were recorded."""
    file: str | None = None

    @property
    def size(self) -> str:
        return "x".join(map(str, self.case.weight.shape))

    def __str__(self) -> str:
        return self.file or f"{self.inputs} inputs, {self.case.dtype}"


@dataclasses.dataclass(frozen=True)
class Result:
    """One backend on one device, on one set of inputs."""

    inputs: str
    size: str
    dtype: str
    backend: str
    device: str
    promises_bits: bool
    """Whether ``wrong_bits`` other than 0 breaks a promise."""
    wrong_bits: int | None
    """Elements with other bits than promised; None where the specification would be compared with itself."""
    num_elements: int
    max_error_ulps: float | None
    """Against float64; None where no element is finite."""
    mean_error_ulps: float | None
    recorded_on: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlpdown check``."""
    parser.description = (
        "Without --hidden-dim, --intermediate-dim, --seed or --model: replay results that were recorded on a GPU, here."
    )
    parser.add_argument("--hidden-dim", type=natural_number, help=f"outputs ({PYTHIA_SHAPE[0]}, as in Pythia-2.8B)")
    parser.add_argument(
        "--intermediate-dim",
        type=natural_number,
        help=f"the reduction axis, a multiple of 8 ({PYTHIA_SHAPE[1]}, as in Pythia-2.8B)",
    )
    parser.add_argument(
        "--dtype", choices=sorted(TORCH_DTYPES), help="one dtype (both, or with --model the checkpoint's)"
    )
    parser.add_argument("--seed", type=natural_number, help="of the inputs (0)")
    parser.add_argument(
        "--model", metavar="MODEL", help="take weight and bias from a GPT-NeoX checkpoint: a folder, or a name on the hub"
    )
    parser.add_argument("--layer", type=natural_number, metavar="N", help="with --model: of this layer, from 0 (0)")
    parser.add_argument("--json", type=output_file, metavar="PATH", help="write the results there too")


def main(arguments: argparse.Namespace) -> int:
    """Check, print, and return 0; 1 if a promise is broken, 2 if the inputs cannot be had."""
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_COLUMNS)
    status = backends()
    available = [name for name, state in status.items() if state.available]
    if not set(available) & set(PROMISE_BITS):
        reasons = "; ".join(status[name].reason for name in PROMISE_BITS)
        print(f"mlpdown check: no backend that promises bits can run here: {reasons}", file=sys.stderr)
        return 2
    results: list[Result] = []
    broken: list[str] = []
    try:
        trials, broken = _trials(arguments)
        for trial in trials:
            found, complaints = run_trial(trial, available)
            results += found
            broken += complaints
    except (CheckpointError, ValueError) as error:
        print(f"mlpdown check: {error}", file=sys.stderr)
        return 2
    console.print(_table(f"weights of {arguments.model}" if arguments.model else "one token", results))
    lines = [f"{name} cannot run here: {state.reason}" for name, state in status.items() if not state.available]
    lines += comparisons(results) + [f"BROKEN: {complaint}" for complaint in broken]
    if not broken:
        bits = "The specification is" if "numba" in available else "The recorded bits are"
        lines.append(f"{bits} within the error bound of the float64 result in every element. No promise is broken.")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if arguments.json is not None:
        with contextlib.suppress(BrokenPipeError):  # of a pipe whose reader has left
            arguments.json.write_text(json.dumps(_report(arguments, status, results, broken), indent=1) + "\n")
    return 1 if broken else 0


def recorded_trials(dtype: str | None = None, largest: float = math.inf) -> tuple[Iterator[Trial], list[str]]:
    """The goldens that come with the package, of one dtype or of both, with at most ``largest`` weights, each made when its turn comes;
    and what is wrong with files that are damaged."""
    goldens, broken = [], []
    for file in shipped_goldens():
        try:
            goldens.append(read_golden(file))
        except ValueError as error:
            broken.append(str(error))
    trials = (
        Trial(golden.case.kind, golden.case.make(), golden.bits[None], golden.gpu, golden.case.file_name)
        for golden in goldens
        if dtype in (None, golden.case.dtype) and golden.case.hidden_dim * golden.case.intermediate_dim <= largest
    )
    return trials, broken


def run_trial(trial: Trial, available: Sequence[str]) -> tuple[list[Result], list[str]]:
    """Run one set of inputs through backends, on the CPU and on the GPU if there is one; the results, and what promises they break."""
    case = trial.case
    specified = case.expected_bits() if "numba" in available else trial.recorded
    if specified is None:
        raise ValueError(f"only the specification knows the bits of these inputs, and it cannot run here: {numba_refusal('cpu')}")
    expected = specified if trial.recorded is None else trial.recorded
    oracle = accuracy.float64_result(case)
    results, broken = [], []
    num_outside = int(accuracy.outside_bound(specified, case, oracle).sum())
    if num_outside:
        broken.append(f"the specification is outside its error bound in {num_outside} elements ({trial})")
    for device in _devices():
        tensors = case.tensors(device)
        for backend in available:
            if (backend == "native" and device.type != "cuda") or (backend == "numba" and numba_refusal(device.type)):
                continue
            bits = result_bits(ops.run(*tensors, backend=backend))  # type: ignore[arg-type]
            wrong = bits != expected
            errors = accuracy.errors_in_ulps(bits, oracle, case.dtype)
            is_specification = backend == "numba" and device.type == "cpu" and trial.recorded is None
            promises_bits = backend in PROMISE_BITS and not is_specification
            results.append(
                Result(
                    trial.inputs,
                    trial.size,
                    case.dtype,
                    backend,
                    device.type,
                    promises_bits,
                    None if is_specification else int(wrong.sum()),
                    wrong.size,
                    float(errors.max()) if errors.size else None,
                    float(errors.mean()) if errors.size else None,
                    trial.gpu,
                )
            )
            if promises_bits and wrong.any():
                token, row = np.argwhere(wrong)[0]
                source = "the specification" if trial.gpu is None else f"were recorded on an {trial.gpu}"
                broken.append(
                    f"{backend} on {device.type}: {int(wrong.sum())} of {wrong.size} elements have other bits than {source} "
                    f"({trial}); the first is [{token}, {row}]: {bits[token, row]:#06x}, expected {expected[token, row]:#06x}"
                )
    return results, broken


def comparisons(results: Sequence[Result]) -> list[str]:
    """What was compared with what, and in how many elements it differs: one line for each source of bits and each backend."""
    counts: dict[tuple[str | None, str, str], list[int]] = {}
    for result in results:
        if result.wrong_bits is not None:
            count = counts.setdefault((result.recorded_on, result.backend, result.device), [0, 0])
            count[0] += result.num_elements
            count[1] += result.wrong_bits
    lines = []
    for (gpu, backend, device), (elements, wrong) in counts.items():
        if backend in PROMISE_BITS:
            source = f"recorded on an {gpu}, replayed" if gpu else "of the specification on this CPU, computed again"
            machine = "this CPU" if device == "cpu" else f"this {torch.cuda.get_device_name()}"
            line = f"{elements:,} elements {source} by {backend} on {machine}: {wrong:,} differ"
            beside = counts.get((gpu, "torch", device))
            lines.append(line + (f" (by PyTorch, which promises nothing: {beside[1]:,})." if beside else "."))
    if not lines:
        lines.append("No bits were compared: only the specification itself runs here. mlpdown check, without options, replays a GPU's.")
    return lines


def result_bits(result: torch.Tensor) -> npt.NDArray[np.uint16]:
    """The bits of a result as the specification returns them: ``[num_tokens, hidden_dim]`` uint16."""
    bits = result.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return bits.reshape(-1, result.shape[-1])


def _trials(arguments: argparse.Namespace) -> tuple[Iterator[Trial], list[str]]:
    if arguments.model is not None:
        return iter([_trial_of_model(arguments)]), []
    if arguments.layer is not None:
        raise ValueError("--layer needs --model")
    dtypes = [arguments.dtype] if arguments.dtype else ["float16", "bfloat16"]
    if arguments.hidden_dim is arguments.intermediate_dim is arguments.seed is None:
        if not shipped_goldens():
            raise ValueError("no goldens came with this package: reinstall mlpdown, or give --hidden-dim")
        recorded, broken = recorded_trials(arguments.dtype)
        made = (Trial("subnormal", make_case(*SUBNORMAL_SHAPE, dtype, "subnormal")) for dtype in dtypes)
        return itertools.chain(recorded, made), broken
    hidden_dim = PYTHIA_SHAPE[0] if arguments.hidden_dim is None else arguments.hidden_dim
    intermediate_dim = PYTHIA_SHAPE[1] if arguments.intermediate_dim is None else arguments.intermediate_dim
    _check_memory(hidden_dim, intermediate_dim)
    seed = arguments.seed or 0
    return (
        Trial(kind, make_case(hidden_dim, intermediate_dim, dtype, kind, seed)) for dtype in dtypes for kind in KINDS
    ), []


def _trial_of_model(arguments: argparse.Namespace) -> Trial:
    if arguments.hidden_dim is not None or arguments.intermediate_dim is not None:
        raise ValueError("--hidden-dim and --intermediate-dim are the checkpoint's with --model: leave them out")
    layer = arguments.layer or 0
    weight, bias = read_layer(arguments.model, layer)
    stored = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    if arguments.dtype is None and weight.dtype not in stored:
        raise ValueError(f"{arguments.model} holds {weight.dtype}: say with --dtype what to round it to")
    for tensor in (weight, bias):
        if not tensor.is_floating_point():
            raise ValueError(f"weight and bias must be floating-point numbers, {arguments.model} holds {tensor.dtype}: quantised?")
    name = arguments.dtype or stored[weight.dtype]
    if weight.shape[1] % VECTOR_SIZE:
        raise ValueError(f"intermediate_dim must be a multiple of 8, {arguments.model} has {list(weight.shape)}")
    _check_memory(*weight.shape)
    ordinary = make_case(weight.shape[0], weight.shape[1], name, "ordinary", arguments.seed or 0)
    weight, bias = (tensor.to(TORCH_DTYPES[name]).float().contiguous() for tensor in (weight, bias))
    return Trial(f"layer {layer}", dataclasses.replace(ordinary, weight=weight.numpy(), bias=bias.numpy()))


def _check_memory(hidden_dim: int, intermediate_dim: int) -> None:
    """Refuse with a ValueError what would end this process, or others, for want of memory."""
    needed = BYTES_A_WEIGHT * hidden_dim * intermediate_dim
    try:
        text = Path("/proc/meminfo").read_text()
        free = 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed > free:
        raise ValueError(
            f"{hidden_dim}x{intermediate_dim} needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are available"
        )


def _devices() -> list[torch.device]:
    return [torch.device("cuda"), torch.device("cpu")] if torch.cuda.is_available() else [torch.device("cpu")]


def _table(title: str, results: list[Result]) -> Table:
    table = Table(
        title=Text(title),  # a path in it is no markup
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for heading in ("size", "dtype", "inputs", "backend", "device"):
        table.add_column(heading, no_wrap=True)
    for heading in ("wrong\nbits", "ULPs off\nat most", "on\naverage"):
        table.add_column(heading, justify="right", no_wrap=True)
    for position, result in enumerate(results):
        last_of_group = position + 1 == len(results) or _group(results[position + 1]) != _group(result)
        wrong_bits = "-" if result.wrong_bits is None else str(result.wrong_bits)
        table.add_row(
            result.size,
            result.dtype,
            result.inputs,
            result.backend,
            result.device,
            wrong_bits if result.backend in PROMISE_BITS else f"({wrong_bits})",
            _figure(result.max_error_ulps),
            _figure(result.mean_error_ulps),
            style="bold red" if result.promises_bits and result.wrong_bits else None,
            end_section=last_of_group,
        )
    return table


def _group(result: Result) -> tuple[str, str, str]:
    return result.size, result.dtype, result.inputs


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.2e}"


def _report(
    arguments: argparse.Namespace, status: dict[str, BackendStatus], results: list[Result], broken: list[str]
) -> dict[str, Any]:
    return {
        "seed": arguments.seed or 0,
        "model": arguments.model,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {name: dataclasses.asdict(state) for name, state in status.items()},
        "results": [dataclasses.asdict(result) for result in results],
        "broken_promises": broken,
    }
