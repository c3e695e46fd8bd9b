// The host side of the kernel: picks the instantiation, sizes the grid by occupancy, launches.
#include <launcher.h>

#include <cuda_runtime.h>
#include <instantiations.h>
#include <mlp_down.cuh>
#include <mlp_down_registers.cuh>
#include <shares.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <tuple>

namespace {

constexpr unsigned long kMostSharedMemoryBytes = 1ul << 28;
constexpr int kFirstPtxVersionOfRing = 90;  // as ptx.cuh has it

// A message for the caller.
int fail(char* error, size_t error_size, const char* what, const char* detail) {
  std::snprintf(error, error_size, "%s: %s", what, detail);
  return 1;
}

// The last CUDA error is cleared: what we report must not surface again in somebody else's check.
#define MLPDOWN_CHECK(call)                                                     \
  do {                                                                          \
    const cudaError_t status = (call);                                          \
    if (status != cudaSuccess) {                                                \
      static_cast<void>(cudaGetLastError());                                    \
      return fail(error, error_size, #call, cudaGetErrorString(status));        \
    }                                                                           \
  } while (0)

using Kernel = const void*;

// What a plan asks of the device. Everything but the number of clusters is known without asking it.
struct Shape {
  Kernel kernel = nullptr;
  unsigned int cluster_size = 1;
  unsigned int threads_per_cta = 0;
  unsigned int shared_memory_bytes = 0;
  bool is_persistent = false;        // as many clusters as are resident at once, or
  unsigned int num_clusters = 0;     // that many
};

// A launch configuration; the attributes it points to live here, so it does not move.
struct Launch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Launch(const Shape& shape, unsigned int num_clusters, bool dependent_launch, void* stream) {
    if (dependent_launch) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.cluster_size > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {shape.cluster_size, 1, 1};
    }
    config.gridDim = dim3(num_clusters * shape.cluster_size);
    config.blockDim = dim3(shape.threads_per_cta);
    config.dynamicSmemBytes = shape.shared_memory_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

// The ring kernel of a plan, and the shared memory that it needs.
struct RingKernel {
  Kernel kernel = nullptr;
  unsigned int shared_memory_bytes = 0;
};

RingKernel find_ring_kernel(const MlpDownProblem& problem, const MlpDownPlan& plan) {
  const unsigned int vectors = plan.activation_in_registers ? vectors_per_lane(problem.intermediate_dim) : 0;
#define MLPDOWN_CASE(cluster_size_, rows_, vectors_)                                                                   \
  if (plan.cluster_size == cluster_size_ && plan.rows_per_stage == rows_ && vectors == vectors_) {                     \
    return {problem.is_bfloat16 ? reinterpret_cast<Kernel>(&mlp_down<BFloat16, cluster_size_, rows_, vectors_>)        \
                                : reinterpret_cast<Kernel>(&mlp_down<Float16, cluster_size_, rows_, vectors_>),        \
            SharedLayout<cluster_size_, rows_>(problem.intermediate_dim, vectors_ > 0).total_bytes(plan.num_stages)};  \
  }
  MLPDOWN_FOR_EACH_INSTANTIATION(MLPDOWN_CASE)
#undef MLPDOWN_CASE
  return {};
}

template <class DType>
Kernel find_registers_kernel(const MlpDownPlan& plan) {
#define MLPDOWN_CASE(rows_in_registers_) \
  if (plan.rows_in_registers == rows_in_registers_) return reinterpret_cast<Kernel>(&mlp_down_registers<DType, rows_in_registers_>);
  MLPDOWN_FOR_EACH_REGISTERS_INSTANTIATION(MLPDOWN_CASE)
#undef MLPDOWN_CASE
  return nullptr;
}

int shape_ring(const MlpDownProblem& problem, const MlpDownPlan& plan, Shape* shape, char* error, size_t error_size) {
  if (plan.num_stages == 0 || plan.num_stages > kMaxStages || plan.stages_in_flight == 0 || plan.stages_in_flight > plan.num_stages ||
      plan.num_consumer_warps == 0 || plan.num_consumer_warps > kMaxConsumerWarps) {
    return fail(error, error_size, "plan", "num_stages must be in 1..16, stages_in_flight in 1..num_stages, num_consumer_warps in 1..16");
  }
  const RingKernel ring = find_ring_kernel(problem, plan);
  if (ring.kernel == nullptr) {
    return fail(error, error_size, "plan", "cluster_size, rows_per_stage, activation_in_registers: not compiled in for this intermediate_dim");
  }
  // A warp for each segment, and each group of warps meets its own stages and slots only.
  const unsigned int segments_per_cta = kNumSegments / plan.cluster_size;
  const unsigned int num_groups = plan.num_consumer_warps / segments_per_cta;
  if (plan.num_consumer_warps % segments_per_cta != 0 || plan.num_stages % num_groups != 0 || kNumPartialSlots % num_groups != 0) {
    return fail(error, error_size, "plan", "num_consumer_warps must be 8 / cluster_size times a divisor of num_stages and 16");
  }
  // The layout counts in 32 bits; what no device has is refused before it could wrap around.
  const unsigned long row_bytes = 2ul * problem.intermediate_dim / plan.cluster_size;
  if (row_bytes * (1ul + static_cast<unsigned long>(plan.rows_per_stage) * plan.num_stages) > kMostSharedMemoryBytes) {
    return fail(error, error_size, "plan", "the plan needs more shared memory a block than any device has");
  }
  shape->kernel = ring.kernel;
  shape->cluster_size = plan.cluster_size;
  shape->threads_per_cta = (kFirstConsumerWarp + plan.num_consumer_warps) * kNumLanes;
  shape->shared_memory_bytes = ring.shared_memory_bytes;
  shape->is_persistent = true;
  return 0;
}

int shape_registers(const MlpDownProblem& problem, const MlpDownPlan& plan, Shape* shape, char* error, size_t error_size) {
  shape->kernel = problem.is_bfloat16 ? find_registers_kernel<BFloat16>(plan) : find_registers_kernel<Float16>(plan);
  if (shape->kernel == nullptr) return fail(error, error_size, "plan", "this rows_in_registers was not compiled in");
  shape->threads_per_cta = kRegistersThreads;
  shape->shared_memory_bytes = plan.rows_in_registers * kNumSegments * sizeof(float);
  shape->num_clusters = (problem.hidden_dim + plan.rows_in_registers - 1) / plan.rows_in_registers;
  return 0;
}

// What the current device says of a kernel.
struct Prepared {
  unsigned int max_active_clusters = 0;  // resident at once on the device
  bool has_dependent_launch = false;     // its code waits for earlier kernels by itself
};

// Checks that the current device can take the shape, and prepares the kernel there. The device is asked once for each kernel and size.
int prepare(const Shape& shape, Prepared* prepared, char* error, size_t error_size) {
  int device = 0;
  MLPDOWN_CHECK(cudaGetDevice(&device));

  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, unsigned int, unsigned int>, Prepared> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, shape.kernel, shape.shared_memory_bytes, shape.threads_per_cta);
  const auto found = known.find(key);
  if (found != known.end()) {
    *prepared = found->second;
    return 0;
  }

  int shared_memory_limit = 0;
  MLPDOWN_CHECK(cudaDeviceGetAttribute(&shared_memory_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  // The device may be newer than the code that the library has for it.
  cudaFuncAttributes attributes;
  MLPDOWN_CHECK(cudaFuncGetAttributes(&attributes, shape.kernel));
  prepared->has_dependent_launch = attributes.ptxVersion >= kFirstPtxVersionOfRing;
  if (shape.is_persistent && attributes.ptxVersion < kFirstPtxVersionOfRing) {
    return fail(error, error_size, "plan", "the ring needs compute capability 9.0, and code for it: take rows_in_registers");
  }
  if (shape.shared_memory_bytes > static_cast<unsigned int>(shared_memory_limit)) {
    char detail[128];
    std::snprintf(detail, sizeof detail, "the plan needs %u bytes of shared memory a block, the device has %d", shape.shared_memory_bytes,
                  shared_memory_limit);
    return fail(error, error_size, "plan", detail);
  }
  int num_clusters = 0;
  if (shape.is_persistent) {
    MLPDOWN_CHECK(cudaFuncSetAttribute(shape.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory_limit));
  }
  if (shape.cluster_size > 1) {
    const Launch launch(shape, 1, false, nullptr);
    MLPDOWN_CHECK(cudaOccupancyMaxActiveClusters(&num_clusters, shape.kernel, &launch.config));
  } else {
    int num_sms = 0;
    MLPDOWN_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    MLPDOWN_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&num_clusters, shape.kernel, static_cast<int>(shape.threads_per_cta),
                                                                shape.shared_memory_bytes));
    num_clusters *= num_sms;
  }
  if (num_clusters < 1) return fail(error, error_size, "plan", "not one cluster of this plan fits on the device");
  prepared->max_active_clusters = static_cast<unsigned int>(num_clusters);
  known.emplace(key, *prepared);
  return 0;
}

int configure(const MlpDownProblem& problem, const MlpDownPlan& plan, Shape* shape, Prepared* prepared, char* error, size_t error_size) {
  if (problem.hidden_dim == 0 || problem.intermediate_dim == 0 || problem.intermediate_dim % kVectorSize != 0) {
    return fail(error, error_size, "problem", "hidden_dim must be positive and intermediate_dim a positive multiple of 8");
  }
  const auto shape_plan = plan.rows_in_registers > 0 ? shape_registers : shape_ring;
  if (shape_plan(problem, plan, shape, error, error_size) != 0) return 1;
  if (prepare(*shape, prepared, error, error_size) != 0) return 1;
  // Never a second wave of persistent clusters, nor more of them than rows.
  const unsigned int most = prepared->max_active_clusters;
  if (shape->is_persistent) shape->num_clusters = problem.hidden_dim < most ? problem.hidden_dim : most;
  return 0;
}

}  // namespace

