"""Two decoders, timed in turns: a few steps of the one, the same few steps of the other.

A loop of Python is bound by the host, and a shared host changes its speed by more than there is to measure, for seconds at a time. Both
halves of a pair see the same host, so the ratio of a pair is free of what lasts longer than a pair; the median over pairs is free of what
hits only one half. Who goes first alternates, so that a drift within pairs cancels as well.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

from mlpdown.bench.e2e_decode import Decoder

# Long enough for an event or a clock (a millisecond a step and more), short enough for the host to stay as it is.
STEPS_PER_BLOCK = 4


@dataclasses.dataclass(frozen=True)
class Pair:
    """One block of steps at the same positions, decoded by both. Times are in milliseconds a token."""

    end: int
    """Tokens since the prompt when the block ended."""
    num_steps: int
    stock_ms: float
    patched_ms: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A median and what is known of it: the quartiles, and the interval that holds it with 95 %, were pairs independent.

    Of fewer than six samples no interval holds it so surely; it is then from the least to the largest.
    """

    median: float
    low: float
    high: float
    quartiles: tuple[float, float]


class Clock(Protocol):
    """Takes the time of one piece of work after another."""

    def time(self, work: Callable[[], None]) -> None:
        """Run ``work``."""

    def milliseconds(self) -> list[float]:
        """The times, in order. May wait for the device."""


class WallClock:
    """Times of work that the host paces: from idle device to idle device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def time(self, work: Callable[[], None]) -> None:
        self._synchronize()
        begin = time.perf_counter()
        work()
        self._synchronize()
        self.times.append(1e3 * (time.perf_counter() - begin))

    def milliseconds(self) -> list[float]:
        return self.times

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class EventClock:
    """Times of work that the device paces: the host runs ahead, and does not wait between blocks."""

    def __init__(self) -> None:
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, work: Callable[[], None]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        self.events.append((begin, end))

    def milliseconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in self.events]


def time_in_turns(
    stock: Decoder,
    patched: Decoder,
    lengths: list[int],
    clock: Clock,
    stock_first: bool = True,
) -> list[Pair]:
    """Decode from the prompt to the last of ``lengths`` tokens with both; a block ends at each length. ``clock`` is a new one."""
    stock.rewind()
    patched.rewind()
    ends = sorted({*range(STEPS_PER_BLOCK, lengths[-1] + 1, STEPS_PER_BLOCK), *lengths})
    collected = gc.isenabled()
    gc.disable()  # it would run in one half of a pair
    try:
        for index, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
            order = (stock, patched) if (index % 2 == 0) == stock_first else (patched, stock)
            for decoder in order:
                clock.time(lambda decoder=decoder, num_steps=end - begin: _steps(decoder, num_steps))  # type: ignore[misc]
        times = clock.milliseconds()
    finally:
        if collected:
            gc.enable()
    pairs = []
    for index, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        one, other = (value / (end - begin) for value in times[2 * index : 2 * index + 2])
        if (index % 2 == 0) != stock_first:
            one, other = other, one
        pairs.append(Pair(end, end - begin, one, other))
    return pairs


def _steps(decoder: Decoder, num_steps: int) -> None:
    for _ in range(num_steps):
        decoder.step()


def estimate(samples: list[float]) -> Estimate:
    """The median of ``samples`` and its 95 % interval between two of them, which assumes nothing of how they are distributed."""
    ordered = sorted(samples)
    number = len(ordered)
    # The rank below which the median lies in 2.5 % of cases: each sample is below it with probability one half.
    rank, below = 0, 1
    while 40 * below <= 2**number:
        rank += 1
        below += math.comb(number, rank)
    rank = max(rank - 1, 0)
    lower, _, upper = statistics.quantiles(ordered, n=4, method="inclusive") if number > 1 else ordered * 3
    return Estimate(statistics.median(ordered), ordered[rank], ordered[number - 1 - rank], (lower, upper))
