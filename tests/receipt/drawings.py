"""The README's two drawings, as SVG: the order of summation, drawn from what ``reference/order.py`` computes, and the times of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from mlpdown.reference import order

from mlpdown.bench.report import Content, label_of, median_of

WIDTH = 900
MARGIN = 20
BLUE, LIGHT_BLUE, GREY, LIGHT_GREY, YELLOW, BLACK = "#1f618d", "#d4e6f1", "#8a8a8a", "#eeeeee", "#e3c26f", "#222222"
ROW_LENGTH = 10240
LANE = 3  # the one that is followed

BARS = (
    ("torch_graph", "PyTorch", GREY),
    ("compiled", "torch.compile, best of three forms", GREY),
    ("native_isolated", "mlpdown, alone", "#7fb3d5"),
    ("read_only", "a kernel that only reads the weight, alone", YELLOW),
    ("native_chained_prefetch", "mlpdown, back to back, weight_prefetch=True", BLUE),
)


class Term(NamedTuple):
    """An addition that the order asked for, or what went into it."""

    left: Any
    right: Any


class Drawing:
    """Shapes, one after the other; ``svg`` is the file's text."""

    def __init__(self) -> None:
        self.shapes: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = GREY) -> None:
        self.shapes.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}"/>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, label: str = "") -> None:
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="white"/>')
        if label:
            self.text(x + width / 2, y + height / 2 + 4, label, anchor="middle", size=11, fill="white" if fill == BLUE else BLACK)

    def dot(self, x: float, y: float) -> None:
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="3" fill="{BLUE}"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "start", size: int = 13, fill: str = BLACK) -> None:
        style = f'text-anchor="{anchor}" font-size="{size}" fill="{fill}"'
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>')

    def svg(self, height: float) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="sans-serif">'
        return "\n".join([head, f'<rect width="{WIDTH}" height="{height:g}" fill="white"/>', *self.shapes, "</svg>", ""])


def order_svg() -> str:
    """Steps 1 to 9 for a row of :data:`ROW_LENGTH` weights. Which vector goes to which lane, and what is added to what, is taken from the
    functions of the specification, run on names in place of numbers."""
    drawing, span = Drawing(), WIDTH - 2 * MARGIN
    num_segments, length = order.num_segments(ROW_LENGTH), order.vectors_per_segment(ROW_LENGTH)
    cut = f"vectors of {order.VECTOR_SIZE}, and these into {num_segments} segments of {length} vectors"
    drawing.text(MARGIN, 24, f"1, 2   A row of {ROW_LENGTH:,} weights is cut into {cut}.")
    for segment in range(num_segments):
        fill = BLUE if segment == 0 else LIGHT_BLUE
        drawing.box(MARGIN + segment * span / num_segments, 34, span / num_segments, 26, fill, f"segment {segment}")

    drawing.text(MARGIN, 92, f"3   The vectors of a segment are dealt to {order.NUM_LANES} lanes: a column is a lane, a number a vector.")
    cell, top = span / order.NUM_LANES, 102
    for lane in range(order.NUM_LANES):
        for place, vector in enumerate(vectors_of(lane, length)):
            drawing.box(MARGIN + lane * cell, top + place * 20, cell, 20, BLUE if lane == LANE else LIGHT_GREY, str(vector))

    y = top + 20 * len(vectors_of(0, length)) + 34
    positions = order.VECTOR_SIZE
    products = "Each vector adds a product to each of them."
    drawing.text(MARGIN, y, f"4   A lane has {positions} accumulators, one for each position in a vector. {products}")
    drawing.text(MARGIN, y + 18, "5   Then the accumulators are added up as a tree: the lane's sum.")
    leaves = {f"a{position}": (MARGIN + 60 + position * 100.0, y + 52.0) for position in range(positions)}
    for name, (x, leaf_y) in leaves.items():
        drawing.box(x - 24, leaf_y - 20, 48, 20, BLUE, name)
    _, y = _draw_sum(drawing, _lane_sum(), leaves, 24, lambda left, right: (left + right) / 2)

    y += 40
    tree = "a tree: the upper half of the lanes to the lower half, until lane 0 has the segment's sum"
    drawing.text(MARGIN, y, f"6   The lanes' sums are added up as {tree}.")
    leaves = {f"l{lane}": (MARGIN + (lane + 0.5) * cell, y + 34.0) for lane in range(order.NUM_LANES)}
    for lane, (x, leaf_y) in enumerate(leaves.values()):
        drawing.box(x - cell / 2, leaf_y - 20, cell, 20, BLUE if lane == LANE else LIGHT_GREY, str(lane))
    _, y = _draw_sum(drawing, _segment_sum(), leaves, 22, min)

    y += 40
    addends = "then bias, attn_output and hidden_states"
    drawing.text(MARGIN, y, f"7, 8   The segments' sums are added in order, {addends}.   9   One rounding to 16 bits.")
    chain = [f"s{segment}" for segment in range(num_segments)] + ["bias", "attn", "hidden"]
    leaves = {name: (MARGIN + 35 + place * 74.0, y + 34.0) for place, name in enumerate(chain)}
    for name, (x, leaf_y) in leaves.items():
        drawing.box(x - 28, leaf_y - 20, 56, 20, BLUE if name == "s0" else LIGHT_BLUE, name)
    (x, last_y), y = _draw_sum(drawing, _row_sum(num_segments, chain[num_segments:]), leaves, 10, max)
    drawing.line(x, last_y, x + 34, last_y)
    drawing.text(x + 38, last_y + 4, "out", size=12)
    return drawing.svg(y + 20)


