// The canonical order of summation, as far as one warp carries it out: reference/order.py says it in prose, with the same step numbers
// and names. How the weights reach the registers is no matter of this file.
#pragma once

#include <order.h>
#include <ptx.cuh>

struct Float16 {
  MLPDOWN_DEVICE static float to_float(uint16_t bits) { return ptx::cvt_f32_f16(bits); }
  MLPDOWN_DEVICE static uint16_t round_once(float value) { return ptx::cvt_rn_f16_f32(value); }
};

struct BFloat16 {
  MLPDOWN_DEVICE static float to_float(uint16_t bits) { return ptx::cvt_f32_bf16(bits); }
  MLPDOWN_DEVICE static uint16_t round_once(float value) { return ptx::cvt_rn_bf16_f32(value); }
};

// The vectors of a row that make up segment s: [s * length, (s + 1) * length), cut off at num_vectors.
struct Segments {
  uint32_t num_vectors;
  uint32_t length;

  MLPDOWN_DEVICE explicit Segments(uint32_t intermediate_dim)
      : num_vectors(intermediate_dim / kVectorSize), length((num_vectors + kNumSegments - 1) / kNumSegments) {}

  MLPDOWN_DEVICE uint32_t first_vector(uint32_t segment) const {
    const uint32_t first = segment * length;
    return first < num_vectors ? first : num_vectors;
  }
};

// Step 4: one vector of a weight row into the lane's 8 accumulators.
template <class DType>
MLPDOWN_DEVICE void unpack(const ptx::Vector& vector, float (&values)[kVectorSize]) {
#pragma unroll
  for (uint32_t word = 0; word < kVectorSize / 2; ++word) {
    values[2 * word] = DType::to_float(static_cast<uint16_t>(vector.words[word] & 0xffffu));
    values[2 * word + 1] = DType::to_float(static_cast<uint16_t>(vector.words[word] >> 16));
  }
}

template <class DType>
MLPDOWN_DEVICE void accumulate(const ptx::Vector& weight, const float (&activation)[kVectorSize], float (&accumulators)[kVectorSize]) {
  float values[kVectorSize];
  unpack<DType>(weight, values);
#pragma unroll
  for (uint32_t j = 0; j < kVectorSize; ++j) accumulators[j] = ptx::fma_rn(values[j], activation[j], accumulators[j]);
}

// Step 5: the lane's sum.
MLPDOWN_DEVICE float sum_lane(const float (&a)[kVectorSize]) {
  return ptx::add_rn(ptx::add_rn(ptx::add_rn(a[0], a[1]), ptx::add_rn(a[2], a[3])),
                     ptx::add_rn(ptx::add_rn(a[4], a[5]), ptx::add_rn(a[6], a[7])));
}

// Step 6 for kRows rows (1, 2, 4 or 8) at once: on return, lane l holds the segment's sum for row l / (32 / kRows). While there are rows to share
// out, the two halves of each group of lanes trade: each keeps half of the rows and adds what the other half had for them. That takes
// kRows - 1 + log2(32 / kRows) shuffles in place of 5 * kRows, and, addition being commutative, every row sees the same tree.
template <uint32_t kRows>
MLPDOWN_DEVICE float fold_lanes(float (&sums)[kRows], uint32_t lane) {
  uint32_t rows = kRows;
#pragma unroll
  for (uint32_t width = kNumLanes / 2; width > 0; width /= 2) {
    if (rows > 1) {
      rows /= 2;
      const bool upper = (lane & width) != 0;
#pragma unroll
      for (uint32_t row = 0; row < rows; ++row) {
        const float kept = upper ? sums[row + rows] : sums[row];
        const float traded = upper ? sums[row] : sums[row + rows];
        sums[row] = ptx::add_rn(kept, ptx::shfl_xor_sync(traded, width));
      }
    } else {
      sums[0] = ptx::add_rn(sums[0], ptx::shfl_xor_sync(sums[0], width));
    }
  }
  return sums[0];
}

// Step 7: the segments in order.
MLPDOWN_DEVICE float sum_segments(const float (&segment_sums)[kNumSegments]) {
  float total = segment_sums[0];
#pragma unroll
  for (uint32_t segment = 1; segment < kNumSegments; ++segment) total = ptx::add_rn(total, segment_sums[segment]);
  return total;
}
