"""Targets as they are named, which GPUs they serve, and what ptxas reports of each."""

from __future__ import annotations

import pytest

from mlpdown.jit import report, targets


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["90"], ("sm_90",)),
        (["8.6", "compute_90", "sm_80"], ("sm_80", "sm_86", "compute_90")),
        (["12.0", "sm_90", "compute_90", "9.0"], ("sm_90", "sm_120", "compute_90")),
        (["all"], targets.ALL_TARGETS),
    ],
)
def test_targets_of_the_command_line(names: list[str], expected: tuple[str, ...]) -> None:
    assert targets.parse_targets(names) == expected


@pytest.mark.parametrize("name", ["sm_75", "compute_75", "compute_80", "compute_89", "hopper", "sm_", "9", "sm_90a"])
def test_target_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="arch must be"):
        targets.parse_targets([name])


@pytest.mark.parametrize(
    ("held", "capability", "expected"),
    [
        (("sm_90",), (9, 0), True),
        (("sm_90",), (10, 0), False),
        (("sm_87",), (8, 7), True),
        (("sm_80", "sm_86"), (8, 9), True),
        (("sm_80",), (9, 0), False),
        (("sm_86",), (8, 0), False),
        (("sm_90", "compute_90"), (11, 0), True),
        (("sm_100",), (10, 3), True),
        (("sm_103",), (10, 0), False),
        (("sm_120",), (12, 1), True),
        (("compute_120",), (9, 0), False),
    ],
)
def test_which_gpus_a_library_serves(held: tuple[str, ...], capability: tuple[int, int], expected: bool) -> None:
    assert targets.serves(held, capability) is expected


def test_report_is_read_from_what_ptxas_says() -> None:
    log = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4ringI7Float16Lj8ELj4EEv14MlpDownProblem11MlpDownPlan' for 'sm_90'
ptxas info    : Function properties for _Z4ringI7Float16Lj8ELj4EEv14MlpDownProblem11MlpDownPlan
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 86 registers, used 1 barriers, 384 bytes smem, 16 bytes lmem
"""
    assert report.parse(log) == [report.KernelResources("sm_90", "ring<Float16, 8, 4>", 86, 4, 12, 8, 16, 384)]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_Z4ringI8BFloat16Lj4ELj2EEv14MlpDownProblem11MlpDownPlan", "ring<BFloat16, 4, 2>"),
        ("_Z9registersI7Float16Lj5EEv14MlpDownProblem", "registers<Float16, 5>"),
        ("_Z5other", "_Z5other"),
    ],
)
def test_kernels_have_their_names(symbol: str, name: str) -> None:
    assert report.kernel_name(symbol) == name
