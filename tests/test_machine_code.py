"""The machine code of every kernel for every target holds the instructions that the design is about."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from mlpdown.reference.order import MAX_SEGMENTS

from mlpdown import heuristics, plan
from mlpdown.bench.shapes import SHAPES
from mlpdown.heuristics import choose_plan
from mlpdown.jit import library, targets
from mlpdown.plan import H200

# Mnemonics of the disassembly, with or without modifiers. Each stands in every kernel.
INSTRUCTIONS = {
    "ACQBULK": "waits for the kernels before (griddepcontrol.wait)",
    "PREEXIT": "leave for dependents to start (griddepcontrol.launch_dependents)",
    "FFMA": "fused multiply-adds in float32",
}
# In every kernel that streams weights through the ring.
RING_INSTRUCTIONS = {
    "UBLKCP": "bulk copies from global into shared memory (cp.async.bulk)",
    "SYNCS": "mbarrier operations",
}
# And where CTAs share the work on a row.
CLUSTER_INSTRUCTIONS = {
    "UCGABAR_ARV": "arrivals at the cluster barrier (barrier.cluster.arrive)",
    "UCGABAR_WAIT": "waits at the cluster barrier (barrier.cluster.wait)",
    "STAS": "asynchronous stores into another CTA's shared memory (st.async)",
}
# In a cluster of one, where none of these may be: the compiler makes waits for the whole CTA of a cluster's barrier.
SINGLE_INSTRUCTIONS = {
    "BAR.SYNC": "waits at the CTA's barrier (barrier.cta.sync)",
}
# Local memory, tensor cores, atomics, approximations, float64; and on anything: subnormals flushed to zero, rounding not to nearest.
FORBIDDEN = re.compile(r"(LDL|STL|[HIQD]G?MMA|REDG?|ATOM[GS]?|MUFU|DADD|DMUL|DFMA)(\.|$)|\w+\.(\w+\.)*(FTZ|FMZ|RM|RP|RZ)(\.|$)")

REGISTERS_PER_SM = 65536
NUM_OTHER_WARPS = 2  # the producer and the epilogue, beside those that sum

# (kernel, dtype, compile-time values): ring<Float16, 4u, 2u, 0u>, as the Itanium C++ ABI spells it.
Kernel = tuple[str, str, tuple[int, ...]]
SYMBOL = re.compile(r"_Z\d+(ring|registers)I\d+(Float16|BFloat16)((?:Lj\d+E)+)E")


def kernel_of(symbol: str) -> Kernel:
    match = SYMBOL.match(symbol)
    assert match is not None, f"{symbol} is none of the kernels"
    return match[1], match[2], tuple(map(int, re.findall(r"\d+", match[3])))


def all_kernels() -> set[Kernel]:
    """What the lists in ``mlpdown.plan`` ask for."""
    ring = [("ring", values) for values in plan.instantiations()]
    registers = [("registers", values) for values in plan.REGISTERS_KERNELS]
    return {(name, dtype, values) for name, values in ring + registers for dtype in ("Float16", "BFloat16")}


@functools.cache
def tools_folder() -> Path:
    """Where cuobjdump and nvdisasm lie: the wheels of the extra "test", or a toolkit."""
    import nvidia

    for root in nvidia.__path__:
        for folder in sorted(Path(root).glob("*/bin")):
            if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
                return folder
    on_path = shutil.which("cuobjdump")
    assert on_path is not None, "cuobjdump is missing: pip install 'mlpdown[test]'"
    return Path(on_path).parent


def disassemble(path: Path, target: str) -> dict[Kernel, list[str]]:
    """Mnemonics of each kernel, with their modifiers."""
    environment = {**os.environ, "PATH": f"{tools_folder()}{os.pathsep}{os.environ['PATH']}"}
    command = [str(tools_folder() / "cuobjdump"), "-sass", "-arch", target, str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True).stdout
    return mnemonics(listing)


def mnemonics(listing: str) -> dict[Kernel, list[str]]:
    kernels: dict[Kernel, list[str]] = {}
    current: list[str] = []
    for line in listing.splitlines():
        if named := re.match(r"\s*Function : (\w+)", line):
            current = kernels.setdefault(kernel_of(named[1]), [])
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)", line):
            current.append(instruction[1])
    return kernels


def is_a(instruction: str, mnemonic: str) -> bool:
    """Whether an instruction is this one, with these modifiers or more."""
    return f"{instruction}.".startswith(f"{mnemonic}.")


@pytest.mark.parametrize(
    ("instruction", "forbidden"),
    [
        *((f"{name} R1, R2, R3", True) for name in ("FFMA.FTZ", "FADD.FTZ", "FMUL.FTZ", "FFMA.FTZ.RZ", "FADD.RM", "DFMA")),
        *((f"{name} R1, R2, R3", True) for name in ("MUFU.RCP", "LDL.64", "STL", "HMMA.16816.F32", "RED.E.ADD", "ATOMG.E")),
        *((f"{name} R1, R2, R3", False) for name in ("FFMA", "FADD", "HFMA2.MMA", "HADD2.F32", "SYNCS.ARRIVE.TRANS64.RED.A1T0")),
    ],
)
@pytest.mark.parametrize("predicate", ["", "@P0 ", "@!UP3 "])
def test_what_a_kernel_must_not_hold_is_found_in_its_listing(instruction: str, forbidden: bool, predicate: str) -> None:
    listing = f"""
