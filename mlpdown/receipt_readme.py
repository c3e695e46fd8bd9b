"""The README's figures, made from the receipts in ``native/receipts/``: nothing is typed in by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .bench.e2e_report import mode_label
from .bench.results import Result, median, read_report
from .bench.tables import COMPILED_PEERS, best
from .receipt_stages import summarize

README = "README.md"
RECEIPTS = "native/receipts"
BEGIN = "<!-- figures:begin -->"
END = "<!-- figures:end -->"
# A ratio whose interval is wider than this is none.
MAX_INTERVAL = 1.2


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
        elif content.get("benchmark") == "e2e" and content.get("rows"):
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
        "Chained: the kernel before is mlpdown's too, and lets this one start early (programmatic dependent launch), with",
        "`weight_prefetch=True` or by default. Isolated: each starts when the one before has ended, as do the other kernels here.",
        "",
        "| shape | floor | read-only kernel | chained, prefetch | chained | isolated | PyTorch | best torch.compile |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
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
    names = ("read_only", "native_chained_prefetch", "native_chained", "native_isolated", "torch_graph")
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
    prefetch = ", weight_prefetch" if content["settings"]["weight_prefetch"] else ""
    lines = [
        _made_on(content["machine"]),
        "",
        f"{content['model']}, {content['dtype']}{prefetch}. Medians over blocks of a few tokens that PyTorch and mlpdown decode in turns.",
        "The ratio is that of a pair of such blocks; in brackets, where its median lies with 95 %, were pairs independent.",
        "",
        "| mode | tokens | PyTorch ms/token | mlpdown ms/token | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    noisy = []
    for row in content["rows"]:
        ratio = row["ratio"]
        if ratio["high"] > MAX_INTERVAL * ratio["low"]:
            noisy.append(f"{mode_label(row['mode'], row['cache_length'])} {row['num_tokens']}")
            continue
        lines.append(
            f"| {mode_label(row['mode'], row['cache_length'])} | {row['num_tokens']} | {row['stock_ms']['median']:.3f} "
            f"| {row['patched_ms']['median']:.3f} | {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) |"
        )
    lines.append("")
    if noisy:
        lines += [f"Too noisy to say anything (mode and tokens): {', '.join(noisy)}.", ""]
    if content["not_run"]:
        lines += [f"Not run: {'; '.join(entry.split(':')[0] for entry in content['not_run'])}.", ""]
    if content["failed"]:
        lines += [f"Failed there: {'; '.join(content['failed'])}.", ""]
    return "\n".join(lines)


def _light_figures(content: dict[str, Any]) -> str:
    lines = [_made_on(content["machine"]), "", "| what | verdict | found |", "|---|---|---|"]
    for name, stage in content["stages"].items():
        found = summarize(name, stage["findings"]).splitlines()[0].replace("|", "\\|")
        lines.append(f"| {name} | {stage['verdict']} | {found} |")
    return "\n".join([*lines, ""])


def _made_on(machine: dict[str, Any]) -> str:
    words = [machine.get("gpu") or machine["platform"], f"torch {machine['torch']}"]
    if machine.get("transformers"):
        words.append(f"transformers {machine['transformers']}")
    if machine.get("driver"):
        words.append(f"driver {machine['driver']}")
    if machine.get("commit"):
        words.append(f"commit {machine['commit']}")
    return f"{', '.join(words)}, {machine['date'][:10]}:"
