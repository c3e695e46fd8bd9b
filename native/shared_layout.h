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

// Offsets and sizes in bytes.
struct SharedLayout {
  unsigned int full_barriers;
  unsigned int empty_barriers;
  unsigned int partials_full;
  unsigned int partials_empty;
  unsigned int activation_barrier;
  unsigned int partials;  // [kNumPartialSlots, owned_rows_per_slot, 8 segments] float32
  unsigned int owned_rows_per_slot;
  unsigned int activation;  // the slice, 16-bit
  unsigned int ring;        // [num_stages, stage_bytes]
  unsigned int stage_bytes;
  unsigned int total_bytes;

  MLPDOWN_HOST_DEVICE SharedLayout(unsigned int intermediate_dim, unsigned int cluster_size, unsigned int rows_per_stage, unsigned int num_stages) {
    const unsigned int num_vectors = intermediate_dim / kVectorSize;
    const unsigned int slice_vectors = (num_vectors + kNumSegments - 1) / kNumSegments * (kNumSegments / cluster_size);
    const unsigned int slice_bytes = (slice_vectors < num_vectors ? slice_vectors : num_vectors) * kVectorBytes;
    full_barriers = 0;
    empty_barriers = full_barriers + num_stages * kBarrierBytes;
    partials_full = empty_barriers + num_stages * kBarrierBytes;
    partials_empty = partials_full + kNumPartialSlots * kBarrierBytes;
    activation_barrier = partials_empty + kNumPartialSlots * kBarrierBytes;
    partials = align(activation_barrier + kBarrierBytes, 16);
    owned_rows_per_slot = (rows_per_stage + cluster_size - 1) / cluster_size;
    activation = align(partials + kNumPartialSlots * owned_rows_per_slot * kNumSegments * 4, 128);
    ring = align(activation + slice_bytes, 128);
    stage_bytes = rows_per_stage * slice_bytes;
    total_bytes = ring + num_stages * stage_bytes;
  }

  MLPDOWN_HOST_DEVICE static unsigned int align(unsigned int offset, unsigned int alignment) {
    return (offset + alignment - 1) / alignment * alignment;
  }
};
