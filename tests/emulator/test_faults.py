"""The checks are themselves tested: the kernel with one place changed must be caught, by the check that is meant for it."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from mlpdown.plan import Plan

from .build import HERE, NATIVE
from .cases import assert_same_bits, expected_bits, expected_partial_sums, make_inputs
from .conftest import NUM_SCHEDULES
from .faults import FAULTS, Fault
from .launch import Kernel, ProtocolViolation

PLAN = Plan(4, 2, rows_per_stage=4, num_stages=2, num_consumer_warps=3)
SHAPE = (81, 200)  # 21 tiles: the ring wraps ten times, the slots once; the last tile has one row
INPUTS = make_inputs(*SHAPE, "float16", 1)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_planted_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    native = tmp_path / "native"
    shutil.copytree(NATIVE, native)
    places = [path for path in native.glob("*.cuh") for _ in range(path.read_text().count(fault.old))]
    assert len(places) == 1, f"the text to change stands in {places}: bring faults.py up to the kernel"
    places[0].write_text(places[0].read_text().replace(fault.old, fault.new))

    kernel = Kernel([(fault.cluster_size, PLAN.rows_per_warp)], native, optimise=False)
    caught: dict[str, str] = {}
    for seed in range(NUM_SCHEDULES):
        check, report = _what_fails(kernel, fault, seed)
        caught.setdefault(check, report)
        if check == fault.check:
            assert _what_fails(kernel, fault, seed) == (check, report), "a failing seed must replay exactly"
            break
    assert fault.check in caught, f"in {NUM_SCHEDULES} schedules, only these checks failed: {caught}"
    print(f"{fault.name}: caught in schedule {seed}: {caught[fault.check]}")


def _what_fails(kernel: Kernel, fault: Fault, seed: int) -> tuple[str, str]:
    plan = dataclasses.replace(PLAN, cluster_size=fault.cluster_size, weight_prefetch=fault.weight_prefetch)
    try:
        out, _ = kernel.launch(INPUTS, plan, num_clusters=1, seed=seed, is_partial_sums=fault.is_partial_sums)
    except ProtocolViolation as violation:
        return violation.check, str(violation)
    try:
        assert_same_bits(
            out, expected_partial_sums(INPUTS) if fault.is_partial_sums else expected_bits(INPUTS), fault.name
        )
    except AssertionError as difference:
        return "wrong bits", str(difference)
    return "none", ""


def test_every_check_has_a_fault() -> None:
    sources = "".join(path.read_text() for path in HERE.glob("*.cpp"))
    checks = set(re.findall(r'fail\("([^"]+)"', sources)) | set(
        re.findall(r'\? "([\w ]+)" : "([\w ]+)", report', sources)[0]
    )
    assert len(checks) > 20
    assert {fault.check for fault in FAULTS} == checks | {"wrong bits"}
