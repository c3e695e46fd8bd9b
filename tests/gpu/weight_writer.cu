// A kernel that lets its dependents start at once, sleeps, and only then writes: what a call must wait for unless it was told not to.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace {

__device__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__global__ void __launch_bounds__(1024) write_late(uint4* destination, const uint4* source, size_t num_vectors, uint64_t sleep_nanoseconds) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const uint64_t begin = nanoseconds();
  while (nanoseconds() - begin < sleep_nanoseconds) __nanosleep(500);
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t idx = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; idx < num_vectors; idx += stride) destination[idx] = source[idx];
}

}  // namespace

// Enqueues a copy of num_bytes (a multiple of 16) on `stream`, by few CTAs without shared memory: the rest of the chip is the next grid's.
// Returns a cudaError_t.
extern "C" int write_weight_late(void* destination, const void* source, size_t num_bytes, unsigned long long sleep_nanoseconds, unsigned int num_ctas,
                                 void* stream) {
  write_late<<<dim3(num_ctas), dim3(1024), 0, static_cast<cudaStream_t>(stream)>>>(static_cast<uint4*>(destination), static_cast<const uint4*>(source),
                                                                                  num_bytes / sizeof(uint4), sleep_nanoseconds);
  return static_cast<int>(cudaGetLastError());
}
