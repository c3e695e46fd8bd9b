// Clusters: CTAs that split rows between them, and the way of segment sums to the CTA that finishes a row. The only file that knows clusters.
#pragma once

#include <geometry.h>
#include <ptx.cuh>
#include <sums.cuh>

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

// This CTA's place. A cluster of one is launched without a cluster's attribute and uses none of its instructions.
template <uint32_t kClusterSize>
struct Cluster {
  static constexpr bool kSplitsRows = kClusterSize > 1;

  uint32_t idx = ptx::cta_idx() / kClusterSize;
  uint32_t cta_rank = kSplitsRows ? ptx::cta_rank_in_cluster() : 0;

  MLPDOWN_DEVICE Slice slice(const Segments& segments) const {
    if constexpr (kSplitsRows) {
      return slice_of(segments, log2_of(kClusterSize), cta_rank);
    } else {
      return {0, segments.log2_count, 0, segments.num_vectors * kVectorBytes};
    }
  }

  // All warps of the cluster wait for each other. Barriers that one of them has initialised and published are then there for all, and so is the
  // memory of every CTA.
  MLPDOWN_DEVICE static void sync() {
    if constexpr (kSplitsRows) {
      ptx::barrier_cluster_arrive_relaxed();
      ptx::barrier_cluster_wait();
    } else {
      ptx::bar_sync();
    }
  }

  // Waits for a barrier at which CTAs of the cluster arrive or store: if there are others, it acquires from all of the cluster.
  MLPDOWN_DEVICE static void wait(ptx::SharedAddress barrier, uint32_t parity) {
    if constexpr (kSplitsRows) {
      ptx::mbarrier_wait_cluster(barrier, parity);
    } else {
      ptx::mbarrier_wait(barrier, parity);
    }
  }
};

// The slots in which segment sums meet. A slot takes the sums of a stage's rows; row r of a stage belongs to CTA r % kClusterSize, its owner, to
// which all ranks send their segment sums. (With fewer rows in a stage than CTAs in the cluster, the last ranks own nothing.)
//
//   full[slot]    epilogue, 1 + 4 bytes for each segment of the rows owned  -> epilogue: all segment sums of these rows are here
//                 (a cluster of one: a consumer warp for every segment)
//   empty[slot]   the epilogue of every owner, at every rank's barrier       -> consumers of that rank: all owners have read the slot
template <uint32_t kClusterSize, uint32_t kRows>
class PartialSums {
  using Cluster = ::Cluster<kClusterSize>;

 public:
  static constexpr uint32_t kNumOwners = kRows < kClusterSize ? kRows : kClusterSize;
  static constexpr uint32_t kOwnedRows = kRows / kNumOwners;  // of a stage, by an owner

  MLPDOWN_DEVICE explicit PartialSums(ptx::SharedAddress smem) : smem_(smem) {}

  // One lane of the epilogue warp.
  MLPDOWN_DEVICE void init(uint32_t segments_per_cta) const {
#pragma unroll 1
    for (uint32_t slot_idx = 0; slot_idx < kNumPartialSlots; ++slot_idx) {
      ptx::mbarrier_init(full(slot_idx), Cluster::kSplitsRows ? 1 : segments_per_cta);
      ptx::mbarrier_init(empty(slot_idx), kNumOwners);
    }
    ptx::fence_mbarrier_init();
  }

  // A consumer warp stores the segment sums that fold_lanes left in its lanes, for the first num_rows of the stage. The slot must have been
  // released before if it is not its first pass.
  MLPDOWN_DEVICE void store(const RingPosition& slot, bool is_first_pass, uint32_t num_rows, uint32_t segment, uint32_t lane, float segment_sum) const {
    const uint32_t row = lane / (kNumLanes / kRows);
    // Every lane that stores waits, and no other. The slot's next phase cannot complete without the stores of these lanes, so that they never
    // miss a phase. A lane that does not store could sleep through two, and a parity that has flipped twice looks like one that has not.
    if (lane % (kNumLanes / kRows) == 0 && row < num_rows) {
      if (!is_first_pass) Cluster::wait(empty(slot.idx), slot.phase ^ 1);
      const ptx::SharedAddress address = segment_sums(slot.idx, row / kClusterSize) + segment * uint32_t{sizeof(float)};
      if constexpr (Cluster::kSplitsRows) {
        const uint32_t owner = row % kClusterSize;
        ptx::st_async(ptx::mapa(address, owner), segment_sum, ptx::mapa(full(slot.idx), owner));  // 4 bytes
      } else {
        ptx::st_shared(address, segment_sum);
      }
    }
    if constexpr (!Cluster::kSplitsRows) {
      ptx::syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(full(slot.idx));
    }
  }

  // The epilogue waits for all sums of the rows that this CTA owns of a stage of num_rows.
  MLPDOWN_DEVICE void wait(const RingPosition& slot, uint32_t cta_rank, uint32_t num_rows, uint32_t num_segments, uint32_t lane) const {
    if (Cluster::kSplitsRows && lane == 0) {
      const uint32_t num_owned_rows = (num_rows + kClusterSize - 1 - cta_rank) / kClusterSize;
      ptx::mbarrier_arrive_expect_tx(full(slot.idx), num_owned_rows * num_segments * uint32_t{sizeof(float)});
    }
    Cluster::wait(full(slot.idx), slot.phase);
  }

  // Where the segment sums of an owned row are.
  MLPDOWN_DEVICE ptx::SharedAddress segment_sums(uint32_t slot_idx, uint32_t owned_row) const {
    return smem_ + SharedLayout::kPartials + (slot_idx * kOwnedRows + owned_row) * kSegmentSumsBytes;
  }

  // The epilogue warp has read the slot, and gives it back to every rank.
  MLPDOWN_DEVICE void release(const RingPosition& slot, uint32_t lane) const {
    if (lane >= kClusterSize) return;
    if constexpr (Cluster::kSplitsRows) {
      ptx::mbarrier_arrive_cluster(ptx::mapa(empty(slot.idx), lane));
    } else {
      ptx::mbarrier_arrive(empty(slot.idx));
    }
  }

 private:
  MLPDOWN_DEVICE ptx::SharedAddress full(uint32_t slot_idx) const { return smem_ + SharedLayout::kPartialsFull + slot_idx * kBarrierBytes; }
  MLPDOWN_DEVICE ptx::SharedAddress empty(uint32_t slot_idx) const { return smem_ + SharedLayout::kPartialsEmpty + slot_idx * kBarrierBytes; }

  ptx::SharedAddress smem_;
};