def vectors_of(lane: int, num_vectors: int) -> list[int]:
    """Those of a segment that a lane takes, as the specification takes them."""
    taken: list[int] = []
    _specification(lambda weight, _activation, _sum: taken.append(weight // order.VECTOR_SIZE)).sum_lane(
        range(ROW_LENGTH), range(ROW_LENGTH), 0, num_vectors, lane
    )
    return taken[:: order.VECTOR_SIZE]


def times_svg(result: Content, gpu: str) -> str:
    """Bars of one shape and dtype of an op receipt: each candidate's median, and the floor."""
    bars = [(label, median_of(result, name), fill) for name, label, fill in BARS]
    bars.append(("floor: the weight's bytes at the card's steady read rate", result["floor_us"], LIGHT_BLUE))
    shown = [(label, value, fill) for label, value, fill in bars if value]
    drawing, left = Drawing(), 400.0
    scale = (WIDTH - left - 70) / max(value for _, value, _ in shown)
    drawing.text(MARGIN, 26, f"{label_of(result)}, one token, {gpu}: microseconds a call, less is better", size=14)
    for place, (label, value, fill) in enumerate(shown):
        y = 42 + place * 28
        drawing.text(left - 10, y + 15, label, anchor="end")
        drawing.box(left, y, value * scale, 22, fill)
        drawing.text(left + value * scale + 6, y + 15, f"{value:.1f}")
    return drawing.svg(54 + 28 * len(shown))


def _specification(fma: Callable[..., Any]) -> order.Arithmetic:
    """The order's functions on names: an addition becomes a :class:`Term`."""

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def missing(*_: Any) -> Any:
        raise NotImplementedError("of numbers, steps 4 to 8 need additions and fused multiply-adds alone")

    operations = {name: missing for name in order.Machine._fields}
    # A name has no bits; those of 0 say that it is no NaN.
    known = {"compile": compile, "add": Term, "fma": fma, "float_to_bits": lambda name: 0}
    return order.arithmetic(order.Machine(**{**operations, **known}))


def _lane_sum() -> Term:
    """Step 5, of the accumulators of a lane with one vector."""
    return _specification(lambda weight, _activation, _sum: f"a{weight}").sum_lane(range(8), range(8), 0, 1, 0)


def _segment_sum() -> Term:
    """Step 6."""
    sums: list[Any] = [f"l{lane}" for lane in range(order.NUM_LANES)]
    width = order.NUM_LANES // 2
    while width > 0:
        for lane in range(order.NUM_LANES):
            _specification(Term).fold_lanes(sums, lane, width)
        width //= 2
    return sums[0]


def _row_sum(num_segments: int, addends: Sequence[str]) -> Term:
    """Steps 7 and 8."""
    specification = _specification(Term)
    total = specification.sum_segments([f"s{segment}" for segment in range(num_segments)], num_segments)
    for addend in addends:
        total = specification.add(total, addend)
    return total


def _draw_sum(
    drawing: Drawing, term: Any, leaves: dict[str, tuple[float, float]], step: float, across: Callable[[float, float], float]
) -> tuple[tuple[float, float], float]:
    """Draw what is added to what, below ``leaves``; returns where the sum is, and the lowest y."""
    if isinstance(term, str):
        return leaves[term], leaves[term][1]
    (left_x, left_y), left_low = _draw_sum(drawing, term.left, leaves, step, across)
    (right_x, right_y), right_low = _draw_sum(drawing, term.right, leaves, step, across)
    x, y = across(left_x, right_x), max(left_y, right_y) + step
    drawing.line(left_x, left_y, x, y)
    drawing.line(right_x, right_y, x, y)
    drawing.dot(x, y)
    return (x, y), max(left_low, right_low, y)
