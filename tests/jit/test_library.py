"""The library that is really built: what it holds, what it needs, and that torch has its ops."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mlpdown import plan
from mlpdown.jit import cache, library, sources, targets

# What a Linux machine with torch has, and nothing else: no CUDA runtime (it is linked in), no driver.
ALLOWED_LIBRARIES = {
    "libtorch_cpu.so",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libm.so.6",
    "libc.so.6",
    "ld-linux-x86-64.so.2",
}
EXPORTED = {"mlpdown_launch", "mlpdown_resources", "mlpdown_shared_memory_bytes", sources.HASH_SYMBOL}


@pytest.fixture(scope="module")
def built() -> library.LibraryInfo:
    return library.build(targets.ALL_TARGETS)


def test_all_targets_compile_without_spills(built: library.LibraryInfo) -> None:
    kernels = built.manifest.kernels
    assert len(kernels) == len(targets.MACHINE_TARGETS) * 2 * (len(plan.instantiations()) + len(plan.REGISTERS_KERNELS))
    assert {kernel["target"] for kernel in kernels} == set(targets.MACHINE_TARGETS)
    for kernel in kernels:
        assert kernel["registers"] > 0
        for place in ("spill_store_bytes", "spill_load_bytes", "stack_bytes", "local_bytes"):
            assert kernel[place] == 0, kernel


def test_library_needs_torch_and_the_system_only(built: library.LibraryInfo) -> None:
    dynamic = subprocess.run(["readelf", "-d", built.path], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert "libtorch_cpu.so" in needed
    assert needed <= ALLOWED_LIBRARIES


def test_library_exports_its_interface_only(built: library.LibraryInfo) -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", built.path], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in listing.splitlines()}
    assert exported >= EXPORTED
    assert not {name for name in exported if name.startswith(("cuda", "cu"))}


def test_library_holds_no_path_of_this_machine(built: library.LibraryInfo) -> None:
    content = built.path.read_bytes()
    for path in (str(cache.cache_folder()), str(sources.native_folder().parent), torch.__path__[0]):
        assert path.encode() not in content


def test_library_carries_the_hash_of_its_source(built: library.LibraryInfo) -> None:
    assert sources.embedded_hash(built.path.read_bytes()) == sources.read_sources().source_hash


def test_ops_are_registered_once_it_is_loaded(built: library.LibraryInfo) -> None:
    code = (
        "import torch; from mlpdown.jit import library; first = library.load(); assert library.load() is first\n"
        "print(torch.ops.mlpdown.mlp_down.overloads(), torch.ops.mlpdown.partial_sums.overloads())"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "['default', 'out'] ['default']"
