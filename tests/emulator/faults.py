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
    setting: str
    old: str
    new: str


FAULTS = (
    # Order and ownership
    Fault(
        "sums go to the wrong owner",
        "surplus bytes",
        "ring",
        "owner = row % kClusterSize;",
        "owner = (row + FAULT) % kNumOwners;",
    ),
    Fault(
        "a lane adds up in another order",
        "wrong bits",
        "ring",
        "ptx::add_rn(a[0], a[1])",
        "ptx::add_rn(a[0], a[FAULT ? 4 : 1])",
    ),
    Fault(
        "missing vectors are positive zeros",
        "wrong bits",
        "negative zeros",
        "vectors[i] = kNegativeZeros;",
        "vectors[i] = FAULT ? ptx::Words{} : kNegativeZeros;",
    ),
    Fault("missing segments are positive zeros", "wrong bits", "negative zeros", "-0.0f;", "FAULT ? 0.0f : -0.0f;"),
    # Waits and arrivals
    Fault(
        "waits for other CTAs have the scope of their own",
        "unordered read",
        "ring",
        "ptx::mbarrier_wait_cluster(barrier, parity);",
        "if (FAULT) ptx::mbarrier_wait(barrier, parity); else OLD",
    ),
    Fault(
        "a rank writes to another that may not have started",
        "absent CTA",
        "ring",
        "  ptx::syncwarp();\n  cluster.sync();",
        "if (FAULT && warp_idx == kEpilogueWarp) partial_sums.release({}, lane); OLD",
    ),
    Fault(
        "threads arrive twice at the cluster barrier",
        "cluster barrier",
        "ring",
        "ptx::barrier_cluster_arrive_relaxed();",
        "if (FAULT) ptx::barrier_cluster_arrive_relaxed(); OLD",
    ),
    Fault(
        "one warp stays out of the barrier",
        "CTA barrier",
        "registers",
        "ptx::bar_sync();\n\n",
        "if (FAULT && warp_idx == 3) return; OLD",
    ),
    Fault(
        "consumers do not wait for the stage",
        "unfilled read",
        "ring",
        "ptx::mbarrier_wait(stages.full(stage.idx), stage.phase);",
        "if (!FAULT) OLD",
    ),
    Fault(
        "epilogue leaves one stage early",
        "early exit",
        "ring",
        "fill_idx < num_fills; ++fill_idx",
        "fill_idx + FAULT < num_fills; ++fill_idx",
    ),
    # Warps
    Fault(
        "one lane stays out of a shuffle",
        "divergence",
        "ring",
        "      const float segment_sum = ",
        "const float segment_sum = FAULT && lane == 31 ? 0.0f : ",
    ),
    Fault(
        "one lane leaves before its warp",
        "absent lane",
        "ring",
        "RingPosition stage{group};",
        "if (FAULT && lane == 31) return; OLD",
    ),
    # Memory
    Fault(
        "a barrier is taken for an activation",
        "barrier read",
        "ring",
        "ptx::ld_shared(smem_ + offset)",
        "ptx::ld_shared(FAULT ? ptx::dynamic_shared_memory() : smem_ + offset)",
    ),
    Fault(
        "the result goes to an input",
        "write to an input",
        "ring",
        "static_cast<uint16_t*>(problem.out)",
        "static_cast<uint16_t*>(FAULT ? const_cast<void*>(problem.hidden_states) : problem.out)",
    ),
    Fault(
        "a residual is read from the output",
        "read of the output",
        "ring",
        "static_cast<const uint16_t*>(problem.hidden_states)",
        "static_cast<const uint16_t*>(FAULT ? problem.out : problem.hidden_states)",
    ),
    # Dependent launch
    Fault(
        "epilogue writes before the wait",
        "early write",
        "partial sums",
        "ptx::griddepcontrol_wait();\n  ptx::griddepcontrol_launch_dependents();",
        "if (!FAULT) { OLD }",
    ),
)


def write_faults(native: Path, folder: Path) -> None:
    """The sources of ``native`` into the new ``folder``, with every fault in place behind its switch."""
    shutil.copytree(native, folder)
    sources = [*folder.glob("*.cuh"), *folder.glob("*.h")]
    for idx, fault in enumerate(FAULTS):
        places = [path for path in sources for _ in range(path.read_text().count(fault.old))]
        assert len(places) == 1, (
            f"{fault.name}: the text to change stands in {[path.name for path in places]}: bring it up to the kernel"
        )
        new = fault.new.replace("OLD", fault.old).replace("FAULT", f"mutant({idx})")
        places[0].write_text(places[0].read_text().replace(fault.old, new))
    write_switch(folder, len(FAULTS))
