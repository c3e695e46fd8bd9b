"""The checks are themselves tested: a kernel with one place changed must be caught, by the check that is meant for it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from mlpdown.plan import H200, Plan, check_plan, instantiation

from .build import HERE, NATIVE
from .cases import assert_same_bits, expected_bits, expected_partial_sums
from .conftest import NUM_SCHEDULES
from .faults import FAULTS, WRAPS, Fault
from .launch import Inputs, Kernel, ProtocolViolation


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_planted_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    native = tmp_path / "native"
    shutil.copytree(NATIVE, native)
    sources = [*native.glob("*.cuh"), *native.glob("*.h")]
    places = [path for path in sources for _ in range(path.read_text().count(fault.old))]
    assert len(places) == 1, f"the text to change stands in {places}: bring faults.py up to the kernel"
    places[0].write_text(places[0].read_text().replace(fault.old, fault.new))

    plan = fault.plan
    kernel = (
        Kernel([], (plan.rows_in_registers,), native, optimise=False)
        if plan.rows_in_registers
        else Kernel([instantiation(plan, fault.inputs.mlp_intermediate.size)], (), native, optimise=False)
    )

    def what_fails(seed: int) -> tuple[str, str]:
        return _what_fails(kernel, fault.inputs, plan, seed, fault.num_clusters, fault.is_partial_sums)

    caught: dict[str, str] = {}
    for seed in range(NUM_SCHEDULES):
        check, report = what_fails(seed)
        caught.setdefault(check, report)
        if check == fault.check:
            assert what_fails(seed) == (check, report), "a failing seed must replay exactly"
            break
    assert fault.check in caught, f"in {NUM_SCHEDULES} schedules, only these checks failed: {caught}"
    print(f"{fault.name}: caught in schedule {seed}: {caught[fault.check]}")


def _what_fails(
    kernel: Kernel, inputs: Inputs, plan: Plan, seed: int, num_clusters: int = 1, is_partial_sums: bool = False
) -> tuple[str, str]:
    try:
        out, _ = kernel.launch(inputs, plan, seed=seed, num_clusters=num_clusters, is_partial_sums=is_partial_sums)
        assert_same_bits(out, expected_partial_sums(inputs) if is_partial_sums else expected_bits(inputs), str(plan))
    except ProtocolViolation as violation:
        return violation.check, str(violation)
    except AssertionError as difference:
        return "wrong bits", str(difference)
    return "none", ""


def test_a_refused_plan_goes_wrong(kernel: Kernel) -> None:
    """Two groups of warps over three stages: each sees only every other pass over a stage."""
    plan = Plan(8, 1, num_stages=3, stages_in_flight=3, num_consumer_warps=2)
    with pytest.raises(ValueError, match="num_consumer_warps"):
        check_plan(plan, WRAPS.mlp_intermediate.size, H200)
    assert "unfilled read" in {_what_fails(kernel, WRAPS, plan, seed)[0] for seed in range(20)}


def test_every_check_has_a_fault() -> None:
    sources = "".join(path.read_text() for path in HERE.glob("*.cpp"))
    checks = set(re.findall(r'fail\("([^"]+)"', sources)) | set(
        re.findall(r'\? "([\w ]+)" : "([\w ]+)", report', sources)[0]
    )
    assert len(checks) > 20
    assert {fault.check for fault in FAULTS} == checks | {"wrong bits"}
