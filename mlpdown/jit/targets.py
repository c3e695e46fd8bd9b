"""Which machine code a library holds, and which GPUs it can serve."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..plan import MINIMUM_COMPUTE_CAPABILITY
from .errors import BuildError

ComputeCapability = tuple[int, int]

# Machine code for every GPU since Hopper, and for the kinds before it, where one kernel of the two runs; none of it uses an
# architecture-specific ("a") feature.
MACHINE_TARGETS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
# PTX of the oldest that has it all: the driver compiles it for whatever comes next. PTX of a newer one would serve fewer GPUs and, as the
# kernels use nothing newer, no GPU better.
PTX_TARGET = "compute_90"
ALL_TARGETS = (*MACHINE_TARGETS, PTX_TARGET)

# The first compiler that knows sm_120, and the first that knows sm_103.
_FIRST_COMPILER = {"sm_103": (12, 9)}


def capability_of(target: str) -> ComputeCapability:
    """``"sm_103"`` or ``"compute_103"`` -> ``(10, 3)``."""
    number = int(target.split("_")[1])
    return number // 10, number % 10


def parse_targets(names: Iterable[str]) -> tuple[str, ...]:
    """Targets from a command line: ``sm_90``, ``90``, ``9.0``, ``compute_90`` or ``all``, in canonical order, each once.

    Raises:
        ValueError: a name is none of these, or is a GPU older than Ampere.
    """
    targets: set[str] = set()
    for name in names:
        if name == "all":
            targets.update(ALL_TARGETS)
            continue
        match = re.fullmatch(r"(?:(sm|compute)_)?(\d{1,2})\.?(\d)", name)
        if match is None:
            raise ValueError(f"arch must be 'all' or like sm_90, 9.0 or compute_90, got {name!r}")
        target = f"{match[1] or 'sm'}_{match[2]}{match[3]}"
        if capability_of(target) < MINIMUM_COMPUTE_CAPABILITY:
            raise ValueError(f"arch must be sm_80 or newer, got {name!r}")
        if match[1] == "compute" and capability_of(target) < capability_of(PTX_TARGET):
            raise ValueError(f"arch must be {PTX_TARGET} or newer where it is PTX: older PTX has no ring for newer GPUs, got {name!r}")
        targets.add(target)
    return tuple(sorted(targets, key=lambda target: (target.startswith("compute"), capability_of(target))))


def targets_for_compiler(targets: Sequence[str], compiler_version: tuple[int, int]) -> tuple[str, ...]:
    """Those of ``targets`` that a compiler of this version knows. Raises BuildError if it knows none."""
    known = tuple(target for target in targets if compiler_version >= _FIRST_COMPILER.get(target, (0, 0)))
    if not known:
        version = ".".join(map(str, compiler_version))
        raise BuildError(f"nvcc {version} knows none of the targets {', '.join(targets)}; sm_103 needs CUDA 12.9 or newer")
    return known


def targets_for_devices(capabilities: Iterable[ComputeCapability]) -> tuple[str, ...]:
    """What to build for the GPUs of this machine alone; everything, if it has none that the kernel can run on."""
    able = [capability for capability in capabilities if capability >= MINIMUM_COMPUTE_CAPABILITY]
    best = {
        max((target for target in MACHINE_TARGETS if serves([target], capability)), key=capability_of, default=PTX_TARGET)
        for capability in able
    }
    return tuple(target for target in ALL_TARGETS if target in best) or ALL_TARGETS


def serves(targets: Sequence[str], capability: ComputeCapability) -> bool:
    """Whether a library with ``targets`` runs on a GPU: by older machine code of the same major version, or by older PTX."""
    return any(
        capability_of(target) <= capability
        and (target.startswith("compute_") or capability_of(target)[0] == capability[0])
        for target in targets
    )


def nvcc_flags(targets: Sequence[str]) -> list[str]:
    """``-gencode`` for each target."""
    return [f"-gencode=arch=compute_{target.split('_')[1]},code={target}" for target in targets]


def present_capabilities() -> list[ComputeCapability]:
    """Compute capabilities of the GPUs that torch can use here; empty if there are none."""
    import torch

    if not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})
