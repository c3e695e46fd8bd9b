"""Two decoders, timed in turns: a few steps of the one, the same few steps of the other; and what the times say.

A loop of Python is bound by the host, and a shared host changes its speed by more than there is to measure, for seconds at a time. Both
halves of a pair see the same host, so the ratio of a pair is free of what lasts longer than a pair; the median over pairs is free of what
hits only one half. Who goes first alternates, so that a drift within pairs cancels as well.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from ..tables import new_table
from ..timing import Clock, median, quartiles
from .e2e_decode import Decoder

SCHEMA_VERSION = 2
# Long enough for an event or a clock (a millisecond a step and more), short enough for the host to stay as it is.
STEPS_PER_BLOCK = 4
REPEAT_SECONDS = 30.0  # for the shorter lengths of a mode, together: every mode is to have its turn
# Of fewer, no interval holds the median with 95 %: it is from the least to the largest of all.
FEWEST_PAIRS = 6


class Pair(NamedTuple):
    """One block of steps, the last of them at ``end`` tokens since the prompt, decoded by both. Times are in milliseconds a token."""

    end: int
    num_steps: int
    stock_ms: float
    patched_ms: float


Decoders = Sequence[Decoder]  # stock and patched


def time_in_turns(decoders: Decoders, lengths: list[int], clock: Clock, stock_first: bool = True) -> list[Pair]:
    """Decode from the prompt to the last of ``lengths`` tokens with both; a block ends at each length. ``clock`` is a new one."""
    for decoder in decoders:
        decoder.rewind()
    ends = sorted({*range(STEPS_PER_BLOCK, lengths[-1] + 1, STEPS_PER_BLOCK), *lengths})
    sizes = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    orders = [1 if (index % 2 == 0) == stock_first else -1 for index in range(len(ends))]
    collected = gc.isenabled()
    gc.disable()  # it would run in one half of a pair
    try:
        for num_steps, order in zip(sizes, orders, strict=True):
            for decoder in decoders[::order]:
                clock.time(functools.partial(_steps, decoder, num_steps))
    finally:
        if collected:
            gc.enable()
    times = clock.milliseconds()
    blocks = zip(ends, sizes, orders, zip(times[::2], times[1::2], strict=True), strict=True)
    return [Pair(end, num_steps, *(ms / num_steps for ms in halves[::order])) for end, num_steps, order, halves in blocks]


def time_lengths(
    decoders: Decoders, lengths: list[int], new_clock: Callable[[], Clock], num_pairs: int, step_seconds: float, left: Callable[[], float]
) -> list[list[Pair]]:
    """Decode once to the longest of ``lengths`` (ascending), then to each shorter one until it has ``num_pairs`` pairs, or until that would
    take longer than there are seconds ``left``; ``step_seconds``: of a token with both."""
    passes, begin = [time_in_turns(decoders, lengths, new_clock())], time.perf_counter()
    for position in reversed(range(len(lengths))):
        while sum(map(len, within(passes, lengths[position]))) < num_pairs:
            if lengths[position] * step_seconds > min(left(), REPEAT_SECONDS - (time.perf_counter() - begin)):
                break
            passes.append(time_in_turns(decoders, lengths[: position + 1], new_clock(), len(passes) % 2 == 0))
    return passes


def within(passes: list[list[Pair]], num_tokens: int) -> list[list[Pair]]:
    """The passes that went so far, cut off there, so that every position counts alike."""
    return [[pair for pair in pairs if pair.end <= num_tokens] for pairs in passes if pairs[-1].end >= num_tokens]


def row(mode: str, cache_length: int | None, num_tokens: int, passes: list[list[Pair]]) -> dict[str, Any]:
    """One mode to one length, at which a block must end: times are in milliseconds a token, totals in milliseconds, means over passes;
    ratios are stock over patched, so above 1 the patched model is faster."""
    cut = within(passes, num_tokens)
    pairs = [pair for one in cut for pair in one]
    stock, patched = (sum(pair.num_steps * pair[column] for pair in pairs) / len(cut) for column in (2, 3))
    found: dict[str, Any] = {"mode": mode, "cache_length": cache_length, "num_tokens": num_tokens, "num_pairs": len(pairs)}
    found |= {name: estimate([getattr(pair, name) for pair in pairs]) for name in ("stock_ms", "patched_ms")}
    found["ratio"] = estimate([pair.stock_ms / pair.patched_ms for pair in pairs])
    return {**found, "total_stock_ms": stock, "total_patched_ms": patched, "total_ratio": stock / patched}


def estimate(samples: list[float]) -> dict[str, Any]:
    """Median and quartiles of ``samples``, and the median's 95 % interval between two of them, whatever their distribution."""
    ordered = sorted(samples)
    # The rank below which the median lies in 2.5 % of cases: each sample is below it with probability one half.
    rank, below = 0, 1
    while 40 * below <= 2 ** len(ordered):
        rank += 1
        below += math.comb(len(ordered), rank)
    rank = max(rank - 1, 0)
    return {"median": median(ordered), "low": ordered[rank], "high": ordered[-1 - rank], "quartiles": [*quartiles(ordered)]}


def table(content: dict[str, Any]) -> Table:
    """Milliseconds per output token, medians; the ratio with the interval that its median lies in."""
    title = "{model}, {dtype}, {device}: ms a token, medians (quartiles); ratio: PyTorch over mlpdown".format(**content)
    mlpdown = f"mlpdown,\nbackend {content['settings']['backend_taken']}"
    result = new_table(title, "mode", "tokens", "pairs", "PyTorch", mlpdown, "ratio, median\n(95 %)", "ratio of\ntotals")
    for row in content["rows"]:
        times = ["{:.3f}\n({:.3f}-{:.3f})".format(ms["median"], *ms["quartiles"]) for ms in (row["stock_ms"], row["patched_ms"])]
        ratio = "{median:.3f}\n({low:.3f}-{high:.3f})".format(**row["ratio"]) + ", all" * (row["num_pairs"] < FEWEST_PAIRS)
        label = mode_label(row["mode"], row["cache_length"]).replace(", ", ",\n")
        result.add_row(label, str(row["num_tokens"]), str(row["num_pairs"]), *times, ratio, f"{row['total_ratio']:.3f}")
    return result


def mode_label(mode: str, cache_length: int | None) -> str:
    """The mode, and the positions of its cache where it reads all of them at every step."""
    return mode if cache_length is None else f"{mode}, cache of {cache_length}"


def _steps(decoder: Decoder, num_steps: int) -> None:
    for _ in range(num_steps):
        decoder.step()