\t\tFunction : _Z4ringI7Float16Lj4ELj2ELj0EEvv
        /*0000*/                   FFMA R0, R1, R2, R3 ;   /* 0x0 */
        /*0010*/              {predicate:>5}{instruction} ;   /* 0x0 */
"""
    (found,) = mnemonics(listing).values()
    assert found == ["FFMA", instruction.split()[0]]
    assert [bool(FORBIDDEN.match(name)) for name in found] == [False, forbidden]


@pytest.fixture(scope="module")
def built() -> library.LibraryInfo:
    return library.build(targets.ALL_TARGETS, for_this_machine=False)


@pytest.mark.parametrize("target", targets.MACHINE_TARGETS)
def test_every_kernel_holds_its_instructions(built: library.LibraryInfo, target: str) -> None:
    kernels = disassemble(built.path, target)
    assert set(kernels) == all_kernels()
    has_ring = targets.capability_of(target) >= plan.RING_COMPUTE_CAPABILITY
    for (name, dtype, values), instructions in kernels.items():
        expected = dict(INSTRUCTIONS)
        forbidden: dict[str, str] = {}
        if not has_ring:
            expected, forbidden = {"FFMA": INSTRUCTIONS["FFMA"]}, {**RING_INSTRUCTIONS, "ACQBULK": "", "PREEXIT": ""}
            if name == "ring":
                # Empty, but for what the compiler puts before every kernel of a target.
                acts = [
                    i
                    for i in instructions
                    if re.match(r"(LDG|STG|LDS|STS|LDL|STL|ATOM|RED|FFMA|SHFL|BAR|SYNCS|UBLKCP)\b", i)
                ]
                assert not acts and "EXIT" in instructions, (name, values, acts)
                continue
        elif name == "ring":
            expected |= RING_INSTRUCTIONS
            if values[0] > 1:
                expected |= CLUSTER_INSTRUCTIONS
            else:
                expected |= SINGLE_INSTRUCTIONS
                forbidden = CLUSTER_INSTRUCTIONS
        missing = [
            f"{mnemonic}: {what}"
            for mnemonic, what in expected.items()
            if not any(is_a(i, mnemonic) for i in instructions)
        ]
        assert not missing, f"{name}{(dtype, *values)} for {target} has no {missing}"
        unwanted = [i for i in instructions if FORBIDDEN.match(i) or any(is_a(i, mnemonic) for mnemonic in forbidden)]
        assert not unwanted, f"{name}{(dtype, *values)} for {target} has {unwanted}"


@pytest.mark.parametrize("target", targets.MACHINE_TARGETS)
def test_registers_take_weights_in_vectors_before_anything_waits(built: library.LibraryInfo, target: str) -> None:
    """16 bytes a load, all of a round ahead of the wait for earlier kernels (where weight_prefetch allows it), or of all sums."""
    first_wait = "ACQBULK" if targets.capability_of(target) >= plan.RING_COMPUTE_CAPABILITY else "FFMA"
    for (name, dtype, values), instructions in disassemble(built.path, target).items():
        if name == "registers":
            before_wait = instructions[: instructions.index(first_wait)]
            vectors = [i for i in before_wait if i.startswith("LDG.E") and "128" in i]
            assert len(vectors) >= values[0] * values[1], f"{name}{(dtype, *values)} for {target}: {vectors}"


def test_nothing_stands_between_a_cta_and_its_first_load(built: library.LibraryInfo) -> None:
    """A launch that nothing overlaps with waits for these instructions. An address that is worked out anew for each
    load doubled them once."""
    for (name, dtype, values), instructions in disassemble(built.path, "sm_90").items():
        if name == "registers":
            first = next(i for i, instruction in enumerate(instructions) if instruction.startswith("LDG.E.NA"))
            last = instructions.index("ACQBULK")
            assert first < 60 and last - first <= 2 * values[0] * values[1], (
                f"{name}{(dtype, *values)}: {first}, {last}"
            )


def test_barriers_of_a_lone_cta_are_set_up_at_uniform_addresses(built: library.LibraryInfo) -> None:
    """An address that the compiler does not know to be the same in all lanes makes a loop of each initialisation, and
    0.4 us of all of them.

    Such a loop ends in BRA.U.ANY. Each bulk copy has one, and nothing else may."""
    for (name, dtype, values), instructions in disassemble(built.path, "sm_90").items():
        if name == "ring" and values[0] == 1:
            loops = sum(i.startswith("BRA.U.ANY") for i in instructions)
            copies = sum(i.startswith("UBLKCP") for i in instructions)
            assert loops <= copies, f"{name}{(dtype, *values)}: {loops} loops, {copies} copies"


@pytest.mark.parametrize("target", targets.MACHINE_TARGETS)
def test_no_kernel_uses_local_memory(built: library.LibraryInfo, target: str) -> None:
    kernels = [kernel for kernel in built.manifest.kernels if kernel["target"] == target]
    assert len(kernels) == len(all_kernels())
    for kernel in kernels:
        assert (
            kernel["spill_store_bytes"] + kernel["spill_load_bytes"] + kernel["stack_bytes"] + kernel["local_bytes"]
            == 0
        ), kernel
        if kernel["kernel"].startswith("ring"):
            # 18 warps at most: 16 that sum, the producer and the epilogue.
            assert kernel["registers"] * (plan.MAX_CONSUMER_WARPS + NUM_OTHER_WARPS) * 32 <= REGISTERS_PER_SM, kernel


@pytest.mark.parametrize("dtype", ["Float16", "BFloat16"])
def test_as_many_ctas_share_an_sm_as_plans_count_on(built: library.LibraryInfo, dtype: str) -> None:
    """Of the rings chosen for an H200, by shared memory and by registers, which a warp gets in units of 8 a thread."""
    registers = {
        kernel["kernel"]: kernel["registers"] for kernel in built.manifest.kernels if kernel["target"] == "sm_90"
    }
    sm_bytes = H200.shared_memory_per_block + heuristics.RESERVED_BYTES_PER_CTA
    num_rings = 0
    for shape in SHAPES:
        chosen = choose_plan(shape.hidden_dim, shape.intermediate_dim, H200, weight_prefetch=True)
        if chosen.rows_in_registers:
            continue
        num_rings += 1
        cta_bytes = plan.shared_memory_bytes(chosen, shape.intermediate_dim) + heuristics.RESERVED_BYTES_PER_CTA
        assert heuristics.CTAS_PER_SM * cta_bytes <= sm_bytes
        num_threads = (chosen.num_consumer_warps + NUM_OTHER_WARPS) * 32
        values = plan.instantiation(chosen, shape.intermediate_dim)
        registers_per_thread = -(-registers[f"ring<{', '.join(map(str, (dtype, *values)))}>"] // 8) * 8
        assert heuristics.CTAS_PER_SM * num_threads * registers_per_thread <= REGISTERS_PER_SM, (
            str(shape),
            chosen,
            registers_per_thread,
        )
    assert num_rings >= 4, "the shapes no longer show what this test is about"


def test_activations_in_registers_leave_room_for_two_ctas(built: library.LibraryInfo) -> None:
    """On every target that has rings, for every number of vectors: no later compiler may halve the occupancy unseen."""
    num_threads = (MAX_SEGMENTS + NUM_OTHER_WARPS) * 32
    names = {
        f"ring<{dtype}, {c}, {r}, {v}>"
        for dtype in ("Float16", "BFloat16")
        for c, r, v in plan.instantiations()
        if v > 0
    }
    with_ring = [
        target for target in targets.MACHINE_TARGETS if targets.capability_of(target) >= plan.RING_COMPUTE_CAPABILITY
    ]
    kernels = [
        kernel for kernel in built.manifest.kernels if kernel["kernel"] in names and kernel["target"] in with_ring
    ]
    assert {(kernel["target"], kernel["kernel"]) for kernel in kernels} == set(itertools.product(with_ring, names))
    for kernel in kernels:
        assert 2 * num_threads * -(-kernel["registers"] // 8) * 8 <= REGISTERS_PER_SM, kernel


def test_library_carries_ptx_for_what_comes_next(built: library.LibraryInfo) -> None:
    command = [str(tools_folder() / "cuobjdump"), "-lptx", str(built.path)]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert targets.PTX_TARGET.replace("compute", "sm") in listing
