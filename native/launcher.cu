// The host side of the kernels: picks one, sizes the grid by occupancy, launches.
#include <launcher.h>

#include <cuda_runtime.h>
#include <geometry.h>
#include <instantiations.h>
#include <registers.cuh>
#include <ring.cuh>

#include <cstdio>
#include <map>
#include <mutex>
#include <tuple>

namespace {

constexpr unsigned long kMostSharedMemoryBytes = 227ul << 10;  // a block of any GPU yet
constexpr int kFirstPtxVersionOfRing = 90;                     // as ptx.cuh has it

// Where a message for the caller goes.
struct Error {
  char* text;
  size_t size;

  int set(const char* what, const char* detail) const {
    std::snprintf(text, size, "%s: %s", what, detail);
    return 1;
  }
};

// The last CUDA error is cleared: what we report must not surface again in somebody else's check.
#define MLPDOWN_CHECK(error, call)                                                     \
  do {                                                                                 \
    const cudaError_t status = (call);                                                 \
    if (status != cudaSuccess) {                                                       \
      static_cast<void>(cudaGetLastError());                                           \
      return (error).set(#call, cudaGetErrorString(status));                           \
    }                                                                                  \
  } while (0)

using Kernel = const void*;

// What a plan launches. The grid of the ring depends on the device; all else is known without asking it.
struct Launchable {
  Kernel kernel = nullptr;
  unsigned int cluster_size = 1;
  unsigned int threads_per_cta = 0;
  unsigned int shared_memory_bytes = 0;
  unsigned int num_clusters = 0;  // 0: as many as are resident at once
};

// A launch configuration. The attributes that it points to live here, so it does not move.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  LaunchConfig(const Launchable& launchable, unsigned int num_clusters, bool dependent_launch, void* stream) {
    if (dependent_launch) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (launchable.cluster_size > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {launchable.cluster_size, 1, 1};
    }
    config.gridDim = dim3(num_clusters * launchable.cluster_size);
    config.blockDim = dim3(launchable.threads_per_cta);
    config.dynamicSmemBytes = launchable.shared_memory_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

template <class Format>
Kernel find_kernel(const MlpDownPlan& plan, unsigned int lane_vectors) {
#define MLPDOWN_CASE(rows_, batch_)                                             \
  if (plan.rows_in_registers == rows_ && plan.vectors_in_flight == batch_) {      \
    return reinterpret_cast<Kernel>(&registers<Format, rows_, batch_>);         \
  }
  MLPDOWN_FOR_EACH_REGISTERS_KERNEL(MLPDOWN_CASE)
#undef MLPDOWN_CASE
  if (plan.rows_in_registers > 0) return nullptr;
  const unsigned int vectors = plan.activation_in_registers ? lane_vectors : 0;
#define MLPDOWN_CASE(cluster_size_, rows_, vectors_)                                               \
  if (plan.cluster_size == cluster_size_ && plan.rows_per_stage == rows_ && vectors == vectors_) { \
    return reinterpret_cast<Kernel>(&ring<Format, cluster_size_, rows_, vectors_>);                \
  }
  MLPDOWN_FOR_EACH_RING_KERNEL(MLPDOWN_CASE)
#undef MLPDOWN_CASE
  return nullptr;
}

Kernel find_kernel(const MlpDownPlan& plan, const Segments& segments, bool is_bfloat16) {
  const unsigned int lane_vectors = vectors_per_lane(segments);
  return is_bfloat16 ? find_kernel<BFloat16>(plan, lane_vectors) : find_kernel<Float16>(plan, lane_vectors);
}

int check_ring(const MlpDownPlan& plan, const Segments& segments, const Error& error) {
  if (plan.num_stages == 0 || plan.num_stages > kMaxStages || plan.stages_in_flight == 0 || plan.stages_in_flight > plan.num_stages ||
      plan.num_consumer_warps == 0 || plan.num_consumer_warps > kMaxConsumerWarps) {
    return error.set("plan", "num_stages must be in 1..16, stages_in_flight in 1..num_stages, num_consumer_warps in 1..16");
  }
  if (plan.cluster_size > segments.count()) {
    return error.set("plan", "cluster_size must be at most the number of segments, which follows intermediate_dim");
  }
  // A warp for each segment, and each group of warps meets its own stages and slots only.
  const unsigned int warps_per_group = segments.count() / plan.cluster_size;
  const unsigned int num_groups = plan.num_consumer_warps / warps_per_group;
  if (plan.num_consumer_warps % warps_per_group != 0 || plan.num_stages % num_groups != 0 || kNumPartialSlots % num_groups != 0) {
    return error.set("plan", "num_consumer_warps must be num_segments / cluster_size times a divisor of num_stages and 16");
  }
  // The layout counts in 32 bits. What no device has is refused before it could wrap around.
  const unsigned long row_bytes = static_cast<unsigned long>(segments.num_vectors) * kVectorBytes / plan.cluster_size;
  if (row_bytes * plan.rows_per_stage * plan.num_stages > kMostSharedMemoryBytes) {
    return error.set("plan", "the plan needs more shared memory a block than any device has");
  }
  return 0;
}

int make_launchable(const MlpDownProblem& problem, const MlpDownPlan& plan, const Segments& segments, Launchable* result, const Error& error) {
  if (problem.hidden_dim == 0 || problem.intermediate_dim == 0 || problem.intermediate_dim % kVectorSize != 0) {
    return error.set("problem", "hidden_dim must be positive and intermediate_dim a positive multiple of 8");
  }
  result->kernel = find_kernel(plan, segments, problem.is_bfloat16);
  if (result->kernel == nullptr) {
    return error.set("plan", "cluster_size, rows_per_stage, activation_in_registers, rows_in_registers, vectors_in_flight: not compiled in for this intermediate_dim");
  }
  if (plan.rows_in_registers > 0) {
    if (plan.num_consumer_warps == 0 || plan.num_consumer_warps > registers_kernel::kMaxWarps || plan.num_consumer_warps % segments.count() != 0) {
      return error.set("plan", "num_consumer_warps must be a multiple of the number of segments, at most 8, beside rows_in_registers");
    }
    const unsigned int cta_rows = registers_kernel::rows_per_cta(plan.rows_in_registers, plan.num_consumer_warps, segments);
    result->threads_per_cta = plan.num_consumer_warps * kNumLanes;
    result->shared_memory_bytes = registers_kernel::shared_memory_bytes(cta_rows);
    result->num_clusters = (problem.hidden_dim - 1) / cta_rows + 1;
    return 0;
  }
  if (check_ring(plan, segments, error) != 0) return 1;
  result->cluster_size = plan.cluster_size;
  result->threads_per_cta = (kFirstConsumerWarp + plan.num_consumer_warps) * kNumLanes;
  result->shared_memory_bytes = SharedLayout(segments, plan).total_bytes(plan.num_stages);
  return 0;
}

// What the current device says of a kernel.
struct Residency {
  unsigned int max_active_clusters = 0;  // resident at once on the device
  bool has_dependent_launch = false;     // its code waits for earlier kernels by itself
};

// Checks that the current device can run it, and prepares the kernel there.
int query_device(const Launchable& launchable, Residency* result, const Error& error) {
  int device = 0;
  int shared_memory_limit = 0;
  int num_sms = 0;
  MLPDOWN_CHECK(error, cudaGetDevice(&device));
  MLPDOWN_CHECK(error, cudaDeviceGetAttribute(&shared_memory_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  MLPDOWN_CHECK(error, cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  // The device may be newer than the code that the library has for it.
  cudaFuncAttributes attributes;
  MLPDOWN_CHECK(error, cudaFuncGetAttributes(&attributes, launchable.kernel));
  result->has_dependent_launch = attributes.ptxVersion >= kFirstPtxVersionOfRing;
  const bool is_ring = launchable.num_clusters == 0;
  if (is_ring && attributes.ptxVersion < kFirstPtxVersionOfRing) {
    return error.set("plan", "the ring needs compute capability 9.0, and code for it: take rows_in_registers");
  }
  if (launchable.shared_memory_bytes > static_cast<unsigned int>(shared_memory_limit)) {
    char detail[128];
    std::snprintf(detail, sizeof detail, "the plan needs %u bytes of shared memory a block, the device has %d",
                  launchable.shared_memory_bytes, shared_memory_limit);
    return error.set("plan", detail);
  }
  if (is_ring) {
    MLPDOWN_CHECK(error, cudaFuncSetAttribute(launchable.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory_limit));
  }
  int num_clusters = 0;
  if (launchable.cluster_size > 1) {
    const LaunchConfig launch(launchable, 1, false, nullptr);
    MLPDOWN_CHECK(error, cudaOccupancyMaxActiveClusters(&num_clusters, launchable.kernel, &launch.config));
  } else {
    MLPDOWN_CHECK(error, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&num_clusters, launchable.kernel,
                                                                       static_cast<int>(launchable.threads_per_cta),
                                                                       launchable.shared_memory_bytes));
    num_clusters *= num_sms;
  }
  if (num_clusters < 1) return error.set("plan", "not one cluster of this plan fits on the device");
  result->max_active_clusters = static_cast<unsigned int>(num_clusters);
  return 0;
}

// The device is asked once for each kernel and size.
int find_residency(const Launchable& launchable, Residency* result, const Error& error) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, unsigned int, unsigned int>, Residency> known;
  int device = 0;
  MLPDOWN_CHECK(error, cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, launchable.kernel, launchable.shared_memory_bytes, launchable.threads_per_cta);
  const auto found = known.find(key);
  if (found != known.end()) {
    *result = found->second;
    return 0;
  }
  if (query_device(launchable, result, error) != 0) return 1;
  known.emplace(key, *result);
  return 0;
}

}  // namespace

int mlpdown_launch(const MlpDownProblem* problem, const MlpDownPlan* plan, void* stream, char* error_text, size_t error_size) {
  const Error error{error_text, error_size};
  const Segments segments = cut_into_segments(problem->intermediate_dim);
  Launchable launchable;
  Residency residency;
  if (make_launchable(*problem, *plan, segments, &launchable, error) != 0) return 1;
  if (find_residency(launchable, &residency, error) != 0) return 1;
  // Never a second wave of the ring's clusters, nor more of them than rows.
  const unsigned int num_clusters =
      launchable.num_clusters > 0 ? launchable.num_clusters : smaller(problem->hidden_dim, residency.max_active_clusters);
  Geometry geometry = make_geometry(*problem, *plan, segments, num_clusters);
  const LaunchConfig launch(launchable, num_clusters, plan->dependent_launch != 0 && residency.has_dependent_launch, stream);
  void* arguments[] = {const_cast<MlpDownProblem*>(problem), const_cast<MlpDownPlan*>(plan), &geometry};
  MLPDOWN_CHECK(error, cudaLaunchKernelExC(&launch.config, launchable.kernel, arguments));
  return 0;
}

unsigned int mlpdown_shared_memory_bytes(unsigned int intermediate_dim, const MlpDownPlan* plan) {
  const Segments segments = cut_into_segments(intermediate_dim);
  if (plan->cluster_size > segments.count() || find_kernel(*plan, segments, false) == nullptr) return 0;
  return SharedLayout(segments, *plan).total_bytes(plan->num_stages);
}
