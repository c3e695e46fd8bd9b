// The production kernel: out = hidden_states + attn_output + weight @ mlp_intermediate + bias for one token.
//
//     global memory                     shared memory of CTA `rank`                              shared memory of the row's owner
//     weight rows  --bulk copies-->  ring of stages --consumer warps--> segment sums --st.async--> partials --epilogue warp--> out
//                                                                     (a cluster of one: st.shared)
//
// A cluster of kClusterSize CTAs takes a range of rows (shares.h) and walks it in tiles of kRows. Each CTA holds a slice of the reduction
// axis: kNumSegments / kClusterSize whole segments. Within a tile, row r belongs to CTA r % kClusterSize, its owner, to which all ranks
// send their segment sums. (With fewer rows in a tile than CTAs in the cluster, the last ranks own nothing.)
//
//   warp 0        producer   fills the ring: weight slices, one stage a tile, stages_in_flight of them under way at a time
//   warp 1        epilogue   adds up the segment sums of the rows that this CTA owns, adds bias and residuals, rounds, writes
//   warps 2 ...   consumers  in groups of a warp for each segment of the slice; group g sums up the tiles g, g + num_groups, ...
//
// The activation is the same for all rows. With kVectors > 0 (clusters of one, rows up to 16384 long, or 8192 with two a stage) lanes keep
// their own vectors of it in registers, converted once: with one row a stage that halves both what is read from shared memory and what is
// converted, and it leaves the room to the ring. With kVectors 0, the first consumer warp brings the slice into shared memory.
//
// Barriers, who arrives, and how many bytes they expect:
//   full_barriers[stage]      producer, 1 + the stage's bytes     -> consumers: the stage holds the tile's weights
//                                                                -> producer: one stage fewer is in flight
//   empty_barriers[stage]     a consumer warp for every segment   -> producer: the stage may be overwritten
//   activation_barrier        first consumer, 1 + slice's bytes   -> consumers (kVectors 0 only)
//   partials_full[slot]       epilogue, 1 + 32 bytes a row owned  -> epilogue: all segment sums of the tile's owned rows are here
//                             (a cluster of one: a consumer warp for every segment)
//   partials_empty[slot]      the epilogue of every owner, at     -> consumers of that rank: all owners have read the slot
//                             every rank's barrier
//
// Dependent launch: the kernel may start while earlier ones are still running. Whoever reads what these wrote, or writes what they may be
// reading, waits for them first: the producer (unless the weight may be prefetched), the consumers for the activation, the epilogue for
// everything else. The epilogue then lets the next kernel in.
//
// The specification, reference/kernel.py, has the sections that compute under the same names and in the same order: sizes, shared memory,
// consumers, where segment sums meet, epilogue. Stages, barriers and producer are mechanism, and stand here only.
#pragma once

#include <arithmetic.cuh>
#include <epilogue.cuh>
#include <problem.h>
#include <ptx.cuh>
#include <shared_layout.h>

constexpr uint32_t kProducerWarp = 0;
constexpr uint32_t kEpilogueWarp = 1;
constexpr uint32_t kFirstConsumerWarp = 2;
constexpr uint32_t kMaxConsumerWarps = 16;
constexpr uint32_t kMaxThreads = (kFirstConsumerWarp + kMaxConsumerWarps) * kNumLanes;

// A position in a ring of slots or stages, and the parity of the pass over it.
struct RingPosition {
  uint32_t idx = 0;
  uint32_t phase = 0;

  // distance divides size, so that a walk meets every distance-th position.
  MLPDOWN_DEVICE void advance(uint32_t distance, uint32_t size) {
    idx += distance;
    if (idx >= size) {
      idx -= size;
      phase ^= 1;
    }
  }
};

