// Everything the kernel needs from the machine: built-in indices, shared and global memory, barriers, copies, arithmetic with a fixed
// rounding. The only inline assembly of the project. Each function is one instruction and named after it (PTX ISA 8.1, sm_90; what the
// registers kernel uses, sm_80).
//
// Shared memory is addressed by 32-bit offsets of the shared window, never by C++ pointers, and global memory through the functions
// below, so that a host implementation of this one header can execute the kernel on a CPU.
#pragma once

using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;

// Clusters, bulk copies, mbarriers with transactions and dependent launch begin with compute capability 9.0. For what is compiled for older
// ones, the ring kernel is empty, and griddepcontrol is nothing: kernels start there after the one before. The launcher asks each kernel
// what it was compiled for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define MLPDOWN_SM_90_OR_NEWER 0
#else
#define MLPDOWN_SM_90_OR_NEWER 1
#endif

#define MLPDOWN_DEVICE __device__ __forceinline__
#define MLPDOWN_KERNEL(max_threads, min_ctas_per_sm) __global__ void __launch_bounds__(max_threads, min_ctas_per_sm)
#define MLPDOWN_PARAMETER const __grid_constant__

namespace ptx {

// 16 bytes: what one load takes.
struct alignas(16) Words {
  uint32_t words[4];
};

// An address in the shared memory of this CTA.
using SharedAddress = uint32_t;

// An address in the shared memory of some CTA of the cluster, made by mapa.
struct ClusterAddress {
  uint32_t value;
};

// The same value, which the compiler keeps in a register rather than work it out again at each use. No instruction.
MLPDOWN_DEVICE uint32_t keep(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

MLPDOWN_DEVICE const uint16_t* keep(const uint16_t* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// ---- Indices -------------------------------------------------------------------------------------------------------------------

MLPDOWN_DEVICE uint32_t thread_idx() { return threadIdx.x; }

MLPDOWN_DEVICE uint32_t cta_rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

MLPDOWN_DEVICE uint32_t cta_idx() { return blockIdx.x; }

// ---- Warp ----------------------------------------------------------------------------------------------------------------------

// All 32 lanes exchange a value with the lane whose index differs in the bits of lane_mask.
MLPDOWN_DEVICE float shfl_xor_sync(float value, uint32_t lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }

// All 32 lanes wait for each other; what each wrote to memory before is visible to the others after.
MLPDOWN_DEVICE void syncwarp() { __syncwarp(); }

// ---- Shared memory -------------------------------------------------------------------------------------------------------------

// Start of the dynamic shared memory, 128-byte aligned.
MLPDOWN_DEVICE SharedAddress dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char smem[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(smem));
}

MLPDOWN_DEVICE Words ld_shared(SharedAddress address) {
  Words v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "r"(address)
               : "memory");
  return v;
}

MLPDOWN_DEVICE float ld_shared_float(SharedAddress address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

MLPDOWN_DEVICE void st_shared(SharedAddress address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// ---- Global memory -------------------------------------------------------------------------------------------------------------

// Volatile and without the non-coherent path: the value may have been written by the kernel that griddepcontrol_wait waited for.
MLPDOWN_DEVICE uint16_t ld_global(const uint16_t* address) {
  uint16_t value;
  asm volatile("ld.global.b16 %0, [%1];" : "=h"(value) : "l"(address) : "memory");
  return value;
}

// 16 bytes that nobody will read again: kept out of L1.
MLPDOWN_DEVICE Words ld_global_vector_no_allocate(const void* address) {
  Words v;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(address)
               : "memory");
  return v;
}

// 16 bytes that the other CTAs of the SM read too.
MLPDOWN_DEVICE Words ld_global_vector(const void* address) {
  Words v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(address)
               : "memory");
  return v;
}

MLPDOWN_DEVICE void st_global(uint16_t* address, uint16_t value) {
  asm volatile("st.global.b16 [%0], %1;" ::"l"(address), "h"(value) : "memory");
}

MLPDOWN_DEVICE void st_global(float* address, float value) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

// ---- mbarrier: phases that complete when all arrivals and all transaction bytes are in --------------------------------------------

MLPDOWN_DEVICE void mbarrier_init(SharedAddress barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

// Makes this thread's mbarrier_init visible to the copy engine and, with the cluster barrier that follows, to the cluster.
MLPDOWN_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
}

// One arrival. Releases this thread's accesses to whoever waits for the phase, within the CTA.
MLPDOWN_DEVICE void mbarrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival at a barrier of any CTA of the cluster. Releases within the cluster.
MLPDOWN_DEVICE void mbarrier_arrive_cluster(ClusterAddress barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier.value) : "memory");
}

