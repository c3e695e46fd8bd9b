"""compute-sanitizer over the C launcher: clean, by tools that have first been shown to find a planted fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu.harness import Verdict, build_harness, find_sanitizer, run_harness, sanitize
from gpu.harness_cases import RACECHECK_CASES, REGISTERS_CASES, RING_CASES, HarnessCase

pytestmark = pytest.mark.gpu

TOOLS = ("memcheck", "synccheck", "initcheck")


@dataclasses.dataclass(frozen=True)
class Shared:
    """A part of shared memory whose accesses are ordered by what racecheck does not follow: what bulk copies and remote stores signal
    through mbarriers, and arrivals on behalf of a warp. native/NOTES.md has the long form."""

    readers: tuple[str, ...]
    """The functions that read it. racecheck names the load itself or a function that it was inlined into."""
    writers: tuple[str, ...]
    ordered_by: str


ORDERED = (
    Shared(
        readers=("ptx::ld_shared", "ActivationInRegisters::accumulate", "ActivationInSharedMemory::accumulate"),
        writers=("ptx::cp_async_bulk_evict_first",),
        ordered_by="a stage: its full barrier before the reads, its empty barrier before the copies of the next pass",
    ),
    Shared(
        readers=("ptx::ld_shared", "ActivationInSharedMemory::accumulate"),
        writers=("ptx::cp_async_bulk",),
        ordered_by="the activation: its barrier",
    ),
    Shared(
        readers=("ptx::ld_shared_float", "sum_segments"),
        writers=("ptx::st_shared",),
        ordered_by="segment sums, cluster of one: the slot's full barrier before the reads, its empty barrier before the next stores",
    ),
    Shared(
        readers=("ptx::ld_shared_float", "sum_segments"),
        writers=("ptx::st_async",),
        ordered_by="segment sums: bytes that the slot's full barrier counts before the reads, its empty barrier before the next stores",
    ),
)
# What racecheck may report although it is in order: the pair of accesses -> what orders them.
EXPLAINED_HAZARDS = {
    f"Read {reader} / Write {writer}": shared.ordered_by for shared in ORDERED for reader in shared.readers for writer in shared.writers
}


@pytest.fixture(scope="module")
def harness() -> Path:
    return build_harness()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, HarnessCase]:
    """Every case but racecheck's, written for the harness."""
    folder = tmp_path_factory.mktemp("cases")
    cases = {folder / str(number): case for number, case in enumerate((*RING_CASES, *REGISTERS_CASES))}
    for path, case in cases.items():
        case.write(path)
    return cases


@pytest.fixture(autouse=True)
def _needs_sanitizer(request: pytest.FixtureRequest) -> None:
    uses_tool = "tool" in request.fixturenames or "racecheck" in request.node.name
    if uses_tool and find_sanitizer() is None:
        pytest.skip("compute-sanitizer is neither beside nvcc nor on PATH")


def test_harness_computes_what_it_should(harness: Path, files: dict[Path, HarnessCase]) -> None:
    assert "exit status 0" in run_harness(harness, "run", *map(str, files))
    assert_right_bits(files)


def test_code_for_older_gpus_runs_registers_and_refuses_the_ring(files: dict[Path, HarnessCase]) -> None:
    """PTX of sm_80 runs here too: without a ring, and without dependent launch, for which its kernels would not wait."""
    older = build_harness(("compute_80",))
    ring = next(path for path, case in files.items() if not case.plan.rows_in_registers)
    assert "the ring needs compute capability 9.0" in run_harness(older, "run", str(ring))
    registers = {path: case for path, case in files.items() if case.plan.rows_in_registers}
    assert "exit status 0" in run_harness(older, "run", *map(str, registers))
    assert_right_bits(registers)


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_finds_a_planted_fault(tool: str, harness: Path, record_property: Callable[[str, object], None]) -> None:
    verdict = sanitize(tool, harness, "plant", tool)
    record_property("errors", verdict.num_errors)
    assert verdict.num_errors > 0, verdict.output


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_finds_nothing_in_the_kernel(
    tool: str, harness: Path, files: dict[Path, HarnessCase], record_property: Callable[[str, object], None]
) -> None:
    verdict = sanitize(tool, harness, "run", *map(str, files))
    record_property("errors", verdict.num_errors)
    assert verdict.num_errors == 0, verdict.output
    assert_right_bits(files)


def test_racecheck_finds_a_planted_fault(harness: Path, record_property: Callable[[str, object], None]) -> None:
    verdict = sanitize("racecheck", harness, "plant", "racecheck")
    record_property("hazards", verdict.num_errors + verdict.num_warnings)
    assert verdict.num_errors + verdict.num_warnings > 0, verdict.output


@pytest.mark.parametrize("case", RACECHECK_CASES, ids=lambda case: f"{case.hidden_dim}x{case.intermediate_dim}-{case.plan.cluster_size}")
def test_every_hazard_of_racecheck_is_explained(
    case: HarnessCase, harness: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    # Shared memory is a launch's own: to racecheck a second call says nothing new.
    case.write(tmp_path / "case", num_calls=1)
    verdict = sanitize("racecheck", harness, "run", str(tmp_path / "case"))
    record_property("errors", verdict.num_errors)
    record_property("warnings", verdict.num_warnings)
    record_property("hazards", " | ".join(f"{finding}: {EXPLAINED_HAZARDS.get(finding, 'not explained')}" for finding in verdict.findings))
    assert case.num_wrong(tmp_path / "case") == 0
    assert not unexplained(verdict), "\n".join([*unexplained(verdict), verdict.output[-3000:]])


def unexplained(verdict: Verdict) -> list[str]:
    """Findings without an explanation; if racecheck counts hazards of which it shows none, that too."""
    if verdict.num_errors + verdict.num_warnings and not verdict.findings:
        return [f"{verdict.num_errors} errors and {verdict.num_warnings} warnings that are not shown"]
    return [finding for finding in verdict.findings if finding not in EXPLAINED_HAZARDS]


def assert_right_bits(files: dict[Path, HarnessCase]) -> None:
    """The harness wrote the specification's bits for every case. The files that say so are removed: each run must write its own."""
    for path, case in files.items():
        assert case.num_wrong(path) == 0, case
        Path(f"{path}.out").unlink()
