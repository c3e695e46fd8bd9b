// The launcher without torch, for compute-sanitizer: a few shapes under plans of every cluster size, or one planted fault.
//
//     harness run                every case once; prints a line a case; exit status 1 if a result is wrong
//     harness racecheck NUMBER   one case of racecheck's list: it takes long, and a case that does not end must not hide the others
//     harness older              as compiled for older GPUs: a ring is refused, the cases of the registers kernel are right
//     harness plant FAULT        a kernel with the fault that a tool is there to find: memcheck, synccheck, initcheck or racecheck
#include <launcher.h>

#include <cuda_runtime.h>
#include <instantiations.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <vector>

namespace {

#define CHECK(call)                                                                          \
  do {                                                                                       \
    const cudaError_t status = (call);                                                       \
    if (status != cudaSuccess) {                                                             \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status));                   \
      std::exit(3);                                                                          \
    }                                                                                        \
  } while (0)

uint32_t mix(uint32_t value) {
  value = (value ^ (value >> 16)) * 0x45d9f3bu;
  value = (value ^ (value >> 16)) * 0x45d9f3bu;
  return value ^ (value >> 16);
}

// A value of magnitude in [2^-4, 1) with few bits, exact in both dtypes, from a counter.
float make_value(uint32_t tensor, uint32_t idx) {
  const uint32_t bits = mix(mix(tensor + 1) + idx);
  const float magnitude = (8.0f + static_cast<float>(bits & 7u)) / static_cast<float>(16u << ((bits >> 3) & 3u));
  return (bits >> 31) ? -magnitude : magnitude;
}

uint16_t encode(float value, bool is_bfloat16) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (is_bfloat16) return static_cast<uint16_t>(bits >> 16);
  // Exact: four significant bits, an exponent that float16 has.
  return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | ((((bits >> 23) & 0xffu) - 112u) << 10) | ((bits >> 13) & 0x3ffu));
}

float decode(uint16_t bits, bool is_bfloat16) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  if (!is_bfloat16) {
    const uint32_t exponent = (bits >> 10) & 31u;
    if (exponent == 0) return (bits & 0x8000u ? -1.0f : 1.0f) * static_cast<float>(bits & 0x3ffu) * std::exp2(-24.0f);
    wide = (static_cast<uint32_t>(bits & 0x8000u) << 16) | ((exponent + 112u) << 23) | (static_cast<uint32_t>(bits & 0x3ffu) << 13);
  }
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Each tensor is an allocation of its own, of its exact size: one byte beyond is a byte too many.
struct Tensor {
  std::vector<float> values;
  uint16_t* device = nullptr;

