"""The README's figures, made from the receipts in ``native/receipts/``: nothing is typed in by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .bench.results import Result, median, read_report
from .bench.tables import COMPILED_PEERS, best
from .receipt_stages import summarize

README = "README.md"
RECEIPTS = "native/receipts"
BEGIN = "<!-- figures:begin -->"
END = "<!-- figures:end -->"


def update_readme(repository: Path) -> bool:
    """Rewrite the block between the marks; returns whether it changed. Raises ValueError if the README has no such block."""
    path = repository / README
    text = path.read_text()
    updated = with_figures(text, figures(repository / RECEIPTS))
    path.write_text(updated)
    return updated != text


def with_figures(readme: str, block: str) -> str:
    """``readme`` with ``block`` between the marks. Raises ValueError if it does not have each mark once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"{README} must have {BEGIN} and then {END}, each once")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block}{END}{rest.split(END)[1]}"


def figures(folder: Path) -> str:
    """The block: the newest receipt of each kind, by the date in it."""
    operations: list[tuple[str, Path]] = []
    models: list[tuple[str, dict[str, Any]]] = []
    lights: list[tuple[str, dict[str, Any]]] = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        machine = content.get("machine") or content.get("environment") or {}
        date = machine.get("date", "")
        if content.get("benchmark") == "op" and content.get("results"):
            operations.append((date, path))
        elif content.get("benchmark") == "e2e":
            models.append((date, content))
        elif content.get("receipt") == "gpu":
            lights.append((date, content))
    parts = []
    if operations:
        parts.append(_operation_figures(*max(operations)))
    if models:
        parts.append(_model_figures(max(models, key=lambda pair: pair[0])[1]))
    if lights:
        parts.append(_light_figures(max(lights, key=lambda pair: pair[0])[1]))
    return "\n".join(parts) if parts else "No receipt has been made yet.\n"


def _operation_figures(_date: str, path: Path) -> str:
    report = read_report(path)
    rate = f" of {median(report.steady_read['tb_per_s']):.2f} TB/s" if report.steady_read else ""
    lines = [
        _made_on(report.machine),
        "",
        "Microseconds a call, medians, over distinct weights with a cold L2 cache, in CUDA graphs.",
        f"In brackets: times the floor, the weight's bytes at the steady read rate{rate}.",
        "",
        "| shape | floor | read-only kernel | mlpdown, chained | mlpdown, isolated | PyTorch | best torch.compile |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_operation_row(result) for result in report.results),
        "",
    ]
    costs = [result for result in report.results if {"native", "torch"} <= result.cpu_cost.keys()]
    if costs:
        native, peer = (median(costs[0].cpu_cost[name]) for name in ("native", "torch"))
        lines += [f"CPU time of an eager call: {native:.1f} us, PyTorch's three calls {peer:.1f} us.", ""]
    if report.validity["valid"] is False:
        lines += [f"This run does not count: {'; '.join(report.validity['reasons'])}.", ""]
    plot = path.with_suffix(".svg")
    if plot.is_file():
        lines += [f"![Bandwidth by shape]({RECEIPTS}/{plot.name})", ""]
    return "\n".join(lines)


def _operation_row(result: Result) -> str:
    names = ("read_only", "native_chained_prefetch", "native_isolated", "torch_graph")
    values = [result.median(name) for name in names]
    compiled = best(result, COMPILED_PEERS)
    values.append(compiled[1] if compiled else None)
    floor = "-" if result.floor_us is None else f"{result.floor_us:.2f}"
    return f"| {result.label} | {floor} | {' | '.join(_with_share(value, result.floor_us) for value in values)} |"


def _with_share(value: float | None, floor: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ({value / floor:.2f})" if floor else "")


def _model_figures(content: dict[str, Any]) -> str:
    lines = [
        f"{content['model']}, {content['dtype']}: milliseconds a token, medians.",
        "",
        "| mode | tokens | PyTorch | patched | PyTorch over patched |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in content["rows"]:
        stock, patched = median(row["stock_ms"]), median(row["patched_ms"])
        lines.append(f"| {row['mode']} | {row['num_tokens']} | {stock:.3f} | {patched:.3f} | {row['ratio']:.3f} |")
    return "\n".join([*lines, ""])


def _light_figures(content: dict[str, Any]) -> str:
    lines = [_made_on(content["machine"]), "", "| what | verdict | found |", "|---|---|---|"]
    for name, stage in content["stages"].items():
        found = summarize(name, stage["findings"]).splitlines()[0].replace("|", "\\|")
        lines.append(f"| {name} | {stage['verdict']} | {found} |")
    return "\n".join([*lines, ""])


def _made_on(machine: dict[str, Any]) -> str:
    words = [machine.get("gpu") or machine["platform"], f"torch {machine['torch']}"]
    if machine.get("driver"):
        words.append(f"driver {machine['driver']}")
    if machine.get("commit"):
        words.append(f"commit {machine['commit']}")
    return f"{', '.join(words)}, {machine['date'][:10]}:"
