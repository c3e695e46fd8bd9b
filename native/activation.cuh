// Sources: where a lane's activations come from, as float32. The activation is the same for all rows, so a source gets it once:
//
//   ring()        offset of the ring in shared memory, behind what the source keeps there
//   init()        one lane of the first consumer warp, before all warps meet: barriers
//   load()        all consumer warps, once earlier kernels have ended
//   accumulate()  step 4 for the lane's vectors of a segment of kRows rows of weights
//
// A warp hides the latency of shared memory by itself, with few others on its SM. So a batch of loads comes before its sums: as many vectors
// as the registers hold.
#pragma once

#include <formats.cuh>
#include <geometry.h>
#include <ptx.cuh>
#include <sums.cuh>

#include <type_traits>

// A segment as one lane sees it. Vectors are counted from the start of the CTA's slice.
struct LaneSegment {
  uint32_t first_vector;  // the lane's own
  uint32_t num_vectors;   // of the segment
  uint32_t lane;
};

// Each lane keeps its own activations in registers, converted once. Against shared memory, and with one row a stage, that halves both what is
// read there and what is converted, and leaves the room to the ring.
template <class Format_, uint32_t kVectors>
class ActivationInRegisters {
 public:
  using Format = Format_;

  // Known at compile time, which shortens the way to the first copy.
  template <uint32_t kRows>
  MLPDOWN_DEVICE static uint32_t ring(const Geometry&) {
    return SharedLayout::activation(kRows);
  }

  MLPDOWN_DEVICE void init(ptx::SharedAddress) {}

  template <uint32_t kRows>
  MLPDOWN_DEVICE void load(const uint16_t* slice, uint32_t, ptx::SharedAddress, bool, const LaneSegment& segment) {
    constexpr uint32_t kBatch = kVectors < 8 ? kVectors : 4;
    // A vector that a lane lacks is -0: its product with a weight of 0 can be added to any sum, -0 too, and changes none. That costs less
    // than lanes that diverge.
    constexpr ptx::Words kNegativeZeros = {{0x80008000u, 0x80008000u, 0x80008000u, 0x80008000u}};
    const uint16_t* const first = slice + segment.first_vector * kVectorSize;
#pragma unroll
    for (uint32_t batch = 0; batch < kVectors; batch += kBatch) {
      ptx::Words vectors[kBatch];
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        vectors[i] = kNegativeZeros;
        if (has_vector(batch + i, segment)) vectors[i] = ptx::ld_global_vector(first + (batch + i) * kNumLanes * kVectorSize);
      }
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) unpack<Format>(vectors[i], values_[batch + i]);
    }
  }

  template <uint32_t kRows>
  MLPDOWN_DEVICE void accumulate(const ptx::SharedAddress (&weight_rows)[kRows], const LaneSegment& segment,
                                 float (&accumulators)[kRows][kVectorSize]) const {
    constexpr uint32_t kBatch = kRows == 1 ? 5 : 3;  // of each row
    ptx::SharedAddress lane_rows[kRows];
#pragma unroll
    for (uint32_t row = 0; row < kRows; ++row) lane_rows[row] = weight_rows[row] + segment.first_vector * kVectorBytes;
#pragma unroll
    for (uint32_t batch = 0; batch < kVectors; batch += kBatch) {
      ptx::Words weights[kRows][kBatch] = {};
#pragma unroll
      for (uint32_t i = 0; i < kBatch && batch + i < kVectors; ++i) {
        if (!has_vector(batch + i, segment)) continue;
#pragma unroll
        for (uint32_t row = 0; row < kRows; ++row) weights[row][i] = ptx::ld_shared(lane_rows[row] + (batch + i) * kNumLanes * kVectorBytes);
      }
#pragma unroll
      for (uint32_t i = 0; i < kBatch && batch + i < kVectors; ++i) {
#pragma unroll
        for (uint32_t row = 0; row < kRows; ++row) ::accumulate<Format>(weights[row][i], values_[batch + i], accumulators[row]);
      }
    }
  }

 private:
  // Whether the lane has an i-th vector. Segments of a row differ by fewer than 8 vectors in length, so only the last two of kVectors can be
  // missing, and only for these a comparison is left.
  MLPDOWN_DEVICE static bool has_vector(uint32_t i, const LaneSegment& segment) {
    return i + 2 < kVectors || i * kNumLanes + segment.lane < segment.num_vectors;
  }

  float values_[kVectors][kVectorSize];
};

