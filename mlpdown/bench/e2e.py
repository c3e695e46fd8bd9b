"""Decode a whole model token by token, PyTorch against patched: eager loop, CUDA graph, torch.compile, and a hand-written loop."""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mlpdown
from mlpdown.bench import e2e_decode, e2e_models
from mlpdown.bench.e2e_check import CheckError, Oracle
from mlpdown.bench.e2e_decode import Decoder, EagerDecoder, LoopDecoder, StaticDecoder, not_patched, patcher
from mlpdown.bench.e2e_loop import LoopModel, torch_mlp_down
from mlpdown.bench.e2e_report import Report, Row

MODES = ("loop", "graph", "compile", "eager")
PROMPT_LENGTH = 8
NUM_CHECKED_TOKENS = 32
CACHE_GRANULARITY = 16
# Attention reads all of a static cache, and who asks for few tokens gets a small one: lengths up to this have a cache of their own.
SHORT_TOKENS = 256
# A run is repeated only while its mode has taken less than this, so that every mode gets its turn.
SECONDS_PER_MODE = 15.0
NUM_ESTIMATE_STEPS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mlpdown bench e2e``."""
    parser.add_argument("--model", help="a GPT-NeoX checkpoint, folder or hub name; default: random weights of --size")
    parser.add_argument(
        "--size", choices=e2e_models.SIZES, help="size of random weights (default: 2.8b on a GPU, tiny without)"
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--tokens", type=_numbers, help="lengths to decode, with commas (default: 16,32,...,2048; to 64 without a GPU)"
    )
    parser.add_argument(
        "--modes", type=_modes, default=MODES, help=f"any of {','.join(MODES)} (default: all that can run)"
    )
    parser.add_argument("--backend", default="auto", help="of the patched model: auto, native, numba or torch")
    parser.add_argument(
        "--weight-prefetch", action="store_true", help="promise that no weight is written while the model decodes"
    )
    parser.add_argument("--repeats", type=_positive, default=3, help="most runs of each length (default: 3)")
    parser.add_argument(
        "--seconds", type=float, default=210, help="start nothing that would end later than this (default: 210)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every run and what it ran on")
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="draw time per token (.svg or .png; needs matplotlib)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the benchmark. Returns 0, 1 if the patched model computes something wrong, 2 for arguments that do not go together."""
    try:
        bench = Benchmark(arguments)
    except (ValueError, RuntimeError) as error:
        print(f"mlpdown bench e2e: {error}", file=sys.stderr)
        return 2
    try:
        bench.run()
    except CheckError as error:
        print(f"mlpdown bench e2e: {error}", file=sys.stderr)
        return 1
    return 0


