"""What ``mlpdown bench op`` found, as tables. The JSON is one object, and so are the results that functions here take:

benchmark, schema_version   "op", 1
machine         what :func:`mlpdown.machine.describe` says
steady_read     {"tb_per_s": [samples]} of one large read; null without a GPU
validity        {"valid": true, false or null, "reasons": [text]}: whether this machine is as fast as it should be
results         a list, one entry a shape and dtype:
    shape, hidden_dim, intermediate_dim, dtype
    weight_bytes    of one call; floor_us: these at the steady read rate, null without a GPU
    num_calls       calls of a run, each over another weight
    plans           native candidate -> its plan; null without the native kernel
    timings         candidate -> [microseconds a call, one sample a run]
    cpu_cost        backend -> [microseconds of the CPU a call, one sample a batch]
    missing         candidate -> why it was not measured
plans           null, or a list of what :func:`mlpdown.bench.plans.sweep` returns, with shape, dtype and floor_us
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..tables import new_table
from ..timing import median, quartiles
from .shapes import Shape

Content = dict[str, Any]

SCHEMA_VERSION = 1
WIDE_COLUMNS = 140
SUMMARY = ("read_only", "native_chained_prefetch", "native_chained", "native_isolated", "torch_graph", "compiled")
# In the order in which they are shown.
CANDIDATES = {
    "read_only": "a kernel that only reads",
    "native_chained_prefetch": "native, chained, prefetch",
    "native_chained": "native, chained",
    "native_isolated": "native, isolated",
    "numba": "numba (the specification)",
    "torch_graph": "PyTorch in a CUDA graph",
    "torch_eager": "PyTorch, eager, wall time",
    "compile_multiply_and_sum": "compiled multiply and sum",
    "compile_default": "torch.compile",
    "compile_max_autotune": "torch.compile, autotuned",
    "torch": "PyTorch",
}


def label_of(result: Content) -> str:
    return f"{Shape(result['shape'], result['hidden_dim'], result['intermediate_dim'])} {result['dtype']}"


def median_of(result: Content, name: str) -> float | None:
    """Median microseconds a call, of ``compiled`` the fastest form's; None if it was not measured."""
    timings = result["timings"]
    medians = [median(timings[form]) for form in timings if form == name or (name == "compiled" and form.startswith("compile_"))]
    return min(medians, default=None)


def steady_rate(content: Content) -> float | None:
    """TB/s; None without a GPU."""
    return median(content["steady_read"]["tb_per_s"]) if content["steady_read"] else None


def detail_table(result: Content, num_rounds: int) -> Table:
    """Every candidate of one shape and dtype."""
    title = f"{label_of(result)}: us a call, {num_rounds} rounds of {result['num_calls']} calls"
    table = new_table(title, "candidate", "median", "quartiles", "over\nfloor", "over native\nchained / isolated")
    if result["floor_us"] is not None:
        table.add_row(f"floor: {result['weight_bytes'] / 1e6:.2f} MB, steady read", f"{result['floor_us']:.2f}", "", "1.00")
    shown = {CANDIDATES[name]: result["timings"][name] for name in CANDIDATES if name in result["timings"]}
    for name, samples in {**shown, **result["cpu_cost"]}.items():
        cells = [name, f"{median(samples):.2f}", "{:.2f}-{:.2f}".format(*quartiles(samples))]
        if name in shown:
            table.add_row(*cells, ratio(median(samples), result["floor_us"]), over_native(median(samples), result))
        else:
            table.add_row(f"CPU time of a call, {name}", *cells[1:])
    return table


def summary_table(content: Content, width: int) -> Table:
    """A row a shape and dtype, of several lines where ``width`` is small."""
    headings = ("shape", "floor", "read\nonly", "chained,\nprefetch", "chained", "iso-\nlated", "PyTorch", "best\ncom-\npiled")
    title = "us a call (over floor); over native: over chained, prefetch / isolated"
    last, options = ("PyTorch\nover\nnative", "compiled\nover\nnative"), {"padding": 0, "caption_justify": "left"}
    table = new_table(title, *headings, *last, caption="Above 1 native is faster.", **options)
    for result in content["results"]:
        cells = [label_of(result), *summary_cells(result), *(over_native(median_of(result, name), result) for name in SUMMARY[-2:])]
        table.add_row(*(cell if width >= WIDE_COLUMNS else cell.replace(" / ", " /\n").replace(" (", "\n(") for cell in cells))
    return table


def summary_cells(result: Content) -> list[str]:
    """The floor, and the medians of :data:`SUMMARY` with their ratio to it."""
    floor, values = result["floor_us"], [median_of(result, name) for name in SUMMARY]
    cells = ["-" if value is None else f"{value:.2f}" + f" ({ratio(value, floor)})" * bool(floor) for value in values]
    return [f"{floor:.2f}" if floor else "-", *cells]


def ratio(value: float | None, reference: float | None) -> str:
    return "-" if value is None or not reference else f"{value / reference:.2f}"


def over_native(value: float | None, result: Content) -> str:
    return " / ".join(ratio(value, median_of(result, name)) for name in ("native_chained_prefetch", "native_isolated"))
