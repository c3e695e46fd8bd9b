"""What can be said of the GPU's test programs without a GPU: their plans are real ones, they compile, tool output is understood."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu import harness, weight_writer
from gpu.harness import RingCase, parse_output, racecheck_ring_cases, ring_cases
from gpu.test_sanitizers import unexplained

from mlpdown.bench import yardstick
from mlpdown.bench.cuda_program import compile_cuda
from mlpdown.jit import BuildError
from mlpdown.plan import (
    CLUSTER_SIZES,
    H200,
    NUM_LANES,
    NUM_SEGMENTS,
    VECTOR_SIZE,
    VECTORS_IN_REGISTERS,
    check_plan,
    instantiation,
    shared_memory_bytes,
)

NUM_PARTIAL_SLOTS = 16
THREADS_PER_SM = 2048
MIB = 2**20


def most_ctas_per_sm(case: RingCase) -> int:
    """By shared memory and threads; registers may leave fewer."""
    reserved = 1024  # of shared memory, for each CTA
    by_memory = (H200.shared_memory_per_block + reserved) // (shared_memory_bytes(case.plan, case.intermediate_dim) + reserved)
    return min(by_memory, THREADS_PER_SM // (32 * (2 + case.plan.num_consumer_warps)))


def fewest_tiles(case: RingCase) -> int:
    """That any cluster of a launch walks on an H200."""
    num_clusters = min(case.hidden_dim, H200.num_sms * most_ctas_per_sm(case) // case.plan.cluster_size)
    rows = case.hidden_dim // num_clusters
    if case.plan.stagger_rows < rows:
        rows -= case.plan.stagger_rows
    return -(-rows // case.plan.rows_per_stage)


def ring_wraps(case: RingCase) -> bool:
    return fewest_tiles(case) > case.plan.num_stages


def slots_wrap(case: RingCase) -> bool:
    return fewest_tiles(case) > NUM_PARTIAL_SLOTS


def has_ragged_lanes(case: RingCase) -> bool:
    """Some lanes have a vector fewer than others."""
    return case.intermediate_dim % (NUM_SEGMENTS * NUM_LANES * VECTOR_SIZE) != 0


def staggers(case: RingCase) -> bool:
    return 0 < case.plan.stagger_rows < fewest_tiles(case) * case.plan.rows_per_stage


def test_harness_cases_have_plans_that_run() -> None:
    for case in [*ring_cases(), *racecheck_ring_cases()]:
        check_plan(case.plan, case.intermediate_dim, H200)


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_harness_wraps_ring_and_slots_in_every_cluster_size(cluster_size: int) -> None:
    cases = [case for case in ring_cases() if case.plan.cluster_size == cluster_size and not case.plan.activation_in_registers]
    assert any(ring_wraps(case) and slots_wrap(case) for case in cases)


@pytest.mark.parametrize("rows_per_stage", VECTORS_IN_REGISTERS)
def test_harness_wraps_ring_and_slots_beside_activations_in_registers(rows_per_stage: int) -> None:
    cases = [case for case in ring_cases() if case.plan.activation_in_registers and case.plan.rows_per_stage == rows_per_stage]
    wrapping = [case for case in cases if ring_wraps(case) and slots_wrap(case)]
    assert {has_ragged_lanes(case) for case in wrapping} == {False, True}
    assert any(case.plan.num_consumer_warps == 2 * NUM_SEGMENTS for case in wrapping), "two groups of warps"


def test_harness_staggers_rings_that_are_prefetched() -> None:
    assert any(staggers(case) and case.plan.weight_prefetch and slots_wrap(case) for case in ring_cases())


def test_harness_has_the_most_activations_that_fit_in_registers() -> None:
    assert max(VECTORS_IN_REGISTERS.values()) in {instantiation(case.plan, case.intermediate_dim)[2] for case in ring_cases()}


def test_racecheck_cases_are_few_and_wrap() -> None:
    cases = racecheck_ring_cases()
    assert all(ring_wraps(case) for case in cases)
    assert {case.plan.cluster_size for case in cases if slots_wrap(case)} == set(CLUSTER_SIZES)
    assert {case.plan.activation_in_registers for case in cases if slots_wrap(case)} == {False, True}
    assert any(staggers(case) for case in cases)


def test_a_line_that_is_no_case_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(harness.__file__).with_name(harness.SOURCE).read_text().replace("kNoPrefetch, 1}}", "kNoPrefetch, yes}}")
    (tmp_path / harness.SOURCE).write_text(source)
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "harness.py"))
    with pytest.raises(ValueError, match="not understood in kCases"):
        harness.read_cases("kCases")


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


ACCESSES = [
    ("Read access at ptx::ld_shared(unsigned int)+0xc30 in ptx.cuh:68 [2496 hazards]", "Read ptx::ld_shared"),
    ("Write access at ptx::st_shared(unsigned int, float)+0x1f70 in ptx.cuh:74", "Write ptx::st_shared"),
    (
        "Write access at ptx::cp_async_bulk_evict_first(unsigned int, const void *, unsigned int, unsigned int)+0x2540 in ptx.cuh:182 "
        "[4380672 hazards]",
        "Write ptx::cp_async_bulk_evict_first",
    ),
    (
        "Read access at void accumulate_batch<Float16, (unsigned int)1, (unsigned int)1>(unsigned int, const unsigned int (&)[T2], "
        "unsigned int, float (&)[T2][8])+0x1ba0 in mlp_down.cuh:68",
        "Read accumulate_batch",
    ),
    (
        "Read access at void accumulate_segment<Float16, (unsigned int)1, (unsigned int)5>(const float (&)[T3][8], const unsigned int "
        "(&)[T2], unsigned int, unsigned int, float (&)[T2][8])+0x12 in mlp_down.cuh:120",
        "Read accumulate_segment",
    ),
    ("Read access at load_segment_sums(unsigned int)+0x2300 in epilogue.cuh:20", "Read load_segment_sums"),
    ("Read access at void f<pair<A<int>, (unsigned int)(3)>, B>(pair<A<int>, int>)+0x10 in f.cu:1", "Read f"),
    ("Write access at void <unnamed>::plant<int>(T1 *)+0x10 in f.cu:1", "Write ::plant"),
    # A lambda is its kernel, which is in no explanation.
    ("Write access at void mlp_down<A, (unsigned int)1>(B)::[lambda() (instance 1)]::operator ()() const+0x10", "Write mlp_down"),
    ("Read access at f+0x10", "Read f"),
    ("Read access at void f<int(int)+0x10 in f.cu:1", "Read access at void f<int(int)+0x10 in f.cu:1"),
    ("Read access at +0x10 in f.cu:1", "Read access at +0x10 in f.cu:1"),
    ("an access of another form", "an access of another form"),
]


@pytest.mark.parametrize(("text", "access"), ACCESSES)
def test_function_of_an_access_is_without_arguments(text: str, access: str) -> None:
    output = f"""========= Error: Race reported between {text}
