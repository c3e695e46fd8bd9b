// The stream's other form: weights straight into registers. The same bits, by the same arithmetic, as ring.cuh, and simpler to read first.
//
// A warp takes one segment of kRows rows, and a CTA of num_consumer_warps warps as many rows as it has warps for. There is no ring to fill and
// nothing to set up: a launch that cannot overlap with the one before gets to its first load sooner, and the CTAs that share an SM hide each
// other's latency. With weight prefetch the ring holds more bytes ahead of the wait, and wins for large weights.
//
// Read it beside reference/row_sums.py: sections of the same name stand in the same order, but for the loads.
#pragma once

#include <endings.cuh>
#include <geometry.h>
#include <plan.h>
#include <ptx.cuh>
#include <sums.cuh>

namespace registers_kernel {

constexpr uint32_t kMaxWarps = 8;
constexpr uint32_t kMaxThreads = kMaxWarps * kNumLanes;

// A thread has kRows * kBatch weight vectors of 16 bytes under way, and as many CTAs share an SM as its registers then hold.
template <uint32_t kRows, uint32_t kBatch>
constexpr uint32_t kCtasPerSm = kRows == 2 ? 2 : kBatch <= 5 ? 4 : 3;

// For the host too.
MLPDOWN_HOST_DEVICE constexpr uint32_t rows_per_cta(uint32_t rows_per_warp, uint32_t num_warps, const Segments& segments) {
  return rows_per_warp * (num_warps >> segments.log2_count);
}

constexpr uint32_t shared_memory_bytes(uint32_t cta_rows) { return cta_rows * kSegmentSumsBytes; }

}  // namespace registers_kernel

template <class Format, uint32_t kRows, uint32_t kBatch>
MLPDOWN_KERNEL(registers_kernel::kMaxThreads, (registers_kernel::kCtasPerSm<kRows, kBatch>))
registers(MLPDOWN_PARAMETER MlpDownProblem problem, MLPDOWN_PARAMETER MlpDownPlan plan, MLPDOWN_PARAMETER Geometry geometry) {
  // ---- Sizes ----
  const Segments& segments = geometry.segments;
  const uint32_t warp_idx = ptx::thread_idx() / kNumLanes;
  const uint32_t lane = ptx::thread_idx() % kNumLanes;
  const uint32_t segment = warp_idx & (segments.count() - 1);
  const uint32_t first_row_of_warp = (warp_idx >> segments.log2_count) * kRows;  // within the CTA's
  const uint32_t cta_rows = registers_kernel::rows_per_cta(kRows, plan.num_consumer_warps, segments);
  const uint32_t first_row = ptx::cta_idx() * cta_rows;
  const uint32_t end_vector = segments.first_vector(segment + 1);

  // ---- Shared memory: segment sums [cta_rows, kMaxSegments] float32 ----
  const ptx::SharedAddress smem_sums = ptx::dynamic_shared_memory();

  // ---- Loads ----
  // A lane's vectors of a row stand kStride elements apart, so that each load has an offset known at compile time.
  constexpr uint32_t kStride = kNumLanes * kVectorSize;
  uint32_t vector = segments.first_vector(segment) + lane;
  const uint16_t* next_weights[kRows];
#pragma unroll
  for (uint32_t r = 0; r < kRows; ++r) {
    // Rows that the last CTA lacks: the last row there is is summed again, and not stored.
    const uint32_t weight_row = smaller(first_row + first_row_of_warp + r, problem.hidden_dim - 1);
    next_weights[r] = ptx::keep(static_cast<const uint16_t*>(problem.weight) +
                                static_cast<uint64_t>(weight_row) * problem.intermediate_dim + vector * kVectorSize);
  }
  const uint16_t* next_activations = static_cast<const uint16_t*>(problem.mlp_intermediate) + vector * kVectorSize;
  ptx::Words weights[kRows][kBatch];
  ptx::Words activations[kBatch];
  const auto load_weights = [&] {
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      if (vector + i * kNumLanes < end_vector) {
#pragma unroll
        for (uint32_t r = 0; r < kRows; ++r) weights[r][i] = ptx::ld_global_vector_no_allocate(next_weights[r] + i * kStride);
      }
    }
  };
  const auto load_activations = [&] {
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      if (vector + i * kNumLanes < end_vector) activations[i] = ptx::ld_global_vector(next_activations + i * kStride);
    }
  };
  // Only a weight that nobody is writing may be read before the wait for earlier kernels.
  if (plan.weight_prefetch) {
    load_weights();
    ptx::griddepcontrol_wait();
  } else {
    ptx::griddepcontrol_wait();
    load_weights();
  }
  load_activations();
  ptx::griddepcontrol_launch_dependents();

  // The ending's loads, by the threads that will finish the rows, while the weights are on their way.
  const uint32_t row = first_row + ptx::thread_idx();
  const bool owns_row = ptx::thread_idx() < cta_rows && row < problem.hidden_dim;
  Ending<Format> ending;
  if (owns_row) ending.load(problem, row);

  // ---- Consumers: each warp sums its segment of the rows, lane by lane, then over the lanes ----
  float accumulators[kRows][kVectorSize] = {};
  while (vector < end_vector) {
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      if (vector + i * kNumLanes < end_vector) {
        float activation[kVectorSize];
        unpack<Format>(activations[i], activation);
#pragma unroll
        for (uint32_t r = 0; r < kRows; ++r) accumulate<Format>(weights[r][i], activation, accumulators[r]);
      }
    }
    vector += kBatch * kNumLanes;
#pragma unroll
    for (uint32_t r = 0; r < kRows; ++r) next_weights[r] += kBatch * kStride;
    next_activations += kBatch * kStride;
    load_weights();
    load_activations();
  }
  const float segment_sum = sum_segment<kRows>(accumulators, lane);

  // ---- Segment sums meet ----
  if (lane % (kNumLanes / kRows) == 0) {
    const uint32_t cta_row = first_row_of_warp + lane / (kNumLanes / kRows);
    ptx::st_shared(smem_sums + cta_row * kSegmentSumsBytes + segment * uint32_t{sizeof(float)}, segment_sum);
  }
  ptx::bar_sync();

  // ---- Epilogue: segments in order, then the ending ----
  if (owns_row) ending.write(problem, row, sum_segments(smem_sums + ptx::thread_idx() * kSegmentSumsBytes, segments.count()));
}
