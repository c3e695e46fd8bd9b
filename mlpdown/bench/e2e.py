"""Decode a whole model token by token, PyTorch against patched: in a CUDA graph, compiled, in a hand-written loop, as it comes."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import sys
import time
import traceback
from typing import Any

import torch

import mlpdown
from mlpdown import native_backend
from mlpdown.arguments import device as device_argument
from mlpdown.arguments import output_file
from mlpdown.bench import e2e_models
from mlpdown.bench.e2e_check import CheckError
from mlpdown.bench.e2e_decode import Decoder, has_inductor_pdl
from mlpdown.bench.e2e_passes import Passes
from mlpdown.bench.e2e_report import Report, mode_label
from mlpdown.bench.e2e_subject import COMPILED_MODES, NUM_CHECKED_TOKENS, STATIC_MODES, Subject
from mlpdown.bench.e2e_timing import Clock, EventClock, WallClock, time_in_turns
from mlpdown.bench.peers import TimeLimitExpired, time_limit
from mlpdown.bench.tables import new_console
from mlpdown.plan import RING_COMPUTE_CAPABILITY, choose_plan

MODES = (*STATIC_MODES, "loop", "eager")
PROMPT_LENGTH = 8
CACHE_GRANULARITY = 16
# Attention reads all of a static cache, and who asks for few tokens gets a small one: lengths up to this have a cache of their own.
SHORT_TOKENS = 256
NUM_ESTIMATE_STEPS = 8
# After a mode's longest decode, its shorter ones are repeated for at most so long: every mode is to have its turn.
REPEAT_SECONDS = 30.0
# A compiler that takes longer, for both models together, is given up.
BUILD_LIMIT_SECONDS = 240.0
NATIVE_OP = "mlpdown::mlp_down"
PLOT_SUFFIXES = (".svg", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mlpdown bench e2e``."""
    parser.add_argument("--model", help="a GPT-NeoX checkpoint, folder or hub name; default: random weights of --size")
    parser.add_argument(
        "--size", choices=e2e_models.SIZES, help="size of random weights (default: 2.8b on a GPU, tiny without)"
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--device", type=device_argument, help="default: cuda where there is one")
    parser.add_argument(
        "--tokens",
        type=_numbers,
        help="lengths to decode, with commas (default: 16,32,...,2048; to 64 without a GPU); "
        f"{' and '.join(STATIC_MODES)}, whose steps are all alike, take the longest up to {SHORT_TOKENS} and the longest",
    )
    parser.add_argument(
        "--modes",
        type=_modes,
        default=MODES,
        help=f"any of {','.join(MODES)} (default: all that can run); compile-pdl lets the compiler's kernels start early too, as "
        "TORCHINDUCTOR_ENABLE_PDL=1 does",
    )
    parser.add_argument("--backend", default="auto", help="of the patched model: auto, native, numba or torch")
    parser.add_argument(
        "--weight-prefetch", action="store_true", help="promise that no weight is written while the model decodes"
    )
    parser.add_argument(
        "--pairs",
        type=_positive,
        default=100,
        help="repeat a short decode until so many blocks of it were timed (default: 100)",
    )
    parser.add_argument(
        "--seconds", type=float, default=420, help="start nothing that would end later than this (default: 420)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=output_file, metavar="PATH", help="write every block and what it ran on")
    parser.add_argument(
        "--plot", type=output_file, metavar="PATH", help="draw time per token (.svg or .png; needs matplotlib)"
    )
    parser.add_argument("--commit", help="the commit to record, where the checkout does not say")


def main(arguments: argparse.Namespace) -> int:
    """Run the benchmark. Returns 0; 1 if a mode failed or computes something wrong, or none could run; 2 for arguments that do not go
    together."""
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
    return 1 if bench.report.failed or not bench.report.rows else 0


class Benchmark:
    """One run of the command: one model, checked and timed in every mode.

    Raises:
        ValueError, RuntimeError: the arguments do not go together, or need what this machine lacks.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.console = new_console()
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
        backends = mlpdown.backends()
        status = None if arguments.backend == "auto" else backends.get(arguments.backend)
        if arguments.backend != "auto" and (status is None or not status.available):
            raise RuntimeError(
                f"backend {arguments.backend!r} cannot run here: {status.reason if status else 'there is none of that name'}"
            )
        if self.on_cuda:
            self.device = torch.device(
                "cuda", torch.cuda.current_device() if self.device.index is None else self.device.index
            )
            torch.cuda.set_device(self.device)
        self.is_native = self.on_cuda and (
            arguments.backend == "native" or (arguments.backend == "auto" and backends["native"].available)
        )
        self.lengths: list[int] = sorted(
            arguments.tokens or [2**power for power in range(4, 12 if self.on_cuda else 7)]
        )
        if arguments.plot and importlib.util.find_spec("matplotlib") is None:
            raise RuntimeError("matplotlib must be installed for --plot: pip install matplotlib")
        if arguments.plot and arguments.plot.suffix not in PLOT_SUFFIXES:
            raise ValueError(f"--plot must end in {' or '.join(PLOT_SUFFIXES)}, got {arguments.plot}")
        settings = {"backend": arguments.backend, "weight_prefetch": arguments.weight_prefetch}
        max_length = positions(self.lengths[-1])
        dtype = getattr(torch, arguments.dtype)
        if arguments.model:
            model: Any = e2e_models.load(arguments.model, dtype, self.device)
            label = arguments.model
        else:
            size_name = arguments.size or ("2.8b" if self.on_cuda else "tiny")
            size = e2e_models.SIZES[size_name]
            weights = e2e_models.random_weights(size, dtype, self.device, arguments.seed)
            model = e2e_models.build(size, weights, max_length)
            label = f"GPT-NeoX {size_name} (random weights)"
        generator = torch.Generator().manual_seed(arguments.seed)
        prompt = torch.randint(model.config.vocab_size, (1, PROMPT_LENGTH), generator=generator).to(self.device)
        self.subject = Subject(model, prompt, settings, max_length)
        self.num_layers: int = model.config.num_hidden_layers
        facts: dict[str, Any] = {**settings, "prompt_length": PROMPT_LENGTH}
        if self.is_native:
            properties = native_backend.device_properties(self.device.index)
            sizes = model.config.hidden_size, model.config.intermediate_size
            facts["plan"] = dataclasses.asdict(
                choose_plan(*sizes, properties, weight_prefetch=arguments.weight_prefetch)
            )
        device_name = torch.cuda.get_device_name(self.device) if self.on_cuda else "CPU"
        self.report = Report(label, arguments.dtype, device_name, facts, arguments.commit)

    def run(self) -> None:
        """Check, then time mode by mode; what is known is written after each.

        Raises:
            CheckError: the patched model's logits are wrong. What fails later costs only its own mode.
        """
        self.say(f"{self.report.model}, {self.report.dtype}, {self.report.device}: {self.subject.patch}")
        self.report.logits = self.subject.check_logits()
        for check in self.report.logits:
            self.say(
                f"logits, {check.name}: {check.patched:.3e} from float64 (stock {check.stock:.3e}, bound {check.bound:.3e}, "
                "root mean square over tokens and vocabulary)"
            )
        for mode, lengths in self.stages():
            cache_length = positions(lengths[-1]) if mode in STATIC_MODES else None
            what = f"{mode_label(mode, cache_length)}, to {lengths[-1]} tokens"
            try:
                self.run_stage(mode, lengths, cache_length, what)
            except TimeLimitExpired as error:
                self.report.failed.append(f"{what}: building was given up: {error}")
            except Exception as error:  # noqa: BLE001 - whatever it is, the modes that are left may run
                traceback.print_exc()
                first_line = next(iter(str(error).strip().splitlines()), "")
                self.report.failed.append(f"{what}: {type(error).__name__}: {first_line}")
            gc.collect()
            self.write()
        self.console.print(self.report.table())
        for line in self.report.not_run:
            self.say(f"not run: {line}")
        for line in self.report.failed:
            self.say(f"FAILED: {line}")
        self.write()

    def stages(self) -> list[tuple[str, list[int]]]:
        """Modes and lengths in the order in which they run: what takes long to build and says least new comes last."""
        short = [length for length in self.lengths if length <= SHORT_TOKENS][-1:]
        long = [length for length in self.lengths if length > SHORT_TOKENS][-1:]
        stages = [*((mode, short) for mode in STATIC_MODES), ("loop", self.lengths)]
        stages += [*((mode, long) for mode in STATIC_MODES), ("eager", self.lengths)]
        return [(mode, lengths) for mode, lengths in stages if lengths and mode in self.arguments.modes]

    def run_stage(self, mode: str, lengths: list[int], cache_length: int | None, what: str) -> None:
        """Build both decoders, check them, time them."""
        reason = self.reason_against(mode)
        if reason is not None:
            self.report.not_run.append(f"{what}: {reason}")
            return
        earlier = [sum(seconds) for name, seconds in self.report.build_seconds.items() if name.split(",")[0] == mode]
        needed, left = max(earlier, default=0.0), self.seconds_left()
        if left <= needed:
            building = f", building takes {needed:.0f} s" if needed else ""
            self.report.not_run.append(f"{what}: {max(left, 0.0):.0f} s are left of --seconds{building}")
            return
        if mode in COMPILED_MODES:
            torch._dynamo.reset()
            # A signal can end the compiler, which knows no limit; the other modes build at once.
            with time_limit(min(BUILD_LIMIT_SECONDS, left)):
                decoders = self.build(mode, cache_length)
        else:
            decoders = self.build(mode, cache_length)
        self.measure(mode, lengths, cache_length, what, *decoders)

    def reason_against(self, mode: str) -> str | None:
        """Why a mode cannot run here; None if it can."""
        if mode == "graph" and not self.on_cuda:
            return "a CUDA graph needs a CUDA device"
        if mode == "compile-pdl":
            if not has_inductor_pdl():
                return f"the compiler of torch {torch.__version__} has no triton.enable_pdl"
            if not self.on_cuda or torch.cuda.get_device_capability(self.device) < RING_COMPUTE_CAPABILITY:
                return "dependent launch needs a GPU of compute capability 9.0 or newer"
        return None

    def build(self, mode: str, cache_length: int | None) -> tuple[Decoder, Decoder]:
        """The stock and the patched decoder of a mode, warm."""
        decoders, seconds = [], []
        for is_patched in (False, True):
            begin = time.perf_counter()
            decoders.append(self.subject.decoder(mode, is_patched, cache_length))
            seconds.append(round(time.perf_counter() - begin, 1))
        if cache_length is not None:
            self.report.build_seconds[mode_label(mode, cache_length)] = seconds
            self.say(
                f"{mode_label(mode, cache_length)}: built in {seconds[0]} s (PyTorch) and {seconds[1]} s (patched)"
            )
        stock, patched = decoders
        return stock, patched

    def measure(
        self, mode: str, lengths: list[int], cache_length: int | None, what: str, stock: Decoder, patched: Decoder
    ) -> None:
        """Check tokens and calls, then time both decoders in turns."""
        label = mode_label(mode, cache_length)
        check = self.subject.oracle.check_tokens(label, stock, patched, NUM_CHECKED_TOKENS)
        self.say(str(check))
        self.report.tokens.append(check)
        self.check_calls(label, stock, patched)

        def new_clock() -> Clock:
            return EventClock() if self.on_cuda and mode in STATIC_MODES else WallClock(self.device)

        time_in_turns(stock, patched, [NUM_ESTIMATE_STEPS], new_clock())  # to be warm
        pairs = time_in_turns(stock, patched, [NUM_ESTIMATE_STEPS], new_clock())
        estimate = max(pair.stock_ms + pair.patched_ms for pair in pairs) / 1e3
        fitting = [length for length in lengths if length * estimate <= self.seconds_left()]
        if fitting != lengths:
            shortest = lengths[len(fitting)]
            self.report.not_run.append(
                f"{what}: {shortest} tokens and more take {shortest * estimate:.0f} s, more than is left of --seconds"
            )
        if not fitting:
            return

        def may_repeat(length: int, seconds_of_repeats: float) -> bool:
            return length * estimate <= min(self.seconds_left(), REPEAT_SECONDS - seconds_of_repeats)

        passes = Passes(mode, cache_length)
        rows = passes.time(stock, patched, fitting, new_clock, self.arguments.pairs, may_repeat)
        self.report.passes.append(passes)
        self.report.rows = sorted(self.report.rows + rows, key=lambda row: MODES.index(row.mode))
        row = rows[-1]
        self.say(
            f"{what}: {row.stock_ms.median:.3f} ms a token, patched {row.patched_ms.median:.3f}, ratio {row.ratio.median:.3f} "
            f"({row.ratio.low:.3f} to {row.ratio.high:.3f})"
        )

    def check_calls(self, name: str, stock: Decoder, patched: Decoder) -> None:
        """Does each layer of a patched step call the native op, and no layer of a stock one?

        Raises:
            CheckError: it does not, where it could.
        """
        calls = {"stock": stock.calls_of_op(), "patched": patched.calls_of_op()}
        self.report.calls_of_op[name] = calls
        expected = {NATIVE_OP: self.num_layers}
        if calls["stock"] or (self.is_native and calls["patched"] != expected):
            raise CheckError(f"{name}: a step calls {calls}, should be none and {expected}")

    def seconds_left(self) -> float:
        return self.arguments.seconds - (time.perf_counter() - self.begin)

    def say(self, text: str) -> None:
        # Not through the console, which would break lines; at once, for whoever follows a log.
        print(f"{time.perf_counter() - self.begin:6.1f} s  {text}", flush=True)

    def write(self) -> None:
        if self.arguments.json:
            self.report.write_json(self.arguments.json)
        if self.arguments.plot and self.report.rows:
            self.report.write_plot(self.arguments.plot)


def positions(num_tokens: int) -> int:
    """Positions of a cache for the prompt and ``num_tokens``, rounded up to what fast attention kernels like."""
    needed = PROMPT_LENGTH + max(num_tokens, NUM_CHECKED_TOKENS) + 1
    return -(-needed // CACHE_GRANULARITY) * CACHE_GRANULARITY


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    for mode in modes:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"must be some of {','.join(MODES)}, got {mode}")
    return modes
