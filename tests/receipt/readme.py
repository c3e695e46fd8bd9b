"""All figures in text, made from the receipts in ``tests/data/receipts/``: nothing is typed in by hand.

The README gets two blocks and two drawings, of the newest receipts. ``tests/data/receipts/README.md`` has all figures of all receipts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlpdown.bench.e2e_timing import mode_label
from mlpdown.bench.report import label_of, median_of, ratio, steady_rate, summary_cells
from mlpdown.timing import median

from .drawings import order_svg, times_svg
from .stages import summarize

README = "README.md"
RECEIPTS = "tests/data/receipts"
ORDER_SVG, TIMES_SVG = "tests/data/order.svg", "tests/data/times.svg"
BLOCKS = ("headline", "figures")
# What the README shows of the op: these shapes, in float16.
SIX_SHAPES = ("pythia-160m", "pythia-1b", "pythia-2.8b", "llama-3-8b", "qwen2-7b", "pythia-12b")
SIX_COLUMNS = ("native_chained_prefetch", "native_isolated", "torch_graph")
# What it shows of a model: a decode of that many tokens.
HEADLINE_TOKENS = 256
# A ratio whose interval is wider than this is none.
MAX_INTERVAL = 1.2
NO_RECEIPT = "No receipt has been made yet."

ABOUT_RECEIPTS = """\
# Receipts

What GPUs said: each JSON file here holds the samples, the machine, the versions and the command. This page is made from them by
`python -m tests.receipt --readme`. Each part names its card, its commit and its date: figures of different cards do not compare."""
ABOUT_SIX = """\
Read a row as microseconds a call, the median over distinct weights with a cold L2 cache in CUDA graphs, and in brackets that time
divided by the floor, the weight's bytes at {rate:.2f} TB/s, which is the steady read rate of this card.
Over all {count} shapes and dtypes of its receipt, a call took its floor plus {isolated} us alone, plus {chained} us back to back."""
ABOUT_OPERATION = """\
Microseconds a call, medians, over distinct weights with a cold L2 cache, in CUDA graphs. In brackets: time divided by the floor. The
floor is the weight's bytes at the steady read rate of this card, {rate}.

- Chained: calls follow each other and overlap (programmatic dependent launch), with `weight_prefetch=True` or without it.
- Isolated: each call starts when the kernel before it has ended. So do the read-only kernel and all of PyTorch's. That is why a
  chained call can be faster than a kernel that only reads.
- Best torch.compile: the fastest of three forms, where there was time to measure it. Its best form, a multiplication and a sum, is
  not tuned to the same kernel each time: other runs on an H200 took 14.9 to 19.3 us at 2560x10240.