// One arrival, and tx_bytes more bytes that the current phase waits for. Bytes that landed before were counted below zero.
MLPDOWN_DEVICE void mbarrier_arrive_expect_tx(SharedAddress barrier, uint32_t tx_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(tx_bytes) : "memory");
}

// Waits until the phase of this parity has completed. Acquires within the CTA: arrivals of its threads and bulk copies.
MLPDOWN_DEVICE void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred done;\n"
        " mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n"
        " selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// The same, but acquires within the cluster: needed for what other CTAs stored or arrived for. Costs more (L1 is invalidated).
MLPDOWN_DEVICE void mbarrier_wait_cluster(SharedAddress barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred done;\n"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
        " selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- Asynchronous copies and stores ----------------------------------------------------------------------------------------------

// Copies num_bytes (a multiple of 16, 16-byte aligned on both sides) from global memory into this CTA's shared memory; when they have
// landed, they count as num_bytes transaction bytes at the barrier.
MLPDOWN_DEVICE void cp_async_bulk(SharedAddress destination, const void* source, uint32_t num_bytes, SharedAddress barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination), "l"(source),
               "r"(num_bytes), "r"(barrier)
               : "memory");
}

// The same, for bytes that nobody will read again: the first to be evicted from L2, so that they do not push out what is read again.
MLPDOWN_DEVICE void cp_async_bulk_evict_first(SharedAddress destination, const void* source, uint32_t num_bytes, SharedAddress barrier) {
  asm volatile(
      "{\n .reg .b64 policy;\n"
      " createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n}" ::"r"(destination),
      "l"(source), "r"(num_bytes), "r"(barrier)
      : "memory");
}

// The address that a shared address of this CTA has in the CTA of the given rank.
MLPDOWN_DEVICE ClusterAddress mapa(SharedAddress address, uint32_t cta_rank) {
  ClusterAddress mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped.value) : "r"(address), "r"(cta_rank));
  return mapped;
}

// Stores 4 bytes into a CTA of the cluster and counts them at a barrier of that CTA when they have landed. Does not stall this thread.
MLPDOWN_DEVICE void st_async(ClusterAddress destination, float value, ClusterAddress barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(destination.value),
               "r"(__float_as_uint(value)), "r"(barrier.value)
               : "memory");
}

// ---- CTA barrier --------------------------------------------------------------------------------------------------------------------

// All threads of the CTA wait for each other; what any wrote to shared memory before is visible after.
MLPDOWN_DEVICE void bar_sync() { asm volatile("barrier.cta.sync.aligned 0;" ::: "memory"); }

// ---- Cluster barrier ------------------------------------------------------------------------------------------------------------

// Every thread of the cluster arrives and waits at once, whole warps at a time. Relaxed: of what was done before the arrival, only the
// mbarriers that fence_mbarrier_init published are sure to be seen after the wait (a release costs a fence to global memory here).
// A warp that arrives and waits later has two traps. Of a cluster of one, the compiler makes the wait a bar.sync and the arrival nothing;
// and compute-sanitizer's racecheck lets none past its wait before all have come to theirs.
MLPDOWN_DEVICE void barrier_cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
MLPDOWN_DEVICE void barrier_cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// ---- Programmatic dependent launch -------------------------------------------------------------------------------------------------

// Holds this thread until all earlier grids have completed and their writes are visible.
MLPDOWN_DEVICE void griddepcontrol_wait() {
#if MLPDOWN_SM_90_OR_NEWER
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next grid start once every CTA of this one has said so or left.
MLPDOWN_DEVICE void griddepcontrol_launch_dependents() {
#if MLPDOWN_SM_90_OR_NEWER
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Arithmetic ------------------------------------------------------------------------------------------------------------------

// Each operation is one of IEEE 754 in float32, subnormals kept. Inline, since the compiler's options (-ftz, -fmad, -use_fast_math) change its
// own functions, and not these.

MLPDOWN_DEVICE float fma_rn(float a, float b, float c) {
  float result;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
  return result;
}

MLPDOWN_DEVICE float add_rn(float a, float b) {
  float result;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

MLPDOWN_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }

MLPDOWN_DEVICE float cvt_f32_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

MLPDOWN_DEVICE float cvt_f32_bf16(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

// To nearest even; NaN becomes 0x7fff.
MLPDOWN_DEVICE uint16_t cvt_rn_f16_f32(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

MLPDOWN_DEVICE uint16_t cvt_rn_bf16_f32(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

}  // namespace ptx