// Steps 3 and 4 for kBatch vectors of a lane, `vector` and every 32nd after it, of kRows rows. All loads come first: with few warps on an
// SM, a warp has to hide the latency of shared memory by itself.
template <class DType, uint32_t kRows, uint32_t kBatch>
MLPDOWN_DEVICE void accumulate_batch(ptx::SharedAddress smem_activation, const ptx::SharedAddress (&weight_rows)[kRows], uint32_t vector,
                                     float (&accumulators)[kRows][kVectorSize]) {
  ptx::Vector activations[kBatch];
  ptx::Vector weights[kRows][kBatch];
#pragma unroll
  for (uint32_t i = 0; i < kBatch; ++i) {
    const uint32_t offset = (vector + i * kNumLanes) * kVectorBytes;
    activations[i] = ptx::ld_shared(smem_activation + offset);
#pragma unroll
    for (uint32_t row = 0; row < kRows; ++row) weights[row][i] = ptx::ld_shared(weight_rows[row] + offset);
  }
#pragma unroll
  for (uint32_t i = 0; i < kBatch; ++i) {
    float activation[kVectorSize];
    unpack<DType>(activations[i], activation);
#pragma unroll
    for (uint32_t row = 0; row < kRows; ++row) accumulate<DType>(weights[row][i], activation, accumulators[row]);
  }
}

// Whether a lane has an i-th vector of its segment of num_vectors: the lane's are every 32nd. Segments of a row differ by fewer than 8 vectors
// in length, so only the last two of kVectors can be missing, and only there is a comparison left.
template <uint32_t kVectors>
MLPDOWN_DEVICE bool has_vector(uint32_t i, uint32_t lane, uint32_t num_vectors) {
  return i + 2 < kVectors || i * kNumLanes + lane < num_vectors;
}

// Step 3, once for all rows: a lane's activations of its segment, `source` being at its first vector. What is missing is -0: its product
// with a weight of 0 can be added to any sum, -0 too, and changes none. That costs less than lanes that part.
template <class DType, uint32_t kVectors>
MLPDOWN_DEVICE void load_activations(const uint16_t* source, uint32_t lane, uint32_t num_vectors, float (&activations)[kVectors][kVectorSize]) {
  constexpr ptx::Vector kNegativeZeros = {{0x80008000u, 0x80008000u, 0x80008000u, 0x80008000u}};
  constexpr uint32_t kBatch = kVectors < 8 ? kVectors : 4;  // as many as the registers hold beside the result
#pragma unroll
  for (uint32_t first = 0; first < kVectors; first += kBatch) {
    ptx::Vector vectors[kBatch];
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      vectors[i] = kNegativeZeros;
      if (has_vector<kVectors>(first + i, lane, num_vectors)) vectors[i] = ptx::ld_global_vector(source + (first + i) * kNumLanes * kVectorSize);
    }
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) unpack<DType>(vectors[i], activations[first + i]);
  }
}

// Step 4 for a lane's whole segment of kRows rows, each at its first vector in weight_rows, with activations of load_activations.
template <class DType, uint32_t kRows, uint32_t kVectors>
MLPDOWN_DEVICE void accumulate_segment(const float (&activations)[kVectors][kVectorSize], const ptx::SharedAddress (&weight_rows)[kRows],
                                       uint32_t lane, uint32_t num_vectors, float (&accumulators)[kRows][kVectorSize]) {
  constexpr uint32_t kBatch = kRows == 1 ? 5 : 3;  // of each row: as many as the registers hold
#pragma unroll
  for (uint32_t first = 0; first < kVectors; first += kBatch) {
    ptx::Vector weights[kRows][kBatch] = {};
#pragma unroll
    for (uint32_t i = 0; i < kBatch && first + i < kVectors; ++i) {
      if (!has_vector<kVectors>(first + i, lane, num_vectors)) continue;
#pragma unroll
      for (uint32_t row = 0; row < kRows; ++row) weights[row][i] = ptx::ld_shared(weight_rows[row] + (first + i) * kNumLanes * kVectorBytes);
    }
#pragma unroll
    for (uint32_t i = 0; i < kBatch && first + i < kVectors; ++i) {
#pragma unroll
      for (uint32_t row = 0; row < kRows; ++row) accumulate<DType>(weights[row][i], activations[first + i], accumulators[row]);
    }
  }
}

