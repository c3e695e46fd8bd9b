"""What an end-to-end run found: rows, table, JSON, plot."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpdown.bench import machine
from mlpdown.bench.e2e_check import LogitsCheck, TokensCheck

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1


@dataclasses.dataclass
class Row:
    """Time per output token, in milliseconds, of each run of one mode to one length."""

    mode: str
    cache_length: int | None
    """Positions of a static cache; None for a cache that grows or is flat."""
    num_tokens: int
    stock_ms: list[float] = dataclasses.field(default_factory=list)
    patched_ms: list[float] = dataclasses.field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Stock over patched, of the medians."""
        return statistics.median(self.stock_ms) / statistics.median(self.patched_ms)


@dataclasses.dataclass
class Report:
    """Everything that goes into the JSON."""

    model: str
    dtype: str
    device: str
    settings: dict[str, Any]
    logits: list[LogitsCheck] = dataclasses.field(default_factory=list)
    tokens: list[TokensCheck] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    not_run: list[str] = dataclasses.field(default_factory=list)

    def table(self) -> Table:
        """Time per output token, median and range over the runs."""
        from rich.table import Table

        table = Table(title=f"{self.model}, {self.dtype}, {self.device}: ms per output token", title_justify="left")
        for heading in ("mode", "cache", "tokens", "PyTorch", "patched", "PyTorch / patched"):
            table.add_column(heading, justify="left" if heading == "mode" else "right")
        for row in self.rows:
            cache = "-" if row.cache_length is None else str(row.cache_length)
            table.add_row(
                row.mode, cache, str(row.num_tokens), _spread(row.stock_ms), _spread(row.patched_ms), f"{row.ratio:.3f}"
            )
        return table

    def write_json(self, path: Path) -> None:
        """All runs, checks and what they ran on. Times are in milliseconds."""
        content = {
            "benchmark": "e2e",
            "schema_version": SCHEMA_VERSION,
            "machine": {**machine.describe(), "transformers": importlib.metadata.version("transformers")},
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(self)
                if field.name not in ("logits", "tokens", "rows")
            },
            "logits": [{**dataclasses.asdict(check), "bound": check.bound} for check in self.logits],
            "tokens": [dataclasses.asdict(check) for check in self.tokens],
            "rows": [{**dataclasses.asdict(row), "ratio": row.ratio} for row in self.rows],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    def write_plot(self, path: Path) -> None:
        """Time per output token over the number of tokens, one colour a mode, dashed for PyTorch."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for index, mode in enumerate(dict.fromkeys(row.mode for row in self.rows)):
            rows = sorted((row for row in self.rows if row.mode == mode), key=lambda row: row.num_tokens)
            lengths = [row.num_tokens for row in rows]
            axes.plot(
                lengths,
                [statistics.median(row.stock_ms) for row in rows],
                "o--",
                color=f"C{index}",
                label=f"{mode}, PyTorch",
            )
            axes.plot(
                lengths,
                [statistics.median(row.patched_ms) for row in rows],
                "o-",
                color=f"C{index}",
                label=f"{mode}, patched",
            )
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("output tokens")
        axes.set_ylabel("ms per output token")
        axes.set_title(f"{self.model}, {self.dtype}, {self.device}", fontsize="medium")
        axes.legend(fontsize="small")
        figure.savefig(path)


def _spread(milliseconds: list[float]) -> str:
    median = statistics.median(milliseconds)
    if len(milliseconds) == 1:
        return f"{median:.3f}"
    return f"{median:.3f} ({min(milliseconds):.3f}-{max(milliseconds):.3f})"
