"""Planted faults: a kernel with one place changed, and the check that is there to notice."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlpdown.plan import Plan

from .cases import make_inputs, make_negative_zeros
from .launch import Inputs

RING = Plan(4, 4, num_stages=2, stages_in_flight=2, num_consumer_warps=4)
PREFETCH = dataclasses.replace(RING, weight_prefetch=True)
LONE_CTA = Plan(1, 4, num_stages=2, stages_in_flight=1, num_consumer_warps=8)
TWO_GROUPS = dataclasses.replace(LONE_CTA, num_consumer_warps=16)
WINDOW = dataclasses.replace(LONE_CTA, stages_in_flight=2)
STAGGERED = dataclasses.replace(LONE_CTA, stagger_rows=2)
ACTIVATION_IN_REGISTERS = Plan(1, 2, num_stages=2, stages_in_flight=1, num_consumer_warps=8, activation_in_registers=True)
ONE_STAGE = dataclasses.replace(ACTIVATION_IN_REGISTERS, num_stages=1)
REGISTERS = Plan.in_registers(4)

WRAPS = make_inputs(81, 200, "float16", 1)  # 21 tiles of 4 rows: the ring wraps ten times, the slots once; the last has one row
FEW_ROWS = make_inputs(3, 200, "float16", 1)
# Two vectors a lane: one lane of most segments has a second, and 6 lanes of the last segment have not even the first.
SHORT_SEGMENT = make_inputs(5, 257 * 8, "float16", 1)
SECOND_BATCH = make_inputs(4, 769 * 8, "float16", 1)  # likewise, but four vectors, which are more than a batch of loads
NEGATIVE_ZEROS = make_negative_zeros(3, 264 * 8)


@dataclasses.dataclass(frozen=True)
class Fault:
    """``old`` stands once in the kernels' sources; with ``new`` in its place, ``check`` fails (``wrong bits``: the comparison)."""

    name: str
    check: str
    old: str
    new: str
    plan: Plan = RING
    is_partial_sums: bool = False
    inputs: Inputs = WRAPS
    num_clusters: int = 1


def changed(name: str, check: str, line: str, old: str, new: str, **options: Any) -> Fault:
    """A fault within a longer ``line``, in which ``old`` stands once."""
    assert line.count(old) == 1, (line, old)
    return Fault(name, check, line, line.replace(old, new), **options)


