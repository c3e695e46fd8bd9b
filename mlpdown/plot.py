"""Plots of results. They need matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .bench.report import Content, label_of, median_of, steady_rate

# Candidates of a GPU, then of a CPU.
BARS = {
    "torch_graph": ("PyTorch, CUDA graph", "#b8b8b8"),
    "compiled": ("torch.compile, best form", "#7f7f7f"),
    "read_only": ("kernel that only reads", "#e3c26f"),
    "native_isolated": ("mlpdown, isolated", "#7fb3d5"),
    "native_chained_prefetch": ("mlpdown, chained, prefetch", "#1f618d"),
    "torch": ("PyTorch", "#b8b8b8"),
    "numba": ("mlpdown, specification", "#7fb3d5"),
}
BESIDE = {"fontsize": "small", "loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}


def require_matplotlib() -> None:
    """Raise ValueError if it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib must be installed for --plot: pip install matplotlib")


def plot_bandwidth(content: Content, path: Path) -> None:
    """How much of the memory's steady rate each candidate reaches, shape by shape; to ``path`` with the suffixes .svg and .png."""
    import matplotlib
    from matplotlib.figure import Figure

    dtypes, rate = list(dict.fromkeys(result["dtype"] for result in content["results"])), steady_rate(content)
    with matplotlib.rc_context({"svg.hashsalt": "mlpdown", "svg.fonttype": "none", "font.size": 9}):
        size = (4.0 + 1.1 * len(content["results"]) / len(dtypes), 3.2 * len(dtypes))
        figure = Figure(figsize=size, layout="constrained")
        for axes, dtype in zip(figure.subplots(len(dtypes), 1, squeeze=False)[:, 0], dtypes, strict=True):
            results = [result for result in content["results"] if result["dtype"] == dtype]
            names = [name for name in BARS if any(median_of(result, name) for result in results)]
            width = 0.8 / len(names)
            for index, name in enumerate(names):
                rates = [result["weight_bytes"] / (median_of(result, name) or float("inf")) / 1e6 for result in results]
                places = [position + (index - (len(names) - 1) / 2) * width for position in range(len(results))]
                axes.bar(places, rates, width, label=BARS[name][0], color=BARS[name][1])
            if rate is not None:
                axes.axhline(rate, color="black", linewidth=1, label=f"steady read {rate:.2f} TB/s")
            axes.set_xticks(range(len(results)), [label_of(result).removesuffix(f" {dtype}").replace(" ", "\n") for result in results])
            axes.set_ylabel("TB/s of weights")
            axes.set_title(f"{content['machine']['gpu'] or 'CPU'}, {dtype}, one token", loc="left")
            axes.legend(**BESIDE)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=160)


def plot_decoding(content: Content, path: Path) -> None:
    """Milliseconds a token over the number of tokens: a colour and a marker a mode, dashed for PyTorch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, mode in enumerate(dict.fromkeys(row["mode"] for row in content["rows"])):
        rows = sorted((row for row in content["rows"] if row["mode"] == mode), key=lambda row: row["num_tokens"])
        for name, label, style in (("stock_ms", "PyTorch", "--"), ("patched_ms", "mlpdown", "-")):
            points = [row["num_tokens"] for row in rows], [row[name]["median"] for row in rows]
            axes.plot(*points, style, color=f"C{index}", marker="os^Dv"[index], label=f"{mode}, {label}")
    lengths = sorted({row["num_tokens"] for row in content["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("output tokens")
    axes.set_ylabel("ms per output token")
    axes.set_title(f"{content['model']}, {content['dtype']}, {content['device']}", fontsize="medium")
    axes.legend(**BESIDE)
    figure.savefig(path)