// Waits for a barrier at which CTAs of the cluster arrive or store: if there are others, it acquires from all of the cluster.
template <uint32_t kClusterSize>
MLPDOWN_DEVICE void wait_for_cluster(ptx::SharedAddress barrier, uint32_t parity) {
  if constexpr (kClusterSize == 1) {
    ptx::mbarrier_wait(barrier, parity);
  } else {
    ptx::mbarrier_wait_cluster(barrier, parity);
  }
}

// All warps of the cluster wait for each other: barriers that one of them has initialised, and published, are then there for all, and so is
// the memory of every CTA.
template <uint32_t kClusterSize>
MLPDOWN_DEVICE void sync_cluster() {
  if constexpr (kClusterSize == 1) {
    ptx::bar_sync();
  } else {
    ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
  }
}

template <class DType, uint32_t kClusterSize, uint32_t kRows, uint32_t kVectors>
MLPDOWN_KERNEL(kMaxThreads, 1)
mlp_down(MLPDOWN_PARAMETER MlpDownProblem problem, MLPDOWN_PARAMETER MlpDownPlan plan, MLPDOWN_PARAMETER MlpDownShares shares) {
#if MLPDOWN_SM_90_OR_NEWER
  // ---- Sizes ----
  // Until the first copies are under way, memory idles: what can be known at compile time or worked out by the launcher is.
  constexpr uint32_t kSegmentsPerCta = kNumSegments / kClusterSize;
  constexpr uint32_t kVectorsInFlight = kRows == 4 ? 3 : 5;  // of each row: as many as the registers hold
  constexpr uint32_t kNumOwners = kRows < kClusterSize ? kRows : kClusterSize;
  constexpr uint32_t kOwnedRows = kRows / kNumOwners;  // of a tile, by an owner
  const uint32_t warp_idx = ptx::thread_idx() / kNumLanes;
  const uint32_t lane = ptx::thread_idx() % kNumLanes;
  const uint32_t cta_rank_in_cluster = kClusterSize == 1 ? 0 : ptx::cta_rank_in_cluster();

  const Segments segments(problem.intermediate_dim);
  const uint32_t first_segment = cta_rank_in_cluster * kSegmentsPerCta;
  const uint32_t slice_first_vector = segments.first_vector(first_segment);
  const uint32_t slice_num_vectors = segments.first_vector(first_segment + kSegmentsPerCta) - slice_first_vector;
  const uint32_t slice_bytes = slice_num_vectors * kVectorBytes;

  const uint32_t cluster_idx = ptx::cta_idx() / kClusterSize;
  const MlpDownShare share = cluster_idx < shares.late.first_cluster ? shares.early : shares.late;
  const uint32_t idx_in_share = cluster_idx - share.first_cluster;
  const uint32_t first_row = share.first_row + idx_in_share * share.min_rows + (idx_in_share < share.num_longer ? idx_in_share : share.num_longer);
  const uint32_t num_rows = share.min_rows + (idx_in_share < share.num_longer ? 1 : 0);
  const uint32_t num_tiles = (num_rows + kRows - 1) / kRows;
  const auto rows_in_tile = [&](uint32_t tile) {
    const uint32_t rows_left = num_rows - tile * kRows;
    return rows_left < kRows ? rows_left : kRows;
  };

  // ---- Shared memory ----
  using Layout = SharedLayout<kClusterSize, kRows>;
  const Layout layout(problem.intermediate_dim, kVectors > 0);
  const ptx::SharedAddress smem = ptx::dynamic_shared_memory();
  const auto full_barriers = [&](uint32_t stage_idx) { return smem + Layout::kFullBarriers + stage_idx * kBarrierBytes; };
  const auto empty_barriers = [&](uint32_t stage_idx) { return smem + Layout::kEmptyBarriers + stage_idx * kBarrierBytes; };
  const auto partials_full = [&](uint32_t slot_idx) { return smem + Layout::kPartialsFull + slot_idx * kBarrierBytes; };
  const auto partials_empty = [&](uint32_t slot_idx) { return smem + Layout::kPartialsEmpty + slot_idx * kBarrierBytes; };
  const ptx::SharedAddress activation_barrier = smem + Layout::kActivationBarrier;
  const auto partials = [&](uint32_t slot_idx, uint32_t owned_row, uint32_t segment) {
    return smem + Layout::kPartials + ((slot_idx * kOwnedRows + owned_row) * kNumSegments + segment) * uint32_t{sizeof(float)};
  };
  const ptx::SharedAddress smem_activation = smem + Layout::kActivation;
  const auto smem_weight = [&](uint32_t stage_idx, uint32_t row) {
    return smem + layout.ring + stage_idx * layout.stage_bytes + row * slice_bytes;
  };

  // ---- Stages ----
  // The producer's next one, and what is left to be copied.
  RingPosition next_stage;
  uint32_t rows_left = num_rows;
  const uint16_t* weight =
      static_cast<const uint16_t*>(problem.weight) + static_cast<uint64_t>(first_row) * problem.intermediate_dim + slice_first_vector * kVectorSize;
  const auto fill_stage = [&] {
    const uint32_t tile_rows = rows_left < kRows ? rows_left : kRows;
    const ptx::SharedAddress barrier = full_barriers(next_stage.idx);
    ptx::mbarrier_arrive_expect_tx(barrier, tile_rows * slice_bytes);
    if constexpr (kClusterSize == 1) {
      // Whole rows follow each other in memory: one copy.
      ptx::cp_async_bulk_evict_first(smem_weight(next_stage.idx, 0), weight, tile_rows * slice_bytes, barrier);
    } else if (slice_bytes > 0) {
      for (uint32_t row = 0; row < tile_rows; ++row) {
        ptx::cp_async_bulk_evict_first(smem_weight(next_stage.idx, row), weight + row * problem.intermediate_dim, slice_bytes, barrier);
      }
    }
    weight += static_cast<uint64_t>(kRows) * problem.intermediate_dim;
    rows_left -= tile_rows;
    next_stage.advance(1, plan.num_stages);
  };

  // ---- Barriers, and the first copies ----
  // Each is initialised by a warp that uses it. Memory idles until the first copy: a stage is filled as soon as its own barrier stands, and
  // the rest is set up behind the copies. No other warp waits for earlier kernels before all have met: that would hold back a producer that
  // may prefetch.
  if (warp_idx == kProducerWarp && lane == 0) {
#pragma unroll 1
    for (uint32_t stage_idx = 0; stage_idx < plan.num_stages; ++stage_idx) {
      ptx::mbarrier_init(full_barriers(stage_idx), 1);
      ptx::fence_mbarrier_init();
      // Only a weight that nobody is writing may be read before the wait for earlier kernels.
      if (stage_idx == 0 && !plan.weight_prefetch) ptx::griddepcontrol_wait();
      if (stage_idx < plan.stages_in_flight && rows_left > 0) fill_stage();
    }
#pragma unroll 1
    for (uint32_t stage_idx = 0; stage_idx < plan.num_stages; ++stage_idx) ptx::mbarrier_init(empty_barriers(stage_idx), kSegmentsPerCta);
    ptx::fence_mbarrier_init();
  }
  if (warp_idx == kEpilogueWarp && lane == 0) {
#pragma unroll 1
    for (uint32_t slot_idx = 0; slot_idx < kNumPartialSlots; ++slot_idx) {
      ptx::mbarrier_init(partials_full(slot_idx), kClusterSize == 1 ? kSegmentsPerCta : 1);
      ptx::mbarrier_init(partials_empty(slot_idx), kNumOwners);
    }
    ptx::fence_mbarrier_init();
  }
  if (kVectors == 0 && warp_idx == kFirstConsumerWarp && lane == 0) {
    ptx::mbarrier_init(activation_barrier, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::syncwarp();
  sync_cluster<kClusterSize>();

  // ---- Producer: one lane ----
  if (warp_idx == kProducerWarp) {
    if (lane == 0) {
      RingPosition landing;  // the stage whose copies are the oldest under way
      for (uint32_t tile = plan.stages_in_flight; rows_left > 0; ++tile) {
        // All that an SM has asked for waits in one queue, the activation too: more than keeps memory busy only makes it longer.
        ptx::mbarrier_wait(full_barriers(landing.idx), landing.phase);
        landing.advance(1, plan.num_stages);
        if (tile >= plan.num_stages) ptx::mbarrier_wait(empty_barriers(next_stage.idx), next_stage.phase ^ 1);
        fill_stage();
      }
    }
    return;
  }

  // ---- Consumers ----
  if (warp_idx >= kFirstConsumerWarp) {
    ptx::griddepcontrol_wait();
    if (kVectors == 0 && warp_idx == kFirstConsumerWarp) {
      if (lane == 0) {
        ptx::mbarrier_arrive_expect_tx(activation_barrier, slice_bytes);
        const uint16_t* const source = static_cast<const uint16_t*>(problem.mlp_intermediate) + slice_first_vector * kVectorSize;
        if (slice_bytes > 0) ptx::cp_async_bulk(smem_activation, source, slice_bytes, activation_barrier);
      }
      ptx::syncwarp();
    }
    const uint32_t segment = first_segment + (warp_idx - kFirstConsumerWarp) % kSegmentsPerCta;
    const uint32_t group = (warp_idx - kFirstConsumerWarp) / kSegmentsPerCta;
    const uint32_t num_groups = plan.num_consumer_warps / kSegmentsPerCta;
    const uint32_t first_vector = segments.first_vector(segment) - slice_first_vector;
    const uint32_t end_vector = segments.first_vector(segment + 1) - slice_first_vector;
    float activations[kVectors > 0 ? kVectors : 1][kVectorSize];
    if constexpr (kVectors > 0) {
      const uint32_t vector = slice_first_vector + first_vector + lane;
      load_activations<DType, kVectors>(static_cast<const uint16_t*>(problem.mlp_intermediate) + vector * kVectorSize, lane,
                                        end_vector - first_vector, activations);
    } else {
      ptx::mbarrier_wait(activation_barrier, 0);
    }
    RingPosition stage{group};
    RingPosition slot{group};
    for (uint32_t tile = group; tile < num_tiles; tile += num_groups) {
      const uint32_t tile_rows = rows_in_tile(tile);
      ptx::mbarrier_wait(full_barriers(stage.idx), stage.phase);
      ptx::SharedAddress weight_rows[kRows];
      float accumulators[kRows][kVectorSize];
#pragma unroll
      for (uint32_t row = 0; row < kRows; ++row) {
        // Rows that the last tile lacks: its last row is summed again, and not handed on.
        weight_rows[row] = smem_weight(stage.idx, row < tile_rows ? row : tile_rows - 1);
#pragma unroll
        for (uint32_t j = 0; j < kVectorSize; ++j) accumulators[row][j] = 0.0f;
      }
      if constexpr (kVectors > 0) {
        ptx::SharedAddress lane_rows[kRows];
#pragma unroll
        for (uint32_t row = 0; row < kRows; ++row) lane_rows[row] = weight_rows[row] + (first_vector + lane) * kVectorBytes;
        accumulate_segment<DType, kRows, kVectors>(activations, lane_rows, lane, end_vector - first_vector, accumulators);
      } else {
        uint32_t vector = first_vector + lane;
        for (; vector + (kVectorsInFlight - 1) * kNumLanes < end_vector; vector += kVectorsInFlight * kNumLanes) {
          accumulate_batch<DType, kRows, kVectorsInFlight>(smem_activation, weight_rows, vector, accumulators);
        }
        for (; vector < end_vector; vector += kNumLanes) {
          accumulate_batch<DType, kRows, 1>(smem_activation, weight_rows, vector, accumulators);
        }
      }

      // All that this warp wants of the stage is in registers.
      ptx::syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(empty_barriers(stage.idx));

      float sums[kRows];
#pragma unroll
      for (uint32_t row = 0; row < kRows; ++row) sums[row] = sum_lane(accumulators[row]);
      const float segment_sum = fold_lanes<kRows>(sums, lane);

      // ---- Segment sums meet, at the owner of the row ----
      const uint32_t row = lane / (kNumLanes / kRows);
      const bool hands_on = lane % (kNumLanes / kRows) == 0 && row < tile_rows;
      // Every lane that stores or arrives waits, and no other: the slot's next phase waits for these. For another lane it would not, and a
      // parity that has changed twice looks like one that has not changed.
      if (hands_on) {
        if (tile >= kNumPartialSlots) wait_for_cluster<kClusterSize>(partials_empty(slot.idx), slot.phase ^ 1);
        const uint32_t owner = row % kClusterSize;
        const ptx::SharedAddress partial = partials(slot.idx, row / kClusterSize, segment);
        if constexpr (kClusterSize == 1) {
          ptx::st_shared(partial, segment_sum);
        } else {
          ptx::st_async(ptx::mapa(partial, owner), segment_sum, ptx::mapa(partials_full(slot.idx), owner));  // 4 bytes
        }
      }
      if constexpr (kClusterSize == 1) {
        ptx::syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(partials_full(slot.idx));
      }
      stage.advance(num_groups, plan.num_stages);
      slot.advance(num_groups, kNumPartialSlots);
    }
    return;
  }

  // ---- Epilogue: segments in order, bias, residuals, one rounding ----
  // This warp reads what earlier kernels wrote, and writes what they may still be reading. Once they have ended, the next grid may line up: its
  // CTAs start as these leave, and its launch costs no time. Not sooner, so that no more than two grids are ever under way.
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (cta_rank_in_cluster >= kNumOwners) return;

  // Of each tile this CTA owns the rows rank, rank + kClusterSize, ...; lanes take owned rows of as many tiles as they reach, a window,
  // so that a window's bias and residuals arrive together, ahead of its sums.
  constexpr uint32_t kTilesPerWindow = kNumLanes / kOwnedRows;
  const uint32_t window_tile = lane / kOwnedRows;
  const uint32_t owned_row = lane % kOwnedRows;
  const auto load = [](const void* tensor, uint32_t idx) { return ptx::ld_global(static_cast<const uint16_t*>(tensor) + idx); };
  RingPosition slot;
  uint32_t row = 0;
  uint16_t bias = 0;
  uint16_t attn_output = 0;
  uint16_t hidden_states = 0;
  for (uint32_t tile = 0; tile < num_tiles; ++tile) {
    if (tile % kTilesPerWindow == 0) {
      row = (tile + window_tile) * kRows + owned_row * kClusterSize + cta_rank_in_cluster;
      if (row < num_rows && !problem.is_partial_sums) {
        if (problem.bias) bias = load(problem.bias, first_row + row);
        if (problem.attn_output) attn_output = load(problem.attn_output, first_row + row);
        hidden_states = load(problem.hidden_states, first_row + row);
      }
    }

    const uint32_t num_owned_rows = (rows_in_tile(tile) + kClusterSize - 1 - cta_rank_in_cluster) / kClusterSize;
    if (kClusterSize > 1 && lane == 0) {
      ptx::mbarrier_arrive_expect_tx(partials_full(slot.idx), num_owned_rows * kNumSegments * uint32_t{sizeof(float)});
    }
    wait_for_cluster<kClusterSize>(partials_full(slot.idx), slot.phase);
    const bool owns_row = window_tile == tile % kTilesPerWindow && row < num_rows;
    SegmentSums sums = {};
    if (owns_row) sums = load_segment_sums(partials(slot.idx, owned_row, 0));
    // The slot is free for the tile kNumPartialSlots later, at every rank. Without such a tile nobody waits, and the rank may be gone.
    ptx::syncwarp();
    if (tile + kNumPartialSlots < num_tiles && lane < kClusterSize) {
      if constexpr (kClusterSize == 1) {
        ptx::mbarrier_arrive(partials_empty(slot.idx));
      } else {
        ptx::mbarrier_arrive_cluster(ptx::mapa(partials_empty(slot.idx), lane));
      }
    }

    if (owns_row) write_row<DType>(problem, first_row + row, sums, bias, attn_output, hidden_states);
    slot.advance(1, kNumPartialSlots);
  }
#endif
}