"""
ABOUT_MODEL = """\
{model}, {dtype}{prefetch}. PyTorch and mlpdown decode blocks of a few tokens in turns. Times are medians over blocks. The ratio is
PyTorch's time over mlpdown's in a pair of such blocks. In brackets: the 95 % interval of its median (treats pairs as independent).
*compile-pdl* is *compile* with `TORCHINDUCTOR_ENABLE_PDL=1` for both sides. That can make PyTorch alone slower, so compare the
fastest of either side. The *loop* is paced by its host: mostly launches are saved there, and only ratios within a pair compare.
"""

Content = dict[str, Any]


def update_readme(repository: Path) -> bool:
    """Write whatever is made from the receipts; returns whether anything changed. Raises ValueError if the README lacks a block."""
    written = {path: text for path, text in files(repository).items() if _text(repository / path) != text}
    for path, text in written.items():
        (repository / path).write_text(text)
    return bool(written)


def files(repository: Path) -> dict[str, str]:
    """The text of every file that is made from the receipts, by its path in the repository."""
    newest = newest_receipts(repository / RECEIPTS)
    readme = (repository / README).read_text()
    for name, lines in (("headline", headline(newest)), ("figures", six_figures(newest))):
        readme = with_block(readme, name, lines)
    made = {README: readme, f"{RECEIPTS}/{README}": all_figures(repository / RECEIPTS), ORDER_SVG: order_svg()}
    if "op" in newest:
        content = newest["op"]
        made[TIMES_SVG] = times_svg(content["results"][0], f"{content['machine']['gpu']}, {content['machine']['date'][:10]}")
    return made


def with_block(readme: str, name: str, lines: list[str]) -> str:
    """``readme`` with ``lines`` between the marks of that name. Raises ValueError if it does not have each mark once, in order."""
    begin, end = (f"<!-- {name}:{which} -->" for which in ("begin", "end"))
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"{README} must have {begin} and then {end}, each once")
    before, rest = readme.split(begin)
    return "\n".join([f"{before}{begin}", *(lines or [NO_RECEIPT]), f"{end}{rest.split(end)[1]}"])


def receipts(folder: Path) -> list[tuple[Path, Content]]:
    """All with anything in them, the newest first."""
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    found = [(path, content) for path, content in found if any(content.get(name) for name in ("results", "rows", "stages"))]
    return sorted(found, key=lambda item: item[1]["machine"]["date"], reverse=True)


def newest_receipts(folder: Path) -> dict[str, Content]:
    """``op``, ``e2e`` and ``gpu``: the newest of each kind, by the date in it."""
    newest: dict[str, Content] = {}
    for _, content in receipts(folder):
        newest.setdefault(_kind(content), content)
    return newest


def headline(newest: dict[str, Content]) -> list[str]:
    """One sentence for the op and one for a model, as items of a list."""
    lines = []
    if "op" in newest:
        result = newest["op"]["results"][0]
        chained, isolated, torch, compiled = (median_of(result, name) for name in (*SIX_COLUMNS, "compiled"))
        lines += [
            f"- **Fast.** A weight of {_size(result)} in {result['dtype']} takes {_us(chained)} us back to back, "
            f"{_us(isolated)} us alone. PyTorch takes {_us(torch)},",
            f"  the best torch.compile {_us(compiled)}. The memory floor is {_us(result['floor_us'])}. ({_where(newest['op'])})",
        ]
    if "e2e" in newest:
        content = newest["e2e"]
        rows = {row["mode"]: row for row in content["rows"] if row["num_tokens"] == HEADLINE_TOKENS}
        words = {"graph": "in a CUDA graph", "compile": "with torch.compile"}
        ratios = [f"{rows[mode]['ratio']['median']:.2f} times as long {words[mode]}" for mode in words if mode in rows]
        call = "mlpdown.patch(model, weight_prefetch=True)" if content["settings"]["weight_prefetch"] else "mlpdown.patch(model)"
        if {"compile", "compile-pdl"} <= rows.keys():
            stock, patched = (min(rows[mode][side]["median"] for mode in ("compile", "compile-pdl")) for side in ("stock_ms", "patched_ms"))
            ratios.append(f"{stock / patched:.2f} times if both may use PDL")
        lines += [
            f"- **Easy.** `{call}`. Without it, a decode step of {content['model']} takes",
            f"  {', '.join(ratios)}. ({_where(content)})",
        ]
    return lines


def six_figures(newest: dict[str, Content]) -> list[str]:
    """A table of the op, and how to read it."""
    if "op" not in newest:
        return []
    content = newest["op"]
    results = {result["shape"]: result for result in content["results"] if result["dtype"] == "float16"}
    lines = [f"| {_where(content)}, float16 | floor | back to back | alone | PyTorch |", "|---|---:|---:|---:|---:|"]
    for result in (results[name] for name in SIX_SHAPES if name in results):
        medians = [median_of(result, name) for name in SIX_COLUMNS]
        cells = ["-" if value is None else f"{value:.2f} ({ratio(value, result['floor_us'])})" for value in medians]
        lines.append(f"| {label_of(result).removesuffix(' float16')} | {result['floor_us']:.2f} | {' | '.join(cells)} |")
    chained, isolated = (_over_floor(content, name) for name in SIX_COLUMNS[:2])
    about = ABOUT_SIX.format(rate=steady_rate(content), count=len(content["results"]), isolated=isolated, chained=chained)
    return [*lines, "", *about.splitlines()]


def all_figures(folder: Path) -> str:
    """The page of all receipts."""
    lines = [ABOUT_RECEIPTS]
    makers = {"op": operation_figures, "e2e": model_figures, "gpu": receipt_figures}
    for path, content in receipts(folder):
        kind = _kind(content)
        lines += ["", f"## {path.name}", "", _made_on(content["machine"]), "", *makers[kind](content)]
    return "\n".join(lines) + "\n"


def operation_figures(content: Content) -> list[str]:
    rate = steady_rate(content)
    lines = [
        ABOUT_OPERATION.format(rate=f"{rate:.2f} TB/s" if rate else "which was not measured"),
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
    return lines


def model_figures(content: Content) -> list[str]:
    prefetch = ", weight_prefetch" if content["settings"]["weight_prefetch"] else ""
    lines = [
        ABOUT_MODEL.format(model=content["model"], dtype=content["dtype"], prefetch=prefetch),
        "| mode | tokens | PyTorch ms/token | mlpdown ms/token | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    noisy = []
    for row in content["rows"]:
        mode, ratio_ = mode_label(row["mode"], row["cache_length"]), row["ratio"]
        if ratio_["high"] > MAX_INTERVAL * ratio_["low"]:
            noisy.append(f"{mode} {row['num_tokens']}")
            continue
        times = f"{row['stock_ms']['median']:.3f} | {row['patched_ms']['median']:.3f}"
        lines.append(f"| {mode} | {row['num_tokens']} | {times} | {{median:.3f}} ({{low:.3f}} to {{high:.3f}}) |".format(**ratio_))
    if noisy:
        lines += ["", f"Too noisy to say anything (mode and tokens): {', '.join(noisy)}."]
    if content["not_run"]:
        lines += ["", f"Not run: {'; '.join(entry.split(':')[0] for entry in content['not_run'])}."]
    return lines + (["", f"Failed there: {'; '.join(content['failed'])}."] if content["failed"] else [])


def receipt_figures(content: Content) -> list[str]:
    lines = ["| what | verdict | found |", "|---|---|---|"]
    for name, stage in content["stages"].items():
        found = summarize(name, stage["findings"]).splitlines()[0].replace("|", "\\|")
        lines.append(f"| {name} | {stage['verdict']} | {found} |")
    return lines


def _kind(content: Content) -> str:
    return content.get("benchmark") or content["receipt"]


def _over_floor(content: Content, name: str) -> str:
    """The least and the most that a candidate takes longer than its floor."""
    medians = [(median_of(result, name), result["floor_us"]) for result in content["results"]]
    excess = [value - floor for value, floor in medians if value is not None and floor is not None]
    return f"{min(excess):.1f} to {max(excess):.1f}" if excess else "-"


def _size(result: Content) -> str:
    return f"{result['hidden_dim']}x{result['intermediate_dim']}"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _where(content: Content) -> str:
    """A card, and the kernels that ran on it."""
    machine = content["machine"]
    return f"{machine['gpu'] or machine['platform']}, kernels of commit {(machine['commit'] or 'unknown')[:7]}"


def _made_on(machine: Content) -> str:
    words = [machine.get("gpu") or machine["platform"]]
    words += [f"{name} {machine[name]}" for name in ("torch", "transformers", "driver", "commit") if machine.get(name)]
    return f"{', '.join(words)}, {machine['date'][:10]}."


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None
