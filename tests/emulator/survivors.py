"""Mutants that survive, by the reason for it. A test fails when one is gone, when one is caught, and when another survives."""

# ruff: noqa: E501
from __future__ import annotations

_BY_REASON = {
    # ---- Nothing changes ----
    "Of two sizes the smaller: where they are the same, either will do.": (
        "comparison | Segments::first_vector | first < 1 + num_vectors",
        "comparison | mlp_down | idx_in_share < 1 + share.num_longer ... ? idx_in_share : share.num_longer);",
        "comparison | mlp_down::rows_in_tile | rows_left < 1 + kRows",
        "comparison | mlp_down::fill_stage | rows_left < 1 + kRows",
        "comparison | SharedLayout::SharedLayout | slice_vectors < 1 + num_vectors",
    ),
    "The last row of the tile or the matrix stands on both sides of the colon.": (
        "comparison | mlp_down | row + 1 < tile_rows ... ? row : tile_rows - 1);",
        "comparison | mlp_down_registers | first_row + row + 1 < problem.hidden_dim",
    ),
    "Bytes come in multiples of 16.": (
        "comparison | mlp_down::fill_stage | slice_bytes > 1 + 0",
        "comparison | mlp_down | slice_bytes > 1 + 0",
    ),
    "A wait for the other phase of a barrier that has completed none ends at once.": (
        "condition | mlp_down | (1 || (tile >= plan.num_stages))",
        "comparison | mlp_down | tile + 1 >= plan.num_stages",
        "condition | mlp_down | (1 || (tile >= kNumPartialSlots))",
        "comparison | mlp_down | tile + 1 >= kNumPartialSlots",
    ),
    "The offset is zero.": (
        "addend | mlp_down::full_barriers | smem + !1 * Layout::kFullBarriers + stage_idx * kBarrierBytes",
    ),
    "The size of an array, computed at compile time.": (
        "comparison | mlp_down | kVectors + 1 > 0 ... ? kVectors : 1][kVectorSize];",
        "comparison | mlp_down | kVectors > 1 + 0 ... ? kVectors : 1][kVectorSize];",
    ),
    "A barrier is initialised that nobody uses.": (
        "condition | mlp_down | (1 || (kVectors == 0)) && warp_idx == kFirstConsumerWarp && lane == 0",
    ),
    "A permutation of the warps over the segments, which all take the same time.": (
        "addend | mlp_down | warp_idx - !1 * kFirstConsumerWarp ... ) % kSegmentsPerCta;",
    ),
    # ---- It takes longer, or more room ----
    "What could be decided at compile time is compared.": (
        "condition | has_vector | (!1 && (i + 2 < kVectors)) || i * kNumLanes + lane < num_vectors",
        "comparison | has_vector | i + 2 + 1 < kVectors",
    ),
    "More copies are under way than keep memory busy.": (
        "delete | mlp_down | ptx::mbarrier_wait(full_barriers(landing.idx), landing.phase);",
    ),
    "The last tile is filled later, if it has one row.": (
        "comparison | mlp_down | rows_left > 1 + 0 ... ) fill_stage();",
    ),
    "The next grid starts later.": (
        "delete | mlp_down | ptx::griddepcontrol_launch_dependents();",
        "delete | mlp_down_registers | ptx::griddepcontrol_launch_dependents();",
    ),
    "Earlier grids have ended when they are waited for again.": (
        "condition | mlp_down | (1 || (stage_idx == 0)) && !plan.weight_prefetch",
    ),
    "Weights are loaded twice.": ("condition | mlp_down_registers | (1 || (!plan.weight_prefetch))",),
    "A step for which no vector is left.": ("comparison | mlp_down_registers | vector < 1 + end_vector",),
    "A vector more is left to the loop over single ones.": (
        "comparison | mlp_down | vector + (kVectorsInFlight - 1) * kNumLanes + 1 < end_vector",
        "addend | mlp_down | kVectorsInFlight - !1 * 1",
    ),
    "Rows are shared out otherwise, and still all of them.": (
        "condition | share_out | num_early == 0 || (!1 && (stagger_rows == 0)) || stagger_rows >= min_rows",
        "comparison | share_out | stagger_rows + 1 >= min_rows",
        "comparison | share_out | stagger_rows >= 1 + min_rows",
        "addend | share_out | min_rows - !1 * stagger_rows",
    ),
    "Lanes have registers for a vector more than there is.": (
        "addend | vectors_per_lane | intermediate_dim / kVectorSize + kNumSegments - !1 * 1",
        "addend | vectors_per_lane | segment + kNumLanes - !1 * 1",
    ),
    "Shared memory has room to spare.": (
        "comparison | SharedLayout::SharedLayout | slice_vectors + 1 < num_vectors",
        "addend | align_up | offset + alignment - !1 * 1",
        "addend | SharedLayout::SharedLayout | num_vectors + kNumSegments - !1 * 1",
    ),
    # ---- The emulator does not see it ----
    "The lanes meet in the barrier. On a GPU they must have met before it.": (
        "delete | mlp_down | ptx::syncwarp(); ... sync_cluster<kClusterSize>();",
    ),
    "Lanes that part meet later. It takes longer.": (
        "delete | mlp_down | ptx::syncwarp(); ... } const uint32_t segment = first_segment + (warp_idx - kFirstConsumerWarp) % kSegmentsPerCta;",
    ),
    "Residuals that partial sums do not need are there all the same, and are read.": (
        "condition | mlp_down | row < num_rows && (1 || (!problem.is_partial_sums))",
        "condition | mlp_down_registers | owns_row && (1 || (!problem.is_partial_sums))",
    ),
}

SURVIVORS = {key: reason for reason, keys in _BY_REASON.items() for key in keys}
