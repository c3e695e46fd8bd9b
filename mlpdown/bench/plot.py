"""The roofline as a bar chart: how much of the memory's steady rate each candidate reaches, shape by shape."""

from __future__ import annotations

from pathlib import Path

from .results import Report, median
from .tables import COMPILED_PEERS, best

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


def write_plot(report: Report, path: Path) -> list[Path]:
    """Draw a report to ``path`` with the suffixes .svg and .png; returns the two.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("a plot needs matplotlib: pip install 'mlpdown[bench]'") from error

    dtypes = list(dict.fromkeys(result.dtype for result in report.results))
    num_shapes = max(sum(result.dtype == dtype for result in report.results) for dtype in dtypes)
    with matplotlib.rc_context({"svg.hashsalt": "mlpdown", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(max(5.0, 1.6 + 1.1 * num_shapes), 3.2 * len(dtypes)), layout="constrained")
        for axes, dtype in zip(figure.subplots(len(dtypes), 1, squeeze=False)[:, 0], dtypes, strict=True):
            results = [result for result in report.results if result.dtype == dtype]
            bars: dict[str, list[tuple[int, float]]] = {}
            for position, result in enumerate(results):
                for name in BARS:
                    compiled = best(result, COMPILED_PEERS)
                    value = (compiled[1] if compiled else None) if name == "compiled" else result.median(name)
                    if value is not None:
                        bars.setdefault(name, []).append((position, result.weight_bytes / value / 1e6))
            names = [name for name in BARS if name in bars]
            width = 0.8 / max(1, len(names))
            for index, name in enumerate(names):
                offset = (index - (len(names) - 1) / 2) * width
                label, color = BARS[name]
                places = [position + offset for position, _ in bars[name]]
                axes.bar(places, [rate for _, rate in bars[name]], width, label=label, color=color)
            if report.steady_read is not None:
                steady = median(report.steady_read["tb_per_s"])
                axes.axhline(steady, color="black", linewidth=1)
                axes.annotate(f"steady read {steady:.2f} TB/s", (0, steady), xytext=(2, 2), textcoords="offset points")
                axes.set_ylim(0, 1.25 * steady)
            axes.set_xticks(range(len(results)), [f"{result.shape}\n{result.hidden_dim}x{result.intermediate_dim}" for result in results])
            axes.set_ylabel("TB/s of weights")
            axes.set_title(f"{report.machine['gpu'] or 'CPU'}, {dtype}, one token", loc="left")
            axes.legend(ncols=3, fontsize=7, loc="upper center")
        paths = [path.with_suffix(".svg"), path.with_suffix(".png")]
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=160)
    return paths
