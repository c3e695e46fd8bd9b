"""What ptxas says of each kernel: registers, spills, local and shared memory. A spill fails the build."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from .errors import BuildError

_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\w+)' for '(?P<target>sm_\w+)'")
_STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<shared>\d+) bytes smem")
_LOCAL = re.compile(r"(?P<local>\d+) bytes lmem")
# ring<Float16, 4u, 2u, 0u> and the like, as the Itanium C++ ABI spells them.
_KERNEL = re.compile(r"_Z\d+(?P<name>[a-z]\w*?)I\d+(?P<dtype>B?Float16)(?P<numbers>(?:Lj\d+E)+)E")


@dataclasses.dataclass
class KernelResources:
    """One kernel on one target. Bytes are per thread, but for shared memory, which is per block and static."""

    target: str
    kernel: str
    registers: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    stack_bytes: int = 0
    local_bytes: int = 0
    static_shared_bytes: int = 0

    @property
    def spills(self) -> bool:
        """Whether anything is kept in local memory."""
        return self.spill_store_bytes + self.spill_load_bytes + self.stack_bytes + self.local_bytes > 0


def parse(log: str) -> list[KernelResources]:
    """The resources of every kernel in the output of nvcc with ``-Xptxas -v``."""
    kernels: list[KernelResources] = []
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(KernelResources(entry["target"], kernel_name(entry["symbol"])))
        elif kernels:
            current = kernels[-1]
            if stack := _STACK.search(line):
                current.stack_bytes = int(stack["stack"])
                current.spill_store_bytes = int(stack["stores"])
                current.spill_load_bytes = int(stack["loads"])
            if used := _USED.search(line):
                current.registers = int(used["registers"])
                shared, local = _SHARED.search(line), _LOCAL.search(line)
                current.static_shared_bytes = int(shared["shared"]) if shared else 0
                current.local_bytes = int(local["local"]) if local else 0
    return sorted(kernels, key=lambda kernel: (int(kernel.target[3:]), kernel.kernel))


def check(kernels: Sequence[KernelResources], targets: Sequence[str], num_kernels: int) -> None:
    """Raise BuildError unless every target has all its kernels, and none of them spills."""
    for target in targets:
        if target.startswith("sm_"):
            compiled = sum(kernel.target == target for kernel in kernels)
            if compiled != num_kernels:
                raise BuildError(
                    f"the compiler reported {compiled} kernels for {target}, {num_kernels} were to be compiled"
                )
    spilled = [kernel for kernel in kernels if kernel.spills]
    if spilled:
        lines = [
            f"  {kernel.kernel} for {kernel.target}: {kernel.stack_bytes} bytes of stack, "
            f"{kernel.spill_store_bytes} of spill stores, {kernel.spill_load_bytes} of spill loads, "
            f"{kernel.local_bytes} of local memory"
            for kernel in spilled
        ]
        raise BuildError("\n".join(["these kernels use local memory, which none may:", *lines]))


def kernel_name(symbol: str) -> str:
    """``ring<Float16, 4, 2, 0>`` from its mangled name; other symbols as they are."""
    match = _KERNEL.match(symbol)
    if match is None:
        return symbol
    numbers = re.findall(r"Lj(\d+)E", match["numbers"])
    return f"{match['name']}<{', '.join([match['dtype'], *numbers])}>"
