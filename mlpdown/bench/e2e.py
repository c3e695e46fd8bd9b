"""``mlpdown bench e2e``: decode a whole model token by token, PyTorch against patched; checked before it is timed.

The JSON is one object: ``benchmark`` ("e2e"), ``schema_version``; ``machine``; ``model``, ``dtype``, ``device``, ``settings``; the checks
``logits`` and ``tokens`` (:mod:`mlpdown.bench.e2e_check`); ``rows``, one a mode and length (:func:`mlpdown.bench.e2e_timing.row`);
``passes``, one a decode that was timed, with its pairs [end, num_steps, stock_ms, patched_ms]; ``build_seconds`` and ``calls_of_op``, by mode
and cache; ``not_run`` and ``failed``: why anything was left out, and what went wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import sys
import time
import traceback
from typing import Any

import torch

import mlpdown

from .. import arguments as argument_types
from .. import machine, native_backend
from ..accuracy import CheckError
from ..json_lines import write_json
from ..plan import RING_COMPUTE_CAPABILITY, choose_plan
from ..timing import Clock
from .baselines import TimeLimitExpired, first_line, time_limit, torch_layer
from .e2e_check import Oracle
from .e2e_decode import Decoder, EagerDecoder, StaticDecoder, forced_logits, has_inductor_pdl
from .e2e_loop import LoopModel
from .e2e_models import SIZES, load, random_model, twin
from .e2e_timing import SCHEMA_VERSION, mode_label, row, table, time_in_turns, time_lengths
from .plot import plot_decoding, require_matplotlib
from .report import new_console

# With a static cache: a CUDA graph of the model as it comes, or compiled, or compiled with dependent launch.
STATIC_MODES = ("graph", "compile", "compile-pdl")
MODES = (*STATIC_MODES, "loop", "eager")
PROMPT_LENGTH = 8
NUM_CHECKED_TOKENS = 32
CACHE_GRANULARITY = 16
# Attention reads all of a static cache, and few tokens need a small one: lengths up to this have a cache of their own.
SHORT_TOKENS = 256
NUM_ESTIMATE_STEPS = 8
# After a mode's longest decode, its shorter ones are repeated for at most so long: every mode is to have its turn.
REPEAT_SECONDS = 30.0
# A compiler that takes longer, for both models together, is given up.
BUILD_LIMIT_SECONDS = 240.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlpdown bench e2e``."""
    add, path = parser.add_argument, {"type": argument_types.output_file, "metavar": "PATH"}
    add("--model", help="a GPT-NeoX checkpoint, folder or hub name; default: random weights of --size")
    add("--size", choices=SIZES, help="size of random weights (2.8b on a GPU, tiny without)")
    add("--dtype", choices=("float16", "bfloat16"), default="float16")
    add("--device", type=argument_types.device, help="cuda where there is one, else cpu")
    static = f"{', '.join(STATIC_MODES)} take the longest up to {SHORT_TOKENS} and the longest: their steps are all alike"
    add("--tokens", help=f"lengths to decode, with commas (16,32,...,2048; to 64 without a GPU); {static}")
    pdl = "compile-pdl lets the compiler's kernels start early too, as TORCHINDUCTOR_ENABLE_PDL=1 does"
    add("--modes", default=",".join(MODES), help=f"with commas (%(default)s); {pdl}")
    add("--backend", default="auto", help="of the patched model: auto, native, numba or torch")
    add("--weight-prefetch", action="store_true", help="promise that no weight is written while the model decodes")
    add("--pairs", type=int, default=100, help="repeat a short decode until so many blocks of it were timed (100)")
    add("--seconds", type=float, default=420, help="start nothing that would end later than this (420)")
    add("--seed", type=int, default=0)
    add("--json", **path, help="write every block and what it ran on")
    add("--plot", **path, help="draw time per token (.svg or .png; needs matplotlib)")
    add("--commit", help="the commit to record, where the checkout does not say")


