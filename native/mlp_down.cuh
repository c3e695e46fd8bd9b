// The production kernel: out = hidden_states + attn_output + weight @ mlp_intermediate + bias for one token.
//
//     global memory                     shared memory of CTA `rank`                              shared memory of the row's owner
//     weight rows  --bulk copies-->  ring of stages --consumer warps--> segment sums --st.async--> partials --epilogue warp--> out
//                                                                     (a cluster of one: st.shared)
//
// A cluster of kClusterSize CTAs takes a balanced range of rows and walks it in tiles of rows_per_stage. Each CTA holds a slice of the
// reduction axis: kNumSegments / kClusterSize whole segments. Within a tile, row r belongs to CTA r % kClusterSize, its owner, to which
// all ranks send their segment sums. (With fewer rows in a stage than CTAs in the cluster, the last ranks own nothing.)
//
//   warp 0        producer   fills the ring: weight slices, one stage a tile; and the activation slice, once
//   warp 1        epilogue   adds up the segment sums of the rows that this CTA owns, adds bias and residuals, rounds, writes
//   warps 2 ...   consumers  each takes an item at a time: one segment of kRowsPerWarp rows of a tile
//
// Barriers, who arrives, and how many bytes they expect:
//   full_barriers[stage]      producer, 1 + the stage's bytes     -> consumers: the stage holds the tile's weights
//   empty_barriers[stage]     a consumer warp for every item      -> producer: the stage may be overwritten
//   activation_barrier        producer, 1 + the slice's bytes     -> consumers
//   partials_full[slot]       epilogue, 1 + 32 bytes a row owned  -> epilogue: all segment sums of the tile's owned rows are here
//                             (a cluster of one: a consumer warp for every item)
//   partials_empty[slot]      the epilogue of every owner         -> consumers: all owners have read the slot, each at its own CTA
//
// The specification, reference/kernel.py, has the sections that compute under the same names and in the same order: sizes, shared memory,
// consumers, where segment sums meet, epilogue. Barriers and producer are mechanism, and stand here only.
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

  MLPDOWN_DEVICE void advance(uint32_t size) {
    if (++idx == size) {
      idx = 0;
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

// Waits for a barrier at which CTAs of the cluster arrive or store: if there are others, it acquires from all of the cluster.
template <uint32_t kClusterSize>
MLPDOWN_DEVICE void wait_for_cluster(ptx::SharedAddress barrier, uint32_t parity) {
  if constexpr (kClusterSize == 1) {
    ptx::mbarrier_wait(barrier, parity);
  } else {
    ptx::mbarrier_wait_cluster(barrier, parity);
  }
}

template <class DType, uint32_t kClusterSize, uint32_t kRowsPerWarp>
MLPDOWN_KERNEL(kMaxThreads, 1) mlp_down(MLPDOWN_PARAMETER MlpDownProblem problem, MLPDOWN_PARAMETER MlpDownPlan plan) {
  // ---- Sizes ----
  constexpr uint32_t kSegmentsPerCta = kNumSegments / kClusterSize;
  constexpr uint32_t kVectorsInFlight = kRowsPerWarp == 4 ? 3 : 5;  // of each row: as many as the registers hold
  const uint32_t warp_idx = ptx::thread_idx() / kNumLanes;
  const uint32_t lane = ptx::thread_idx() % kNumLanes;
  const uint32_t cta_rank_in_cluster = ptx::cta_rank_in_cluster();

  const Segments segments(problem.intermediate_dim);
  const uint32_t first_segment = cta_rank_in_cluster * kSegmentsPerCta;
  const uint32_t slice_first_vector = segments.first_vector(first_segment);
  const uint32_t slice_num_vectors = segments.first_vector(first_segment + kSegmentsPerCta) - slice_first_vector;
  const uint32_t slice_bytes = slice_num_vectors * kVectorBytes;

  // Balanced rows: the clusters' shares differ by one row at most.
  const uint32_t cluster_idx = ptx::cluster_idx();
  const uint32_t min_rows = problem.hidden_dim / ptx::num_clusters();
  const uint32_t num_longer = problem.hidden_dim % ptx::num_clusters();
  const uint32_t first_row = cluster_idx * min_rows + (cluster_idx < num_longer ? cluster_idx : num_longer);
  const uint32_t end_row = first_row + min_rows + (cluster_idx < num_longer ? 1 : 0);
  const uint32_t items_per_tile = (plan.rows_per_stage + kRowsPerWarp - 1) / kRowsPerWarp * kSegmentsPerCta;
  const uint32_t num_owners = plan.rows_per_stage < kClusterSize ? plan.rows_per_stage : kClusterSize;
  const uint32_t num_tiles = (end_row - first_row + plan.rows_per_stage - 1) / plan.rows_per_stage;
  const auto rows_in_tile = [&](uint32_t tile) {
    const uint32_t rows_left = end_row - first_row - tile * plan.rows_per_stage;
    return rows_left < plan.rows_per_stage ? rows_left : plan.rows_per_stage;
  };

  // ---- Shared memory ----
  const SharedLayout layout(problem.intermediate_dim, kClusterSize, plan.rows_per_stage, plan.num_stages);
  const ptx::SharedAddress smem = ptx::dynamic_shared_memory();
  const auto full_barriers = [&](uint32_t stage_idx) { return smem + layout.full_barriers + stage_idx * kBarrierBytes; };
  const auto empty_barriers = [&](uint32_t stage_idx) { return smem + layout.empty_barriers + stage_idx * kBarrierBytes; };
  const auto partials_full = [&](uint32_t slot_idx) { return smem + layout.partials_full + slot_idx * kBarrierBytes; };
  const auto partials_empty = [&](uint32_t slot_idx) { return smem + layout.partials_empty + slot_idx * kBarrierBytes; };
  const ptx::SharedAddress activation_barrier = smem + layout.activation_barrier;
  const auto partials = [&](uint32_t slot_idx, uint32_t owned_row, uint32_t segment) {
    return smem + layout.partials + ((slot_idx * layout.owned_rows_per_slot + owned_row) * kNumSegments + segment) * uint32_t{sizeof(float)};
  };
  const ptx::SharedAddress smem_activation = smem + layout.activation;
  const auto smem_weight = [&](uint32_t stage_idx, uint32_t row) {
    return smem + layout.ring + stage_idx * layout.stage_bytes + row * slice_bytes;
  };

  // ---- Barriers ----
  // By one lane each of the warps that need them first: the producer can then fill its ring without waiting for anyone.
  if (warp_idx == kProducerWarp && lane == 0) {
#pragma unroll 1  // the launch waits for these instructions to be fetched: fewer are faster
    for (uint32_t stage_idx = 0; stage_idx < plan.num_stages; ++stage_idx) {
      ptx::mbarrier_init(full_barriers(stage_idx), 1);
      ptx::mbarrier_init(empty_barriers(stage_idx), items_per_tile);
    }
    ptx::mbarrier_init(activation_barrier, 1);
    ptx::fence_mbarrier_init();
  }
  if (warp_idx == kEpilogueWarp && lane == 0) {
#pragma unroll 1
    for (uint32_t slot_idx = 0; slot_idx < kNumPartialSlots; ++slot_idx) {
      ptx::mbarrier_init(partials_full(slot_idx), kClusterSize == 1 ? items_per_tile : 1);
      ptx::mbarrier_init(partials_empty(slot_idx), num_owners);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::syncwarp();
  // Who touches a barrier that another warp initialised, or another CTA's memory, first waits for all threads of the cluster.
  ptx::barrier_cluster_arrive_relaxed();

  // ---- Producer ----
  if (warp_idx == kProducerWarp) {
    const uint16_t* const weight = static_cast<const uint16_t*>(problem.weight);
    RingPosition stage;
    const auto load_tile = [&](uint32_t tile) {
      const uint32_t num_rows = rows_in_tile(tile);
      const uint64_t tile_first_row = first_row + tile * plan.rows_per_stage;
      // Expects num_rows * slice_bytes. Copies of other lanes may land before this arrival: the phase waits for the arrival.
      if (lane == 0) ptx::mbarrier_arrive_expect_tx(full_barriers(stage.idx), num_rows * slice_bytes);
      if constexpr (kClusterSize == 1) {
        // Whole rows follow each other in memory: one copy.
        if (lane == 0) {
          ptx::cp_async_bulk(smem_weight(stage.idx, 0), weight + tile_first_row * problem.intermediate_dim, num_rows * slice_bytes,
                             full_barriers(stage.idx));
        }
      } else if (lane < num_rows && slice_bytes > 0) {
        const uint16_t* const source = weight + (tile_first_row + lane) * problem.intermediate_dim + slice_first_vector * kVectorSize;
        ptx::cp_async_bulk(smem_weight(stage.idx, lane), source, slice_bytes, full_barriers(stage.idx));
      }
      stage.advance(plan.num_stages);
    };

    // The first tiles find the ring empty. Only a weight that nobody is writing may be read before the wait for earlier kernels.
    const uint32_t num_first_tiles = num_tiles < plan.num_stages ? num_tiles : plan.num_stages;
    const uint32_t num_prefetched_tiles = plan.weight_prefetch ? num_first_tiles : 0;
    for (uint32_t tile = 0; tile < num_prefetched_tiles; ++tile) load_tile(tile);
    ptx::griddepcontrol_wait();
    // From here on the next grid may line up: its CTAs start as these leave, and its launch costs no time. Not before the wait, so that no
    // more than two grids are ever under way.
    ptx::griddepcontrol_launch_dependents();
    if (lane == 0) {
      ptx::mbarrier_arrive_expect_tx(activation_barrier, slice_bytes);
      const uint16_t* const source = static_cast<const uint16_t*>(problem.mlp_intermediate) + slice_first_vector * kVectorSize;
      if (slice_bytes > 0) ptx::cp_async_bulk(smem_activation, source, slice_bytes, activation_barrier);
    }
    for (uint32_t tile = num_prefetched_tiles; tile < num_first_tiles; ++tile) load_tile(tile);

    // Before the first wait for a consumer: in a cluster of one, consumers start only when the producer has come here.
    ptx::syncwarp();
    ptx::barrier_cluster_wait();
    for (uint32_t tile = num_first_tiles; tile < num_tiles; ++tile) {
      ptx::mbarrier_wait(empty_barriers(stage.idx), stage.phase ^ 1);
      ptx::syncwarp();  // all lanes have seen this phase: a late one could otherwise find it two phases on, and wait for ever
      load_tile(tile);
    }
    return;
  }

  ptx::barrier_cluster_wait();

  // ---- Consumers ----
  if (warp_idx >= kFirstConsumerWarp) {
    ptx::mbarrier_wait(activation_barrier, 0);
    // The items of all tiles, one after the other, are dealt to the warps: those that have finished a tile go on to the next.
    uint32_t item = warp_idx - kFirstConsumerWarp;
    RingPosition stage;
    RingPosition slot;
    for (uint32_t tile = 0; tile < num_tiles; ++tile) {
      const uint32_t num_rows = rows_in_tile(tile);
      for (; item < items_per_tile; item += plan.num_consumer_warps) {
        const uint32_t segment = item % kSegmentsPerCta;
        const uint32_t item_first_row = item / kSegmentsPerCta * kRowsPerWarp;
        ptx::mbarrier_wait(full_barriers(stage.idx), stage.phase);
        const uint32_t first_vector = segments.first_vector(first_segment + segment) - slice_first_vector;
        const uint32_t end_vector = segments.first_vector(first_segment + segment + 1) - slice_first_vector;
        ptx::SharedAddress weight_rows[kRowsPerWarp];
        float accumulators[kRowsPerWarp][kVectorSize];
#pragma unroll
        for (uint32_t row = 0; row < kRowsPerWarp; ++row) {
          // Rows that the last tile lacks: the last row it has is summed again, and not handed on.
          const uint32_t tile_row = item_first_row + row < num_rows ? item_first_row + row : num_rows - 1;
          weight_rows[row] = smem_weight(stage.idx, tile_row);
#pragma unroll
          for (uint32_t j = 0; j < kVectorSize; ++j) accumulators[row][j] = 0.0f;
        }
        uint32_t vector = first_vector + lane;
        for (; vector + (kVectorsInFlight - 1) * kNumLanes < end_vector; vector += kVectorsInFlight * kNumLanes) {
          accumulate_batch<DType, kRowsPerWarp, kVectorsInFlight>(smem_activation, weight_rows, vector, accumulators);
        }
        for (; vector < end_vector; vector += kNumLanes) {
          accumulate_batch<DType, kRowsPerWarp, 1>(smem_activation, weight_rows, vector, accumulators);
        }

        // All that this item wants of the stage is in registers.
        ptx::syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(empty_barriers(stage.idx));

        float sums[kRowsPerWarp];
#pragma unroll
        for (uint32_t row = 0; row < kRowsPerWarp; ++row) sums[row] = sum_lane(accumulators[row]);
        const float segment_sum = fold_lanes<kRowsPerWarp>(sums, lane);

        // Segment sums meet at the owner of the row.
        const uint32_t tile_row = item_first_row + lane / (kNumLanes / kRowsPerWarp);
        const bool hands_on = lane % (kNumLanes / kRowsPerWarp) == 0 && tile_row < num_rows;
        // Every lane that stores or arrives, rows or no rows, and no other: the slot's next phase waits for these, others could miss it.
        if (hands_on || (kClusterSize == 1 && lane == 0)) {
          if (tile >= kNumPartialSlots) wait_for_cluster<kClusterSize>(partials_empty(slot.idx), slot.phase ^ 1);
        }
        if (hands_on) {
          const uint32_t owner = tile_row % kClusterSize;
          const ptx::SharedAddress partial = partials(slot.idx, tile_row / kClusterSize, first_segment + segment);
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
      }
      item -= items_per_tile;
      stage.advance(plan.num_stages);
      slot.advance(kNumPartialSlots);
    }
    return;
  }

  // ---- Epilogue: segments in order, bias, residuals, one rounding ----
  if (cta_rank_in_cluster >= num_owners) return;
  // Reads what earlier kernels wrote, and writes what they may still be reading.
  ptx::griddepcontrol_wait();

  // Of each tile this CTA owns the rows rank, rank + kClusterSize, ...; lanes take owned rows of as many tiles as they reach, a window,
  // so that a window's bias and residuals arrive together, ahead of its sums.
  // Each tile has a power of two of lanes: shifts, where divisions would cost more than the sums.
  const uint32_t owned_rows_per_tile = (plan.rows_per_stage + kClusterSize - 1 - cta_rank_in_cluster) / kClusterSize;
  uint32_t lanes_shift = 0;
  while ((1u << lanes_shift) < owned_rows_per_tile) ++lanes_shift;
  const uint32_t tiles_per_window = kNumLanes >> lanes_shift;
  const uint32_t window_tile = lane >> lanes_shift;
  const uint32_t owned_row = lane & ((1u << lanes_shift) - 1);
  const auto load = [](const void* tensor, uint32_t idx) { return ptx::ld_global(static_cast<const uint16_t*>(tensor) + idx); };
  RingPosition slot;
  uint32_t window_first_tile = 0;
  uint32_t window_end_tile = 0;
  uint32_t row = 0;
  uint16_t bias = 0;
  uint16_t attn_output = 0;
  uint16_t hidden_states = 0;
  for (uint32_t tile = 0; tile < num_tiles; ++tile) {
    if (tile == window_end_tile) {
      window_first_tile = tile;
      window_end_tile = tile + tiles_per_window;
      row = first_row + (tile + window_tile) * plan.rows_per_stage + owned_row * kClusterSize + cta_rank_in_cluster;
      if (owned_row < owned_rows_per_tile && row < end_row && !problem.is_partial_sums) {
        if (problem.bias) bias = load(problem.bias, row);
        if (problem.attn_output) attn_output = load(problem.attn_output, row);
        hidden_states = load(problem.hidden_states, row);
      }
    }

    const uint32_t num_owned_rows = (rows_in_tile(tile) + kClusterSize - 1 - cta_rank_in_cluster) / kClusterSize;
    if (kClusterSize > 1 && lane == 0) {
      ptx::mbarrier_arrive_expect_tx(partials_full(slot.idx), num_owned_rows * kNumSegments * uint32_t{sizeof(float)});
    }
    wait_for_cluster<kClusterSize>(partials_full(slot.idx), slot.phase);
    const bool owns_row = tile == window_first_tile + window_tile && owned_row < num_owned_rows;
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

    if (owns_row) write_row<DType>(problem, row, sums, bias, attn_output, hidden_states);
    slot.advance(kNumPartialSlots);
  }
}
