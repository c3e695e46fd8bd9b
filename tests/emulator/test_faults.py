"""The checks are themselves tested: a kernel with one place changed must be caught, or stand in a list with the reason why it is not."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

from mlpdown.plan import H200, check_plan

from .build import HERE, NATIVE
from .faults import FAULTS, write_faults
from .launch import Kernel
from .mutants import find_mutants, write_mutants
from .survivors import SURVIVORS
from .tokens import blank
from .trials import FOUR_SEGMENTS, INSTANTIATIONS, RING, SETTINGS, ChangedKernels, Failure, Setting, run_apart, try_once

MUTANTS = find_mutants(NATIVE)
OPERATORS = sorted({mutant.operator for mutant in MUTANTS})
FEW_SCHEDULES = 2  # of each setting: the first catches nearly all that can be caught
MANY_SCHEDULES = 30


@pytest.fixture(scope="module")
def plain() -> Kernel:
    return Kernel(*INSTANTIATIONS, optimise=False)


@pytest.fixture(scope="module")
def plain_failure(plain: Kernel) -> Failure | None:
    """What goes wrong with the kernels as they stand."""
    failures = run_apart([functools.partial(try_once, plain, setting, 0) for setting in SETTINGS.values()])
    return next(filter(None, failures), None)


@pytest.fixture(scope="module")
def _sound(plain_failure: Failure | None) -> None:
    if plain_failure:
        pytest.skip(f"the kernels as they stand fail: {plain_failure.report.splitlines()[0]}")


@pytest.fixture(scope="module")
def mutants(_sound: None, tmp_path_factory: pytest.TempPathFactory) -> ChangedKernels:
    native = tmp_path_factory.mktemp("mutants") / "native"
    write_mutants(NATIVE, MUTANTS, native)
    return ChangedKernels(native, len(MUTANTS))


@pytest.fixture(scope="module")
def faults(_sound: None, tmp_path_factory: pytest.TempPathFactory) -> ChangedKernels:
    native = tmp_path_factory.mktemp("faults") / "native"
    write_faults(NATIVE, native)
    return ChangedKernels(native, len(FAULTS))


@pytest.fixture(scope="module")
def failures(mutants: ChangedKernels) -> list[Failure | None]:
    """Of each mutant."""
    num_schedules = [FEW_SCHEDULES if mutant.key in SURVIVORS else MANY_SCHEDULES for mutant in MUTANTS]
    return mutants.first_failures(zip(range(len(MUTANTS)), mutants.reaching, num_schedules, strict=True))


def test_the_kernels_as_they_stand_pass(plain_failure: Failure | None) -> None:
    if plain_failure:
        pytest.fail(f"ProtocolViolation: {plain_failure.report}", pytrace=False)


@pytest.mark.parametrize("operator", OPERATORS)
def test_mutants_are_caught_or_listed(mutants: ChangedKernels, failures: list[Failure | None], operator: str) -> None:
    wrong = []
    for mutant, failure, reaching in zip(MUTANTS, failures, mutants.reaching, strict=True):
        if mutant.operator == operator and (failure is None) != (mutant.key in SURVIVORS):
            outcome = failure.report.splitlines()[0] if failure else f"survives {', '.join(reaching) or 'unreached'}"
            wrong.append(f"{mutant.file}:{mutant.line}: {mutant.key!r}: {outcome}")
    assert not wrong, "mutants that survive and are not listed, or are listed and are caught:\n" + "\n".join(wrong)


def test_every_listed_survivor_is_a_mutant() -> None:
    keys = [mutant.key for mutant in MUTANTS]
    assert len(set(keys)) == len(keys)
    assert SURVIVORS.keys() <= set(keys)


@pytest.mark.slow
def test_listed_survivors_survive_many_schedules(mutants: ChangedKernels) -> None:
    listed = [idx for idx, mutant in enumerate(MUTANTS) if mutant.key in SURVIVORS]
    failures = mutants.first_failures((idx, mutants.reaching[idx], MANY_SCHEDULES) for idx in listed)
    caught = [f"{MUTANTS[idx].key}: {failure.report}" for idx, failure in zip(listed, failures, strict=True) if failure]
    assert not caught, "\n".join(caught)


def test_every_synchronisation_has_a_mutant_without_it() -> None:
    synchronisation = re.compile(r"ptx::((?:mbarrier|fence|syncwarp|bar|cp_async|st_|griddepcontrol)\w*)")
    sources = "".join(blank(path.read_text()) for path in NATIVE.glob("*.cuh") if path.name != "ptx.cuh")
    deleted = " ".join(mutant.code.split(" ... ")[0] for mutant in MUTANTS if mutant.operator == "delete")
    assert Counter(synchronisation.findall(sources)) == Counter(synchronisation.findall(deleted))


def test_each_operator_finds_its_places(tmp_path: Path) -> None:
    (tmp_path / "kernel.cuh").write_text(
        """
