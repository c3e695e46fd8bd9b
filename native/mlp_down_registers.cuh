// The other way of bringing the weights in: straight into registers. The same bits, by the same arithmetic, as mlp_down.cuh.
//
// One CTA of 8 warps takes kRows rows, and one warp one segment of the reduction axis. There is no ring to fill and nothing to set up: a
// launch that cannot overlap with the one before gets to its first load sooner, and the CTAs that share an SM hide each other's latency.
// Under dependent launch with weight prefetch the ring holds more bytes ahead of the wait, and wins for large weights.
//
// The specification, reference/kernel.py, has the same sections in the same order, but for the loads.
#pragma once

#include <arithmetic.cuh>
#include <epilogue.cuh>
#include <problem.h>
#include <ptx.cuh>

constexpr uint32_t kRegistersThreads = kNumSegments * kNumLanes;

// Loads in flight: kRows * kBatch vectors of 16 bytes for each thread, and as many threads as then fit.
template <uint32_t kRows>
constexpr uint32_t kRegistersBatch = kRows == 4 ? 2 : 5;
template <uint32_t kRows>
constexpr uint32_t kRegistersCtasPerSm = kRows == 1 ? 4 : 3;

template <class DType, uint32_t kRows>
MLPDOWN_KERNEL(kRegistersThreads, kRegistersCtasPerSm<kRows>)
mlp_down_registers(MLPDOWN_PARAMETER MlpDownProblem problem, MLPDOWN_PARAMETER MlpDownPlan plan) {
  // ---- Sizes ----
  constexpr uint32_t kBatch = kRegistersBatch<kRows>;
  const uint32_t segment = ptx::thread_idx() / kNumLanes;
  const uint32_t lane = ptx::thread_idx() % kNumLanes;
  const uint32_t first_row = ptx::cta_idx() * kRows;
  const Segments segments(problem.intermediate_dim);
  const uint32_t end_vector = segments.first_vector(segment + 1);

  // ---- Shared memory: partials [kRows, kNumSegments] float32 ----
  const ptx::SharedAddress smem_partials = ptx::dynamic_shared_memory();

  // ---- Loads ----
  const uint16_t* weight_rows[kRows];
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    // Rows that the last CTA lacks: the last row there is is summed again, and not handed on.
    const uint32_t weight_row = first_row + row < problem.hidden_dim ? first_row + row : problem.hidden_dim - 1;
    weight_rows[row] = static_cast<const uint16_t*>(problem.weight) + static_cast<uint64_t>(weight_row) * problem.intermediate_dim;
  }
  const uint16_t* const mlp_intermediate = static_cast<const uint16_t*>(problem.mlp_intermediate);
  ptx::Vector weights[kRows][kBatch];
  const auto load_weights = [&](uint32_t vector) {
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
#pragma unroll
      for (uint32_t row = 0; row < kRows; ++row) {
        if (vector + i * kNumLanes < end_vector) {
          weights[row][i] = ptx::ld_global_vector_no_allocate(weight_rows[row] + (vector + i * kNumLanes) * kVectorSize);
        }
      }
    }
  };
  uint32_t vector = segments.first_vector(segment) + lane;
  // Only a weight that nobody is writing may be read before the wait for earlier kernels.
  if (plan.weight_prefetch) load_weights(vector);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (!plan.weight_prefetch) load_weights(vector);

  // Bias and residuals, by the threads that will add them, while the weights are on their way.
  const uint32_t row = first_row + ptx::thread_idx();
  const bool owns_row = ptx::thread_idx() < kRows && row < problem.hidden_dim;
  const bool has_residuals = owns_row && !problem.is_partial_sums;
  const auto load = [&](const void* tensor) {
    return has_residuals && tensor != nullptr ? ptx::ld_global(static_cast<const uint16_t*>(tensor) + row) : uint16_t{0};
  };
  const uint16_t bias = load(problem.bias);
  const uint16_t attn_output = load(problem.attn_output);
  const uint16_t hidden_states = load(problem.hidden_states);

  // ---- Consumer: each warp sums its segment of the rows, lane by lane, then over the lanes ----
  float accumulators[kRows][kVectorSize] = {};
  while (vector < end_vector) {
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      const uint32_t batch_vector = vector + i * kNumLanes;
      if (batch_vector < end_vector) {
        float activation[kVectorSize];
        unpack<DType>(ptx::ld_global_vector(mlp_intermediate + batch_vector * kVectorSize), activation);
#pragma unroll
        for (uint32_t r = 0; r < kRows; ++r) accumulate<DType>(weights[r][i], activation, accumulators[r]);
      }
    }
    vector += kBatch * kNumLanes;
    load_weights(vector);
  }
  float sums[kRows];
#pragma unroll
  for (uint32_t r = 0; r < kRows; ++r) sums[r] = sum_lane(accumulators[r]);
  const float segment_sum = fold_lanes<kRows>(sums, lane);

  // ---- Segment sums meet ----
  if (lane % (kNumLanes / kRows) == 0) {
    const uint32_t cta_row = lane / (kNumLanes / kRows);
    ptx::st_shared(smem_partials + (cta_row * kNumSegments + segment) * uint32_t{sizeof(float)}, segment_sum);
  }
  ptx::bar_sync();

  // ---- Epilogue: segments in order, bias, residuals, one rounding ----
  if (owns_row) {
    write_row<DType>(problem, row, load_segment_sums(smem_partials + ptx::thread_idx() * kNumSegments * uint32_t{sizeof(float)}), bias, attn_output, hidden_states);
  }
}
