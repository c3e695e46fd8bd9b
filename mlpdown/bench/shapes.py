"""The shapes that are measured: the MLP down projections of models that people run, and other linear layers, whose rows are short."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..plan import BYTES_PER_ELEMENT
from ..reference.order import VECTOR_SIZE


class Shape(NamedTuple):
    """``weight`` is ``[hidden_dim, intermediate_dim]`` in 16 bits."""

    name: str
    hidden_dim: int
    intermediate_dim: int

    @property
    def weight_bytes(self) -> int:
        """What a call cannot help reading from memory. The vectors are left out: they are 0.1 % of it, and stay in the L2 cache."""
        return BYTES_PER_ELEMENT * self.hidden_dim * self.intermediate_dim

    def __str__(self) -> str:
        size = f"{self.hidden_dim}x{self.intermediate_dim}"
        return size if self.name == size else f"{self.name} {size}"


def _read(text: str) -> Shape:
    name, hidden_dim, intermediate_dim = re.fullmatch(r"(?:(\S+) )?(\d+)x(\d+)", text).groups()  # type: ignore[union-attr]
    return Shape(name or text, int(hidden_dim), int(intermediate_dim))


PYTHIA_2B8 = _read("pythia-2.8b 2560x10240")
_PYTHIA = "pythia-70m 512x2048,pythia-160m 768x3072,pythia-410m 1024x4096,pythia-1b 2048x8192"
_PYTHIA += f",{PYTHIA_2B8},pythia-6.9b 4096x16384,pythia-12b 5120x20480"
SHAPES = tuple(map(_read, f"{_PYTHIA},llama-2-7b 4096x11008,llama-3-8b 4096x14336,qwen2-7b 3584x18944".split(",")))
# Of Pythia-2.8B the up projection, query, key and value, and the attention's output projection; and a square.
SHORT_SHAPES = tuple(map(_read, ["up-2.8b 10240x2560", "qkv-2.8b 7680x2560", "proj-2.8b 2560x2560", "4096x4096"]))


def parse_shapes(text: str) -> list[Shape]:
    """``all``, ``short``, or names and ``HIDDENxINTERMEDIATE`` sizes with commas. Raises ValueError for anything else."""
    known = {key: shape for shape in (*SHAPES, *SHORT_SHAPES) for key in (shape.name, str(shape).split()[-1])}
    shapes = list({"all": SHAPES, "short": SHORT_SHAPES}.get(text, ()))
    for word in [] if shapes else text.split(","):
        if word not in known and re.fullmatch(r"\d+x\d+", word) is None:
            raise ValueError(f"shape must be all, short, HIDDENxINTERMEDIATE or one of {', '.join(known)}, got {word!r}")
        shapes.append(known.get(word) or _read(word))
        if shapes[-1].hidden_dim < 1 or shapes[-1].intermediate_dim < VECTOR_SIZE or shapes[-1].intermediate_dim % VECTOR_SIZE:
            raise ValueError(f"intermediate_dim of a shape must be a positive multiple of 8, got {word!r}")
    return shapes