_INIT_FULL = "ptx::mbarrier_init(full_barriers(stage_idx), 1);"
_INIT_EMPTY = "ptx::mbarrier_init(empty_barriers(stage_idx), kSegmentsPerCta);"
_FENCE_FULL = f"{_INIT_FULL}\n      ptx::fence_mbarrier_init();"
_FENCE_EMPTY = f"{_INIT_EMPTY}\n    ptx::fence_mbarrier_init();"
_SYNC = "  sync_cluster<kClusterSize>();\n"
_CLUSTER_ARRIVE_AND_WAIT = "    ptx::barrier_cluster_arrive_relaxed();\n    ptx::barrier_cluster_wait();\n"
_CTA_SYNC = "    ptx::bar_sync();\n  } else {\n"
_EARLY_ARRIVAL = (
    "  if (warp_idx == kEpilogueWarp && lane == 0) {\n"
    "    ptx::mbarrier_arrive_cluster(ptx::mapa(partials_empty(0), (cta_rank_in_cluster + 1) % kClusterSize));\n"
    "  }\n"
)
_INIT_ACTIVATION = (
    "  if (kVectors == 0 && warp_idx == kFirstConsumerWarp && lane == 0) {\n"
    "    ptx::mbarrier_init(activation_barrier, 1);\n"
    "    ptx::fence_mbarrier_init();\n"
    "  }\n"
)
_WAIT_EMPTY = "ptx::mbarrier_wait(empty_barriers(next_stage.idx), next_stage.phase ^ 1);"
_WAIT_LANDING = "ptx::mbarrier_wait(full_barriers(landing.idx), landing.phase);"
_EXPECT_STAGE = "ptx::mbarrier_arrive_expect_tx(barrier, tile_rows * slice_bytes)"
_ROW_COPY = "weight + row * problem.intermediate_dim, slice_bytes"
_WEIGHT = "const uint16_t* weight =\n      static_cast<const uint16_t*>(problem.weight) +"
_TILE_ROWS = "const uint32_t tile_rows = rows_left < kRows ? rows_left : kRows;"
_FILL_AT_START = "if (stage_idx < plan.stages_in_flight && rows_left > 0) fill_stage();"
_FILL_LATER = "for (uint32_t tile = plan.stages_in_flight; rows_left > 0; ++tile) {"
_PRODUCER_DEPENDENCE = "if (stage_idx == 0 && !plan.weight_prefetch) ptx::griddepcontrol_wait();"
_CONSUMER_DEPENDENCE = "  if (warp_idx >= kFirstConsumerWarp) {\n    ptx::griddepcontrol_wait();"
_WAIT_ACTIVATION = "      ptx::mbarrier_wait(activation_barrier, 0);"
_HAS_VECTOR = "return i + 2 < kVectors || i * kNumLanes + lane < num_vectors;"
_LOAD_WEIGHTS = "if (!has_vector<kVectors>(first + i, lane, num_vectors)) continue;"
_WAIT_FULL = "ptx::mbarrier_wait(full_barriers(stage.idx), stage.phase);"
_WAIT_SLOT = "if (tile >= kNumPartialSlots) wait_for_cluster<kClusterSize>(partials_empty(slot.idx), slot.phase ^ 1);"
_FOLD = "const float segment_sum = fold_lanes<kRows>(sums, lane);\n\n      // ---- Segment sums meet"
_RELEASE_STAGE = "      ptx::syncwarp();\n      if (lane == 0) ptx::mbarrier_arrive(empty_barriers(stage.idx));"
_EPILOGUE_DEPENDENCE = (
    "ever under way.\n  ptx::griddepcontrol_wait();\n  ptx::griddepcontrol_launch_dependents();"
)
_EPILOGUE_LOOP = "for (uint32_t tile = 0; tile < num_tiles; ++tile) {\n    if (tile % kTilesPerWindow == 0) {"
_CONSUMER_LOOP = "for (uint32_t tile = group; tile < num_tiles; tile += num_groups) {"
_EXPECT_SLOT = (
    "if (kClusterSize > 1 && lane == 0) {\n"
    "      ptx::mbarrier_arrive_expect_tx(partials_full(slot.idx), num_owned_rows * kNumSegments *"
)
_WAIT_PARTIALS = "wait_for_cluster<kClusterSize>(partials_full(slot.idx), slot.phase);"
_BAR_SYNC = "  ptx::bar_sync();\n\n"
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
    changed(
        "one stage too many is filled at the start",
        "overwrite",
        _FILL_AT_START,
        "stage_idx < plan",
        "stage_idx <= plan",
        plan=LONE_CTA,
    ),
    changed(
        "the tiles filled at the start are miscounted",
        "overwrite",
        _FILL_LATER,
        "plan.stages_in_flight",
        "plan.stages_in_flight - 1",
        plan=WINDOW,
    ),
    Fault(
        "producer waits for a stage that is not under way",
        "deadlock",
        "RingPosition landing;",
        "RingPosition landing{1};",
        plan=LONE_CTA,
    ),
    # Arrivals
    Fault(
        "a stage is released before all lanes have read it", "overwrite", _RELEASE_STAGE, _RELEASE_STAGE.split("\n")[1]
    ),
    changed("all lanes release the stage for their warp", "overwrite", _RELEASE_STAGE, "if (lane == 0) ", ""),
    changed("a stage expects a second producer", "deadlock", _INIT_FULL, "1", "2"),
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
        "a stage is filled before its barrier is initialised",
        "barrier not initialised",
        _INIT_FULL,
        f"{_FILL_AT_START} {_INIT_FULL}",
        plan=PREFETCH,
    ),
    Fault(
        "the last stage's empty barrier is not initialised",
        "barrier not initialised",
        _INIT_EMPTY,
        f"if (stage_idx + 1 < plan.num_stages) {_INIT_EMPTY}",
    ),
    Fault("a stage is filled before the fence", "barrier not visible", _FENCE_FULL, _INIT_FULL, plan=PREFETCH),
    Fault("empty barriers are initialised without the fence", "barrier not visible", _FENCE_EMPTY, _INIT_EMPTY),
    Fault(
        "a barrier is initialised after the cluster has met",
        "barrier not visible",
        f"{_INIT_ACTIVATION}  ptx::syncwarp();\n{_SYNC}",
        f"  ptx::syncwarp();\n{_SYNC}{_INIT_ACTIVATION}",
    ),
    Fault(
        "a barrier of a lone CTA is initialised after its warps have met",
        "barrier not visible",
        f"{_INIT_ACTIVATION}  ptx::syncwarp();\n{_SYNC}",
        f"  ptx::syncwarp();\n{_SYNC}{_INIT_ACTIVATION}",
        plan=LONE_CTA,
    ),
    Fault(
        "the activation's barrier is initialised without the fence",
        "barrier not visible",
        "mbarrier_init(activation_barrier, 1);\n    ptx::fence_mbarrier_init();",
        "mbarrier_init(activation_barrier, 1);",
    ),
    Fault("warps do not wait for the cluster", "barrier not visible", _CLUSTER_ARRIVE_AND_WAIT, ""),
    Fault(
        "a rank writes to another that may not have started",
        "absent CTA",
        _SYNC,
        _EARLY_ARRIVAL + _SYNC,
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
        f"{_CLUSTER_ARRIVE_AND_WAIT}  }} else {{\n",
        plan=LONE_CTA,
    ),
    Fault(
        "a warp leaves the cluster barrier without waiting",
        "cluster barrier",
        _SYNC,
        f"  if (warp_idx == kProducerWarp) {{\n    ptx::barrier_cluster_arrive_relaxed();\n  }} else {{\n{_SYNC}  }}\n",
    ),
    Fault(
        "producer of a lone CTA stays out of its barrier",
        "CTA barrier",
        _SYNC,
        f"  if (warp_idx != kProducerWarp) {_SYNC}",
        plan=LONE_CTA,
    ),
    changed(
        "a cluster takes a row too many",
        "out of bounds",
        "idx_in_share < share.num_longer ? 1 : 0",
        "<",
        "<=",
    ),
    changed(
        "the late share begins a row early",
        "second write",
        "share_out_evenly(early_rows, hidden_dim - early_rows,",
        "(early_rows,",
        "(early_rows - 1,",
        plan=STAGGERED,
        num_clusters=3,
    ),
    changed(
        "a cluster of the late share takes the early one's",
        "wrong bits",
        "cluster_idx < shares.late.first_cluster",
        "<",
        "<=",
        plan=STAGGERED,
        num_clusters=3,
    ),
    changed(
        "the clusters of the late share are counted from the first of all",
        "out of bounds",
        "cluster_idx - share.first_cluster;",
        " - share.first_cluster",
        "",
        plan=STAGGERED,
        num_clusters=3,
    ),
    Fault(
        "a cluster gives more rows than it has",
        "out of bounds",
        " || stagger_rows >= min_rows",
        "",
        plan=dataclasses.replace(STAGGERED, stagger_rows=63),
        num_clusters=3,
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
        _SYNC,
        f"  if (lane == 0) {{\n{_CLUSTER_ARRIVE_AND_WAIT}  }} else {{\n{_CLUSTER_ARRIVE_AND_WAIT}  }}\n",
    ),
    # Addresses
    changed("a copy takes the row below", "out of bounds", _ROW_COPY, "+ row", "+ (row + 1)"),
    Fault("a copy starts one element late", "misaligned", _WEIGHT, f"{_WEIGHT} 1 +"),
    changed("a copy of nothing", "misaligned", _FILL_AT_START, " && rows_left > 0", "", plan=WINDOW, inputs=FEW_ROWS),
    changed("the last tile has all rows", "out of bounds", _TILE_ROWS, "rows_left < kRows ? rows_left : ", ""),
    Fault("tiles are filled for ever", "out of bounds", "rows_left -= tile_rows;", ""),
    Fault(
        "every tile has the weights of the first",
        "wrong bits",
        "weight += static_cast<uint64_t>(kRows) * problem.intermediate_dim;",
        "",
    ),
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
        _CONSUMER_DEPENDENCE,
        _CONSUMER_DEPENDENCE.split("\n")[0],
        plan=PREFETCH,
    ),
    Fault(
        "activations are loaded before the wait",
        "early read",
        _CONSUMER_DEPENDENCE,
        _CONSUMER_DEPENDENCE.split("\n")[0],
        plan=ACTIVATION_IN_REGISTERS,
    ),
    Fault(
        "dependents are let in before the wait",
        "early dependents",
        _SYNC,
        f"  if (warp_idx == kEpilogueWarp) ptx::griddepcontrol_launch_dependents();\n{_SYNC}",
    ),
    Fault("epilogue reads before the wait", "early read", _EPILOGUE_DEPENDENCE, ""),
    Fault("epilogue writes before the wait", "early write", _EPILOGUE_DEPENDENCE, "", is_partial_sums=True),
    # The activation in registers
    changed(
        "the ring leaves room for an activation in registers",
        "out of bounds",
        "const Layout layout(problem.intermediate_dim, kVectors > 0);",
        "kVectors > 0",
        "false",
        plan=ACTIVATION_IN_REGISTERS,
    ),
    changed(
        "lanes take the first activations of the slice",
        "wrong bits",
        "const uint32_t vector = slice_first_vector + first_vector + lane;",
        " + first_vector",
        "",
        plan=ACTIVATION_IN_REGISTERS,
    ),
    changed(
        "all lanes take the first weights of the segment",
        "wrong bits",
        "weight_rows[row] + (first_vector + lane) * kVectorBytes;",
        " + lane",
        "",
        plan=ACTIVATION_IN_REGISTERS,
    ),
    changed(
        "only the last vector of a lane can be missing",
        "out of bounds",
        _HAS_VECTOR,
        "i + 2",
        "i + 1",
        plan=ACTIVATION_IN_REGISTERS,
        inputs=SHORT_SEGMENT,
    ),
    changed(
        "a lane has a vector of the next segment",
        "out of bounds",
        _HAS_VECTOR,
        "lane <",
        "lane <=",
        plan=ACTIVATION_IN_REGISTERS,
    ),
    changed(
        "the last vector of a segment is missing",
        "wrong bits",
        _HAS_VECTOR,
        "lane <",
        "lane + 1 <",
        plan=ACTIVATION_IN_REGISTERS,
    ),
    changed(
        "a lane's second vector is missing",
        "wrong bits",
        _HAS_VECTOR,
        "i * kNumLanes + lane",
        "2 * i * kNumLanes + lane",
        plan=ACTIVATION_IN_REGISTERS,
        inputs=SHORT_SEGMENT,
    ),
    changed(
        "weights of a later batch are loaded by all lanes",
        "out of bounds",
        _LOAD_WEIGHTS,
        "first + i",
        "i",
        plan=ONE_STAGE,
        inputs=SECOND_BATCH,
    ),
    changed(
        "a later batch has the weights of the first",
        "wrong bits",
        "(first + i) * kNumLanes * kVectorBytes",
        "first + i",
        "i",
        plan=ONE_STAGE,
        inputs=SECOND_BATCH,
    ),
    changed(
        "a later batch has the activations of the first",
        "wrong bits",
        "accumulate<DType>(weights[row][i], activations[first + i], accumulators[row]);",
        "first + i",
        "i",
        plan=ONE_STAGE,
        inputs=SECOND_BATCH,
    ),
    changed(
        "missing vectors are positive zeros",
        "wrong bits",
        "constexpr ptx::Vector kNegativeZeros = {{0x80008000u, 0x80008000u, 0x80008000u, 0x80008000u}};",
        "{{0x80008000u, 0x80008000u, 0x80008000u, 0x80008000u}}",
        "{{0, 0, 0, 0}}",
        plan=ACTIVATION_IN_REGISTERS,
        inputs=NEGATIVE_ZEROS,
    ),
    # Registers
    Fault("segment sums are added up without the barrier", "unwritten read", _BAR_SYNC, "", plan=REGISTERS),
    Fault(
        "one warp stays out of the barrier",
        "CTA barrier",
        _BAR_SYNC,
        f"  if (segment != 3) {_BAR_SYNC}",
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
        _SYNC,
        f"{_SYNC}  if (warp_idx == kProducerWarp) ptx::bar_sync();\n",
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
        "load_weights(vector);\n  ptx::griddepcontrol_wait();\n  ptx::griddepcontrol_launch_dependents();\n",
        "load_weights(vector);\n",
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
