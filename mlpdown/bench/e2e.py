"""``mlpdown bench e2e``: decode a whole model token by token, PyTorch against patched; checked before it is timed.

The JSON is one object: ``benchmark`` ("e2e"), ``schema_version``; ``machine``; ``model``, ``dtype``, ``device``, ``settings``; the checks
``logits`` and ``tokens`` (:mod:`mlpdown.bench.e2e_check`); ``rows``, one a mode and length (:func:`mlpdown.bench.e2e_timing.row`);
``passes``, one a decode that was timed, with its pairs [end, num_steps, stock_ms, patched_ms]; ``build_seconds`` and ``calls_of_op``, by
mode and cache; ``not_run`` and ``failed``: why anything was left out, and what went wrong.
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
from ..gpt_neox import SIZES, LoopModel, load, random_model, twin
from ..heuristics import choose_plan
from ..json_lines import write_json
from ..plan import RING_COMPUTE_CAPABILITY
from ..plot import plot_decoding, require_matplotlib
from ..tables import new_console
from ..timing import Clock, TimeLimitExpired, time_limit
from .baselines import described, torch_layer
from .e2e_check import Oracle
from .e2e_decode import Decoder, EagerDecoder, StaticDecoder, forced_logits, has_inductor_pdl
from .e2e_timing import SCHEMA_VERSION, mode_label, row, table, time_in_turns, time_lengths

# With a static cache: a CUDA graph of the model as it comes, or compiled, or compiled with dependent launch.
STATIC_MODES = ("graph", "compile", "compile-pdl")
MODES = (*STATIC_MODES, "loop", "eager")
PROMPT_LENGTH = 8
NUM_CHECKED_TOKENS = 32
CACHE_GRANULARITY = 16
# Attention reads all of a static cache, and few tokens need a small one: lengths up to this have a cache of their own.
SHORT_TOKENS = 256
NUM_ESTIMATE_STEPS = 8
# A compiler that takes longer, for both models together, is given up.
BUILD_LIMIT_SECONDS = 240.0
NATIVE_OP = "mlpdown::run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlpdown bench e2e``."""
    add, path = parser.add_argument, dict[str, Any](type=argument_types.output_file, metavar="PATH")
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
    together or need what this machine lacks."""
    try:
        bench = Benchmark(arguments)
        bench.run()
    except (ValueError, OSError, CheckError) as error:
        print(f"mlpdown bench e2e: {error}", file=sys.stderr)
        return 1 if isinstance(error, CheckError) else 2
    return 1 if bench.content["failed"] or not bench.content["rows"] else 0


class Benchmark:
    """One run of the command: one model, stock and patched, checked and timed in every mode.

    Not one model that is patched and unpatched between blocks: each keeps what Python and the compiler know of its classes.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Raises ValueError if the arguments do not go together, or need what this machine lacks; OSError if there is no such model."""
        self.begin, self.arguments, self.modes = time.perf_counter(), arguments, arguments.modes.split(",")
        self.device = machine.current_device(arguments.device)
        self.on_cuda = self.device.type == "cuda"
        lengths = (arguments.tokens or ",".join(str(2**power) for power in range(4, 12 if self.on_cuda else 7))).split(",")
        status = mlpdown.backends().get("torch" if arguments.backend == "auto" else arguments.backend)
        reason = "there is none of that name" if status is None else "" if status.available else status.reason
        refusals = {
            f"--tokens must be positive numbers with commas, got {arguments.tokens!r}": not all(w.isdecimal() and int(w) for w in lengths),
            f"--modes must be some of {','.join(MODES)}, got {arguments.modes!r}": not set(self.modes) <= set(MODES),
            f"--model and --size exclude each other, got {arguments.model} and {arguments.size}": arguments.model and arguments.size,
            f"--plot must end in .svg or .png, got {arguments.plot}": arguments.plot and arguments.plot.suffix not in (".svg", ".png"),
            "transformers 4.57 or newer is needed: pip install transformers": importlib.util.find_spec("transformers") is None,
            f"backend {arguments.backend!r} cannot run here: {reason}": reason,
        }
        for refusal, holds in refusals.items():
            if holds:
                raise ValueError(refusal)
        if arguments.plot:
            require_matplotlib()
        self.lengths = sorted(map(int, lengths))
        size, dtype = arguments.size or ("2.8b" if self.on_cuda else "tiny"), getattr(torch, arguments.dtype)
        self.model: Any = load(arguments.model, dtype, self.device) if arguments.model else None
        self.model = self.model or random_model(SIZES[size], dtype, self.device, arguments.seed)
        config, generator = self.model.config, torch.Generator().manual_seed(arguments.seed)
        self.prompt = torch.randint(config.vocab_size, (1, PROMPT_LENGTH), generator=generator).to(self.device)
        settings = {"backend": arguments.backend, "weight_prefetch": arguments.weight_prefetch}
        self.patched_model = twin(self.model)
        patch = mlpdown.patch(self.patched_model, **settings)
        ops = (torch_layer, functools.partial(mlpdown.run, **settings))
        self.loops = [LoopModel(self.model, positions(self.lengths[-1]), op) for op in ops]
        facts, self.expected_calls = {**settings, "backend_taken": patch.report.backend, "prompt_length": PROMPT_LENGTH}, None
        if self.on_cuda and patch.report.backend == "native":
            self.expected_calls = {NATIVE_OP: config.num_hidden_layers}
            sizes = config.hidden_size, config.intermediate_size, native_backend.device_properties(self.device.index)
            facts["plan"] = dataclasses.asdict(choose_plan(*sizes, weight_prefetch=arguments.weight_prefetch))
        made_on = {**machine.describe(arguments.commit), "transformers": importlib.metadata.version("transformers")}
        label = arguments.model or f"GPT-NeoX {size} (random weights)"
        self.content: dict[str, Any] = {"benchmark": "e2e", "schema_version": SCHEMA_VERSION, "machine": made_on, "model": label}
        self.content |= {"dtype": arguments.dtype, "device": made_on["gpu"] if self.on_cuda else "CPU", "settings": facts, "logits": []}
        self.content |= {"tokens": [], "rows": [], "passes": [], "build_seconds": {}, "calls_of_op": {}, "not_run": [], "failed": []}
        self.say(f"{label}, {arguments.dtype}, {self.content['device']}: {patch}")

    def run(self) -> None:
        """Check the logits (CheckError if they are wrong), then time mode by mode; what fails there costs only its own mode. What is known
        is written after each."""
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
                self.content["failed"].append(f"{what}: {described(error)}")
            gc.collect()
            if self.arguments.json:
                write_json(self.arguments.json, self.content)
        for line in [f"not run: {line}" for line in self.content["not_run"]] + [f"FAILED: {line}" for line in self.content["failed"]]:
            self.say(line)
        if self.content["rows"]:
            new_console().print(table(self.content))
            if self.arguments.plot:
                plot_decoding(self.content, self.arguments.plot)

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
        needed = max((sum(spent) for name, spent in self.content["build_seconds"].items() if name.split(",")[0] == mode), default=0.0)
        if self.seconds_left() <= needed:
            return f"{max(self.seconds_left(), 0.0):.0f} s are left of --seconds, building takes {needed:.0f} s"
        decoders = stock, patched = self.build(mode, cache_length, label)
        check = self.oracle.check_tokens(label, stock, patched, NUM_CHECKED_TOKENS)
        self.content["tokens"].append(check)
        self.content["calls_of_op"][label] = calls = {"stock": stock.calls_of_op(), "patched": patched.calls_of_op()}
        if calls["stock"] or (self.expected_calls and calls["patched"] != self.expected_calls):
            raise CheckError(f"{label}: a step calls {calls}, should be none and {self.expected_calls}")
        new_clock = functools.partial(Clock, self.device, "device" if self.on_cuda and mode in STATIC_MODES else "wall")
        for _ in range(2):  # once to be warm
            pairs = time_in_turns(decoders, [NUM_ESTIMATE_STEPS], new_clock())
        estimate = max(pair.stock_ms + pair.patched_ms for pair in pairs) / 1e3
        fitting = [length for length in lengths if length * estimate <= self.seconds_left()]
        if fitting:
            passes = time_lengths(decoders, fitting, new_clock, self.arguments.pairs, estimate, self.seconds_left)
            self.content["passes"] += [{"mode": mode, "cache_length": cache_length, "pairs": pairs} for pairs in passes]
            rows = [row(mode, cache_length, length, passes) for length in fitting]
            self.content["rows"] = sorted(self.content["rows"] + rows, key=lambda row: MODES.index(row["mode"]))
            ratio = "{median:.3f} ({low:.3f} to {high:.3f})".format(**rows[-1]["ratio"])
            alike = f"{check['num_alike']} of {NUM_CHECKED_TOKENS} tokens alike"
            self.say(f"{label}: {alike}; PyTorch over mlpdown to {fitting[-1]} tokens: {ratio}")
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
        return decoders

    def seconds_left(self) -> float:
        return self.arguments.seconds - (time.perf_counter() - self.begin)

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self.begin:6.1f} s  {text}", flush=True)  # at once, for whoever follows a log


def positions(num_tokens: int) -> int:
    """Positions of a cache for the prompt and ``num_tokens``, rounded up to what fast attention kernels like."""
    return -(-(PROMPT_LENGTH + max(num_tokens, NUM_CHECKED_TOKENS) + 1) // CACHE_GRANULARITY) * CACHE_GRANULARITY
