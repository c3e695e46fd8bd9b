"""What can be said of the GPU's test programs without a GPU: their plans are real ones, they compile, tool output is understood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpu import harness, weight_writer
from gpu.harness import parse_output
from gpu.harness_cases import RACECHECK_CASES, REGISTERS_CASES, RING_CASES, TENSORS, HarnessCase
from gpu.test_sanitizers import unexplained
from mlpdown.bench import read_only
from mlpdown.jit import BuildError
from mlpdown.jit.program import compile_cuda
from mlpdown.plan import CLUSTER_SIZES, H200, Plan, check_plan, shared_memory_bytes

NUM_PARTIAL_SLOTS = 16
THREADS_PER_SM = 2048
RESERVED_BYTES_PER_CTA = 1024


def num_passes(case: HarnessCase) -> int:
    """The fewest stages that a cluster of a launch walks on an H200, by shared memory and threads; registers may leave more."""
    by_memory = (H200.shared_memory_per_block + RESERVED_BYTES_PER_CTA) // (
        shared_memory_bytes(case.plan, case.intermediate_dim) + RESERVED_BYTES_PER_CTA
    )
    ctas_per_sm = min(by_memory, THREADS_PER_SM // (32 * (2 + case.plan.num_consumer_warps)))
    rows = case.hidden_dim // min(case.hidden_dim, H200.num_sms * ctas_per_sm // case.plan.cluster_size)
    if case.plan.stagger_rows < rows:
        rows -= case.plan.stagger_rows
    return -(-rows // case.plan.rows_per_stage)


def wraps(case: HarnessCase) -> bool:
    """The ring is filled anew, and so are the slots for partial sums."""
    return num_passes(case) > max(case.plan.num_stages, NUM_PARTIAL_SLOTS)


def test_cases_have_plans_that_run() -> None:
    for case in (*RING_CASES, *REGISTERS_CASES, *RACECHECK_CASES):
        check_plan(case.plan, case.intermediate_dim, H200)


@pytest.mark.parametrize("cases", [RING_CASES, RACECHECK_CASES], ids=["all tools", "racecheck"])
def test_ring_and_slots_wrap_in_every_kind_of_ring(cases: tuple[HarnessCase, ...]) -> None:
    wrapping = [case.plan for case in cases if not case.plan.rows_in_registers and wraps(case)]
    assert {plan.cluster_size for plan in wrapping} == set(CLUSTER_SIZES)
    assert {plan.activation_in_registers for plan in wrapping} == {False, True}
    assert any(plan.stagger_rows for plan in wrapping)


def test_racecheck_cases_are_few() -> None:
    assert len(RACECHECK_CASES) <= 12
    assert all(num_passes(case) > case.plan.num_stages for case in RACECHECK_CASES if not case.plan.rows_in_registers)


@pytest.mark.parametrize("is_partial_sums", [False, True])
def test_case_is_written_as_the_harness_reads_it(is_partial_sums: bool, tmp_path: Path) -> None:
    case = HarnessCase(200, 64, "bfloat16", Plan(1, 2, 4, 3, 8), ("attn_output",), is_partial_sums)
    case.write(tmp_path / "case", num_calls=1)
    line, _, bits = (tmp_path / "case").read_bytes().partition(b"\n")
    values = {name: int(value) for name, value in (word.split("=") for word in line.decode().split())}
    assert (values["hidden_dim"], values["intermediate_dim"], values["is_bfloat16"], values["num_calls"]) == (200, 64, 1, 1)
    assert (values["rows_per_stage"], values["num_stages"], values["dependent_launch"]) == (2, 4, 1)
    assert values["weight_bytes"] == 200 * 64 * 2 and values["attn_output_bytes"] == 0
    assert values["hidden_states_bytes"] == values["bias_bytes"] == (0 if is_partial_sums else 400)
    assert len(bits) == sum(values[f"{name}_bytes"] for name in TENSORS)
    expected = case.make()[1]
    assert values["out_bytes"] == len(expected) == 200 * (4 if is_partial_sums else 2)
    Path(f"{tmp_path}/case.out").write_bytes(expected)
    assert case.num_wrong(tmp_path / "case") == 0
    flipped = np.frombuffer(expected, np.uint8).copy()
    flipped[-1] ^= 1
    Path(f"{tmp_path}/case.out").write_bytes(flipped.tobytes())
    assert case.num_wrong(tmp_path / "case") == 1


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
=========     and Read access at ptx::ld_shared_float(unsigned int)+0x2300 in ptx.cuh:74 [2496 hazards]
=========     and Read access at ptx::ld_shared_float(unsigned int)+0x2310 in ptx.cuh:74 [2496 hazards]
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
        "Read ptx::ld_shared_float / Write ptx::st_shared",
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
        "Read access at void ActivationInSharedMemory<Float16>::accumulate<(unsigned int)1>(const unsigned int (&)[T1], const "
        "LaneSegment &, float (&)[T1][8]) const+0x1ba0 in activation.cuh:146",
        "Read ActivationInSharedMemory::accumulate",
    ),
    (
        "Read access at void ActivationInRegisters<Float16, (unsigned int)5>::accumulate<(unsigned int)1>(const unsigned int (&)[T1], "
        "const LaneSegment &, float (&)[T1][8]) const+0x12 in activation.cuh:75",
        "Read ActivationInRegisters::accumulate",
    ),
    ("Read access at sum_segments(unsigned int, unsigned int)+0x2300 in sums.cuh:66", "Read sum_segments"),
    ("Read access at void f<pair<A<int>, (unsigned int)(3)>, B>(pair<A<int>, int>)+0x10 in f.cu:1", "Read f"),
    ("Write access at void <unnamed>::plant<int>(T1 *)+0x10 in f.cu:1", "Write ::plant"),
    # A lambda is its kernel, which is in no explanation.
    ("Write access at void ring<A, (unsigned int)1>(B)::[lambda() (instance 1)]::operator ()() const+0x10", "Write ring"),
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


FROM_SHARED = "void ActivationInSharedMemory<Float16>::accumulate<(unsigned int)1>(const unsigned int (&)[T1]) const+0x1ba0"
FROM_REGISTERS = "void ActivationInRegisters<Float16, (unsigned int)5>::accumulate<(unsigned int)1>(const unsigned int (&)[T1]) const+0x12"
COPY = "ptx::cp_async_bulk_evict_first(unsigned int, const void *)+0x2540"
COPY_ACTIVATION = "ptx::cp_async_bulk(unsigned int, const void *)+0x25"
STORE, SEND = "ptx::st_shared(unsigned int, float)+0x1f70", "ptx::st_async(ptx::ClusterAddress, float, ptx::ClusterAddress)+0x10"


@pytest.mark.parametrize(
    ("read", "write", "is_explained"),
    [
        (FROM_SHARED, COPY, True),
        (FROM_REGISTERS, COPY, True),
        (FROM_SHARED, COPY_ACTIVATION, True),
        ("ptx::ld_shared_float(unsigned int)+0xc30 in ptx.cuh:68", STORE, True),
        ("sum_segments(unsigned int, unsigned int)+0xc30", SEND, True),
        # Those that have activations in registers read none from shared memory, and who accumulates reads no segment sums.
        (FROM_REGISTERS, COPY_ACTIVATION, False),
        (FROM_SHARED, STORE, False),
        (FROM_SHARED, SEND, False),
        ("sum_segments(unsigned int, unsigned int)+0xc30", COPY_ACTIVATION, False),
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


@pytest.mark.parametrize(("name", "files"), [("read-only", read_only.source_files()), ("weight-writer", weight_writer.source_files())])
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