// The CTA's slice of the activation lies in shared memory, as 16-bit elements; lanes read and convert it for every stage.
template <class Format_>
class ActivationInSharedMemory {
 public:
  using Format = Format_;

  template <uint32_t kRows>
  MLPDOWN_DEVICE static uint32_t ring(const Geometry& geometry) {
    return geometry.ring;
  }

  MLPDOWN_DEVICE void init(ptx::SharedAddress smem) {
    ptx::mbarrier_init(smem + SharedLayout::kActivationBarrier, 1);
    ptx::fence_mbarrier_init();
  }

  template <uint32_t kRows>
  MLPDOWN_DEVICE void load(const uint16_t* slice, uint32_t slice_bytes, ptx::SharedAddress smem, bool is_first_warp, const LaneSegment& segment) {
    smem_ = smem + SharedLayout::activation(kRows);
    if (is_first_warp) {
      if (segment.lane == 0) {
        ptx::mbarrier_arrive_expect_tx(smem + SharedLayout::kActivationBarrier, slice_bytes);
        if (slice_bytes > 0) ptx::cp_async_bulk(smem_, slice, slice_bytes, smem + SharedLayout::kActivationBarrier);
      }
      ptx::syncwarp();
    }
    ptx::mbarrier_wait(smem + SharedLayout::kActivationBarrier, 0);
  }

  template <uint32_t kRows>
  MLPDOWN_DEVICE void accumulate(const ptx::SharedAddress (&weight_rows)[kRows], const LaneSegment& segment,
                                 float (&accumulators)[kRows][kVectorSize]) const {
    constexpr uint32_t kBatch = kRows == 4 ? 3 : 5;  // of each row
    const uint32_t end_vector = segment.first_vector - segment.lane + segment.num_vectors;
    uint32_t vector = segment.first_vector;
    for (; vector + (kBatch - 1) * kNumLanes < end_vector; vector += kBatch * kNumLanes) accumulate_batch<kBatch>(weight_rows, vector, accumulators);
    for (; vector < end_vector; vector += kNumLanes) accumulate_batch<1>(weight_rows, vector, accumulators);
  }

 private:
  // For `vector` and the kBatch - 1 vectors that the lane has after it.
  template <uint32_t kBatch, uint32_t kRows>
  MLPDOWN_DEVICE void accumulate_batch(const ptx::SharedAddress (&weight_rows)[kRows], uint32_t vector,
                                       float (&accumulators)[kRows][kVectorSize]) const {
    ptx::Words activations[kBatch];
    ptx::Words weights[kRows][kBatch];
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      const uint32_t offset = (vector + i * kNumLanes) * kVectorBytes;
      activations[i] = ptx::ld_shared(smem_ + offset);
#pragma unroll
      for (uint32_t row = 0; row < kRows; ++row) weights[row][i] = ptx::ld_shared(weight_rows[row] + offset);
    }
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      float activation[kVectorSize];
      unpack<Format>(activations[i], activation);
#pragma unroll
      for (uint32_t row = 0; row < kRows; ++row) ::accumulate<Format>(weights[row][i], activation, accumulators[row]);
    }
  }

  ptx::SharedAddress smem_ = 0;
};

// For kVectors of the activation in a lane's registers, or 0 for shared memory.
template <class Format, uint32_t kVectors>
using SourceOf = std::conditional_t<kVectors == 0, ActivationInSharedMemory<Format>, ActivationInRegisters<Format, kVectors>>;
