"""Faults that no operator makes, each with the check that is there to notice it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from .mutants import write_switch


@dataclasses.dataclass(frozen=True)
class Fault:
    """``old`` stands once in the kernels' sources, and gives way to ``new``, in which ``OLD`` stands for it. ``check`` fails if ``FAULT``
    is true."""

    name: str
    check: str
    old: str
    new: str
    setting: str = "ring"


FAULTS = (
    # Order and ownership
    Fault("a lane adds up in another order", "wrong bits", "add_rn(a[0], a[1])", "add_rn(a[0], a[FAULT ? 4 : 1])"),
    Fault(
        "missing vectors are positive zeros",
        "wrong bits",
        "vectors[i] = kNegativeZeros;",
        "OLD if (FAULT) vectors[i] = {};",
        "negative zeros",
    ),
    Fault("missing segments are positive zeros", "wrong bits", "-0.0f;", "FAULT ? 0.0f : OLD", "negative zeros"),
    Fault("sums go to the wrong owner", "surplus bytes", "owner = row %", "owner = (row + FAULT) %"),
    # Waits and arrivals
    Fault("consumers do not wait for the stage", "unfilled read", "ptx::mbarrier_wait(stages.full(", "if (!FAULT) OLD"),
    Fault(
        "waits for other CTAs have the scope of their own",
        "unordered read",
        "ptx::mbarrier_wait_cluster(barrier, parity);",
        "if (FAULT) ptx::mbarrier_wait(barrier, parity); else OLD",
    ),
    Fault(
        "a rank writes to another that may not have started",
        "absent CTA",
        "  cluster.sync();",
        "if (FAULT && warp_idx == kEpilogueWarp) partial_sums.release({}, lane); OLD",
    ),
    Fault(
        "threads arrive twice at the cluster barrier",
        "cluster barrier",
        "ptx::barrier_cluster_arrive_relaxed();",
        "if (FAULT) ptx::barrier_cluster_arrive_relaxed(); OLD",
    ),
    Fault(
        "one warp stays out of the barrier",
        "CTA barrier",
        "ptx::bar_sync();\n\n",
        "if (FAULT && warp_idx == 3) return; OLD",
        "registers",
    ),
    Fault("the epilogue leaves early", "early exit", "fill_idx < num_fills; ++", "fill_idx + FAULT < num_fills; ++"),
    # Warps
    Fault(
        "one lane leaves its warp", "absent lane", "RingPosition stage{group};", "if (FAULT && lane == 31) return; OLD"
    ),
    Fault(
        "one lane stays out of a shuffle",
        "divergence",
        "      const float segment_sum = ",
        "OLD FAULT && lane == 31 ? 0.0f : ",
    ),
    # Memory
    Fault(
        "a barrier is taken for an activation",
        "barrier read",
        "ptx::ld_shared(smem_ + offset)",
        "ptx::ld_shared(FAULT ? ptx::dynamic_shared_memory() : smem_ + offset)",
    ),
    Fault(
        "the result goes to an input",
        "write to an input",
        "static_cast<uint16_t*>(problem.out)",
        "static_cast<uint16_t*>(FAULT ? const_cast<void*>(problem.hidden_states) : problem.out)",
    ),
    Fault(
        "a residual is read from the output",
        "read of the output",
        "static_cast<const uint16_t*>(problem.hidden_states)",
        "static_cast<const uint16_t*>(FAULT ? problem.out : problem.hidden_states)",
    ),
    # Dependent launch
    Fault(
        "the epilogue writes before the wait",
        "early write",
        "ptx::griddepcontrol_wait();\n  ptx::griddepcontrol_launch_dependents();",
        "if (!FAULT) { OLD }",
        "partial sums",
    ),
)


def write_faults(native: Path, folder: Path) -> None:
    """The sources of ``native`` into the new ``folder``, with every fault in place behind its switch."""
    shutil.copytree(native, folder)
    sources = [*folder.glob("*.cuh"), *folder.glob("*.h")]
    for idx, fault in enumerate(FAULTS):
        places = [path for path in sources for _ in range(path.read_text().count(fault.old))]
        where = [path.name for path in places]
        assert len(places) == 1, f"{fault.name}: the text to change stands in {where}: bring it up to the kernel"
        new = fault.new.replace("OLD", fault.old).replace("FAULT", f"mutant({idx})")
        places[0].write_text(places[0].read_text().replace(fault.old, new))
    write_switch(folder, len(FAULTS))
