"""The machine code of every kernel for every target holds the instructions that the design is about."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mlpdown import plan
from mlpdown.build import library, report, targets

# Mnemonics of the disassembly. Each stands in every kernel.
INSTRUCTIONS = {
    "UBLKCP": "bulk copies from global into shared memory (cp.async.bulk)",
    "SYNCS": "mbarrier operations",
    "ACQBULK": "waits for the kernels before (griddepcontrol.wait)",
    "PREEXIT": "leave for dependents to start (griddepcontrol.launch_dependents)",
    "FFMA": "fused multiply-adds in float32",
}
# And in every kernel whose CTAs share the work on a row.
CLUSTER_INSTRUCTIONS = {
    "UCGABAR_ARV": "arrivals at the cluster barrier (barrier.cluster.arrive)",
    "UCGABAR_WAIT": "waits at the cluster barrier (barrier.cluster.wait)",
    "STAS": "asynchronous stores into another CTA's shared memory (st.async)",
}
# Local memory, tensor cores, atomics: none of these belongs here.
FORBIDDEN = re.compile(r"^(LDL|STL|HMMA|RED|ATOM|ATOMG)\b")


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


def disassemble(path: Path, target: str) -> dict[str, list[str]]:
    """Mnemonics of each kernel, e.g. ``mlp_down<Float16, 4, 2>``."""
    environment = {**os.environ, "PATH": f"{tools_folder()}{os.pathsep}{os.environ['PATH']}"}
    command = [str(tools_folder() / "cuobjdump"), "-sass", "-arch", target, str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True).stdout
    kernels: dict[str, list[str]] = {}
    current: list[str] = []
    for line in listing.splitlines():
        if named := re.match(r"\s*Function : (\w+)", line):
            current = kernels.setdefault(report.kernel_name(named[1]), [])
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)", line):
            current.append(instruction[1])
    return kernels


@pytest.fixture(scope="module")
def built() -> library.LibraryInfo:
    return library.build(targets.ALL_TARGETS, for_this_machine=False)


@pytest.mark.parametrize("target", targets.MACHINE_TARGETS)
def test_every_kernel_holds_its_instructions(built: library.LibraryInfo, target: str) -> None:
    kernels = disassemble(built.path, target)
    names = {
        f"mlp_down<{dtype}, {cluster_size}, {rows_per_warp}>"
        for dtype in ("Float16", "BFloat16")
        for cluster_size, rows_per_warp in plan.instantiations()
    }
    assert set(kernels) == names
    for name, instructions in kernels.items():
        mnemonics = {instruction.split(".")[0] for instruction in instructions}
        expected = INSTRUCTIONS if ", 1, " in name else {**INSTRUCTIONS, **CLUSTER_INSTRUCTIONS}
        missing = [f"{mnemonic}: {what}" for mnemonic, what in expected.items() if mnemonic not in mnemonics]
        assert not missing, f"{name} for {target} has no {missing}"
        assert not [instruction for instruction in instructions if FORBIDDEN.match(instruction)], f"{name} for {target}"


@pytest.mark.parametrize("target", targets.MACHINE_TARGETS)
def test_no_kernel_uses_local_memory(built: library.LibraryInfo, target: str) -> None:
    kernels = [kernel for kernel in built.manifest.kernels if kernel["target"] == target]
    assert len(kernels) == 2 * len(plan.instantiations())
    for kernel in kernels:
        assert (
            kernel["spill_store_bytes"] + kernel["spill_load_bytes"] + kernel["stack_bytes"] + kernel["local_bytes"]
            == 0
        ), kernel
        # 18 warps at most: 16 that sum, the producer and the epilogue. 65536 registers must do for them.
        assert kernel["registers"] * (plan.MAX_CONSUMER_WARPS + 2) * 32 <= 65536, kernel


def test_library_carries_ptx_for_what_comes_next(built: library.LibraryInfo) -> None:
    command = [str(tools_folder() / "cuobjdump"), "-lptx", str(built.path)]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert targets.PTX_TARGET.replace("compute", "sm") in listing