int mlpdown_launch(const MlpDownProblem* problem, const MlpDownPlan* plan, void* stream, char* error, size_t error_size) {
  Shape shape;
  Prepared prepared;
  if (configure(*problem, *plan, &shape, &prepared, error, error_size) != 0) return 1;
  const Launch launch(shape, shape.num_clusters, plan->dependent_launch != 0 && prepared.has_dependent_launch, stream);
  MlpDownShares shares = share_out(problem->hidden_dim, shape.num_clusters, plan->stagger_rows);
  // The registers kernel has no third parameter, and takes none.
  void* arguments[] = {const_cast<MlpDownProblem*>(problem), const_cast<MlpDownPlan*>(plan), &shares};
  MLPDOWN_CHECK(cudaLaunchKernelExC(&launch.config, shape.kernel, arguments));
  return 0;
}

int mlpdown_resources(const MlpDownProblem* problem, const MlpDownPlan* plan, MlpDownResources* resources, char* error, size_t error_size) {
  Shape shape;
  Prepared prepared;
  if (configure(*problem, *plan, &shape, &prepared, error, error_size) != 0) return 1;
  cudaFuncAttributes attributes;
  MLPDOWN_CHECK(cudaFuncGetAttributes(&attributes, shape.kernel));
  resources->num_clusters = static_cast<int>(shape.num_clusters);
  resources->max_active_clusters = static_cast<int>(prepared.max_active_clusters);
  resources->shared_memory_bytes = static_cast<int>(shape.shared_memory_bytes);
  resources->registers_per_thread = attributes.numRegs;
  resources->local_bytes_per_thread = static_cast<int>(attributes.localSizeBytes);
  resources->threads_per_cta = static_cast<int>(shape.threads_per_cta);
  return 0;
}

unsigned int mlpdown_shared_memory_bytes(unsigned int intermediate_dim, const MlpDownPlan* plan) {
  MlpDownProblem problem = {};
  problem.intermediate_dim = intermediate_dim;
  return find_ring_kernel(problem, *plan).shared_memory_bytes;
}
