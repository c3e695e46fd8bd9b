"""Run the op through every backend that can run here, and hold the results to what is promised.

Promises: ``native`` and ``numba`` give the bits of the specification, on every device; the specification is within its bound of the
exact result. ``torch`` promises nothing: its wrong bits and its error are what the others are to be seen beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import accuracy, ops
from .arguments import output_file
from .backends import backends
from .cases import KINDS, TORCH_DTYPES, Case, make_case
from .checkpoint import CheckpointError, read_layer

PROMISE_BITS = ("native", "numba")
NUM_TIMED_CALLS = 5
CAPTION = (
    "Wrong bits: elements unlike the specification's; torch promises none. ULPs are counted from the float64 result; where inputs "
    "cancel, float32 itself is many off. Times are of single calls, each waited for."
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One backend on one device, on one set of inputs."""

    inputs: str
    dtype: str
    backend: str
    device: str
    wrong_bits: int
    """Elements whose bits are not the specification's."""
    num_elements: int
    max_error_ulps: float | None
    """Against float64; None where no element is finite."""
    mean_error_ulps: float | None
    seconds: float
    """Median of a few calls, each waited for. Says what it costs here; ``mlpdown bench`` measures."""
    promises_bits: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlpdown check``."""
    parser.add_argument("--hidden-dim", type=int, help="outputs (2560, as in Pythia-2.8B)")
    parser.add_argument(
        "--intermediate-dim", type=int, help="the reduction axis, a multiple of 8 (10240, as in Pythia-2.8B)"
    )
    parser.add_argument(
        "--dtype", choices=sorted(TORCH_DTYPES), help="one dtype (both, or with --model the checkpoint's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="take weight and bias from a GPT-NeoX checkpoint's safetensors"
    )
    parser.add_argument("--layer", type=int, metavar="N", help="with --model: of this layer, from 0 (0)")
    parser.add_argument("--json", type=output_file, metavar="PATH", help="write the results there too")


def main(arguments: argparse.Namespace) -> int:
    """Check, print one table, and return 0; 1 if a promise is broken, 2 if the inputs cannot be had."""
    console = Console()
    try:
        cases = list(_cases(arguments))
    except (CheckpointError, ValueError) as error:
        print(f"mlpdown check: {error}", file=sys.stderr)
        return 2
    status = backends()
    results, broken = [], []
    for inputs, case in cases:
        found, complaints = check_case(inputs, case, [name for name, state in status.items() if state.available])
        results += found
        broken += complaints
    hidden_dim, intermediate_dim = cases[0][1].weight.shape
    source = f", weights of {arguments.model}" if arguments.model else ""
    console.print(_table(f"hidden_dim {hidden_dim}, intermediate_dim {intermediate_dim}, one token{source}", results))
    for name, state in status.items():
        if not state.available:
            console.print(f"{name} cannot run here: {state.reason}", highlight=False, markup=False, soft_wrap=True)
    for complaint in broken:
        console.print(f"BROKEN: {complaint}", highlight=False, markup=False, soft_wrap=True)
    if not broken:
        console.print("Every promise holds.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_report(arguments, cases, status, results, broken), indent=1) + "\n")
    return 1 if broken else 0


def check_case(inputs: str, case: Case, available: list[str]) -> tuple[list[Result], list[str]]:
    """Run one case through backends, on the CPU and on the GPU if there is one; the results, and what promises they break."""
    expected = case.expected_bits()
    oracle = accuracy.float64_result(case)
    results, broken = [], []
    num_outside = int(accuracy.outside_bound(expected, case, oracle).sum())
    if num_outside:
        broken.append(
            f"the specification is outside its error bound in {num_outside} elements ({inputs} inputs, {case.dtype})"
        )
    for device in _devices():
        tensors = case.tensors(device)
        for backend in available:
            if backend == "native" and device.type != "cuda":
                continue
            call = _call(tensors, backend)
            bits = result_bits(call())
            wrong = bits != expected
            errors = accuracy.errors_in_ulps(bits, oracle, case.dtype)
            result = Result(
                inputs,
                case.dtype,
                backend,
                device.type,
                int(wrong.sum()),
                wrong.size,
                float(errors.max()) if errors.size else None,
                float(errors.mean()) if errors.size else None,
                _median_seconds(call, device),
                backend in PROMISE_BITS,
            )
            results.append(result)
            if result.promises_bits and result.wrong_bits:
                token, row = np.argwhere(wrong)[0]
                broken.append(
                    f"{backend} on {device.type}: {result.wrong_bits} of {wrong.size} elements have other bits than the specification "
                    f"({inputs} inputs, {case.dtype}); the first is [{token}, {row}]: {bits[token, row]:#06x}, "
                    f"expected {expected[token, row]:#06x}"
                )
    return results, broken


def result_bits(result: torch.Tensor) -> npt.NDArray[np.uint16]:
    """The bits of a result as the specification returns them: ``[num_tokens, hidden_dim]`` uint16."""
    bits = result.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return bits.reshape(-1, result.shape[-1])


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    if arguments.model is None:
        if arguments.layer is not None:
            raise ValueError("--layer needs --model")
        hidden_dim = 2560 if arguments.hidden_dim is None else arguments.hidden_dim
        intermediate_dim = 10240 if arguments.intermediate_dim is None else arguments.intermediate_dim
        for dtype in [arguments.dtype] if arguments.dtype else ["float16", "bfloat16"]:
            for kind in KINDS:
                yield kind, make_case(hidden_dim, intermediate_dim, dtype, kind, arguments.seed)
        return
    if arguments.hidden_dim is not None or arguments.intermediate_dim is not None:
        raise ValueError("--hidden-dim and --intermediate-dim are the checkpoint's with --model: leave them out")
    layer = 0 if arguments.layer is None else arguments.layer
    weight, bias = read_layer(arguments.model, layer)
    stored = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    if arguments.dtype is None and weight.dtype not in stored:
        raise ValueError(f"{arguments.model} holds {weight.dtype}: say with --dtype what to round it to")
    name = arguments.dtype or stored[weight.dtype]
    if weight.shape[1] % 8:
        raise ValueError(f"intermediate_dim must be a multiple of 8, {arguments.model} has {list(weight.shape)}")
    ordinary = make_case(weight.shape[0], weight.shape[1], name, "ordinary", arguments.seed)
    weight, bias = (tensor.to(TORCH_DTYPES[name]).float().contiguous() for tensor in (weight, bias))
    yield f"layer {layer}", dataclasses.replace(ordinary, weight=weight.numpy(), bias=bias.numpy())


def _devices() -> list[torch.device]:
    return [torch.device("cuda"), torch.device("cpu")] if torch.cuda.is_available() else [torch.device("cpu")]


def _call(tensors: tuple[torch.Tensor | None, ...], backend: str) -> Callable[[], torch.Tensor]:
    hidden_states, attn_output, mlp_intermediate, weight, bias = tensors
    assert hidden_states is not None and mlp_intermediate is not None and weight is not None
    return lambda: ops.run(hidden_states, attn_output, mlp_intermediate, weight, bias, backend=backend)


def _median_seconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    seconds = []
    for _ in range(NUM_TIMED_CALLS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _table(title: str, results: list[Result]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for heading in ("dtype", "inputs", "backend", "device"):
        table.add_column(heading, no_wrap=True)
    for heading in ("wrong\nbits", "ULPs off\nat most", "on\naverage", "time\n(ms)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for position, result in enumerate(results):
        last_of_group = position + 1 == len(results) or _group(results[position + 1]) != _group(result)
        table.add_row(
            result.dtype,
            result.inputs,
            result.backend,
            result.device,
            str(result.wrong_bits) if result.promises_bits else f"({result.wrong_bits})",
            _figure(result.max_error_ulps),
            _figure(result.mean_error_ulps),
            f"{1e3 * result.seconds:.3f}",
            style="bold red" if result.promises_bits and result.wrong_bits else None,
            end_section=last_of_group,
        )
    return table


def _group(result: Result) -> tuple[str, str]:
    return result.dtype, result.inputs


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.2e}"


def _report(
    arguments: argparse.Namespace,
    cases: list[tuple[str, Case]],
    status: dict[str, Any],
    results: list[Result],
    broken: list[str],
) -> dict[str, Any]:
    return {
        "hidden_dim": cases[0][1].weight.shape[0],
        "intermediate_dim": cases[0][1].weight.shape[1],
        "seed": arguments.seed,
        "model": None if arguments.model is None else str(arguments.model),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {name: dataclasses.asdict(state) for name, state in status.items()},
        "results": [dataclasses.asdict(result) for result in results],
        "broken_promises": broken,
    }
