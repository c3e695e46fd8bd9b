"""What can be said of the GPU's test programs without a GPU: their plans are real ones, they compile, tool output is understood."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpu import harness, weight_writer
from gpu.harness import parse_output
from gpu.test_sanitizers import unexplained

from mlpdown.bench import yardstick
from mlpdown.bench.cuda_program import compile_cuda
from mlpdown.build import BuildError
from mlpdown.plan import H200, Plan, check_plan, shared_memory_bytes

CASE = re.compile(r"\{(\d+), (\d+), \w+, \w+, \w+, \{(\d+), (\d+), (\d+), (\d+), (\d+), \w+, \d\}\}")
# cudaOccupancyMaxActiveClusters of an H200 with one CTA an SM.
ACTIVE_CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}
NUM_PARTIAL_SLOTS = 16


def cases() -> list[tuple[int, int, Plan]]:
    text = (Path(harness.__file__).parent / harness.SOURCE).read_text()
    numbers = [[int(number) for number in match] for match in CASE.findall(text)]
    return [(hidden_dim, intermediate_dim, Plan(*plan)) for hidden_dim, intermediate_dim, *plan in numbers]


def test_harness_cases_have_plans_that_run() -> None:
    assert len(cases()) == harness.NUM_RING_CASES
    for _, intermediate_dim, plan in cases():
        check_plan(plan, intermediate_dim, H200)
        assert (plan.cluster_size, plan.rows_per_stage) in harness.INSTANTIATIONS


@pytest.mark.parametrize("cluster_size", ACTIVE_CLUSTERS)
def test_harness_wraps_ring_and_slots_in_every_cluster_size(cluster_size: int) -> None:
    def wraps(hidden_dim: int, intermediate_dim: int, plan: Plan) -> bool:
        one_per_sm = 2 * (shared_memory_bytes(plan, intermediate_dim) + 1024) > H200.shared_memory_per_block + 1024
        num_tiles = hidden_dim // ACTIVE_CLUSTERS[plan.cluster_size] // plan.rows_per_stage
        return one_per_sm and num_tiles > max(plan.num_stages, NUM_PARTIAL_SLOTS)

    assert any(wraps(*case) for case in cases() if case[2].cluster_size == cluster_size)


def test_findings_of_memcheck_are_counted() -> None:
    output = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at plant_memcheck(unsigned int *, unsigned int)+0xa0 in harness.cu:201
========= ERROR SUMMARY: 1 error
"""
    verdict = parse_output("memcheck", output)
    assert verdict.num_errors == 1
    assert verdict.findings == ("Invalid __global__ write of size 4 bytes",)


def test_findings_of_racecheck_are_counted() -> None:
    output = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at plant_racecheck(unsigned int *)+0x80 in harness.cu:221
=========     and Read access at plant_racecheck(unsigned int *)+0xb0 in harness.cu:222 [124 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
    verdict = parse_output("racecheck", output)
    assert (verdict.num_errors, verdict.num_warnings) == (1, 0)
    assert verdict.findings == ("Read plant_racecheck / Write plant_racecheck",)
    assert unexplained(verdict) == list(verdict.findings)


def test_hazards_of_racecheck_are_told_apart_by_their_pair_of_accesses() -> None:
    output = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at ptx::ld_shared(unsigned int)+0x17c0 in ptx.cuh:74
=========     and Write access at ptx::cp_async_bulk(unsigned int, const void *)+0x4580 in ptx.cuh:178 [3333120 hazards]
=========
========= Error: Race reported between Write access at ptx::st_shared(unsigned int, float)+0x1bc0 in ptx.cuh:80
=========     and Read access at ptx::ld_shared(unsigned int)+0x2300 in ptx.cuh:74 [2496 hazards]
=========     and Read access at ptx::ld_shared(unsigned int)+0x2310 in ptx.cuh:74 [2496 hazards]
=========     and Write access at ptx::st_shared(unsigned int, float)+0x1bc0 in ptx.cuh:80 [8 hazards]
=========
========= Error: Race reported between Write access at ptx::cp_async_bulk(unsigned int, const void *)+0x53a0 in ptx.cuh:178
=========     and Read access at ptx::ld_shared(unsigned int)+0x1e60 in ptx.cuh:74 [1707379 hazards]
=========
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""
    verdict = parse_output("racecheck", output)
    assert verdict.findings == (
        "Read ptx::ld_shared / Write ptx::cp_async_bulk",
        "Read ptx::ld_shared / Write ptx::st_shared",
        "Write ptx::st_shared / Write ptx::st_shared",
    )
    assert unexplained(verdict) == ["Write ptx::st_shared / Write ptx::st_shared"]


def test_a_tool_that_could_not_work_is_no_clean_verdict() -> None:
    output = "========= COMPUTE-SANITIZER\n========= Error: Target application terminated before first instrumented API call\n"
    with pytest.raises(ValueError, match="gave no summary"):
        parse_output("memcheck", output)


def test_compile_error_of_a_test_program_names_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPDOWN_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(BuildError, match="unknown_word"):
        compile_cuda("broken", {"broken.cu": b"unknown_word main() { return 0; }"}, ["broken.cu"], shared=False, built_targets=("sm_90",))
    assert not list((tmp_path / "cache").glob("*.program"))


@pytest.mark.parametrize(("name", "files"), [("yardstick", yardstick.source_files()), ("weight-writer", weight_writer.source_files())])
def test_small_programs_compile(name: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPDOWN_CACHE_DIR", str(tmp_path / "cache"))
    library = compile_cuda(name, files, list(files), shared=True, built_targets=("sm_90",))
    written = library.stat().st_mtime_ns
    assert compile_cuda(name, files, list(files), shared=True, built_targets=("sm_90",)) == library
    assert library.stat().st_mtime_ns == written, "the second call must take what the first made"


@pytest.mark.slow
def test_harness_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPDOWN_CACHE_DIR", str(tmp_path / "cache"))
    assert harness.build_harness(("sm_90",)).is_file()
