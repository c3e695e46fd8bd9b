"""Launches that try a changed kernel, and what goes wrong in them."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import functools
import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy.typing as npt

from mlpdown.plan import VECTOR_SIZE, Plan, instantiation

from .build import build
from .cases import assert_same_bits, expected_bits, expected_partial_sums, make_inputs, make_negative_zeros
from .launch import Inputs, Kernel, ProtocolViolation
from .mutants import ENDLESS_STATUS


@dataclasses.dataclass(frozen=True)
class Setting:
    """A launch that a changed kernel is tried with. ``prefetched_bytes``: so many, if earlier grids end as late as can be."""

    plan: Plan
    inputs: Inputs
    num_clusters: int = 1
    is_partial_sums: bool = False
    prefetched_bytes: int | None = None

    @functools.cached_property
    def expected(self) -> npt.NDArray[Any]:
        return expected_partial_sums(self.inputs) if self.is_partial_sums else expected_bits(self.inputs)


class Failure(NamedTuple):
    """A launch that went wrong: ``check`` is the emulator's, or wrong bits, prefetch, refused, endless or crash."""

    check: str
    report: str


def try_once(kernel: Kernel, setting: Setting, seed: int) -> Failure | None:
    """One launch, held to the specification's bits."""
    try:
        out, statistics = kernel.launch(
            setting.inputs,
            setting.plan,
            seed=seed,
            num_clusters=setting.num_clusters,
            is_partial_sums=setting.is_partial_sums,
            earlier_grids_last=setting.prefetched_bytes is not None,
        )
        assert_same_bits(out, setting.expected, str(setting.plan))
    except ProtocolViolation as violation:
        return Failure(violation.check, str(violation))
    except AssertionError as difference:
        return Failure("wrong bits", str(difference))
    except ValueError as refusal:
        return Failure("refused", str(refusal))
    if setting.prefetched_bytes not in (None, statistics.bytes_prefetched):
        return Failure(
            "prefetch", f"{statistics.bytes_prefetched} bytes were prefetched, not {setting.prefetched_bytes}"
        )
    return None


LONE_CTA = Plan(1, 2, num_stages=2, stages_in_flight=1, num_consumer_warps=1)
ACTIVATION_IN_REGISTERS = dataclasses.replace(LONE_CTA, activation_in_registers=True)
RING = Plan(2, 2, num_stages=2, stages_in_flight=2, num_consumer_warps=2)
RING_OF_FOUR = Plan(4, 1, num_stages=2, stages_in_flight=2, num_consumer_warps=1)


def _inputs(hidden_dim: int, num_vectors: int, *, is_bare: bool = False) -> Inputs:
    return make_inputs(hidden_dim, num_vectors * VECTOR_SIZE, "float16", 1, attn_output=not is_bare, bias=not is_bare)


# 21 stages of 2 rows: the ring wraps ten times, the slots once; the last has one row. Over three clusters the shares differ.
ONE_SEGMENT = _inputs(41, 25)
TWO_SEGMENTS = _inputs(41, 257)
FOUR_SEGMENTS = _inputs(41, 515)  # two of them for each CTA of the ring
# Five vectors a lane of most segments. Of the last segment six lanes have only three.
EIGHT_SEGMENTS = _inputs(3, 1025)
LONG_SEGMENT = _inputs(3, 255)  # eight vectors a lane
FEW_ROWS = _inputs(5, 200, is_bare=True)

