"""What ``mlpdown bench op`` found, and the JSON that keeps it.

The file is one object:

    benchmark       "op"
    schema_version  1
    machine         what :func:`mlpdown.bench.machine.describe` says
    steady_read     {"tb_per_s": [samples], "num_bytes"} of one large read; null without a GPU
    validity        {"valid": true, false or null, "reasons": [text]}: whether this machine's yardsticks are what they should be
    results         a list, one entry a shape and dtype:
        shape, hidden_dim, intermediate_dim, dtype
        weight_bytes    of one call
        num_calls       calls of a chain, each over another weight
        floor_us        weight_bytes at the steady read rate; null without a GPU
        plans           native candidate -> its plan; null without the native kernel
        timings         name -> [microseconds a call, one sample a replay]
        cpu_cost        name -> [microseconds of the CPU a call, one sample a batch]
        missing         name -> why it was not measured
    plans           null, or a list of what :func:`mlpdown.bench.plans.sweep` returns, with shape, dtype and floor_us
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from .shapes import Shape

SCHEMA_VERSION = 1


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def quartiles(samples: list[float]) -> tuple[float, float]:
    """Lower and upper quartile; of a single sample, that sample."""
    if len(samples) == 1:
        return samples[0], samples[0]
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return lower, upper


@dataclasses.dataclass
class Result:
    """One shape and dtype; the members are those of the file."""

    shape: str
    hidden_dim: int
    intermediate_dim: int
    dtype: str
    weight_bytes: int
    num_calls: int
    floor_us: float | None = None
    plans: dict[str, dict[str, Any]] | None = None
    timings: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    cpu_cost: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{Shape(self.shape, self.hidden_dim, self.intermediate_dim)} {self.dtype}"

    def median(self, name: str) -> float | None:
        """Median microseconds a call; None if it was not measured."""
        return median(self.timings[name]) if name in self.timings else None


@dataclasses.dataclass
class Report:
    """A whole run; the members are those of the file."""

    machine: dict[str, Any]
    steady_read: dict[str, Any] | None = None
    validity: dict[str, Any] = dataclasses.field(default_factory=lambda: {"valid": None, "reasons": []})
    results: list[Result] = dataclasses.field(default_factory=list)
    plans: list[dict[str, Any]] | None = None

    def write(self, path: Path) -> None:
        content = {"benchmark": "op", "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        path.write_text(json.dumps(_rounded(content), indent=1) + "\n")


def read_report(path: Path) -> Report:
    """Read a file that :meth:`Report.write` wrote.

    Raises:
        ValueError: it is not one. OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        if content.pop("benchmark", None) != "op" or content.pop("schema_version", None) != SCHEMA_VERSION:
            raise ValueError(f"benchmark must be 'op' and schema_version {SCHEMA_VERSION}")
        content["results"] = [Result(**result) for result in content["results"]]
        return Report(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of mlpdown bench op: {error}") from error


def _rounded(value: Any) -> Any:
    """Floats to the nanosecond, so that a receipt is not mostly digits."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
