"""Decodes that were timed, and what they say of each length that they reached."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from mlpdown.bench.e2e_decode import Decoder
from mlpdown.bench.e2e_timing import Clock, Estimate, Pair, estimate, time_in_turns


@dataclasses.dataclass
class Row:
    """One mode to one length, from every pass that went so far: each is cut off there, so that every position counts alike."""

    mode: str
    cache_length: int | None
    """Positions of a static cache; None for a cache that grows or is flat."""
    num_tokens: int
    passes: list[list[Pair]]

    @property
    def pairs(self) -> list[Pair]:
        return [pair for pairs in self.passes for pair in pairs]

    @property
    def stock_ms(self) -> Estimate:
        return estimate([pair.stock_ms for pair in self.pairs])

    @property
    def patched_ms(self) -> Estimate:
        return estimate([pair.patched_ms for pair in self.pairs])

    @property
    def ratio(self) -> Estimate:
        """Stock over patched, within each pair."""
        return estimate([pair.stock_ms / pair.patched_ms for pair in self.pairs])

    @property
    def total_stock_ms(self) -> float:
        """Milliseconds of the whole decode, mean over passes."""
        return sum(pair.stock_ms * pair.num_steps for pair in self.pairs) / len(self.passes)

    @property
    def total_patched_ms(self) -> float:
        return sum(pair.patched_ms * pair.num_steps for pair in self.pairs) / len(self.passes)

    def content(self) -> dict[str, Any]:
        """Plain values for the JSON."""
        return {
            "mode": self.mode,
            "cache_length": self.cache_length,
            "num_tokens": self.num_tokens,
            "num_pairs": len(self.pairs),
            "stock_ms": _plain(self.stock_ms),
            "patched_ms": _plain(self.patched_ms),
            "ratio": _plain(self.ratio),
            "total_stock_ms": round(self.total_stock_ms, 3),
            "total_patched_ms": round(self.total_patched_ms, 3),
            "total_ratio": round(self.total_stock_ms / self.total_patched_ms, 4),
        }


@dataclasses.dataclass
class Passes:
    """Every timed decode of one mode over one cache."""

    mode: str
    cache_length: int | None
    passes: list[list[Pair]] = dataclasses.field(default_factory=list)

    def row(self, num_tokens: int) -> Row:
        """Of the first ``num_tokens`` tokens, at which a pair must end, of the passes that are as long."""
        reaching = [pairs for pairs in self.passes if pairs[-1].end >= num_tokens]
        within = [[pair for pair in pairs if pair.end <= num_tokens] for pairs in reaching]
        return Row(self.mode, self.cache_length, num_tokens, within)

    def time(
        self,
        stock: Decoder,
        patched: Decoder,
        lengths: list[int],
        new_clock: Callable[[], Clock],
        num_pairs: int,
        may_repeat: Callable[[int, float], bool],
    ) -> list[Row]:
        """Decode once to the longest of ``lengths`` (ascending), then to each shorter one until it has ``num_pairs`` pairs.

        ``may_repeat`` is asked, with the length and the seconds that repeats have taken, before a decode that is not needed for a row.
        """
        repeats_begin: float | None = None
        for position in reversed(range(len(lengths))):
            while len(self.row(lengths[position]).pairs) < num_pairs:
                if self.passes:
                    repeats_begin = repeats_begin or time.perf_counter()
                    if not may_repeat(lengths[position], time.perf_counter() - repeats_begin):
                        break
                stock_first = len(self.passes) % 2 == 0
                pairs = time_in_turns(stock, patched, lengths[: position + 1], new_clock(), stock_first)
                self.passes.append(pairs)
        return [self.row(length) for length in lengths]


def _plain(value: Estimate) -> dict[str, Any]:
    plain = {name: round(getattr(value, name), 4) for name in ("median", "low", "high")}
    return {**plain, "quartiles": [round(quartile, 4) for quartile in value.quartiles]}
