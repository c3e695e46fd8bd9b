"""What an end-to-end run found: rows, table, JSON, plot.

The file is one object:

    benchmark, schema_version   "e2e", 2
    machine         what :func:`mlpdown.bench.machine.describe` says, and transformers' version
    model, dtype, device, settings
    logits, tokens  the checks, :class:`LogitsCheck` and :class:`TokensCheck`
    rows            a list, one entry a mode and length: the members of :class:`Row`, and what it makes of its pairs
        mode, cache_length, num_tokens, num_pairs
        stock_ms, patched_ms    {median, low, high, quartiles} of milliseconds a token
        ratio                   the same, of stock over patched of each pair
        total_stock_ms, total_patched_ms, total_ratio   of the whole decode: mean over passes, milliseconds
    passes          a list, one entry a decode that was timed: mode, cache_length, and pairs [[end, num_steps, stock_ms, patched_ms]]
    build_seconds   mode and cache -> [stock, patched]
    calls_of_op     mode and cache -> {"stock", "patched"} -> op of this package -> its calls in one step
    not_run, failed why anything was left out, and what went wrong
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpdown.bench import machine
from mlpdown.bench.e2e_check import LogitsCheck, TokensCheck
from mlpdown.bench.e2e_passes import Passes, Row

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 2
# Of fewer, no interval holds the median with 95 %: it is from the least to the largest of all.
FEWEST_PAIRS = 6


@dataclasses.dataclass
class Report:
    """Everything that goes into the JSON."""

    model: str
    dtype: str
    device: str
    settings: dict[str, Any]
    commit: str | None = None
    """Where the checkout does not say."""
    logits: list[LogitsCheck] = dataclasses.field(default_factory=list)
    tokens: list[TokensCheck] = dataclasses.field(default_factory=list)
    passes: list[Passes] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    build_seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    calls_of_op: dict[str, dict[str, dict[str, int]]] = dataclasses.field(default_factory=dict)
    not_run: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)

    def table(self) -> Table:
        """Time per output token, medians; the ratio with the interval that its median lies in."""
        from rich.table import Table

        title = f"{self.model}, {self.dtype}, {self.device}: ms per output token, medians (quartiles)"
        table = Table(title=title, title_justify="left")
        headings = ("mode", "tokens", "pairs", "PyTorch", "mlpdown", "ratio, median (95 %)", "of total time")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "mode" else "right")
        for row in self.rows:
            table.add_row(
                mode_label(row.mode, row.cache_length),
                str(row.num_tokens),
                str(len(row.pairs)),
                *("{:.3f} ({:.3f}-{:.3f})".format(ms.median, *ms.quartiles) for ms in (row.stock_ms, row.patched_ms)),
                f"{row.ratio.median:.3f} ({row.ratio.low:.3f}-{row.ratio.high:.3f})"
                + ("" if len(row.pairs) >= FEWEST_PAIRS else ", all"),
                f"{row.total_stock_ms / row.total_patched_ms:.3f}",
            )
        return table

    def write_json(self, path: Path) -> None:
        """All pairs, checks and what they ran on."""
        pairs = {
            "passes": [
                {
                    "mode": group.mode,
                    "cache_length": group.cache_length,
                    "pairs": [
                        [pair.end, pair.num_steps, round(pair.stock_ms, 4), round(pair.patched_ms, 4)] for pair in one
                    ],
                }
                for group in self.passes
                for one in group.passes
            ]
        }
        facts = {**machine.describe(), "transformers": importlib.metadata.version("transformers")}
        content = {
            "benchmark": "e2e",
            "schema_version": SCHEMA_VERSION,
            "machine": {**facts, "commit": self.commit or facts["commit"]},
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "settings": self.settings,
            "logits": [{**dataclasses.asdict(check), "bound": check.bound} for check in self.logits],
            "tokens": [dataclasses.asdict(check) for check in self.tokens],
            "rows": [row.content() for row in self.rows],
            "build_seconds": self.build_seconds,
            "calls_of_op": self.calls_of_op,
            "not_run": self.not_run,
            "failed": self.failed,
        }
        # A pair a line would be most of the file.
        text = json.dumps(content, indent=1).removesuffix("\n}") + ",\n" + json.dumps(pairs)[1:] + "\n"
        path.write_text(text)

    def write_plot(self, path: Path) -> None:
        """Time per output token over the number of tokens, one colour a mode, dashed for PyTorch."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for index, mode in enumerate(dict.fromkeys(row.mode for row in self.rows)):
            rows = sorted((row for row in self.rows if row.mode == mode), key=lambda row: row.num_tokens)
            lengths = [row.num_tokens for row in rows]
            stock, patched = [row.stock_ms.median for row in rows], [row.patched_ms.median for row in rows]
            axes.plot(lengths, stock, "o--", color=f"C{index}", label=f"{mode}, PyTorch")
            axes.plot(lengths, patched, "o-", color=f"C{index}", label=f"{mode}, mlpdown")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("output tokens")
        axes.set_ylabel("ms per output token")
        axes.set_title(f"{self.model}, {self.dtype}, {self.device}", fontsize="medium")
        axes.legend(fontsize="small")
        figure.savefig(path)


def mode_label(mode: str, cache_length: int | None) -> str:
    """The mode, and the positions of its cache where it reads all of them at every step."""
    return mode if cache_length is None else f"{mode}, cache of {cache_length}"
