"""compute-sanitizer over the C launcher: clean, by tools that have first been shown to find a planted fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu.harness import NUM_RING_CASES, Verdict, build_harness, find_sanitizer, run_harness, sanitize

pytestmark = pytest.mark.gpu

TOOLS = ("memcheck", "synccheck", "initcheck")
# What racecheck reports although it is in order: the pair of accesses -> what orders them. It does not follow what bulk copies and remote
# stores signal through mbarriers. native/NOTES.md has the long form.
EXPLAINED_HAZARDS = {
    "Read ptx::ld_shared / Write ptx::cp_async_bulk_evict_first": (
        "a stage: full_barriers before the reads, empty_barriers before the copies of the next pass"
    ),
    "Read ptx::ld_shared / Write ptx::cp_async_bulk": "the activation: activation_barrier",
    "Read ptx::ld_shared / Write ptx::st_shared": (
        "partial sums of a cluster of one: partials_full before the reads, partials_empty before the stores of the tile 16 later"
    ),
    "Read ptx::ld_shared / Write ptx::st_async": (
        "partial sums: bytes counted by partials_full before the reads, partials_empty before the stores of the tile 16 later"
    ),
}


@pytest.fixture(scope="module")
def harness() -> Path:
    return build_harness()


@pytest.fixture(autouse=True)
def _needs_sanitizer(request: pytest.FixtureRequest) -> None:
    uses_tool = "tool" in request.fixturenames or "racecheck" in request.node.name
    if uses_tool and find_sanitizer() is None:
        pytest.skip("compute-sanitizer is neither beside nvcc nor on PATH")


def test_harness_computes_what_it_should(harness: Path) -> None:
    assert_all_cases_right(run_harness(harness, "run"))


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_finds_a_planted_fault(tool: str, harness: Path, record_property: Callable[[str, object], None]) -> None:
    verdict = sanitize(tool, harness, "plant", tool)
    record_property("errors", verdict.num_errors)
    assert verdict.num_errors > 0, verdict.output


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_finds_nothing_in_the_kernel(tool: str, harness: Path, record_property: Callable[[str, object], None]) -> None:
    verdict = sanitize(tool, harness, "run")
    record_property("errors", verdict.num_errors)
    assert verdict.num_errors == 0, verdict.output
    assert_all_cases_right(verdict.output)


def test_racecheck_finds_a_planted_fault(harness: Path) -> None:
    verdict = sanitize("racecheck", harness, "plant", "racecheck")
    assert verdict.num_errors + verdict.num_warnings > 0, verdict.output


def test_every_hazard_of_racecheck_is_explained(harness: Path, record_property: Callable[[str, object], None]) -> None:
    verdict = sanitize("racecheck", harness, "run")
    record_property("errors", verdict.num_errors)
    record_property("warnings", verdict.num_warnings)
    record_property("hazards", " | ".join(f"{finding}: {EXPLAINED_HAZARDS.get(finding, 'not explained')}" for finding in verdict.findings))
    assert_all_cases_right(verdict.output)
    assert not unexplained(verdict), "\n".join([*unexplained(verdict), verdict.output[-3000:]])


def unexplained(verdict: Verdict) -> list[str]:
    """Findings without an explanation; if racecheck counts hazards of which it shows none, that too."""
    if verdict.num_errors + verdict.num_warnings and not verdict.findings:
        return [f"{verdict.num_errors} errors and {verdict.num_warnings} warnings that are not shown"]
    return [finding for finding in verdict.findings if finding not in EXPLAINED_HAZARDS]


def assert_all_cases_right(output: str) -> None:
    """Each case of the harness printed its line, with no wrong element; cases of both kernels."""
    verdicts = re.findall(r"(\d+) rows in registers.*: (\d+) wrong$", output, re.MULTILINE)
    assert sum(rows == "0" for rows, _ in verdicts) == NUM_RING_CASES, output
    assert len(verdicts) > NUM_RING_CASES, output
    assert all(num_wrong == "0" for _, num_wrong in verdicts), output
