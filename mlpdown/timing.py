"""Time: taken in turns, so that a clock that drifts drifts for all candidates alike; and limits of it."""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch

NUM_WARM_UP_ROUNDS = 3

Key = TypeVar("Key", bound=Hashable)
median = statistics.median


def quartiles(samples: list[float]) -> tuple[float, float]:
    """Lower and upper quartile; of a single sample, that sample."""
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return lower, upper


class Captured:
    """Work in a CUDA graph: run once to warm up (or ``warm_up`` in its place), once to be captured, then replayed.

    Not :class:`torch.cuda.graph`: it collects garbage before each capture, which takes longer than a whole measurement.
    """

    def __init__(self, work: Callable[[], Any], warm_up: Callable[[], object] | None = None) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            (warm_up or work)()
            torch.cuda.synchronize()
            # Only this thread is held to what a capture allows.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.outs = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self.replay: Callable[[], None] = graph.replay


class Clock:
    """Times of pieces of work. ``kind`` is "device": between events of the stream, while the host runs ahead; "wall": from idle device to
    idle device; or "host": from an idle device until the work has been enqueued."""

    def __init__(self, device: torch.device, kind: str) -> None:
        self.device, self.kind = device, kind
        self.marks: list[tuple[Any, Any]] = []

    def time(self, work: Callable[[], object]) -> None:
        begin = self._mark(waits=True)
        work()
        self.marks.append((begin, self._mark(waits=self.kind == "wall")))

    def milliseconds(self) -> list[float]:
        """The times, in order. Waits for the device."""
        if self.kind != "device":
            return [1e3 * (end - begin) for begin, end in self.marks]
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in self.marks]

    def _mark(self, waits: bool) -> Any:
        if self.kind == "device":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if waits and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def time_rounds(candidates: Mapping[Key, Callable[[], object]], clock: Clock, num_rounds: int, num_calls: int) -> dict[Key, list[float]]:
    """Microseconds a call, of which each candidate makes ``num_calls``; one sample a round."""
    names = list(candidates)
    shifts = [round_idx % len(names) for round_idx in range(NUM_WARM_UP_ROUNDS + num_rounds)]
    order = [name for shift in shifts for name in names[shift:] + names[:shift]]
    for name in order:
        clock.time(candidates[name])
    samples: dict[Key, list[float]] = {name: [] for name in names}
    for name, milliseconds in list(zip(order, clock.milliseconds(), strict=True))[NUM_WARM_UP_ROUNDS * len(names) :]:
        samples[name].append(1e3 * milliseconds / num_calls)
    return samples


class TimeLimitExpired(BaseException):
    """Not an Exception: the compiler catches those, and goes on with something slower."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExpired in the body once it has run for so long. For the main thread, the only one that signals reach."""

    def expire(_number: int, _frame: object) -> None:
        raise TimeLimitExpired(f"not done in {seconds:.1f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
