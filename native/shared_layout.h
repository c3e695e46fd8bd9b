// Where everything stands in a CTA's shared memory, for the kernel and for the host that sizes the launch.
#pragma once

#include <order.h>

#ifdef __CUDACC__
#define MLPDOWN_HOST_DEVICE __host__ __device__ inline
#else
#define MLPDOWN_HOST_DEVICE inline
#endif

constexpr unsigned int kBarrierBytes = 8;
constexpr unsigned int kMaxStages = 16;

// How many tiles the ranks of a cluster may drift apart before one waits for another.
constexpr unsigned int kNumPartialSlots = 16;

MLPDOWN_HOST_DEVICE constexpr unsigned int align_up(unsigned int offset, unsigned int alignment) { return (offset + alignment - 1) / alignment * alignment; }

// Offsets and sizes in bytes. All but the ring's are known at compile time: that shortens the way to the first copy.
template <unsigned int kClusterSize, unsigned int kRows>
struct SharedLayout {
  static constexpr unsigned int kFullBarriers = 0;
  static constexpr unsigned int kEmptyBarriers = kFullBarriers + kMaxStages * kBarrierBytes;
  static constexpr unsigned int kPartialsFull = kEmptyBarriers + kMaxStages * kBarrierBytes;
  static constexpr unsigned int kPartialsEmpty = kPartialsFull + kNumPartialSlots * kBarrierBytes;
  static constexpr unsigned int kActivationBarrier = kPartialsEmpty + kNumPartialSlots * kBarrierBytes;
  // [kNumPartialSlots, owned rows, 8 segments] float32
  static constexpr unsigned int kPartials = align_up(kActivationBarrier + kBarrierBytes, 16);
  static constexpr unsigned int kOwnedRows = (kRows + kClusterSize - 1) / kClusterSize;
  static constexpr unsigned int kActivation = align_up(kPartials + kNumPartialSlots * kOwnedRows * kNumSegments * 4, 128);  // the slice

  unsigned int ring;  // [num_stages, stage_bytes]
  unsigned int stage_bytes;

  MLPDOWN_HOST_DEVICE SharedLayout(unsigned int intermediate_dim, bool activation_in_registers) {
    const unsigned int num_vectors = intermediate_dim / kVectorSize;
    const unsigned int slice_vectors = (num_vectors + kNumSegments - 1) / kNumSegments * (kNumSegments / kClusterSize);
    const unsigned int slice_bytes = (slice_vectors < num_vectors ? slice_vectors : num_vectors) * kVectorBytes;
    ring = align_up(kActivation + (activation_in_registers ? 0 : slice_bytes), 128);
    stage_bytes = kRows * slice_bytes;
  }

  MLPDOWN_HOST_DEVICE unsigned int total_bytes(unsigned int num_stages) const { return ring + num_stages * stage_bytes; }
};
