"""Time, taken in turns: every round runs each candidate once, so that a clock that drifts drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

from .chain import Captured

NUM_WARM_UP_ROUNDS = 3

Key = TypeVar("Key", bound=Hashable)


def time_replays(candidates: Mapping[Key, Captured], num_rounds: int, num_calls: int) -> dict[Key, list[float]]:
    """Microseconds a call of each graph, one sample a round.

    All rounds are enqueued at once: the host runs ahead, so no gap on the GPU is one that the host made.
    """
    order = list(candidates)
    events: list[tuple[Key, torch.cuda.Event, torch.cuda.Event]] = []
    torch.cuda.synchronize()
    for round_idx in range(NUM_WARM_UP_ROUNDS + num_rounds):
        # Another candidate goes first each time.
        shift = round_idx % len(order)
        for name in order[shift:] + order[:shift]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            candidates[name].replay()
            end.record()
            if round_idx >= NUM_WARM_UP_ROUNDS:
                events.append((name, begin, end))
    torch.cuda.synchronize()
    samples: dict[Key, list[float]] = {name: [] for name in order}
    for name, begin, end in events:
        samples[name].append(1e3 * begin.elapsed_time(end) / num_calls)
    return samples


def time_wall(
    candidates: Mapping[str, Callable[[], object]], num_rounds: int, num_calls: int, device: torch.device
) -> dict[str, list[float]]:
    """Microseconds a call by the clock on the wall, one sample a round, each waited for."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for round_idx in range(1 + num_rounds):
        for name, work in candidates.items():
            synchronize(device)
            begin = time.perf_counter()
            work()
            synchronize(device)
            if round_idx > 0:
                samples[name].append(1e6 * (time.perf_counter() - begin) / num_calls)
    return samples


def time_enqueueing(
    candidates: Mapping[str, Callable[[], object]], num_batches: int, calls_per_batch: int, device: torch.device
) -> dict[str, list[float]]:
    """Microseconds of the CPU that a call takes to be enqueued, one sample a batch. The GPU is waited for between batches only; a batch
    must be smaller than the launch queue (1,024 kernels), or the host would wait for the GPU."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for batch_idx in range(1 + num_batches):
        for name, call in candidates.items():
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(calls_per_batch):
                call()
            elapsed = time.perf_counter() - begin
            if batch_idx > 0:
                samples[name].append(1e6 * elapsed / calls_per_batch)
    synchronize(device)
    return samples


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
