"""Planted faults: a kernel with one place changed, and the check that is there to notice."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlpdown.plan import Plan

RING = Plan(4, 4, num_stages=2, stages_in_flight=2, num_consumer_warps=4)
PREFETCH = dataclasses.replace(RING, weight_prefetch=True)
LONE_CTA = Plan(1, 4, num_stages=2, stages_in_flight=1, num_consumer_warps=8)
TWO_GROUPS = dataclasses.replace(LONE_CTA, num_consumer_warps=16)
REGISTERS = Plan.in_registers(4)


@dataclasses.dataclass(frozen=True)
class Fault:
    """``old`` stands once in the kernels' sources; with ``new`` in its place, ``check`` fails (``wrong bits``: the comparison)."""

    name: str
    check: str
    old: str
    new: str
    plan: Plan = RING
    is_partial_sums: bool = False


def changed(name: str, check: str, line: str, old: str, new: str, **options: Any) -> Fault:
    """A fault within a longer ``line``, in which ``old`` stands once."""
    assert line.count(old) == 1, (line, old)
    return Fault(name, check, line, line.replace(old, new), **options)


_INIT_EMPTY = "ptx::mbarrier_init(empty_barriers(stage_idx), kSegmentsPerCta);"
_ARRIVE_AND_WAIT = "  barriers_arrive_and_wait<kClusterSize>(num_threads);\n\n  // ---- Consumers ----"
_PRODUCER_ARRIVES = "    barriers_arrive<kClusterSize>(num_threads);\n"
_CLUSTER_ARRIVE_AND_WAIT = "    ptx::barrier_cluster_arrive_relaxed();\n    ptx::barrier_cluster_wait();\n"
_CTA_SYNC = "    ptx::bar_sync(num_threads);\n"
_EARLY_ARRIVAL = (
    "  if (warp_idx == kEpilogueWarp && lane == 0) {\n"
    "    ptx::mbarrier_arrive_cluster(ptx::mapa(partials_empty(0), (cta_rank_in_cluster + 1) % kClusterSize));\n"
    "  }\n"
)
_WAIT_EMPTY = "ptx::mbarrier_wait(empty_barriers(stage.idx), stage.phase ^ 1);"
_WAIT_LANDING = "ptx::mbarrier_wait(full_barriers(landing.idx), landing.phase);"
_EXPECT_STAGE = "ptx::mbarrier_arrive_expect_tx(full_barriers(stage.idx), tile_rows * slice_bytes)"
_ROW_COPY = "tile_weight + lane * problem.intermediate_dim, slice_bytes"
_TILE_WEIGHT = "const uint16_t* const tile_weight = weight +"
_PRODUCER_DEPENDENCE = "if (!plan.weight_prefetch) ptx::griddepcontrol_wait();"
_ACTIVATION_DEPENDENCE = "  if (warp_idx == kFirstConsumerWarp) {\n    ptx::griddepcontrol_wait();"
_WAIT_ACTIVATION = "    ptx::mbarrier_wait(activation_barrier, 0);"
_WAIT_FULL = "ptx::mbarrier_wait(full_barriers(stage.idx), stage.phase);"
_WAIT_SLOT = "if (tile >= kNumPartialSlots) wait_for_cluster<kClusterSize>(partials_empty(slot.idx), slot.phase ^ 1);"
_FOLD = "const float segment_sum = fold_lanes<kRows>(sums, lane);\n\n      // Segment sums meet at the owner"
_RELEASE_STAGE = "      ptx::syncwarp();\n      if (lane == 0) ptx::mbarrier_arrive(empty_barriers(stage.idx));"
_EPILOGUE_DEPENDENCE = "they may still be reading.\n  ptx::griddepcontrol_wait();"
_EPILOGUE_LOOP = "for (uint32_t tile = 0; tile < num_tiles; ++tile) {\n    if (tile % kTilesPerWindow == 0) {"
_CONSUMER_LOOP = "for (uint32_t tile = group; tile < num_tiles; tile += num_groups) {"
_EXPECT_SLOT = (
    "if (kClusterSize > 1 && lane == 0) {\n"
    "      ptx::mbarrier_arrive_expect_tx(partials_full(slot.idx), num_owned_rows * kNumSegments *"
)
_WAIT_PARTIALS = "wait_for_cluster<kClusterSize>(partials_full(slot.idx), slot.phase);"
_BAR_SYNC = "  ptx::bar_sync(kRegistersThreads);\n"
_STORE = "ptx::st_global(static_cast<uint16_t*>(problem.out) + row, "

