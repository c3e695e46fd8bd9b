"""Mutants that survive, by the reason for it. A test fails when one is gone, when one is caught, and when another survives."""

from __future__ import annotations

_BY_REASON = {
    # ---- Nothing changes ----
    "Where two sizes are the same, either is the smaller one.": ("comparison | smaller | a < 1 + b",),
    "Segments are 1, 2, 4 or 8.": ("comparison | cut_into_segments | (2u << log2_count) <= 1 + kMaxSegments",),
    "No slice is empty, and bytes come in multiples of 16.": (
        "condition | ActivationInSharedMemory::load | (1 || (slice_bytes > 0))",
        "comparison | ActivationInSharedMemory::load | slice_bytes + 1 > 0",
        "comparison | ActivationInSharedMemory::load | slice_bytes > 1 + 0",
    ),
    "A wait for the other phase of a barrier that has completed none ends at once.": (
        "condition | Producer::run | (1 || (fill_idx >= plan.num_stages))",
        "comparison | Producer::run | fill_idx + 1 >= plan.num_stages",
        "condition | PartialSums::store | (1 || (!is_first_pass))",
        "comparison | stream | fill_idx + 1 < kNumPartialSlots",
    ),
    "The offset is zero.": (
        "addend | Stages::full | smem + !1 * SharedLayout::kFullBarriers + stage_idx * kBarrierBytes",
    ),
    "The registers kernel does not look at what is worked out for the ring.": (
        "comparison | make_geometry | plan.rows_in_registers > 1 + 0",
    ),
    # ---- It takes longer, or more room ----
    "What could be decided at compile time is compared.": (
        "condition | ActivationInRegisters::has_vector | (!1 && (i + 2 < kVectors)) || i * kNumLanes + segment.lane < segment.num_vectors",
        "comparison | ActivationInRegisters::has_vector | i + 2 + 1 < kVectors",
    ),
    "More copies are under way than keep memory busy.": (
        "delete | Producer::run | ptx::mbarrier_wait(stages_.full(oldest_in_flight.idx), oldest_in_flight.phase);",
    ),
    "A last stage of one row is filled later.": ("comparison | Producer::start | rows_left_ > 1 + 0",),
    "The next grid starts later.": (
        "delete | stream | ptx::griddepcontrol_launch_dependents();",
        "delete | registers | ptx::griddepcontrol_launch_dependents();",
    ),
    "Earlier grids have ended when they are waited for again.": (
        "condition | Producer::start | (1 || (stage_idx == 0)) && !plan.weight_prefetch",
    ),
    "A pass of the loop for which the lane has no vector left.": ("comparison | registers | vector < 1 + end_vector",),
    "A vector more is left to the loop over single ones.": (
        "comparison | ActivationInSharedMemory::accumulate | vector + (kBatch - 1) * kNumLanes + 1 < end_vector",
        "addend | ActivationInSharedMemory::accumulate | kBatch - !1 * 1",
    ),
    "Rows are shared out otherwise, and still all of them.": (
        "condition | share_out | num_first == 0 || (!1 && (stagger_rows == 0)) || stagger_rows >= min_rows",
        "comparison | share_out | stagger_rows + 1 >= min_rows",
        "comparison | share_out | stagger_rows >= 1 + min_rows",
        "addend | share_out | min_rows - !1 * stagger_rows",
    ),
    "Lanes have registers for a vector more than there is.": (
        "addend | vectors_per_lane | segments.length + kNumLanes - !1 * 1",
    ),
    "Shared memory has room to spare.": ("addend | align_up | offset + alignment - !1 * 1",),
    # ---- The emulator does not see it ----
    "The lanes meet in the barrier. On a GPU they must have met before it.": (
        "delete | stream | ptx::syncwarp(); ... cluster.sync();",
    ),
    "Lanes that have parted stay apart longer.": ("delete | ActivationInSharedMemory::load | ptx::syncwarp();",),
    "Residuals that partial sums do not need are there all the same, and are read.": (
        "condition | Ending::load | (1 || (!problem.is_partial_sums))",
    ),
}

SURVIVORS = {key: reason for reason, keys in _BY_REASON.items() for key in keys}