// if (a < b) wait(c, 0);
template <int kSize>
void wait(int barrier, int parity) {
  constexpr int kHalf = kSize / 2 - 1;
#pragma unroll
  for (int i = 0; i < kSize && i < 8; ++i) first[i] = kHalf;
}
struct Ring {
  int size = 0;
  void advance() {
    if (size < 3 && is_last(size - 1)) wait<2>(size, 0);
    const auto init = [&](int i) { ptx::mbarrier_init(i, 1); };
    return;
  }
};
"""
    )
    assert [mutant.key for mutant in find_mutants(tmp_path)] == [
        "delete | wait | first[i] = kHalf;",
        "delete | Ring::advance | wait<2>(size, 0);",
        "delete | Ring::advance::init | ptx::mbarrier_init(i, 1);",
        "delete | Ring::advance | return;",
        "condition | Ring::advance | size < 3 && (1 || (is_last(size - 1)))",
        "condition | Ring::advance | (1 || (size < 3)) && is_last(size - 1)",
        "comparison | wait | i + 1 < kSize",
        "comparison | wait | i + 1 < 8",
        "comparison | Ring::advance | size + 1 < 3",
        "comparison | Ring::advance | size < 1 + 3",
        "addend | Ring::advance | size - !1 * 1",
        "argument | Ring::advance | wait<2>(size, ((0) ^ 1))",
        "argument | Ring::advance::init | mbarrier_init(i, ((1) + 1))",
        "argument | Ring::advance::init | mbarrier_init(i, ((1) - 1))",
    ]


@pytest.mark.parametrize("idx", range(len(FAULTS)), ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_planted_fault_is_caught(faults: ChangedKernels, idx: int) -> None:
    change, check = (idx, [FAULTS[idx].setting], MANY_SCHEDULES), FAULTS[idx].check
    caught, again = faults.first_failures([change, change], check)
    assert caught is not None and caught.check == check, f"never {check}, but {faults.first_failures([change])}"
    assert caught == again, "a failing seed must replay exactly"


def test_every_check_has_failed(failures: list[Failure | None]) -> None:
    sources = "".join(path.read_text() for path in HERE.glob("*.cpp"))
    checks = set(re.findall(r'fail\("([^"]+)"', sources)) | set(
        re.findall(r'Violation{.*\? "(.+)" : "(.+)",', sources)[0]
    )
    assert len(checks) > 20
    failed = {failure.check for failure in failures if failure} | {fault.check for fault in FAULTS}
    assert failed - {"wrong bits", "prefetch", "refused", "endless", "crash"} == checks


def test_a_refused_plan_goes_wrong(plain: Kernel) -> None:
    """Two groups of warps over three stages: each sees only every other pass over a stage."""
    plan = dataclasses.replace(RING, num_stages=3, stages_in_flight=3, num_consumer_warps=4)
    with pytest.raises(ValueError, match="num_consumer_warps"):
        check_plan(plan, FOUR_SEGMENTS.mlp_intermediate.size, H200)
    failures = [try_once(plain, Setting(plan, FOUR_SEGMENTS), seed) for seed in range(20)]
    assert "unfilled read" in {failure.check for failure in failures if failure}
