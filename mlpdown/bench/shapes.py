"""The shapes that are measured: the MLP down projections of models that people run, and other linear layers, whose rows are short."""

from __future__ import annotations

import dataclasses
import re

BYTES_PER_ELEMENT = 2


@dataclasses.dataclass(frozen=True)
class Shape:
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


PYTHIA_2B8 = Shape("pythia-2.8b", 2560, 10240)
SHAPES = (
    Shape("pythia-70m", 512, 2048),
    Shape("pythia-160m", 768, 3072),
    Shape("pythia-410m", 1024, 4096),
    Shape("pythia-1b", 2048, 8192),
    PYTHIA_2B8,
    Shape("pythia-6.9b", 4096, 16384),
    Shape("pythia-12b", 5120, 20480),
    Shape("llama-2-7b", 4096, 11008),
    Shape("llama-3-8b", 4096, 14336),
    Shape("qwen2-7b", 3584, 18944),
)

# Of Pythia-2.8B the up projection, query, key and value, and the attention's output projection; and a square.
SHORT_SHAPES = (
    Shape("up-2.8b", 10240, 2560),
    Shape("qkv-2.8b", 7680, 2560),
    Shape("proj-2.8b", 2560, 2560),
    Shape("4096x4096", 4096, 4096),
)
LISTS = {"all": SHAPES, "short": SHORT_SHAPES}


def parse_shapes(text: str) -> list[Shape]:
    """``all``, ``short``, or names and ``HIDDENxINTERMEDIATE`` sizes with commas. Raises ValueError for anything else."""
    if text in LISTS:
        return list(LISTS[text])
    known = (*SHAPES, *SHORT_SHAPES)
    by_name = {shape.name: shape for shape in known}
    by_size = {(shape.hidden_dim, shape.intermediate_dim): shape for shape in known}
    shapes = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", word)
        if word in by_name:
            shapes.append(by_name[word])
        elif match:
            size = int(match[1]), int(match[2])
            if size[0] < 1 or size[1] < 8 or size[1] % 8:
                raise ValueError(f"intermediate_dim of a shape must be a positive multiple of 8, got {word!r}")
            shapes.append(by_size.get(size, Shape(word, *size)))
        else:
            raise ValueError(f"shape must be {', '.join(LISTS)}, HIDDENxINTERMEDIATE or one of {', '.join(by_name)}, got {word!r}")
    return shapes
