"""Goldens: what the native kernel gave on a GPU, bit for bit, kept so that a machine without one can hold the specification to it.

They lie in ``goldens/``, one JSON file a case: the arguments of :func:`mlpdown.cases.make_case`, the GPU, and the output's bits (base64
of little-endian 16-bit words).
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .cases import Case, make_case

if TYPE_CHECKING:
    from importlib.abc import Traversable


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """The arguments of :func:`mlpdown.cases.make_case`."""

    hidden_dim: int
    intermediate_dim: int
    dtype: str
    kind: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.hidden_dim}x{self.intermediate_dim}-{self.dtype}-{self.kind}.json"

    def make(self) -> Case:
        return make_case(self.hidden_dim, self.intermediate_dim, self.dtype, self.kind, self.seed)


@dataclasses.dataclass(frozen=True)
class Golden:
    """A case and its output on a GPU."""

    case: GoldenCase
    gpu: str
    bits: npt.NDArray[np.uint16]
    """``[hidden_dim]``."""

    def write(self, folder: Path) -> Path:
        """Write to ``folder`` under the case's own name."""
        encoded = base64.b64encode(self.bits.astype("<u2").tobytes()).decode()
        content = {**dataclasses.asdict(self.case), "gpu": self.gpu, "bits": encoded}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.case.file_name
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    def num_wrong_bits(self) -> int:
        """Elements in which the specification, run here, differs."""
        return int((self.case.make().expected_bits()[0] != self.bits).sum())


def shipped_goldens() -> list[Traversable]:
    """The files that come with the package, in the order of their names."""
    folder = importlib.resources.files(__package__) / "goldens"
    files = [file for file in folder.iterdir() if file.name.endswith(".json")] if folder.is_dir() else []
    return sorted(files, key=lambda file: file.name)


def read_golden(path: Path | Traversable) -> Golden:
    """Read what :meth:`Golden.write` wrote. Raises ValueError if it is something else."""
    try:
        content = json.loads(path.read_text())
        bits = np.frombuffer(base64.b64decode(content.pop("bits"), validate=True), "<u2").astype(np.uint16)
        golden = Golden(gpu=content.pop("gpu"), bits=bits, case=GoldenCase(**content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a golden: {error}") from error
    numbers = (golden.case.hidden_dim, golden.case.intermediate_dim, golden.case.seed)
    if not all(type(number) is int and 0 <= number < 1 << 32 for number in numbers) or not isinstance(golden.gpu, str):
        raise ValueError(f"{path} is not a golden: its sizes and seed must be numbers, its GPU a name")
    if path.name != golden.case.file_name:
        raise ValueError(f"{path} holds {golden.case.file_name}")
    if bits.shape != (golden.case.hidden_dim,):
        raise ValueError(f"{path} must hold {golden.case.hidden_dim} elements, got {bits.size}")
    return golden
