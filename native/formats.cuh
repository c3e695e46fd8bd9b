// The 16-bit formats of weights, activations and results.
#pragma once

#include <geometry.h>
#include <ptx.cuh>

struct Float16 {
  MLPDOWN_DEVICE static float to_float(uint16_t bits) { return ptx::cvt_f32_f16(bits); }
  MLPDOWN_DEVICE static uint16_t round_once(float value) { return ptx::cvt_rn_f16_f32(value); }
};

struct BFloat16 {
  MLPDOWN_DEVICE static float to_float(uint16_t bits) { return ptx::cvt_f32_bf16(bits); }
  MLPDOWN_DEVICE static uint16_t round_once(float value) { return ptx::cvt_rn_bf16_f32(value); }
};

static_assert(kVectorBytes == sizeof(ptx::Words), "a vector of the order is what one load takes");

// The 8 elements of a vector, as float32. Exact.
template <class Format>
MLPDOWN_DEVICE void unpack(const ptx::Words& vector, float (&values)[kVectorSize]) {
#pragma unroll
  for (uint32_t i = 0; i < kVectorSize / 2; ++i) {
    values[2 * i] = Format::to_float(static_cast<uint16_t>(vector.words[i] & 0xffffu));
    values[2 * i + 1] = Format::to_float(static_cast<uint16_t>(vector.words[i] >> 16));
  }
}