class Benchmark:
    """One run of the command: one model, checked and timed in every mode.

    Raises:
        ValueError, RuntimeError: the arguments do not go together, or need what this machine lacks.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from rich.console import Console

        self.console = Console(width=None if sys.stdout.isatty() else 140)
        self.begin = time.perf_counter()
        self.arguments = arguments
        self.device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.on_cuda = self.device.type == "cuda"
        if arguments.model and arguments.size:
            raise ValueError(f"--model and --size exclude each other, got {arguments.model} and {arguments.size}")
        if importlib.util.find_spec("transformers") is None:
            raise RuntimeError(
                "transformers 4.57 or newer must be installed for this benchmark: pip install transformers"
            )
        status = None if arguments.backend == "auto" else mlpdown.backends().get(arguments.backend)
        if arguments.backend != "auto" and (status is None or not status.available):
            raise RuntimeError(
                f"backend {arguments.backend!r} cannot run here: {status.reason if status else 'there is none of that name'}"
            )
        self.lengths: list[int] = sorted(
            arguments.tokens or [2**power for power in range(4, 12 if self.on_cuda else 7)]
        )
        self.max_length = positions(self.lengths)
        self.settings = {"backend": arguments.backend, "weight_prefetch": arguments.weight_prefetch}
        dtype = getattr(torch, arguments.dtype)
        if arguments.model:
            self.model: Any = e2e_models.load(arguments.model, dtype, self.device)
            label = arguments.model
        else:
            size_name = arguments.size or ("2.8b" if self.on_cuda else "tiny")
            size = e2e_models.SIZES[size_name]
            weights = e2e_models.random_weights(size, dtype, self.device, arguments.seed)
            self.model = e2e_models.build(size, weights, self.max_length)
            label = f"GPT-NeoX {size_name} (random weights)"
        config = self.model.config
        if config.model_type != "gpt_neox" or not config.use_parallel_residual:
            raise ValueError(
                f"--model must be a GPT-NeoX with parallel residual, got {arguments.model} of type {config.model_type}"
            )
        self.loop_model = LoopModel(e2e_models.weights_of(self.model), config.num_attention_heads, self.max_length)
        generator = torch.Generator().manual_seed(arguments.seed)
        self.prompt = torch.randint(config.vocab_size, (1, PROMPT_LENGTH), generator=generator).to(self.device)
        device_name = torch.cuda.get_device_name(self.device) if self.on_cuda else "CPU"
        self.report = Report(label, arguments.dtype, device_name, {**self.settings, "prompt_length": PROMPT_LENGTH})

    def run(self) -> None:
        """Check, then time mode by mode; what is known is written after each."""
        with mlpdown.patch(self.model, **self.settings) as patched:
            self.console.print(f"{self.report.model}, {self.report.dtype}, {self.report.device}: {patched}")
        self.check_logits()
        short, long = [n for n in self.lengths if n <= SHORT_TOKENS], [n for n in self.lengths if n > SHORT_TOKENS]
        stages: list[tuple[str, list[int]]] = [
            ("loop", self.lengths),
            ("graph", short),
            ("compile", short),
            ("eager", self.lengths),
        ]
        stages += [("graph", long), ("compile", long)]
        seconds_to_build: dict[str, float] = {}
        for mode, lengths in stages:
            if not lengths or mode not in self.arguments.modes:
                continue
            what = f"{mode}, {lengths[0]} to {lengths[-1]} tokens"
            if mode == "graph" and not self.on_cuda:
                self.leave_out(f"{what}: a CUDA graph needs a CUDA device")
                continue
            needed, left = seconds_to_build.get(mode, 0.0), self.seconds_left()
            if left <= needed:
                building = f", building takes {needed:.0f} s" if needed else ""
                self.leave_out(f"{what}: {max(left, 0.0):.0f} s are left of --seconds{building}")
                continue
            begin = time.perf_counter()
            cache_length = positions(lengths) if mode in ("graph", "compile") else None
            decoders = self.build(mode, cache_length)
            seconds_to_build[mode] = time.perf_counter() - begin
            self.measure(mode, lengths, cache_length, *decoders)
            del decoders
            gc.collect()
            self.write()
        self.console.print(self.report.table())
        for line in self.report.not_run:
            self.console.print(f"not run: {line}")
        self.write()

    def check_logits(self) -> None:
        """Logits of forced decode steps, stock and patched, against the float64 model."""
        decoder = EagerDecoder(self.model, self.prompt, not_patched)
        decoder.rewind()
        for _ in range(NUM_CHECKED_TOKENS - 1):
            decoder.step()
        continuation = torch.tensor(decoder.tokens(), device=self.device)
        with self.status("float64 logits"):
            self.oracle = Oracle(self.model, self.prompt, continuation)
        stock = e2e_decode.forced_logits(self.model, self.prompt, continuation)
        with mlpdown.patch(self.model, **self.settings):
            patched = e2e_decode.forced_logits(self.model, self.prompt, continuation)
        checks = [self.oracle.check_logits("transformers", stock, patched)]
        forced_loop = functools.partial(e2e_decode.forced_loop_logits, self.loop_model, self.prompt, continuation)
        checks.append(self.oracle.check_logits("loop", forced_loop(torch_mlp_down), forced_loop(self.mlp_down())))
        for check in checks:
            self.console.print(
                f"logits, {check.name}: {check.patched:.3e} from float64 (stock {check.stock:.3e}, bound {check.bound:.3e}, "
                f"root mean square over {NUM_CHECKED_TOKENS} tokens)"
            )
        self.report.logits = checks

    def mlp_down(self) -> Callable[..., torch.Tensor]:
        return functools.partial(mlpdown.run, **self.settings)

    def build(self, mode: str, cache_length: int | None) -> tuple[Decoder, Decoder]:
        """The stock and the patched decoder of a mode, warm."""
        patch = patcher(self.model, self.settings)
        with self.status(f"building {mode}"):
            if mode == "loop":
                return LoopDecoder(self.loop_model, self.prompt, torch_mlp_down), LoopDecoder(
                    self.loop_model, self.prompt, self.mlp_down()
                )
            if mode == "eager":
                return EagerDecoder(self.model, self.prompt, not_patched), EagerDecoder(self.model, self.prompt, patch)
            assert cache_length is not None
            if mode == "compile":
                torch._dynamo.reset()
            keywords: dict[str, Any] = {"compile": mode == "compile", "graph": self.on_cuda}
            return (
                StaticDecoder(self.model, self.prompt, not_patched, cache_length, **keywords),
                StaticDecoder(self.model, self.prompt, patch, cache_length, **keywords),
            )

    def measure(
        self, mode: str, lengths: list[int], cache_length: int | None, stock: Decoder, patched: Decoder
    ) -> None:
        """Check greedy tokens, then time both decoders, one after the other, as often as there is time for."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        check = self.oracle.check_tokens(mode, stock, patched, NUM_CHECKED_TOKENS)
        self.console.print(str(check))
        self.report.tokens.append(check)
        estimate = sum(self.time(decoder, [NUM_ESTIMATE_STEPS])[0] for decoder in (stock, patched)) / NUM_ESTIMATE_STEPS
        fitting = [length for length in lengths if length * estimate <= self.seconds_left()]
        if fitting != lengths:
            left_out = lengths[len(fitting) :]
            self.leave_out(
                f"{mode}, {left_out[0]} to {left_out[-1]} tokens: {left_out[0] * estimate:.0f} s, more than is left of --seconds"
            )
        if not fitting:
            return
        rows = [Row(mode, cache_length, length) for length in fitting]
        seconds_per_repeat = fitting[-1] * estimate
        seconds = min(SECONDS_PER_MODE, self.seconds_left())
        repeats = min(self.arguments.repeats, max(1, int(seconds / seconds_per_repeat)))
        columns = (
            TextColumn(f"{mode:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
        )
        # Drawn only between timed parts: a thread that draws would take its time from the loop.
        with Progress(*columns, console=self.console, transient=True, auto_refresh=False) as progress:
            task = progress.add_task(mode, total=2 * repeats * fitting[-1])

            def advance(num_steps: int) -> None:
                progress.update(task, advance=num_steps, refresh=True)

            for _ in range(repeats):
                for decoder, name in ((stock, "stock_ms"), (patched, "patched_ms")):
                    elapsed = self.time(decoder, fitting, advance)
                    for row, value in zip(rows, elapsed, strict=True):
                        getattr(row, name).append(1e3 * value / row.num_tokens)
        self.report.rows += rows

    def time(self, decoder: Decoder, lengths: list[int], advance: Callable[[int], None] | None = None) -> list[float]:
        """Seconds from the end of the prompt to each of ``lengths`` tokens, of one run. ``advance`` hears of tokens, off the clock."""
        decoder.rewind()
        elapsed: list[float] = []
        num_steps, seconds = 0, 0.0
        with decoder.patch():
            for length in lengths:
                self.synchronize()
                begin = time.perf_counter()
                for _ in range(length - num_steps):
                    decoder.step()
                self.synchronize()
                seconds += time.perf_counter() - begin
                elapsed.append(seconds)
                if advance is not None:
                    advance(length - num_steps)
                num_steps = length
        return elapsed

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def seconds_left(self) -> float:
        return self.arguments.seconds - (time.perf_counter() - self.begin)

    def leave_out(self, reason: str) -> None:
        self.report.not_run.append(reason)

    def status(self, text: str) -> Any:
        return self.console.status(text)

    def write(self) -> None:
        if self.arguments.json:
            self.report.write_json(self.arguments.json)
        if self.arguments.plot and self.report.rows:
            self.report.write_plot(self.arguments.plot)


def positions(lengths: list[int]) -> int:
    """Positions of a cache for the prompt and the longest of ``lengths``, rounded up to what fast attention kernels like."""
    needed = PROMPT_LENGTH + max(*lengths, NUM_CHECKED_TOKENS) + 1
    return -(-needed // CACHE_GRANULARITY) * CACHE_GRANULARITY


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return number


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    for mode in modes:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"must be some of {','.join(MODES)}, got {mode}")
    return modes
