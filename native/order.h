// The sizes of the canonical order of summation, and its step 2, as in reference/order.py.
#pragma once

#ifdef __CUDACC__
#define MLPDOWN_HOST_DEVICE __host__ __device__ inline
#else
#define MLPDOWN_HOST_DEVICE inline
#endif

constexpr unsigned int kVectorSize = 8;  // elements of a vector, the unit in which a row is dealt out
constexpr unsigned int kNumLanes = 32;
constexpr unsigned int kMaxSegments = 8;
constexpr unsigned int kMinVectorsPerSegment = 128;

MLPDOWN_HOST_DEVICE constexpr unsigned int smaller(unsigned int a, unsigned int b) { return a < b ? a : b; }

// Step 2: the segments of a row.
struct Segments {
  unsigned int num_vectors;  // of the row
  unsigned int log2_count;   // of the segments: 1, 2, 4 or 8 of them
  unsigned int length;       // vectors of each; the last may have fewer

  MLPDOWN_HOST_DEVICE unsigned int count() const { return 1u << log2_count; }

  MLPDOWN_HOST_DEVICE unsigned int first_vector(unsigned int segment) const { return smaller(segment * length, num_vectors); }
};

MLPDOWN_HOST_DEVICE Segments cut_into_segments(unsigned int row_length) {
  const unsigned int num_vectors = row_length / kVectorSize;
  unsigned int log2_count = 0;
  while ((2u << log2_count) <= kMaxSegments && num_vectors >= (2u << log2_count) * kMinVectorsPerSegment) ++log2_count;
  return {num_vectors, log2_count, (num_vectors + (1u << log2_count) - 1) >> log2_count};
}

// The most vectors that a lane has of a segment (step 3).
MLPDOWN_HOST_DEVICE unsigned int vectors_per_lane(const Segments& segments) { return (segments.length + kNumLanes - 1) / kNumLanes; }
