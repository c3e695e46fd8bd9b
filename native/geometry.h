// How a launch is cut up: rows over clusters, a row over the CTAs of a cluster, and a CTA's shared memory. The host works out what it can, so
// that no thread has to: until the first copy is issued, memory idles.
#pragma once

#include <order.h>
#include <plan.h>

constexpr unsigned int kElementBytes = 2;  // float16 and bfloat16
constexpr unsigned int kVectorBytes = kVectorSize * kElementBytes;

// ---- Rows over clusters ---------------------------------------------------------------------------------------------------------------

struct RowRange {
  unsigned int first;
  unsigned int count;
};

// A share of the rows, from first_row on, for the clusters from first_cluster on. Each takes min_rows, and the first num_larger one more.
struct Share {
  unsigned int first_cluster;
  unsigned int first_row;
  unsigned int min_rows;
  unsigned int num_larger;

  MLPDOWN_HOST_DEVICE RowRange rows_of(unsigned int cluster_idx) const {
    const unsigned int idx = cluster_idx - first_cluster;
    return {first_row + idx * min_rows + smaller(idx, num_larger), min_rows + (idx < num_larger ? 1 : 0)};
  }
};

inline Share share_evenly(unsigned int first_row, unsigned int num_rows, unsigned int first_cluster, unsigned int num_clusters) {
  return {first_cluster, first_row, num_rows / num_clusters, num_rows % num_clusters};
}

// The device starts the clusters of the first half sooner.
struct Shares {
  Share first_half;
  Share second_half;

  MLPDOWN_HOST_DEVICE RowRange rows_of(unsigned int cluster_idx) const {
    return (cluster_idx < second_half.first_cluster ? first_half : second_half).rows_of(cluster_idx);
  }
};

// Even shares. With stagger_rows, each cluster of the first half takes so many rows fewer than an even share rounded down, and the second half
// shares the rest. If that would leave the first half without rows, or there is no second half, there is no stagger.
inline Shares share_out(unsigned int num_rows, unsigned int num_clusters, unsigned int stagger_rows) {
  const unsigned int num_first = num_clusters / 2;
  const unsigned int min_rows = num_rows / num_clusters;
  if (num_first == 0 || stagger_rows == 0 || stagger_rows >= min_rows) {
    return {share_evenly(0, num_rows, 0, num_clusters), {num_clusters, num_rows, 0, 0}};
  }
  const unsigned int first_rows = num_first * (min_rows - stagger_rows);
  return {share_evenly(0, first_rows, 0, num_first), share_evenly(first_rows, num_rows - first_rows, num_first, num_clusters - num_first)};
}

// ---- A row over the CTAs of a cluster -----------------------------------------------------------------------------------------------------

// The CTA of a rank takes whole segments, one after the other.
struct Slice {
  unsigned int first_segment;
  unsigned int log2_num_segments;
  unsigned int first_vector;
  unsigned int num_bytes;  // of a row

  MLPDOWN_HOST_DEVICE unsigned int num_segments() const { return 1u << log2_num_segments; }
};

// cluster_size is 1 << log2_cluster_size, at most the number of segments.
MLPDOWN_HOST_DEVICE Slice slice_of(const Segments& segments, unsigned int log2_cluster_size, unsigned int cta_rank) {
  const unsigned int log2_num_segments = segments.log2_count - log2_cluster_size;
  const unsigned int first_segment = cta_rank << log2_num_segments;
  const unsigned int first_vector = segments.first_vector(first_segment);
  const unsigned int end_vector = segments.first_vector(first_segment + (1u << log2_num_segments));
  return {first_segment, log2_num_segments, first_vector, (end_vector - first_vector) * kVectorBytes};
}

// ---- Shared memory of a CTA of the ring -----------------------------------------------------------------------------------------------------

constexpr unsigned int kBarrierBytes = 8;
constexpr unsigned int kMaxStages = 16;
constexpr unsigned int kMaxConsumerWarps = 16;

// How many stages the ranks of a cluster may drift apart before one waits for another.
constexpr unsigned int kNumPartialSlots = 16;

MLPDOWN_HOST_DEVICE constexpr unsigned int align_up(unsigned int offset, unsigned int alignment) {
  return (offset + alignment - 1) / alignment * alignment;
}

MLPDOWN_HOST_DEVICE constexpr unsigned int log2_of(unsigned int power_of_two) { return power_of_two <= 1 ? 0 : 1 + log2_of(power_of_two / 2); }

// Bytes of all barriers, and of the partial sums for each row of a stage. Python reads these two numbers.
constexpr unsigned int kBarriersBytes = 640;
constexpr unsigned int kPartialsBytesPerRow = 512;

// Offsets in bytes. All but the ring's are known at compile time, for a number of rows a stage.
struct SharedLayout {
  static constexpr unsigned int kFullBarriers = 0;
  static constexpr unsigned int kEmptyBarriers = kFullBarriers + kMaxStages * kBarrierBytes;
  static constexpr unsigned int kPartialsFull = kEmptyBarriers + kMaxStages * kBarrierBytes;
  static constexpr unsigned int kPartialsEmpty = kPartialsFull + kNumPartialSlots * kBarrierBytes;
  static constexpr unsigned int kActivationBarrier = kPartialsEmpty + kNumPartialSlots * kBarrierBytes;
  static constexpr unsigned int kPartials = kBarriersBytes;  // [kNumPartialSlots, rows that the CTA owns of a stage, kMaxSegments] float32
  static_assert(kBarriersBytes == align_up(kActivationBarrier + kBarrierBytes, 128));
  static_assert(kPartialsBytesPerRow == kNumPartialSlots * kMaxSegments * 4);

  // The slice, if a source keeps it in shared memory; else the ring.
  MLPDOWN_HOST_DEVICE static constexpr unsigned int activation(unsigned int rows_per_stage) {
    return kPartials + rows_per_stage * kPartialsBytesPerRow;
  }

  unsigned int ring;  // [num_stages, stage_bytes]
  unsigned int stage_bytes;

  // The slice of rank 0, the longest, decides for all ranks.
  SharedLayout(const Segments& segments, const MlpDownPlan& plan) {
    const unsigned int slice_bytes = slice_of(segments, log2_of(plan.cluster_size), 0).num_bytes;
    ring = activation(plan.rows_per_stage) + (plan.activation_in_registers ? 0 : align_up(slice_bytes, 128));
    stage_bytes = plan.rows_per_stage * slice_bytes;
  }

  unsigned int total_bytes(unsigned int num_stages) const { return ring + num_stages * stage_bytes; }
};

// ---- What a kernel is given beside the problem and the plan ---------------------------------------------------------------------------------

struct Geometry {
  Segments segments;
  Shares shares;
  unsigned int ring;  // SharedLayout's, as the next one
  unsigned int stage_bytes;
};

// The registers kernel needs the segments alone.
inline Geometry make_geometry(const MlpDownProblem& problem, const MlpDownPlan& plan, const Segments& segments, unsigned int num_clusters) {
  if (plan.rows_in_registers > 0) return {segments, {}, 0, 0};
  const SharedLayout layout(segments, plan);
  return {segments, share_out(problem.hidden_dim, num_clusters, plan.stagger_rows), layout.ring, layout.stage_bytes};
}
