"""What a GPU gave, against the specification run here: the silicon is not needed any more to hold the specification to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mlpdown import golden, reference
from mlpdown.golden import Golden, GoldenCase, read_golden
from receipt import goldens as receipt_goldens
from receipt.goldens import GOLDEN_CASES

FOLDER = Path(golden.__file__).parent / "goldens"
SMALL = GoldenCase(24, 64, "bfloat16", "cancelling", 5)


def test_every_golden_is_there() -> None:
    """Made on a GPU by ``python -m tests.receipt.goldens --out mlpdown/goldens``."""
    assert {path.name for path in FOLDER.glob("*.json")} == {case.file_name for case in GOLDEN_CASES}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_specification_has_the_bits_of_the_gpu(path: Path) -> None:
    recorded = read_golden(path)
    assert recorded.case in GOLDEN_CASES
    assert recorded.gpu
    assert recorded.num_wrong_bits() == 0


@pytest.mark.parametrize("golden_case", [case for case in GOLDEN_CASES if case.kind == "cancelling"], ids=lambda case: case.file_name)
def test_another_order_would_show(golden_case: GoldenCase) -> None:
    """The same products in reverse: over half of the bits differ, so goldens of these inputs pin the order down."""
    case = golden_case.make()
    reverse = dataclasses.replace(
        case,
        mlp_intermediate=np.ascontiguousarray(case.mlp_intermediate[:, ::-1]),
        weight=np.ascontiguousarray(case.weight[:, ::-1]),
    )
    assert (case.expected_bits() != reference.mlp_down(*reverse.arrays(), dtype=case.dtype)).mean() > 0.5


def test_golden_survives_its_file_and_sees_one_flipped_bit(tmp_path: Path) -> None:
    bits = SMALL.make().expected_bits()[0]
    path = Golden(SMALL, "a GPU", bits).write(tmp_path)
    again = read_golden(path)
    assert again.case == SMALL and again.gpu == "a GPU"
    assert again.num_wrong_bits() == 0
    bits = bits.copy()
    bits[3] ^= 1
    assert read_golden(Golden(SMALL, "a GPU", bits).write(tmp_path)).num_wrong_bits() == 1


@pytest.mark.parametrize("damage", [{"bits": "AAAA"}, {"bits": "?"}, {"extra": 1}, {"gpu": None, "seed": None, "bits": ""}])
def test_damaged_golden_is_refused(damage: dict[str, object], tmp_path: Path) -> None:
    path = Golden(SMALL, "a GPU", SMALL.make().expected_bits()[0]).write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(ValueError, match=path.name):
        read_golden(path)


def test_making_goldens_needs_the_native_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlpdown

    monkeypatch.setattr(mlpdown, "backends", lambda: {"native": mlpdown.BackendStatus(False, "no GPU today")})
    monkeypatch.setattr("sys.argv", ["receipt_goldens", "--out", str(tmp_path / "goldens")])
    assert receipt_goldens.main() == 2
    assert "no GPU today" in capsys.readouterr().err
    assert not (tmp_path / "goldens").exists()
