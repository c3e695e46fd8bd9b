// The primitives of native/ptx.cuh on an emulated machine. With this folder before native/ on the include path, a host compiler builds
// the kernel as it stands. tests/emulator/__init__.py says what is modelled.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <source_location>

#define MLPDOWN_SM_90_OR_NEWER 1
#define MLPDOWN_DEVICE inline
#define MLPDOWN_KERNEL(max_threads, min_ctas_per_sm) void
#define MLPDOWN_PARAMETER const

namespace emulator {

using Where = std::source_location;  // the line of the kernel that called, for the reports

// The nearest multiple, ties to even, of what the last of `digits` significant bits is worth, or of `smallest` below the normal range.
inline double round_to_digits(double magnitude, int digits, double smallest) {
  int exponent;
  std::frexp(magnitude, &exponent);
  const double unit = std::fmax(std::ldexp(1.0, exponent - digits), smallest);
  return std::nearbyint(magnitude / unit) * unit;
}

}  // namespace emulator

namespace ptx {

using emulator::Where;

struct alignas(16) Words {
  uint32_t words[4];
};

using SharedAddress = uint32_t;

// The rank of the CTA in the upper byte.
struct ClusterAddress {
  uint32_t value;
};

MLPDOWN_DEVICE uint32_t keep(uint32_t value) { return value; }
MLPDOWN_DEVICE const uint16_t* keep(const uint16_t* pointer) { return pointer; }

// ---- For the thread that runs at the moment (primitives.cpp) ------------------------------------------------------------------------

uint32_t thread_idx();
uint32_t cta_rank_in_cluster();
uint32_t cta_idx();

float shfl_xor_sync(float value, uint32_t lane_mask, Where where = Where::current());
void syncwarp(Where where = Where::current());

SharedAddress dynamic_shared_memory();
Words ld_shared(SharedAddress address, Where where = Where::current());
float ld_shared_float(SharedAddress address, Where where = Where::current());
void st_shared(SharedAddress address, float value, Where where = Where::current());

uint16_t ld_global(const uint16_t* address, Where where = Where::current());
Words ld_global_vector_no_allocate(const void* address, Where where = Where::current());
Words ld_global_vector(const void* address, Where where = Where::current());
void st_global(uint16_t* address, uint16_t value, Where where = Where::current());
void st_global(float* address, float value, Where where = Where::current());

void mbarrier_init(SharedAddress barrier, uint32_t num_arrivals, Where where = Where::current());
void fence_mbarrier_init(Where where = Where::current());
void mbarrier_arrive(SharedAddress barrier, Where where = Where::current());
void mbarrier_arrive_cluster(ClusterAddress barrier, Where where = Where::current());
void mbarrier_arrive_expect_tx(SharedAddress barrier, uint32_t tx_bytes, Where where = Where::current());
void mbarrier_wait(SharedAddress barrier, uint32_t parity, Where where = Where::current());
void mbarrier_wait_cluster(SharedAddress barrier, uint32_t parity, Where where = Where::current());

void cp_async_bulk(SharedAddress destination, const void* source, uint32_t num_bytes, SharedAddress barrier, Where where = Where::current());
// Eviction is no matter of what is computed.
MLPDOWN_DEVICE void cp_async_bulk_evict_first(SharedAddress destination, const void* source, uint32_t num_bytes, SharedAddress barrier,
                                              Where where = Where::current()) {
  cp_async_bulk(destination, source, num_bytes, barrier, where);
}
ClusterAddress mapa(SharedAddress address, uint32_t cta_rank, Where where = Where::current());
void st_async(ClusterAddress destination, float value, ClusterAddress barrier, Where where = Where::current());

void bar_sync(Where where = Where::current());
void barrier_cluster_arrive_relaxed(Where where = Where::current());
void barrier_cluster_wait(Where where = Where::current());

void griddepcontrol_wait(Where where = Where::current());
void griddepcontrol_launch_dependents(Where where = Where::current());

// ---- Arithmetic ------------------------------------------------------------------------------------------------------------------

// PTX's float32 arithmetic has one NaN.
inline float one_nan(float value) { return std::isnan(value) ? std::bit_cast<float>(0x7fffffffu) : value; }
MLPDOWN_DEVICE float fma_rn(float a, float b, float c) { return one_nan(std::fmaf(a, b, c)); }
MLPDOWN_DEVICE float add_rn(float a, float b) { return one_nan(a + b); }

MLPDOWN_DEVICE float float_from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

MLPDOWN_DEVICE float cvt_f32_f16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 31u;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(fraction) * 0x1p-24f));
  return std::bit_cast<float>(sign | (exponent == 31 ? 0xffu : exponent + 112u) << 23 | fraction << 13);
}

MLPDOWN_DEVICE float cvt_f32_bf16(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

MLPDOWN_DEVICE uint16_t cvt_rn_f16_f32(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isinf(value)) return sign | 0x7c00;
  const double rounded = emulator::round_to_digits(std::fabs(value), 11, 0x1p-24);
  if (rounded > 65504.0) return sign | 0x7c00;
  if (rounded < 0x1p-14) return static_cast<uint16_t>(sign | static_cast<uint32_t>(rounded * 0x1p24));
  return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(static_cast<float>(rounded)) - (112u << 23)) >> 13);
}

MLPDOWN_DEVICE uint16_t cvt_rn_bf16_f32(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isinf(value)) return sign | 0x7f80;
  const double rounded = emulator::round_to_digits(std::fabs(value), 8, 0x1p-133);
  return static_cast<uint16_t>(sign | std::bit_cast<uint32_t>(static_cast<float>(rounded)) >> 16);
}

}  // namespace ptx