=========     and Write access at g(int)+0x10 in f.cu:1 [8 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
    assert parse_output("racecheck", output).findings == (" / ".join(sorted((access, "Write g"))),)


READ_BATCH = "void accumulate_batch<Float16, (unsigned int)1, (unsigned int)1>(unsigned int, float (&)[T2][8])+0x1ba0 in mlp_down.cuh:68"
READ_STAGE = "void accumulate_segment<Float16, (unsigned int)1, (unsigned int)5>(const float (&)[T3][8])+0x12 in mlp_down.cuh:120"


@pytest.mark.parametrize(
    ("read", "write", "is_explained"),
    [
        (READ_BATCH, "ptx::cp_async_bulk_evict_first(unsigned int, const void *)+0x2540 in ptx.cuh:182", True),
        (READ_STAGE, "ptx::cp_async_bulk_evict_first(unsigned int, const void *)+0x2540 in ptx.cuh:182", True),
        (READ_BATCH, "ptx::cp_async_bulk(unsigned int, const void *)+0x2540 in ptx.cuh:182", True),
        ("ptx::ld_shared(unsigned int)+0xc30 in ptx.cuh:68", "ptx::st_shared(unsigned int, float)+0x1f70 in ptx.cuh:74", True),
        ("load_segment_sums(unsigned int)+0xc30", "ptx::st_async(ptx::ClusterAddress, float, ptx::ClusterAddress)+0x10", True),
        # Those that read activations from registers read none from shared memory, and nobody sums what others hand on.
        (READ_STAGE, "ptx::cp_async_bulk(unsigned int, const void *)+0x2540 in ptx.cuh:182", False),
        (READ_BATCH, "ptx::st_shared(unsigned int, float)+0x1f70 in ptx.cuh:74", False),
        (READ_BATCH, "ptx::st_async(ptx::ClusterAddress, float, ptx::ClusterAddress)+0x10", False),
        ("load_segment_sums(unsigned int)+0xc30", "ptx::cp_async_bulk(unsigned int, const void *)+0x2540 in ptx.cuh:182", False),
    ],
)
def test_hazards_are_explained_by_who_reads_and_who_writes(read: str, write: str, is_explained: bool) -> None:
    output = f"""========= Error: Race reported between Read access at {read}
=========     and Write access at {write} [8 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
    verdict = parse_output("racecheck", output)
    assert unexplained(verdict) == ([] if is_explained else list(verdict.findings))


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