FAULTS = (
    # Waits
    Fault("consumers do not wait for the stage", "unfilled read", _WAIT_FULL, ""),
    changed("consumers wait for the stage's other phase", "unordered read", _WAIT_FULL, "phase", "phase ^ 1"),
    Fault("consumers do not wait for the activation", "unfilled read", _WAIT_ACTIVATION, ""),
    Fault("consumers do not wait for the slot", "overwrite", _WAIT_SLOT, ""),
    Fault("epilogue does not wait for the partial sums", "unwritten read", _WAIT_PARTIALS, ""),
    changed(
        "epilogue waits with the scope of its CTA",
        "unordered read",
        _WAIT_PARTIALS,
        "wait_for_cluster<kClusterSize>",
        "ptx::mbarrier_wait",
    ),
    Fault(
        "a refill is issued one stage early",
        "overwrite",
        f"if (tile >= plan.num_stages) {_WAIT_EMPTY}",
        f"if (tile > plan.num_stages) {_WAIT_EMPTY}",
    ),
    changed("producer waits for the stage's other phase", "overwrite", _WAIT_EMPTY, " ^ 1", ""),
    changed("producer waits for the landing's other phase", "deadlock", _WAIT_LANDING, "phase", "phase ^ 1"),
    Fault(
        "producer lanes do not meet after the wait", "deadlock", f"{_WAIT_EMPTY}\n      ptx::syncwarp();", _WAIT_EMPTY
    ),
    # Arrivals
    Fault(
        "a stage is released before all lanes have read it", "overwrite", _RELEASE_STAGE, _RELEASE_STAGE.split("\n")[1]
    ),
    changed("all lanes release the stage for their warp", "overwrite", _RELEASE_STAGE, "if (lane == 0) ", ""),
    changed("a stage expects one warp too many", "deadlock", _INIT_EMPTY, "kSegmentsPerCta", "kSegmentsPerCta + 1"),
    changed("a stage expects one warp too few", "overwrite", _INIT_EMPTY, "kSegmentsPerCta", "kSegmentsPerCta - 1"),
    changed(
        "a lone CTA hands a slot over before all lanes have written",
        "unwritten read",
        "        ptx::syncwarp();\n        if (lane == 0) ptx::mbarrier_arrive(partials_full",
        "        ptx::syncwarp();\n",
        "",
        plan=LONE_CTA,
    ),
    changed("two lanes arm the slot", "surplus arrival", _EXPECT_SLOT, "lane == 0", "lane < 2"),
    # Bytes
    changed("a stage expects 16 bytes too few", "surplus bytes", _EXPECT_STAGE, "slice_bytes", "slice_bytes - 16"),
    changed("a stage expects 16 bytes too many", "missing bytes", _EXPECT_STAGE, "slice_bytes", "slice_bytes + 16"),
    changed("a slot expects half of the bytes", "surplus bytes", _EXPECT_SLOT, "kNumSegments", "kNumSegments / 2"),
    changed("sums go to the wrong owner", "surplus bytes", "const uint32_t owner = row % kClusterSize;", "row", "(row + 1)"),
    # Start and end
    Fault(
        "the last stage's barriers are not initialised",
        "barrier not initialised",
        "stage_idx < plan.num_stages; ++stage_idx",
        "stage_idx + 1 < plan.num_stages; ++stage_idx",
    ),
    Fault(
        "barriers are initialised without the fence",
        "barrier not visible",
        "mbarrier_init(activation_barrier, 1);\n    ptx::fence_mbarrier_init();",
        "mbarrier_init(activation_barrier, 1);",
    ),
    Fault("consumers do not wait for the cluster", "barrier not visible", _CLUSTER_ARRIVE_AND_WAIT, ""),
    Fault(
        "a rank writes to another that may not have started",
        "absent CTA",
        _ARRIVE_AND_WAIT,
        _EARLY_ARRIVAL + _ARRIVE_AND_WAIT,
    ),
    Fault(
        "threads arrive twice at the cluster barrier",
        "cluster barrier",
        _CLUSTER_ARRIVE_AND_WAIT,
        f"    ptx::barrier_cluster_arrive_relaxed();\n{_CLUSTER_ARRIVE_AND_WAIT}",
    ),
    Fault("slots are released to ranks that may be gone", "absent CTA", "tile + kNumPartialSlots < num_tiles && ", ""),
    changed("epilogue leaves one tile early", "early exit", _EPILOGUE_LOOP, "tile < num_tiles", "tile + 1 < num_tiles"),
    Fault(
        "a lone CTA comes to the cluster barrier",
        "cluster barrier",
        _CTA_SYNC,
        _CLUSTER_ARRIVE_AND_WAIT,
        plan=LONE_CTA,
    ),
    Fault("producer of a lone CTA does not arrive", "deadlock", _PRODUCER_ARRIVES, "", plan=LONE_CTA),
    changed(
        "the threads of a lone CTA are miscounted",
        "CTA barrier",
        _CTA_SYNC,
        "num_threads",
        "num_threads - kNumLanes",
        plan=LONE_CTA,
    ),
    Fault(
        "producer of a lone CTA arrives twice",
        "CTA barrier",
        _PRODUCER_ARRIVES,
        _PRODUCER_ARRIVES * 2,
        plan=LONE_CTA,
    ),
    changed(
        "a cluster takes a row too many",
        "out of bounds",
        "cluster_idx < shares.num_longer ? 1 : 0",
        "<",
        "<=",
    ),
    changed(
        "a group of consumers begins at another's stage",
        "overwrite",
        "RingPosition stage{group};",
        "group",
        "0",
        plan=TWO_GROUPS,
    ),
    changed(
        "two groups of consumers take the same tiles", "deadlock", _CONSUMER_LOOP, "= group", "= 0", plan=TWO_GROUPS
    ),
    # Warps
    changed("one lane stays out of a shuffle", "divergence", _FOLD, "= ", "= lane == 31 ? 0.0f : "),
    Fault(
        "one lane leaves before its warp",
        "absent lane",
        _WAIT_ACTIVATION,
        f"    if (lane == 31) return;\n{_WAIT_ACTIVATION}",
    ),
    Fault(
        "the lanes of a warp reach two cluster barriers",
        "divergence",
        _ARRIVE_AND_WAIT,
        f"  if (lane == 0) {{\n{_CLUSTER_ARRIVE_AND_WAIT}  }} else {{\n{_CLUSTER_ARRIVE_AND_WAIT}  }}\n  // ---- Consumers ----",
    ),
    # Addresses
    changed("a copy takes the row below", "out of bounds", _ROW_COPY, "+ lane", "+ (lane + 1)"),
    Fault("a copy starts one element late", "misaligned", _TILE_WEIGHT, f"{_TILE_WEIGHT} 1 +"),
    Fault(
        "the ring begins one row late", "out of bounds", "smem + layout.ring +", "smem + layout.ring + slice_bytes +"
    ),
    Fault("the activation lands on the barriers", "barrier overwritten", "smem + Layout::kActivation;", "smem;"),
    Fault(
        "a barrier is taken for an activation",
        "barrier read",
        "ptx::ld_shared(smem_activation + offset)",
        "ptx::ld_shared(ptx::dynamic_shared_memory())",
    ),
    changed("all rows go to one element", "second write", _STORE, " + row", ""),
    changed(
        "the result goes to an input",
        "write to an input",
        _STORE,
        "problem.out",
        "const_cast<void*>(problem.hidden_states)",
    ),
    Fault(
        "a residual is read from the output",
        "read of the output",
        "load(problem.hidden_states, first_row + row)",
        "load(problem.out, first_row + row)",
    ),
    # Dependent launch
    Fault("producer prefetches without leave", "early read", _PRODUCER_DEPENDENCE, ""),
    Fault(
        "the activation is read before the wait",
        "early read",
        _ACTIVATION_DEPENDENCE,
        _ACTIVATION_DEPENDENCE.split("\n")[0],
        plan=PREFETCH,
    ),
    Fault("epilogue reads before the wait", "early read", _EPILOGUE_DEPENDENCE, ""),
    Fault("epilogue writes before the wait", "early write", _EPILOGUE_DEPENDENCE, "", is_partial_sums=True),
    # Registers
    Fault("segment sums are added up without the barrier", "unwritten read", _BAR_SYNC, "", plan=REGISTERS),
    Fault(
        "one warp stays out of the barrier",
        "CTA barrier",
        _BAR_SYNC,
        "  if (segment != 3) ptx::bar_sync(kRegistersThreads);\n",
        plan=REGISTERS,
    ),
    Fault(
        "one lane leaves before the barrier",
        "absent lane",
        _BAR_SYNC,
        f"  if (lane == 31) return;\n{_BAR_SYNC}",
        plan=REGISTERS,
    ),
    Fault(
        "the lanes of a warp reach two CTA barriers",
        "divergence",
        _BAR_SYNC,
        f"  if (lane == 0) {{\n{_BAR_SYNC}  }} else {{\n{_BAR_SYNC}  }}\n",
        plan=REGISTERS,
    ),
    Fault(
        "the producer alone waits for its CTA",
        "deadlock",
        _PRODUCER_ARRIVES,
        f"{_PRODUCER_ARRIVES}    ptx::bar_sync(num_threads);\n",
    ),
    Fault(
        "registers prefetch without leave",
        "early read",
        "if (plan.weight_prefetch) load_weights(vector);",
        "load_weights(vector);",
        plan=REGISTERS,
    ),
    Fault(
        "registers do not wait for earlier grids",
        "early read",
        "  ptx::griddepcontrol_wait();\n  ptx::griddepcontrol_launch_dependents();\n",
        "",
        plan=dataclasses.replace(REGISTERS, weight_prefetch=True),
    ),
    changed("each CTA begins one row late", "wrong bits", "ptx::cta_idx() * kRows;", ";", " + 1;", plan=REGISTERS),
    changed(
        "weights are loaded from the row below",
        "out of bounds",
        "problem.hidden_dim ? first_row + row",
        "? first_row",
        "? first_row + 1",
        plan=REGISTERS,
    ),
    Fault(
        "loads run past the segment",
        "out of bounds",
        "if (vector + i * kNumLanes < end_vector)",
        "if (vector < end_vector)",
        plan=REGISTERS,
    ),
    changed(
        "the segments of a row share one place",
        "overwrite",
        "(cta_row * kNumSegments + segment)",
        " + segment",
        "",
        plan=REGISTERS,
    ),
    # Arithmetic
    Fault(
        "the bias is left out", "wrong bits", "if (problem.bias) total = ptx::add_rn(total, DType::to_float(bias));", ""
    ),
    Fault("a lane adds up in another order", "wrong bits", "ptx::add_rn(a[0], a[1])", "ptx::add_rn(a[0], a[4])"),
)