  Tensor(uint32_t tensor, size_t size, bool is_bfloat16) : values(size) {
    std::vector<uint16_t> bits(size);
    for (size_t idx = 0; idx < size; ++idx) {
      values[idx] = make_value(tensor, static_cast<uint32_t>(idx));
      bits[idx] = encode(values[idx], is_bfloat16);
    }
    CHECK(cudaMalloc(&device, size * sizeof(uint16_t)));
    CHECK(cudaMemcpy(device, bits.data(), size * sizeof(uint16_t), cudaMemcpyHostToDevice));
  }
  ~Tensor() { cudaFree(device); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
};

struct PlanValues {
  unsigned int cluster_size;
  unsigned int rows_per_stage;
  unsigned int num_stages;
  unsigned int stages_in_flight;
  unsigned int num_consumer_warps;
  int activation_in_registers;
  unsigned int stagger_rows;
  int weight_prefetch;
  int dependent_launch;
  unsigned int rows_in_registers = 0;
};

struct TestCase {
  unsigned int hidden_dim;
  unsigned int intermediate_dim;
  bool is_bfloat16;
  bool has_optional;  // attn_output and bias
  bool is_partial_sums;
  PlanValues plan;
};

// The members of MlpDownPlan that a case sets; the others are zero.
MlpDownPlan make_plan(const PlanValues& values) {
  MlpDownPlan plan = {};
  plan.cluster_size = values.cluster_size;
  plan.rows_per_stage = values.rows_per_stage;
  plan.num_stages = values.num_stages;
  plan.stages_in_flight = values.stages_in_flight;
  plan.num_consumer_warps = values.num_consumer_warps;
  plan.activation_in_registers = values.activation_in_registers;
  plan.stagger_rows = values.stagger_rows;
  plan.weight_prefetch = values.weight_prefetch;
  plan.dependent_launch = values.dependent_launch;
  plan.rows_in_registers = values.rows_in_registers;
  return plan;
}

// Where the activation is.
constexpr int kShared = 0;
constexpr int kRegisters = 1;
constexpr int kNoPrefetch = 0;
constexpr int kPrefetch = 1;

// harness.py reads these two lists, a case a line; tests/bench/test_harness.py works out what is said of them here.
//
// Over 114 KB of shared memory a CTA in the large cases, so that an SM holds one: then a cluster walks more tiles than the ring has stages
// and than there are slots for partial sums, and both wrap. Ragged sizes leave rows, segments, lanes and slices partly or wholly empty. In
// some cases several CTAs share an SM.
const TestCase kCases[] = {
    // hidden, intermediate, bf16, optional, partial, {cluster, rows, stages, in flight, warps, activation, stagger, prefetch, dependent}
    {2400, 4096, false, true, false, {1, 1, 14, 4, 16, kShared, 0, kNoPrefetch, 1}},
    {2400, 8192, true, true, false, {2, 2, 7, 3, 4, kShared, 0, kPrefetch, 1}},
    {2400, 8192, false, true, false, {4, 4, 8, 5, 8, kShared, 0, kNoPrefetch, 1}},
    {1100, 16384, true, false, false, {8, 4, 8, 8, 2, kShared, 0, kPrefetch, 1}},
    {333, 1000, false, true, false, {4, 1, 2, 1, 4, kShared, 0, kPrefetch, 0}},
    {77, 8, false, true, false, {8, 1, 2, 2, 2, kShared, 0, kNoPrefetch, 1}},
    {1, 2048, true, true, false, {4, 1, 2, 1, 2, kShared, 0, kNoPrefetch, 1}},
    {512, 2048, false, true, false, {4, 2, 5, 5, 2, kShared, 0, kNoPrefetch, 1}},
    {512, 512, false, false, true, {2, 1, 4, 3, 8, kShared, 0, kNoPrefetch, 1}},
    {2560, 2048, true, true, false, {1, 1, 2, 1, 8, kShared, 0, kPrefetch, 1}},
    {2400, 4096, false, true, false, {1, 1, 14, 4, 16, kRegisters, 1, kPrefetch, 1}},
    {2401, 3848, true, true, false, {1, 1, 16, 5, 8, kRegisters, 0, kNoPrefetch, 1}},
    {4600, 2048, true, false, false, {1, 2, 14, 7, 8, kRegisters, 0, kPrefetch, 1}},
    {4601, 2312, false, true, false, {1, 2, 14, 13, 16, kRegisters, 0, kNoPrefetch, 0}},
    {200, 16328, true, true, false, {1, 1, 3, 2, 8, kRegisters, 0, kNoPrefetch, 1}},
    {333, 1000, false, true, true, {1, 2, 4, 1, 16, kRegisters, 3, kPrefetch, 1}},
};

// For racecheck, which takes seconds for these and counts hazards up to a limit: one CTA an SM, one group of warps, and hardly more tiles than
// it takes for the slots to wrap, in a cluster of one and in clusters, with stores to other CTAs. All rings wrap.
const TestCase kRacecheckCases[] = {
    {2250, 3584, false, true, false, {1, 1, 16, 8, 8, kShared, 0, kNoPrefetch, 1}},
    {2390, 3584, true, true, false, {1, 1, 16, 8, 8, kRegisters, 1, kPrefetch, 1}},
    {2400, 3584, false, false, false, {1, 2, 8, 4, 8, kRegisters, 0, kNoPrefetch, 1}},
    {1150, 7168, true, true, false, {2, 1, 16, 8, 4, kShared, 0, kNoPrefetch, 1}},
    {580, 14336, false, true, false, {4, 1, 16, 8, 2, kShared, 0, kPrefetch, 1}},
    {290, 28672, false, true, false, {8, 1, 16, 8, 1, kShared, 0, kPrefetch, 1}},
};

// A case of the kernel that lands weights in registers.
TestCase register_case(unsigned int hidden_dim, unsigned int intermediate_dim, bool is_bfloat16, bool has_optional, bool is_partial_sums,
                       int weight_prefetch, int dependent_launch, unsigned int rows_in_registers) {
  PlanValues plan = {1, 1, 1, 1, 1, kShared, 0, weight_prefetch, dependent_launch, rows_in_registers};
  return {hidden_dim, intermediate_dim, is_bfloat16, has_optional, is_partial_sums, plan};
}

std::vector<TestCase> register_cases() {
  std::vector<TestCase> cases;
#define MLPDOWN_CASE(rows_)                                                                       \
  for (const bool is_bfloat16 : {false, true}) {                                                  \
    cases.push_back(register_case(512, 2048, is_bfloat16, true, false, kPrefetch, 1, rows_));     \
    cases.push_back(register_case(333, 11008, is_bfloat16, false, false, kNoPrefetch, 1, rows_)); \
    cases.push_back(register_case(77, 1000, is_bfloat16, true, true, kNoPrefetch, 0, rows_));     \
  }
  MLPDOWN_FOR_EACH_REGISTERS_INSTANTIATION(MLPDOWN_CASE)
#undef MLPDOWN_CASE
  return cases;
}

std::vector<TestCase> cases() {
  std::vector<TestCase> cases(std::begin(kCases), std::end(kCases));
  for (const TestCase& test : register_cases()) cases.push_back(test);
  return cases;
}

std::vector<TestCase> racecheck_cases() {
  std::vector<TestCase> cases(std::begin(kRacecheckCases), std::end(kRacecheckCases));
#define MLPDOWN_CASE(rows_) cases.push_back(register_case(333, 1000, false, true, false, kNoPrefetch, 1, rows_));
  MLPDOWN_FOR_EACH_REGISTERS_INSTANTIATION(MLPDOWN_CASE)
#undef MLPDOWN_CASE
  return cases;
}

// Enqueues calls, each of which may start while the one before drains, and compares the last one's result with double precision.
bool run_case(const TestCase& test, int num_calls) {
  Tensor hidden_states(0, test.hidden_dim, test.is_bfloat16);
  Tensor attn_output(1, test.hidden_dim, test.is_bfloat16);
  Tensor mlp_intermediate(2, test.intermediate_dim, test.is_bfloat16);
  Tensor weight(3, static_cast<size_t>(test.hidden_dim) * test.intermediate_dim, test.is_bfloat16);
  Tensor bias(4, test.hidden_dim, test.is_bfloat16);
  const size_t out_bytes = test.hidden_dim * (test.is_partial_sums ? sizeof(float) : sizeof(uint16_t));
  void* out = nullptr;
  CHECK(cudaMalloc(&out, out_bytes));

  MlpDownProblem problem = {};
  problem.hidden_states = test.is_partial_sums ? nullptr : hidden_states.device;
  problem.attn_output = test.has_optional ? attn_output.device : nullptr;
  problem.mlp_intermediate = mlp_intermediate.device;
  problem.weight = weight.device;
  problem.bias = test.has_optional ? bias.device : nullptr;
  problem.out = out;
  problem.hidden_dim = test.hidden_dim;
  problem.intermediate_dim = test.intermediate_dim;
  problem.is_bfloat16 = test.is_bfloat16;
  problem.is_partial_sums = test.is_partial_sums;
  const MlpDownPlan plan = make_plan(test.plan);
  char error[512] = "";
  for (int call = 0; call < num_calls; ++call) {
    if (mlpdown_launch(&problem, &plan, nullptr, error, sizeof error) != 0) {
      std::fprintf(stderr, "not launched: %s\n", error);
      std::exit(3);
    }
  }
  CHECK(cudaDeviceSynchronize());

  std::vector<uint16_t> bits(out_bytes / sizeof(uint16_t));
  CHECK(cudaMemcpy(bits.data(), out, out_bytes, cudaMemcpyDeviceToHost));
  CHECK(cudaFree(out));
  unsigned int wrong = 0;
  for (unsigned int row = 0; row < test.hidden_dim; ++row) {
    double exact = 0.0;
    double magnitude = 0.0;
    for (unsigned int k = 0; k < test.intermediate_dim; ++k) {
      const double product = static_cast<double>(weight.values[static_cast<size_t>(row) * test.intermediate_dim + k]) * mlp_intermediate.values[k];
      exact += product;
      magnitude += std::fabs(product);
    }
    float actual;
    double unit = std::ldexp(1.0, -24);
    if (test.is_partial_sums) {
      std::memcpy(&actual, bits.data() + 2 * row, sizeof actual);
    } else {
      if (test.has_optional) exact += static_cast<double>(bias.values[row]) + attn_output.values[row];
      exact += hidden_states.values[row];
      magnitude += std::fabs(bias.values[row]) + std::fabs(attn_output.values[row]) + std::fabs(hidden_states.values[row]);
      actual = decode(bits[row], test.is_bfloat16);
      unit = std::ldexp(1.0, test.is_bfloat16 ? -8 : -11);
    }
    // Half a unit of the result, and float32's rounding of a sum of at most 64 steps.
    const double bound = unit * std::fabs(exact) + 64 * std::ldexp(1.0, -24) * magnitude;
    if (!(std::fabs(actual - exact) <= bound)) ++wrong;
  }
  std::printf(
      "%u x %u, %s%s, %u rows in registers, cluster %u, %u rows a stage, %u stages, %u in flight, %u warps, activation in %s, stagger %u, "
      "prefetch %d: %u wrong\n",
      test.hidden_dim, test.intermediate_dim, test.is_bfloat16 ? "bfloat16" : "float16", test.is_partial_sums ? " partial sums" : "",
      test.plan.rows_in_registers, test.plan.cluster_size, test.plan.rows_per_stage, test.plan.num_stages, test.plan.stages_in_flight,
      test.plan.num_consumer_warps, test.plan.activation_in_registers ? "registers" : "shared memory", test.plan.stagger_rows,
      test.plan.weight_prefetch, wrong);
  return wrong == 0;
}

// Before any tensor is looked at.
bool ring_is_refused() {
  MlpDownProblem problem = {};
  problem.hidden_dim = kCases[0].hidden_dim;
  problem.intermediate_dim = kCases[0].intermediate_dim;
  const MlpDownPlan plan = make_plan(kCases[0].plan);
  char error[512] = "";
  const bool is_refused = mlpdown_launch(&problem, &plan, nullptr, error, sizeof error) != 0;
  std::printf("ring %s: %s\n", is_refused ? "refused" : "launched", error);
  return is_refused;
}

// ---- Planted faults --------------------------------------------------------------------------------------------------------------

constexpr int kPlantThreads = 64;

// Writes one element past the end.
__global__ void plant_memcheck(uint32_t* data, uint32_t size) {
  if (threadIdx.x <= size) data[threadIdx.x] = threadIdx.x;
}

// Lanes of the upper half of a warp meet at a barrier of the lower half, whose mask leaves them out.
__global__ void plant_synccheck(uint32_t* data) {
  __shared__ uint32_t shared[kPlantThreads];
  shared[threadIdx.x] = threadIdx.x;
  __syncwarp(0x0000ffffu);
  data[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// Reads memory that nobody has written.
__global__ void plant_initcheck(const uint32_t* data, uint32_t* out) { out[threadIdx.x] = data[threadIdx.x] + 1; }

// Two warps exchange values without a barrier.
__global__ void plant_racecheck(uint32_t* data) {
  __shared__ uint32_t shared[kPlantThreads];
  shared[threadIdx.x] = threadIdx.x;
  data[threadIdx.x] = shared[kPlantThreads - 1 - threadIdx.x];
}

int plant(const char* fault) {
  uint32_t* data = nullptr;
  uint32_t* out = nullptr;
  CHECK(cudaMalloc(&data, (kPlantThreads - 1) * sizeof(uint32_t)));
  CHECK(cudaMalloc(&out, kPlantThreads * sizeof(uint32_t)));
  if (std::strcmp(fault, "memcheck") == 0) {
    plant_memcheck<<<1, kPlantThreads>>>(data, kPlantThreads - 1);
  } else if (std::strcmp(fault, "synccheck") == 0) {
    plant_synccheck<<<1, kPlantThreads>>>(out);
  } else if (std::strcmp(fault, "initcheck") == 0) {
    plant_initcheck<<<1, kPlantThreads - 1>>>(data, out);
  } else if (std::strcmp(fault, "racecheck") == 0) {
    plant_racecheck<<<1, kPlantThreads>>>(out);
  } else {
    std::fprintf(stderr, "no such fault: %s\n", fault);
    return 2;
  }
  // What this returns is the tool's affair.
  std::printf("planted %s: %s\n", fault, cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "plant") == 0) return plant(argv[2]);
  bool all_right = true;
  if (argc == 2 && std::strcmp(argv[1], "run") == 0) {
    for (const TestCase& test : cases()) all_right = run_case(test, 2) && all_right;
  } else if (argc == 3 && std::strcmp(argv[1], "racecheck") == 0) {
    // Shared memory is a launch's own: to racecheck a second call says nothing new.
    const std::vector<TestCase> list = racecheck_cases();
    char* end = nullptr;
    const size_t number = std::strtoul(argv[2], &end, 10);
    if (end == argv[2] || *end != 0 || number >= list.size()) {
      std::fprintf(stderr, "racecheck has cases 0 to %zu, got %s\n", list.size() - 1, argv[2]);
      return 2;
    }
    all_right = run_case(list[number], 1);
  } else if (argc == 2 && std::strcmp(argv[1], "older") == 0) {
    all_right = ring_is_refused();
    for (const TestCase& test : register_cases()) all_right = run_case(test, 2) && all_right;
  } else {
    std::fprintf(stderr, "usage: harness run | harness racecheck NUMBER | harness older | harness plant FAULT\n");
    return 2;
  }
  CHECK(cudaDeviceReset());
  return all_right ? 0 : 1;
}
