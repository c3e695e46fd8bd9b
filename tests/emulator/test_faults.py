"""The checks are themselves tested: a kernel with one place changed must be caught, by the check that is meant for it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from mlpdown.plan import H200, Plan, check_plan

from .build import HERE, NATIVE
from .cases import assert_same_bits, expected_bits, expected_partial_sums, make_inputs
from .conftest import NUM_SCHEDULES
from .faults import FAULTS, Fault
from .launch import Kernel, ProtocolViolation

SHAPE = (81, 200)  # 21 tiles: the ring wraps ten times, the slots once; the last tile has one row
INPUTS = make_inputs(*SHAPE, "float16", 1)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_planted_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    native = tmp_path / "native"
    shutil.copytree(NATIVE, native)
    places = [path for path in native.glob("*.cuh") for _ in range(path.read_text().count(fault.old))]
    assert len(places) == 1, f"the text to change stands in {places}: bring faults.py up to the kernel"
    places[0].write_text(places[0].read_text().replace(fault.old, fault.new))

    plan = fault.plan
    kernel = (
        Kernel([], (plan.rows_in_registers,), native, optimise=False)
        if plan.rows_in_registers
        else Kernel([(plan.cluster_size, plan.rows_per_stage)], (), native, optimise=False)
    )
    caught: dict[str, str] = {}
    for seed in range(NUM_SCHEDULES):
        check, report = _what_fails(kernel, plan, seed, fault.is_partial_sums)
        caught.setdefault(check, report)
        if check == fault.check:
            assert _what_fails(kernel, plan, seed, fault.is_partial_sums) == (check, report), (
                "a failing seed must replay exactly"
            )
            break
    assert fault.check in caught, f"in {NUM_SCHEDULES} schedules, only these checks failed: {caught}"
    print(f"{fault.name}: caught in schedule {seed}: {caught[fault.check]}")


def _what_fails(kernel: Kernel, plan: Plan, seed: int, is_partial_sums: bool = False) -> tuple[str, str]:
    try:
        out, _ = kernel.launch(INPUTS, plan, seed=seed, is_partial_sums=is_partial_sums)
        assert_same_bits(out, expected_partial_sums(INPUTS) if is_partial_sums else expected_bits(INPUTS), str(plan))
    except ProtocolViolation as violation:
        return violation.check, str(violation)
    except AssertionError as difference:
        return "wrong bits", str(difference)
    return "none", ""


def test_a_refused_plan_goes_wrong(kernel: Kernel) -> None:
    """Two groups of warps over three stages: each sees only every other pass over a stage."""
    plan = Plan(8, 1, num_stages=3, stages_in_flight=3, num_consumer_warps=2)
    with pytest.raises(ValueError, match="num_consumer_warps"):
        check_plan(plan, SHAPE[1], H200)
    assert "unfilled read" in {_what_fails(kernel, plan, seed)[0] for seed in range(20)}


def test_every_check_has_a_fault() -> None:
    sources = "".join(path.read_text() for path in HERE.glob("*.cpp"))
    checks = set(re.findall(r'fail\("([^"]+)"', sources)) | set(
        re.findall(r'\? "([\w ]+)" : "([\w ]+)", report', sources)[0]
    )
    assert len(checks) > 20
    assert {fault.check for fault in FAULTS} == checks | {"wrong bits"}
