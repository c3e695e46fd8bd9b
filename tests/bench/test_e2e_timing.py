"""Decoders timed in turns: equal work at equal positions, and a ratio that a host of changing speed does not change."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable

import pytest

from mlpdown.bench import e2e_timing
from mlpdown.bench.e2e_timing import Pair, estimate, row, time_in_turns, time_lengths, within


class Host:
    """A clock that the steps of decoders move, by their own time and by what the host makes of it."""

    def __init__(self, slowness: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now = 0.0
        self.slowness = slowness
        self.times: list[float] = []

    def time(self, work: Callable[[], None]) -> None:
        begin = self.now
        work()
        self.times.append(self.now - begin)

    def milliseconds(self) -> list[float]:
        return self.times


class Decoder:
    """A step takes ``step_ms``, longer where the host is slow."""

    def __init__(self, name: str, step_ms: float, host: Host, log: list[tuple[str, int]]) -> None:
        self.name, self.step_ms, self.host, self.log = name, step_ms, host, log

    def rewind(self) -> None:
        self.position = 0

    def step(self) -> None:
        self.position += 1
        self.log.append((self.name, self.position))
        self.host.now += self.step_ms * self.host.slowness(self.host.now)

    def tokens(self) -> list[int]:
        return []

    def calls_of_op(self) -> dict[str, int]:
        return {}


def run(host: Host, lengths: list[int], stock_first: bool = True) -> tuple[list[Pair], list[tuple[str, int]]]:
    log: list[tuple[str, int]] = []
    decoders = (Decoder("stock", 10.0, host, log), Decoder("patched", 8.0, host, log))
    return time_in_turns(decoders, lengths, host, stock_first), log  # type: ignore[arg-type]


@pytest.mark.parametrize("stock_first", [True, False])
def test_both_decode_the_same_positions_in_turns(stock_first: bool) -> None:
    pairs, log = run(Host(), [6, 8], stock_first)
    assert [(pair.end, pair.num_steps) for pair in pairs] == [(4, 4), (6, 2), (8, 2)]
    assert {(pair.stock_ms, pair.patched_ms) for pair in pairs} == {(10.0, 8.0)}
    first, second = ("stock", "patched") if stock_first else ("patched", "stock")
    blocks = [(first, 1, 4), (second, 1, 4), (second, 5, 6), (first, 5, 6), (first, 7, 8), (second, 7, 8)]
    assert log == [(name, position) for name, begin, end in blocks for position in range(begin, end + 1)]
    assert gc.isenabled()


def test_collector_is_on_again_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        assert not gc.isenabled()
        raise RuntimeError

    monkeypatch.setattr(e2e_timing, "_steps", fail)
    with pytest.raises(RuntimeError):
        run(Host(), [4])
    assert gc.isenabled()


def test_noise_of_the_host_leaves_the_ratio_alone() -> None:
    """Bursts that treble the time, half of all the time, for about 50 steps each: the totals err, the median of pairs does not."""
    generator = random.Random(5)
    bursts = [generator.random() < 0.5 for _ in range(1000)]
    host = Host(lambda now: (3.0 if bursts[int(now / 500) % 1000] else 1.0) * generator.uniform(0.9, 1.1))
    pairs, _ = run(host, [1024])
    ratio = estimate([pair.stock_ms / pair.patched_ms for pair in pairs])
    assert ratio["low"] <= 1.25 <= ratio["high"]
    assert ratio["high"] - ratio["low"] < 0.04
    slow = estimate([pair.stock_ms for pair in pairs])
    assert slow["quartiles"][1] / slow["quartiles"][0] > 1.9


def test_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    generator = random.Random(1)
    hits = 0
    for _ in range(1000):
        found = estimate([generator.expovariate(1.0) for _ in range(25)])
        hits += found["low"] <= 0.6931 <= found["high"]
    assert 945 <= hits <= 985
    assert estimate([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0, "quartiles": [2.0, 2.0]}
    few = estimate([1.0, 2.0, 9.0])
    assert (few["low"], few["high"]) == (1.0, 9.0)
    assert estimate([float(number) for number in range(5000)])["median"] == 2499.5


def test_row_is_of_passes_that_went_so_far() -> None:
    passes = [[Pair(4, 4, 3.0, 2.0), Pair(8, 4, 5.0, 4.0)], [Pair(4, 4, 9.0, 3.0)]]
    assert within(passes, 8) == passes[:1]
    assert within(passes, 4) == [[Pair(4, 4, 3.0, 2.0)], [Pair(4, 4, 9.0, 3.0)]]
    assert within(passes, 12) == []
    found = row("loop", None, 4, passes)
    assert (found["num_pairs"], found["ratio"]["median"]) == (2, 2.25)
    assert (found["total_stock_ms"], found["total_patched_ms"], found["total_ratio"]) == (24.0, 10.0, 2.4)


def test_short_lengths_are_repeated_until_there_are_enough_pairs() -> None:
    host = Host()
    decoders = (Decoder("stock", 10.0, host, []), Decoder("patched", 8.0, host, []))
    seconds = [1000.0]

    def new_clock() -> Host:
        host.times = []
        return host

    def passes(lengths: list[int], num_pairs: int) -> list[list[Pair]]:
        return time_lengths(decoders, lengths, new_clock, num_pairs, 0.018, lambda: seconds[0])  # type: ignore[arg-type]

    found = passes([4, 8, 64], 6)
    # The pass to 64 has one pair within 4 tokens and two within 8.
    assert [pairs[-1].end for pairs in found] == [64, 8, 8, 4, 4, 4]
    assert [row("loop", None, length, found)["num_pairs"] for length in (4, 8, 64)] == [6, 6, 16]
    assert {pair.stock_ms / pair.patched_ms for pairs in found for pair in pairs} == {1.25}
    seconds[0] = 0.1  # enough for 5 tokens, not for 8
    assert [pairs[-1].end for pairs in passes([4, 8, 64], 3)] == [64, 4, 4]
    seconds[0] = 0.0
    assert len(passes([4, 64], 100)) == 1, "without time there is the longest decode alone"