# Of two that reach a place the first is tried first.
SETTINGS = {
    "registers": Setting(Plan.in_registers(1, num_consumer_warps=4), FEW_ROWS),
    "registers, two rows": Setting(Plan.in_registers(2, weight_prefetch=True), _inputs(11, 256), is_partial_sums=True),
    "registers, long segments": Setting(Plan.in_registers(1), _inputs(2, 2050)),
    "few rows": Setting(dataclasses.replace(LONE_CTA, num_stages=16, stages_in_flight=16), FEW_ROWS),
    "negative zeros": Setting(
        dataclasses.replace(ACTIVATION_IN_REGISTERS, num_consumer_warps=2), make_negative_zeros(3, 257 * VECTOR_SIZE)
    ),
    "short segment": Setting(dataclasses.replace(ACTIVATION_IN_REGISTERS, num_consumer_warps=8), EIGHT_SEGMENTS),
    "long segment": Setting(dataclasses.replace(ACTIVATION_IN_REGISTERS, rows_per_stage=1), LONG_SEGMENT),
    "activation in registers": Setting(ACTIVATION_IN_REGISTERS, ONE_SEGMENT),
    "lone CTA": Setting(dataclasses.replace(LONE_CTA, num_consumer_warps=2), TWO_SEGMENTS),
    "two groups": Setting(dataclasses.replace(LONE_CTA, num_consumer_warps=2), ONE_SEGMENT),
    "prefetch": Setting(
        dataclasses.replace(LONE_CTA, weight_prefetch=True),
        ONE_SEGMENT,
        prefetched_bytes=4 * ONE_SEGMENT.weight[0].nbytes,
    ),
    "ring": Setting(RING, FOUR_SEGMENTS),
    "partial sums": Setting(RING, TWO_SEGMENTS, is_partial_sums=True),
    "shares": Setting(RING, TWO_SEGMENTS, num_clusters=3),
    "staggered shares": Setting(dataclasses.replace(LONE_CTA, stagger_rows=2), ONE_SEGMENT, num_clusters=3),
    "one share, staggered": Setting(dataclasses.replace(LONE_CTA, stagger_rows=2), FEW_ROWS),
    "all rows staggered": Setting(dataclasses.replace(LONE_CTA, stagger_rows=13), ONE_SEGMENT, num_clusters=3),
    "more rows staggered": Setting(dataclasses.replace(LONE_CTA, stagger_rows=63), ONE_SEGMENT, num_clusters=3),
    "one row a stage": Setting(RING_OF_FOUR, _inputs(19, 515)),
    "four rows a stage": Setting(dataclasses.replace(RING_OF_FOUR, rows_per_stage=4), _inputs(9, 515)),
}


_PLANS = [(setting.plan, setting.inputs.mlp_intermediate.size) for setting in SETTINGS.values()]
# What these launch, of the ring and of registers.
INSTANTIATIONS = (
    sorted({instantiation(plan, size) for plan, size in _PLANS if not plan.rows_in_registers}),
    tuple(sorted({(plan.rows_in_registers, plan.vectors_in_flight) for plan, _ in _PLANS if plan.rows_in_registers})),
)


def run_apart(calls: Sequence[Callable[[], Failure | None]]) -> list[Failure | None]:
    """What the calls return, in processes of their own: one that crashes or never ends is a failure."""
    results: list[Failure | None] = []
    while len(results) < len(calls):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _run_child(calls[len(results) :], writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe, contextlib.suppress(EOFError):
            while True:
                results.append(pickle.load(pipe))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            check = "endless" if status == ENDLESS_STATUS else "crash"
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            results.append(Failure(check, f"{check}: the process ended {how}"))
    return results


def _run_child(calls: Sequence[Callable[[], Failure | None]], writing: int) -> NoReturn:
    """Neither a core nor a stack is printed by a crash, and what asks for too much memory does not get it."""
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
        for call in calls:
            os.write(writing, pickle.dumps(call()))
        os._exit(0)
    finally:
        os._exit(1)


class ChangedKernels:
    """The sources of a folder with a switch for each change, built for all settings; without a choice, the kernels as they stand."""

    def __init__(self, native: Path, num_changes: int) -> None:
        self._kernel = Kernel(*INSTANTIATIONS, native, optimise=False)
        library = ctypes.CDLL(str(build(native, *INSTANTIATIONS, optimise=False)))
        self._chosen = ctypes.c_uint32.in_dll(library, "emulator_mutant")
        self._visits = ctypes.c_uint32.in_dll(library, "emulator_visits")
        self._reached = (ctypes.c_bool * num_changes).in_dll(library, "emulator_reached")
        self.reaching: list[list[str]] = [[] for _ in range(num_changes)]
        for name, setting in SETTINGS.items():
            ctypes.memset(self._reached, 0, num_changes)
            failure = try_once(self._kernel, setting, 0)
            assert failure is None, f"with every change switched off, {name} fails: {failure}"
            for idx, is_reached in enumerate(self._reached):
                if is_reached:
                    self.reaching[idx].append(name)

    def first_failures(self, changes: Iterable[tuple[int, list[str], int]], check: str = "") -> list[Failure | None]:
        """For each change, its settings and a number of schedules of each: what fails first, or first in ``check``."""
        return run_apart([functools.partial(self._search, *change, check) for change in changes])

    def _search(self, idx: int, settings: list[str], num_schedules: int, check: str) -> Failure | None:
        for seed in range(num_schedules):
            for name in settings:
                self._chosen.value, self._visits.value = idx, 0
                failure = try_once(self._kernel, SETTINGS[name], seed)
                if failure and check in ("", failure.check):
                    return failure
        return None