def main(arguments: argparse.Namespace) -> int:
    """Run the benchmark. Returns 0; 1 if a mode failed or computes something wrong, or none could run; 2 for arguments that do not go
    together."""
    try:
        bench = Benchmark(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"mlpdown bench e2e: {error}", file=sys.stderr)
        return 2
    try:
        bench.run()
    except CheckError as error:
        print(f"mlpdown bench e2e: {error}", file=sys.stderr)
        return 1
    return 1 if bench.content["failed"] or not bench.content["rows"] else 0


class Benchmark:
    """One run of the command: one model, stock and patched, checked and timed in every mode.

    Not one model that is patched and unpatched between blocks: each keeps what Python and the compiler know of its classes.

    Raises:
        ValueError, RuntimeError, OSError: the arguments do not go together, or need what this machine lacks.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.begin, self.arguments = time.perf_counter(), arguments
        self.device = machine.current_device(arguments.device)
        self.on_cuda = self.device.type == "cuda"
        self.modes = arguments.modes.split(",")
        backends, taken = mlpdown.backends(), arguments.backend
        if taken == "auto":
            taken = "native" if self.on_cuda and backends["native"].available else "torch"
        self.check_arguments(backends.get(taken))
        size, dtype = arguments.size or ("2.8b" if self.on_cuda else "tiny"), getattr(torch, arguments.dtype)
        self.model: Any = load(arguments.model, dtype, self.device) if arguments.model else None
        self.model = self.model or random_model(size, dtype, self.device, arguments.seed)
        config, generator = self.model.config, torch.Generator().manual_seed(arguments.seed)
        self.prompt = torch.randint(config.vocab_size, (1, PROMPT_LENGTH), generator=generator).to(self.device)
        settings = {"backend": arguments.backend, "weight_prefetch": arguments.weight_prefetch}
        self.patched_model = twin(self.model)
        patch = mlpdown.patch(self.patched_model, **settings)
        ops = (torch_layer, functools.partial(mlpdown.run, **settings))
        self.loops = [LoopModel(self.model, positions(self.lengths[-1]), op) for op in ops]
        facts = {**settings, "backend_taken": taken, "prompt_length": PROMPT_LENGTH}
        self.expected_calls = None
        if self.on_cuda and taken == "native":
            self.expected_calls = {"mlpdown::mlp_down": config.num_hidden_layers}
            sizes = config.hidden_size, config.intermediate_size, native_backend.device_properties(self.device.index)
            facts["plan"] = dataclasses.asdict(choose_plan(*sizes, weight_prefetch=arguments.weight_prefetch))
        made_on = {**machine.describe(arguments.commit), "transformers": importlib.metadata.version("transformers")}
        label = arguments.model or f"GPT-NeoX {size} (random weights)"
        device_name = torch.cuda.get_device_name(self.device) if self.on_cuda else "CPU"
        self.content: dict[str, Any] = {"benchmark": "e2e", "schema_version": SCHEMA_VERSION, "machine": made_on, "model": label}
        self.content |= {"dtype": arguments.dtype, "device": device_name, "settings": facts, "logits": [], "tokens": [], "rows": []}
        self.content |= {"passes": [], "build_seconds": {}, "calls_of_op": {}, "not_run": [], "failed": []}
        self.say(f"{label}, {arguments.dtype}, {device_name}: {patch}, backend {taken}")
        if taken != arguments.backend and taken == "torch":
            self.say(f"native is not taken: {backends['native'].reason}")

    def check_arguments(self, status: Any) -> None:
        arguments, lengths = self.arguments, self.arguments.tokens
        lengths = lengths.split(",") if lengths else [str(2**power) for power in range(4, 12 if self.on_cuda else 7)]
        for length in lengths:
            if not length.isdecimal() or int(length) < 1:
                raise ValueError(f"--tokens must be positive numbers with commas, got {length!r}")
        self.lengths = sorted(map(int, lengths))
        if not set(self.modes) <= set(MODES):
            raise ValueError(f"--modes must be some of {','.join(MODES)}, got {arguments.modes!r}")
        if arguments.model and arguments.size:
            raise ValueError(f"--model and --size exclude each other, got {arguments.model} and {arguments.size}")
        if arguments.plot and arguments.plot.suffix not in (".svg", ".png"):
            raise ValueError(f"--plot must end in .svg or .png, got {arguments.plot}")
        if arguments.plot:
            require_matplotlib()
        if importlib.util.find_spec("transformers") is None:
            raise RuntimeError("transformers 4.57 or newer must be installed for this benchmark: pip install transformers")
        if status is None or not status.available:
            reason = status.reason if status else "there is none of that name"
            raise RuntimeError(f"backend {arguments.backend!r} cannot run here: {reason}")

    def run(self) -> None:
        """Check, then time mode by mode; what is known is written after each.

        Raises:
            CheckError: the patched model's logits are wrong. What fails later costs only its own mode.
        """
        decoder = EagerDecoder(self.model, self.prompt)
        decoder.rewind()
        for _ in range(NUM_CHECKED_TOKENS - 1):
            decoder.step()
        continuation = torch.tensor(decoder.tokens(), device=self.device)
        self.oracle = Oracle(self.model, self.prompt, continuation)
        for name, models in (("transformers", (self.model, self.patched_model)), ("loop", self.loops)):
            check = self.oracle.check_logits(name, *(forced_logits(model, self.prompt, continuation) for model in models))
            self.content["logits"].append(check)
            self.say("logits, {name}: {patched:.3e} from float64 (stock {stock:.3e}, bound {bound:.3e}, root mean square)".format(**check))
        for mode, lengths in self.stages():
            cache_length = positions(lengths[-1]) if mode in STATIC_MODES else None
            what = f"{mode_label(mode, cache_length)}, to {lengths[-1]} tokens"
            try:
                reason = self.run_stage(mode, lengths, cache_length)
                self.content["not_run"] += [f"{what}: {reason}"] if reason else []
            except (Exception, TimeLimitExpired) as error:  # noqa: BLE001 - whatever it is, the modes that are left may run
                traceback.print_exc()
                self.content["failed"].append(f"{what}: {type(error).__name__}: {first_line(error)}")
            gc.collect()
            self.write()
        if self.content["rows"]:
            new_console().print(table(self.content))
        for line in [f"not run: {line}" for line in self.content["not_run"]] + [f"FAILED: {line}" for line in self.content["failed"]]:
            self.say(line)
        self.write()

    def stages(self) -> list[tuple[str, list[int]]]:
        """Modes and lengths in the order in which they run: what takes long to build and says least new comes last."""
        short = [length for length in self.lengths if length <= SHORT_TOKENS][-1:]
        long = [length for length in self.lengths if length > SHORT_TOKENS][-1:]
        stages = [*((mode, short) for mode in STATIC_MODES), ("loop", self.lengths)]
        stages += [*((mode, long) for mode in STATIC_MODES), ("eager", self.lengths)]
        return [(mode, lengths) for mode, lengths in stages if lengths and mode in self.modes]

    def run_stage(self, mode: str, lengths: list[int], cache_length: int | None) -> str | None:
        """Build both decoders, check them, time them; returns why not, or why not to every length."""
        if mode == "graph" and not self.on_cuda:
            return "a CUDA graph needs a CUDA device"
        if mode == "compile-pdl" and not has_inductor_pdl():
            return f"the compiler of torch {torch.__version__} has no triton.enable_pdl"
        if mode == "compile-pdl" and not (self.on_cuda and torch.cuda.get_device_capability(self.device) >= RING_COMPUTE_CAPABILITY):
            return "dependent launch needs a GPU of compute capability 9.0 or newer"
        label = mode_label(mode, cache_length)
        before = [sum(seconds) for name, seconds in self.content["build_seconds"].items() if name.split(",")[0] == mode]
        if self.seconds_left() <= max(before, default=0.0):
            return f"{max(self.seconds_left(), 0.0):.0f} s are left of --seconds, building takes {max(before, default=0.0):.0f} s"
        stock, patched = self.build(mode, cache_length, label)
        check = self.oracle.check_tokens(label, stock, patched, NUM_CHECKED_TOKENS)
        self.content["tokens"].append(check)
        calls = {"stock": stock.calls_of_op(), "patched": patched.calls_of_op()}
        self.content["calls_of_op"][label] = calls
        if calls["stock"] or (self.expected_calls and calls["patched"] != self.expected_calls):
            raise CheckError(f"{label}: a step calls {calls}, should be none and {self.expected_calls}")
        kind = "device" if self.on_cuda and mode in STATIC_MODES else "wall"
        new_clock = functools.partial(Clock, self.device, kind)
        for _ in range(2):  # once to be warm
            pairs = time_in_turns(stock, patched, [NUM_ESTIMATE_STEPS], new_clock())
        estimate = max(pair.stock_ms + pair.patched_ms for pair in pairs) / 1e3
        fitting = [length for length in lengths if length * estimate <= self.seconds_left()]
        if fitting:

            def may_repeat(length: int, seconds: float) -> bool:
                return length * estimate <= min(self.seconds_left(), REPEAT_SECONDS - seconds)

            passes = time_lengths(stock, patched, fitting, new_clock, self.arguments.pairs, may_repeat)
            self.content["passes"] += [{"mode": mode, "cache_length": cache_length, "pairs": pairs} for pairs in passes]
            rows = [row(mode, cache_length, length, passes) for length in fitting]
            self.content["rows"] = sorted(self.content["rows"] + rows, key=lambda row: MODES.index(row["mode"]))
            ratio = "{median:.3f} ({low:.3f} to {high:.3f})".format(**rows[-1]["ratio"])
            self.say(f"{label}: {check['num_alike']} of {NUM_CHECKED_TOKENS} tokens alike; PyTorch over mlpdown to {fitting[-1]} tokens: {ratio}")
        if fitting == lengths:
            return None
        shortest = lengths[len(fitting)]
        return f"{shortest} tokens and more take {shortest * estimate:.0f} s, more than is left of --seconds"

    def build(self, mode: str, cache_length: int | None, label: str) -> list[Decoder]:
        """The stock and the patched decoder of a mode, warm."""
        if cache_length is None:
            return [EagerDecoder(model, self.prompt) for model in (self.loops if mode == "loop" else (self.model, self.patched_model))]
        decoders: list[Decoder] = []
        self.content["build_seconds"][label] = seconds = []
        torch._dynamo.reset()
        options = {"compile": mode != "graph", "graph": self.on_cuda, "pdl": mode == "compile-pdl"}
        with time_limit(min(BUILD_LIMIT_SECONDS, self.seconds_left())):  # a signal can end the compiler, which knows no limit
            for model in (self.model, self.patched_model):
                begin = time.perf_counter()
                decoders.append(StaticDecoder(model, self.prompt, cache_length, **options))
                seconds.append(round(time.perf_counter() - begin, 1))
        self.say(f"{label}: built in {seconds[0]} s (PyTorch) and {seconds[1]} s (patched)")
        return decoders

    def seconds_left(self) -> float:
        return self.arguments.seconds - (time.perf_counter() - self.begin)

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self.begin:6.1f} s  {text}", flush=True)  # at once, for whoever follows a log

    def write(self) -> None:
        if self.arguments.json:
            write_json(self.arguments.json, self.content)
        if self.arguments.plot and self.content["rows"]:
            plot_decoding(self.content, self.arguments.plot)


def positions(num_tokens: int) -> int:
    """Positions of a cache for the prompt and ``num_tokens``, rounded up to what fast attention kernels like."""
    needed = PROMPT_LENGTH + max(num_tokens, NUM_CHECKED_TOKENS) + 1
    return -(-needed // CACHE_GRANULARITY) * CACHE_GRANULARITY
