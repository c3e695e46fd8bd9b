// Steps 7 to 9 of the canonical order, for one row: the end of every kernel.
#pragma once

#include <arithmetic.cuh>
#include <problem.h>
#include <ptx.cuh>

struct SegmentSums {
  float values[kNumSegments];
};

// The 32 bytes at `address`: a row's sums, one a segment.
MLPDOWN_DEVICE SegmentSums load_segment_sums(ptx::SharedAddress address) {
  SegmentSums sums;
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    const ptx::Vector vector = ptx::ld_shared(address + half * kVectorBytes);
#pragma unroll
    for (uint32_t word = 0; word < 4; ++word) sums.values[half * 4 + word] = ptx::float_from_bits(vector.words[word]);
  }
  return sums;
}

// Segments in order, bias, residuals, one rounding. bias, attn_output and hidden_states are the row's bits, unused where the tensor is absent.
template <class DType>
MLPDOWN_DEVICE void write_row(const MlpDownProblem& problem, uint32_t row, const SegmentSums& sums, uint16_t bias, uint16_t attn_output,
                              uint16_t hidden_states) {
  float total = sum_segments(sums.values);
  if (problem.is_partial_sums) {
    ptx::st_global(static_cast<float*>(problem.out) + row, total);
    return;
  }
  if (problem.bias) total = ptx::add_rn(total, DType::to_float(bias));
  if (problem.attn_output) total = ptx::add_rn(total, DType::to_float(attn_output));
  total = ptx::add_rn(total, DType::to_float(hidden_states));
  ptx::st_global(static_cast<uint16_t*>(problem.out) + row, DType::round_once(total));
}
