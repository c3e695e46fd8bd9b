// Steps 4 to 7 of the canonical order, as one warp carries them out. reference/order.py says them in prose, with the same numbers and names. How
// weights and activations reach the registers is not decided here.
#pragma once

#include <formats.cuh>
#include <order.h>
#include <ptx.cuh>

// Step 4: one vector of a weight row into the lane's 8 accumulators.
template <class Format>
MLPDOWN_DEVICE void accumulate(const ptx::Words& weight, const float (&activation)[kVectorSize], float (&accumulators)[kVectorSize]) {
  float values[kVectorSize];
  unpack<Format>(weight, values);
#pragma unroll
  for (uint32_t j = 0; j < kVectorSize; ++j) accumulators[j] = ptx::fma_rn(values[j], activation[j], accumulators[j]);
}

// Step 5: the lane's sum.
MLPDOWN_DEVICE float sum_lane(const float (&a)[kVectorSize]) {
  return ptx::add_rn(ptx::add_rn(ptx::add_rn(a[0], a[1]), ptx::add_rn(a[2], a[3])),
                     ptx::add_rn(ptx::add_rn(a[4], a[5]), ptx::add_rn(a[6], a[7])));
}

// Step 6 for kRows rows (1, 2, 4 or 8) at once. On return, lane l holds the segment's sum of row l / (32 / kRows). While a lane has several rows, the
// two halves of each group of lanes trade: each keeps half of the rows and adds what the other half had for them. That takes
// kRows - 1 + log2(32 / kRows) shuffles in place of 5 * kRows. Addition is commutative, so every row gets the same tree.
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

// Steps 5 and 6 for kRows rows, as fold_lanes.
template <uint32_t kRows>
MLPDOWN_DEVICE float sum_segment(const float (&accumulators)[kRows][kVectorSize], uint32_t lane) {
  float sums[kRows];
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) sums[row] = sum_lane(accumulators[row]);
  return fold_lanes<kRows>(sums, lane);
}

// Where a row's segment sums lie in shared memory: kMaxSegments of float32, of which the row's first segments are there.
constexpr uint32_t kSegmentSumsBytes = kMaxSegments * sizeof(float);

// Step 7: the segments in order.
MLPDOWN_DEVICE float sum_segments(ptx::SharedAddress segment_sums, uint32_t num_segments) {
  float values[kMaxSegments];
#pragma unroll
  for (uint32_t segment = 0; segment < kMaxSegments; ++segment) {
    // A segment that a short row lacks counts as -0, which changes no sum. All loads come first.
    values[segment] = segment < num_segments ? ptx::ld_shared_float(segment_sums + segment * uint32_t{sizeof(float)}) : -0.0f;
  }
  float total = values[0];
#pragma unroll
  for (uint32_t segment = 1; segment < kMaxSegments; ++segment) total = ptx::add_rn(total, values[segment]);
  return total;
}
