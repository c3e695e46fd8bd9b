// The launcher without torch, for compute-sanitizer: cases from files, or one planted fault.
//
//     harness run FILE...    each FILE is a case of harness.py: a line of NAME=VALUE, then the bits of each tensor that has a size there;
//                            writes the bits of the result to FILE.out
//     harness plant FAULT    a kernel with the fault that a tool is there to find: memcheck, synccheck, initcheck or racecheck
#include <launcher.h>

#include <case_members.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

#define CHECK(call)                                                        \
  do {                                                                     \
    const cudaError_t status = (call);                                     \
    if (status != cudaSuccess) {                                           \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status)); \
      std::exit(3);                                                        \
    }                                                                      \
  } while (0)

// Each tensor is an allocation of its own, of its exact size: one byte beyond is a byte too many.
struct DeviceBytes {
  void* data = nullptr;
  size_t size;

  explicit DeviceBytes(size_t size_) : size(size_) {
    if (size != 0) CHECK(cudaMalloc(&data, size));
  }
  ~DeviceBytes() { cudaFree(data); }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
};

int run_case(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string line;
  std::getline(file, line);
  std::map<std::string, unsigned int> values;
  std::istringstream words(line);
  for (std::string word; words >> word;) values[word.substr(0, word.find('='))] = std::stoul(word.substr(word.find('=') + 1));

  const auto read = [&](DeviceBytes& tensor) {
    std::vector<char> bytes(tensor.size);
    file.read(bytes.data(), bytes.size());
    if (!file) {
      std::fprintf(stderr, "%s: too short\n", path.c_str());
      std::exit(2);
    }
    if (tensor.size != 0) CHECK(cudaMemcpy(tensor.data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  };
#define READ(name)                        \
  DeviceBytes name(values.at(#name "_bytes")); \
  read(name)
  READ(hidden_states);
  READ(attn_output);
  READ(mlp_intermediate);
  READ(weight);
  READ(bias);
#undef READ
  DeviceBytes out(values.at("out_bytes"));

  MlpDownProblem problem = {};
  problem.hidden_states = hidden_states.data;
  problem.attn_output = attn_output.data;
  problem.mlp_intermediate = mlp_intermediate.data;
  problem.weight = weight.data;
  problem.bias = bias.data;
  problem.out = out.data;
  problem.hidden_dim = values.at("hidden_dim");
  problem.intermediate_dim = values.at("intermediate_dim");
  problem.is_bfloat16 = values.at("is_bfloat16");
  problem.is_partial_sums = values.at("is_partial_sums");
  MlpDownPlan plan = {};
#define SET(name) plan.name = values.at(#name);
  FOR_EACH_PLAN_MEMBER(SET)
#undef SET

  // Each call may start while the one before drains.
  char error[512] = "";
  for (unsigned int call = 0; call < values.at("num_calls"); ++call) {
    if (mlpdown_launch(&problem, &plan, nullptr, error, sizeof error) != 0) {
      std::fprintf(stderr, "not launched: %s\n", error);
      return 1;
    }
  }
  CHECK(cudaDeviceSynchronize());
  std::vector<char> bytes(out.size);
  CHECK(cudaMemcpy(bytes.data(), out.data, out.size, cudaMemcpyDeviceToHost));
  std::ofstream(path + ".out", std::ios::binary).write(bytes.data(), bytes.size());
  return 0;
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

int plant(const std::string& fault) {
  DeviceBytes data((kPlantThreads - 1) * sizeof(uint32_t)), out(kPlantThreads * sizeof(uint32_t));
  auto* in = static_cast<uint32_t*>(data.data);
  auto* result = static_cast<uint32_t*>(out.data);
  if (fault == "memcheck") plant_memcheck<<<1, kPlantThreads>>>(in, kPlantThreads - 1);
  if (fault == "synccheck") plant_synccheck<<<1, kPlantThreads>>>(result);
  if (fault == "initcheck") plant_initcheck<<<1, kPlantThreads - 1>>>(in, result);
  if (fault == "racecheck") plant_racecheck<<<1, kPlantThreads>>>(result);
  // What this returns is the tool's affair.
  std::printf("planted %s: %s\n", fault.c_str(), cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 2 ? argv[1] : "";
  if (command == "plant") return plant(argv[2]);
  if (command != "run") {
    std::fprintf(stderr, "usage: harness run FILE... | harness plant FAULT\n");
    return 2;
  }
  int num_refused = 0;
  for (int position = 2; position < argc; ++position) num_refused += run_case(argv[position]);
  CHECK(cudaDeviceReset());
  return num_refused != 0;
}
