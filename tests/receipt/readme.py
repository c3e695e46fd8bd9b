"""The README's figures, made from the receipts in ``tests/data/receipts/``: nothing is typed in by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlpdown.bench.e2e_timing import mode_label
from mlpdown.bench.report import label_of, steady_rate, summary_cells
from mlpdown.plot import plot_bandwidth
from mlpdown.timing import median

from .stages import summarize

README = "README.md"
RECEIPTS = "tests/data/receipts"
BEGIN = "<!-- figures:begin -->"
END = "<!-- figures:end -->"
# A ratio whose interval is wider than this is none.
MAX_INTERVAL = 1.2

Content = dict[str, Any]


def update_readme(repository: Path) -> bool:
    """Draw the plot, and rewrite the block between the marks; returns whether that changed. Raises ValueError if the README has no such
    block."""
    newest = newest_receipts(repository / RECEIPTS)
    if "op" in newest:
        path, content = newest["op"]
        plot_bandwidth({**content, "results": content["results"][:1]}, path)
        path.with_suffix(".png").unlink()
    text = (repository / README).read_text()
    updated = with_figures(text, figures(repository / RECEIPTS))
    (repository / README).write_text(updated)
    return updated != text


def with_figures(readme: str, block: str) -> str:
    """``readme`` with ``block`` between the marks. Raises ValueError if it does not have each mark once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"{README} must have {BEGIN} and then {END}, each once")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block}{END}{rest.split(END)[1]}"


def newest_receipts(folder: Path) -> dict[str, tuple[Path, Content]]:
    """``op``, ``e2e`` and ``gpu``: the newest file of each kind with anything in it, by the date in it."""
    newest: dict[str, tuple[Path, Content]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        kind = content.get("benchmark") or content.get("receipt")
        has_any = any(content.get(name) for name in ("results", "rows", "stages"))
        if has_any and (kind not in newest or content["machine"]["date"] > newest[kind][1]["machine"]["date"]):
            newest[kind] = path, content
    return newest


def figures(folder: Path) -> str:
    """The block, of the newest receipts."""
    newest = newest_receipts(folder)
    makers = {"op": operation_figures, "e2e": model_figures, "gpu": receipt_figures}
    parts = [[_made_on(newest[kind][1]["machine"]), "", *make(*newest[kind]), ""] for kind, make in makers.items() if kind in newest]
    return "\n".join("\n".join(lines) for lines in parts) or "No receipt has been made yet.\n"


def operation_figures(path: Path, content: Content) -> list[str]:
    rate = steady_rate(content)
    lines = [
        "Microseconds a call, medians, over distinct weights with a cold L2 cache, in CUDA graphs.",
        f"In brackets: time over the floor, the weight's bytes at the steady read rate{f' of {rate:.2f} TB/s' if rate else ''}.",
        "Chained: the kernel before is mlpdown's too, and lets this one start early (programmatic dependent launch), with",
        "`weight_prefetch=True` or by default. Isolated: each starts when the one before has ended, as do the other kernels here.",
        "",
        "| shape | floor | read-only kernel | chained, prefetch | chained | isolated | PyTorch | best torch.compile |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(f"| {' | '.join([label_of(result), *summary_cells(result)])} |" for result in content["results"]),
    ]
    costs = [result["cpu_cost"] for result in content["results"] if {"native", "torch"} <= result["cpu_cost"].keys()]
    if costs:
        native, torch = (median(costs[0][name]) for name in ("native", "torch"))
        lines += ["", f"CPU time of an eager call: {native:.1f} us, PyTorch's three calls {torch:.1f} us."]
    if content["validity"]["valid"] is False:
        lines += ["", f"This run does not count: {'; '.join(content['validity']['reasons'])}."]
    plot = path.with_suffix(".svg")
    return [*lines, "", f"![Bandwidth at {label_of(content['results'][0])}]({RECEIPTS}/{plot.name})"] if plot.is_file() else lines


def model_figures(_path: Path, content: Content) -> list[str]:
    prefetch = ", weight_prefetch" if content["settings"]["weight_prefetch"] else ""
    lines = [
        f"{content['model']}, {content['dtype']}{prefetch}. Medians over blocks of a few tokens that PyTorch and mlpdown decode in turns.",
        "The ratio is PyTorch over mlpdown in a pair of such blocks; in brackets, where its median lies with 95 %, for independent pairs.",
        "",
        "| mode | tokens | PyTorch ms/token | mlpdown ms/token | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    noisy = []
    for row in content["rows"]:
        mode, ratio = mode_label(row["mode"], row["cache_length"]), row["ratio"]
        if ratio["high"] > MAX_INTERVAL * ratio["low"]:
            noisy.append(f"{mode} {row['num_tokens']}")
            continue
        times = f"{row['stock_ms']['median']:.3f} | {row['patched_ms']['median']:.3f}"
        lines.append(f"| {mode} | {row['num_tokens']} | {times} | {{median:.3f}} ({{low:.3f}} to {{high:.3f}}) |".format(**ratio))
    if noisy:
        lines += ["", f"Too noisy to say anything (mode and tokens): {', '.join(noisy)}."]
    if content["not_run"]:
        lines += ["", f"Not run: {'; '.join(entry.split(':')[0] for entry in content['not_run'])}."]
    return lines + (["", f"Failed there: {'; '.join(content['failed'])}."] if content["failed"] else [])


def receipt_figures(_path: Path, content: Content) -> list[str]:
    lines = ["| what | verdict | found |", "|---|---|---|"]
    for name, stage in content["stages"].items():
        found = summarize(name, stage["findings"]).splitlines()[0].replace("|", "\\|")
        lines.append(f"| {name} | {stage['verdict']} | {found} |")
    return lines


def _made_on(machine: Content) -> str:
    words = [machine.get("gpu") or machine["platform"]]
    words += [f"{name} {machine[name]}" for name in ("torch", "transformers", "driver", "commit") if machine.get(name)]
    return f"{', '.join(words)}, {machine['date'][:10]}:"
