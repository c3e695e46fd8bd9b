// The host side of the kernel: picks the instantiation, sizes the grid by occupancy, launches.
#include <launcher.h>

#include <cuda_runtime.h>
#include <instantiations.h>
#include <mlp_down.cuh>

#include <cstdio>
#include <map>
#include <mutex>
#include <tuple>

namespace {

// A message for the caller. The last CUDA error is cleared: what we report must not surface again in somebody else's check.
int fail(char* error, size_t error_size, const char* what, const char* detail) {
  std::snprintf(error, error_size, "%s: %s", what, detail);
  static_cast<void>(cudaGetLastError());
  return 1;
}

#define MLPDOWN_CHECK(call)                                                                                   \
  do {                                                                                                        \
    const cudaError_t status = (call);                                                                        \
    if (status != cudaSuccess) return fail(error, error_size, #call, cudaGetErrorString(status));             \
  } while (0)

const void* find_kernel(const MlpDownProblem& problem, const MlpDownPlan& plan) {
#define MLPDOWN_CASE(cluster_size_, rows_per_warp_)                                                           \
  if (plan.cluster_size == cluster_size_ && plan.rows_per_warp == rows_per_warp_) {                           \
    return problem.is_bfloat16 ? reinterpret_cast<const void*>(&mlp_down<BFloat16, cluster_size_, rows_per_warp_>) \
                               : reinterpret_cast<const void*>(&mlp_down<Float16, cluster_size_, rows_per_warp_>); \
  }
  MLPDOWN_FOR_EACH_INSTANTIATION(MLPDOWN_CASE)
#undef MLPDOWN_CASE
  return nullptr;
}

// What is asked of the driver once for each kernel, device and launch size.
struct Prepared {
  int max_active_clusters;
};

// A launch configuration; the attributes it points to live here, so it does not move.
struct Launch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Launch(const MlpDownPlan& plan, unsigned int num_clusters, unsigned int shared_memory_bytes, void* stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = plan.cluster_size;
    attributes[0].val.clusterDim.y = 1;
    attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(num_clusters * plan.cluster_size);
    config.blockDim = dim3((kFirstConsumerWarp + plan.num_consumer_warps) * kNumLanes);
    config.dynamicSmemBytes = shared_memory_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = plan.dependent_launch ? 2 : 1;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

int prepare(const void* kernel, const MlpDownPlan& plan, unsigned int shared_memory_bytes, Prepared* prepared, char* error, size_t error_size) {
  int device = 0;
  MLPDOWN_CHECK(cudaGetDevice(&device));

  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, unsigned int, unsigned int>, Prepared> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, kernel, shared_memory_bytes, plan.num_consumer_warps);
  const auto found = known.find(key);
  if (found != known.end()) {
    *prepared = found->second;
    return 0;
  }

  int major = 0;
  int shared_memory_limit = 0;
  MLPDOWN_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  MLPDOWN_CHECK(cudaDeviceGetAttribute(&shared_memory_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (major < 9) return fail(error, error_size, "device", "the native kernel needs compute capability 9.0 or newer");
  if (shared_memory_bytes > static_cast<unsigned int>(shared_memory_limit)) {
    char detail[128];
    std::snprintf(detail, sizeof detail, "the plan needs %u bytes of shared memory a block, the device has %d", shared_memory_bytes, shared_memory_limit);
    return fail(error, error_size, "plan", detail);
  }
  MLPDOWN_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory_limit));
  const Launch launch(plan, 1, shared_memory_bytes, nullptr);
  MLPDOWN_CHECK(cudaOccupancyMaxActiveClusters(&prepared->max_active_clusters, kernel, &launch.config));
  if (prepared->max_active_clusters < 1) return fail(error, error_size, "plan", "not one cluster of this plan fits on the device");
  known.emplace(key, *prepared);
  return 0;
}

// Checks the plan and finds out how many clusters take part: all that can be resident, so that there is never a second wave.
int configure(const MlpDownProblem& problem, const MlpDownPlan& plan, const void** kernel, unsigned int* shared_memory_bytes,
              unsigned int* num_clusters, Prepared* prepared, char* error, size_t error_size) {
  if (problem.hidden_dim == 0 || problem.intermediate_dim == 0 || problem.intermediate_dim % kVectorSize != 0) {
    return fail(error, error_size, "problem", "hidden_dim must be positive and intermediate_dim a positive multiple of 8");
  }
  if (plan.rows_per_stage == 0 || plan.rows_per_stage > kNumLanes || plan.num_stages == 0 || plan.num_stages > kMaxStages ||
      plan.num_consumer_warps == 0 || plan.num_consumer_warps > kMaxConsumerWarps) {
    return fail(error, error_size, "plan", "rows_per_stage must be in 1..32, num_stages in 1..16, num_consumer_warps in 1..16");
  }
  *kernel = find_kernel(problem, plan);
  if (*kernel == nullptr) return fail(error, error_size, "plan", "this cluster_size and rows_per_warp were not compiled in");
  // A consumer warp that skipped a pass over the ring could mistake one phase of a barrier for the next but one.
  const unsigned int items_per_tile = (plan.rows_per_stage + plan.rows_per_warp - 1) / plan.rows_per_warp * (kNumSegments / plan.cluster_size);
  const unsigned int tiles_at_once = (plan.num_consumer_warps + items_per_tile - 1) / items_per_tile;
  if (tiles_at_once > 1 && (plan.num_consumer_warps % items_per_tile != 0 || plan.num_stages % tiles_at_once != 0 || kNumPartialSlots % tiles_at_once != 0)) {
    return fail(error, error_size, "plan", "num_consumer_warps beyond the items of a tile must be a multiple of them that divides num_stages");
  }
  *shared_memory_bytes = SharedLayout(problem.intermediate_dim, plan.cluster_size, plan.rows_per_stage, plan.num_stages).total_bytes;
  if (prepare(*kernel, plan, *shared_memory_bytes, prepared, error, error_size) != 0) return 1;
  const unsigned int max_active_clusters = static_cast<unsigned int>(prepared->max_active_clusters);
  *num_clusters = problem.hidden_dim < max_active_clusters ? problem.hidden_dim : max_active_clusters;
  return 0;
}

}  // namespace

int mlpdown_launch(const MlpDownProblem* problem, const MlpDownPlan* plan, void* stream, char* error, size_t error_size) {
  const void* kernel = nullptr;
  unsigned int shared_memory_bytes = 0;
  unsigned int num_clusters = 0;
  Prepared prepared;
  if (configure(*problem, *plan, &kernel, &shared_memory_bytes, &num_clusters, &prepared, error, error_size) != 0) return 1;
  const Launch launch(*plan, num_clusters, shared_memory_bytes, stream);
  void* arguments[] = {const_cast<MlpDownProblem*>(problem), const_cast<MlpDownPlan*>(plan)};
  MLPDOWN_CHECK(cudaLaunchKernelExC(&launch.config, kernel, arguments));
  return 0;
}

int mlpdown_resources(const MlpDownProblem* problem, const MlpDownPlan* plan, MlpDownResources* resources, char* error, size_t error_size) {
  const void* kernel = nullptr;
  unsigned int shared_memory_bytes = 0;
  unsigned int num_clusters = 0;
  Prepared prepared;
  if (configure(*problem, *plan, &kernel, &shared_memory_bytes, &num_clusters, &prepared, error, error_size) != 0) return 1;
  cudaFuncAttributes attributes;
  MLPDOWN_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  resources->num_clusters = static_cast<int>(num_clusters);
  resources->max_active_clusters = prepared.max_active_clusters;
  resources->shared_memory_bytes = static_cast<int>(shared_memory_bytes);
  resources->registers_per_thread = attributes.numRegs;
  resources->local_bytes_per_thread = static_cast<int>(attributes.localSizeBytes);
  resources->threads_per_cta = static_cast<int>((kFirstConsumerWarp + plan->num_consumer_warps) * kNumLanes);
  return 0;
}

unsigned int mlpdown_shared_memory_bytes(unsigned int intermediate_dim, unsigned int cluster_size, unsigned int rows_per_stage,
                                         unsigned int num_stages) {
  return SharedLayout(intermediate_dim, cluster_size, rows_per_stage, num_stages).total_bytes;
}
