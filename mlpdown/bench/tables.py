"""Results as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .measure import CANDIDATES
from .results import Report, Result, median, quartiles

PEERS = ("torch_graph", "compile_multiply_and_sum", "compile_default", "compile_max_autotune")
COMPILED_PEERS = PEERS[1:]


LOG_COLUMNS = 180


def new_console() -> Console:
    """A console of the terminal's width; wide where there is none: a file has no edge, and a table cut to 80 columns no names."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_COLUMNS)


def best(result: Result, names: tuple[str, ...]) -> tuple[str, float] | None:
    """The fastest of these candidates and its median; None if none was measured."""
    measured = [(name, value) for name in names if (value := result.median(name)) is not None]
    return min(measured, key=lambda pair: pair[1], default=None)


def detail_table(result: Result, num_rounds: int) -> Table:
    """Every candidate of one shape and dtype."""
    title = f"{result.label}: microseconds a call; chains of {result.num_calls} calls over distinct weights, {num_rounds} samples"
    table = Table(title=title, title_justify="left")
    table.add_column("candidate")
    for heading in ("us a call", "quartiles", "of the floor", "over native chained", "over native isolated"):
        table.add_column(heading, justify="right")
    chained, isolated = result.median("native_chained_prefetch"), result.median("native_isolated")
    if result.floor_us is not None:
        table.add_row(
            f"floor: {result.weight_bytes / 1e6:.2f} MB at the steady read rate", f"{result.floor_us:.2f}", "", "1.00"
        )
    for name, text in CANDIDATES.items():
        if name in result.timings:
            value = median(result.timings[name])
            lower, upper = quartiles(result.timings[name])
            table.add_row(
                text,
                f"{value:.2f}",
                f"{lower:.2f}-{upper:.2f}",
                ratio(value, result.floor_us),
                ratio(value, chained),
                ratio(value, isolated),
            )
    for name, samples in result.cpu_cost.items():
        lower, upper = quartiles(samples)
        table.add_row(f"CPU time of a call, {name}", f"{median(samples):.2f}", f"{lower:.2f}-{upper:.2f}")
    return table


def summary_table(report: Report) -> Table:
    """One row a shape and dtype."""
    table = Table(title="microseconds a call (over the floor), and peers over native", title_justify="left")
    headings: tuple[str, ...] = ("floor", "read only", "chained,\nprefetch", "chained", "isolated", "PyTorch", "best\ncompiled")
    headings += ("PyTorch over\nchained / isolated", "compiled over\nchained / isolated")
    table.add_column("shape")
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in report.results:
        compiled = best(result, COMPILED_PEERS)
        names = ("read_only", "native_chained_prefetch", "native_chained", "native_isolated", "torch_graph")
        times = [*(result.median(name) for name in names), compiled[1] if compiled else None]
        chained, isolated = times[1], times[3]
        table.add_row(
            result.label,
            "-" if result.floor_us is None else f"{result.floor_us:.2f}",
            *("-" if value is None else f"{value:.2f} ({ratio(value, result.floor_us)})" for value in times),
            *(f"{ratio(peer, chained)} / {ratio(peer, isolated)}" for peer in times[-2:]),
        )
    return table


def ratio(value: float | None, reference: float | None) -> str:
    return "-" if value is None or not reference else f"{value / reference:.2f}"
