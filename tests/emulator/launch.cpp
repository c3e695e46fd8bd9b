// The C interface: one launch of a kernel, built from its own source, on the emulated machine.
#include <geometry.h>
#include <registers.cuh>
#include <ring.cuh>

#include <cstdio>

#include "machine.h"

// The two MLPDOWN_FOR_EACH macros, which the product gets from a header that its build makes, come from the command line.

namespace {

struct Arguments {
  MlpDownProblem problem;
  MlpDownPlan plan;
  Geometry geometry;
};

using Kernel = void (*)(const void* arguments);

template <auto kKernel>
void call(const void* arguments) {
  const Arguments& a = *static_cast<const Arguments*>(arguments);
  kKernel(a.problem, a.plan, a.geometry);
}

template <class Format>
Kernel find_kernel(const Arguments& a) {
  const uint32_t vectors = a.plan.activation_in_registers ? vectors_per_lane(a.geometry.segments) : 0;
#define RING(cluster_size_, rows_, vectors_)                                                                                                  \
  if (a.plan.rows_in_registers == 0 && a.plan.cluster_size == cluster_size_ && a.plan.rows_per_stage == rows_ && vectors == vectors_) {       \
    return &call<&ring<Format, cluster_size_, rows_, vectors_>>;                                                                              \
  }
#define REGISTERS(rows_, batch_) \
  if (a.plan.rows_in_registers == rows_ && a.plan.vectors_in_flight == batch_) return &call<&registers<Format, rows_, batch_>>;
  MLPDOWN_FOR_EACH_RING_KERNEL(RING)
  MLPDOWN_FOR_EACH_REGISTERS_KERNEL(REGISTERS)
#undef RING
#undef REGISTERS
  return nullptr;
}

std::string name_shared_memory(const void* arguments, uint32_t offset) {
  using L = SharedLayout;
  const Arguments& a = *static_cast<const Arguments*>(arguments);
  const auto element = [&](const char* array, uint32_t first, uint32_t bytes) {
    const uint32_t rest = (offset - first) % bytes;
    return array + ("[" + std::to_string((offset - first) / bytes) + "]") + (rest ? " + " + std::to_string(rest) + " bytes" : "");
  };
  if (a.plan.rows_in_registers > 0) return element("segment sums of row", 0, kSegmentSumsBytes);
  if (offset < L::kEmptyBarriers) return element("full", L::kFullBarriers, kBarrierBytes);
  if (offset < L::kPartialsFull) return element("empty", L::kEmptyBarriers, kBarrierBytes);
  if (offset < L::kPartialsEmpty) return element("full of slot", L::kPartialsFull, kBarrierBytes);
  if (offset < L::kActivationBarrier) return element("empty of slot", L::kPartialsEmpty, kBarrierBytes);
  if (offset < L::kPartials) return "activation_barrier";
  const uint32_t activation = L::activation(a.plan.rows_per_stage);
  if (offset < activation) return element("segment sums of slot and owned row", L::kPartials, kSegmentSumsBytes);
  if (offset < a.geometry.ring) return "activation + " + std::to_string(offset - activation) + " bytes";
  return element("stage", a.geometry.ring, a.geometry.stage_bytes);
}

}  // namespace

extern "C" {

struct EmulatorResult {
  uint64_t num_switches;
  uint64_t num_landings;
  uint64_t num_phases;
  uint64_t bytes_prefetched;
  char check[32];  // the check that failed; empty if none did
  char report[8192];
};

size_t emulator_problem_bytes() { return sizeof(MlpDownProblem); }
size_t emulator_plan_bytes() { return sizeof(MlpDownPlan); }

// Arithmetic that has no other way to a test.
float emulator_cvt_f32_f16(uint16_t bits) { return ptx::cvt_f32_f16(bits); }
uint16_t emulator_cvt_rn_f16_f32(float value) { return ptx::cvt_rn_f16_f32(value); }
uint16_t emulator_cvt_rn_bf16_f32(float value) { return ptx::cvt_rn_bf16_f32(value); }

// Nonzero if this build lacks the instantiation. num_clusters is the ring's: the other kernel has a CTA for every few rows.
int emulator_launch(const MlpDownProblem* problem, const MlpDownPlan* plan, uint32_t num_clusters, uint64_t seed, bool earlier_grids_last,
                    EmulatorResult* result) {
  const Segments segments = cut_into_segments(problem->intermediate_dim);
  if (plan->rows_in_registers == 0 && plan->cluster_size > segments.count()) return 1;
  const Arguments arguments{*problem, *plan, make_geometry(*problem, *plan, segments, num_clusters)};
  const Kernel kernel = problem->is_bfloat16 ? find_kernel<BFloat16>(arguments) : find_kernel<Float16>(arguments);
  if (kernel == nullptr) return 1;
  const size_t vector_bytes = problem->hidden_dim * sizeof(uint16_t);
  const size_t activation_bytes = problem->intermediate_dim * sizeof(uint16_t);
  emulator::Launch launch = {};
  if (plan->rows_in_registers > 0) {
    const uint32_t cta_rows = registers_kernel::rows_per_cta(plan->rows_in_registers, plan->num_consumer_warps, segments);
    launch.num_clusters = (problem->hidden_dim + cta_rows - 1) / cta_rows;
    launch.cluster_size = 1;
    launch.num_threads = plan->num_consumer_warps * kNumLanes;
    launch.shared_memory_bytes = registers_kernel::shared_memory_bytes(cta_rows);
  } else {
    launch.num_clusters = num_clusters;
    launch.cluster_size = plan->cluster_size;
    launch.num_threads = (kFirstConsumerWarp + plan->num_consumer_warps) * kNumLanes;
    launch.shared_memory_bytes = SharedLayout(segments, *plan).total_bytes(plan->num_stages);
    launch.num_barriers = SharedLayout::kActivationBarrier / kBarrierBytes + 1;
  }
  launch.is_dependent = plan->dependent_launch != 0;
  launch.earlier_grids_last = earlier_grids_last;
  launch.seed = seed;
  launch.kernel = kernel;
  launch.arguments = &arguments;
  launch.name_shared_memory = &name_shared_memory;
  const auto add = [&](const char* name, const void* address, size_t num_bytes, bool is_output, bool may_be_read_early) {
    if (address != nullptr) launch.tensors.push_back({name, static_cast<char*>(const_cast<void*>(address)), num_bytes, is_output, may_be_read_early});
  };
  add("weight", problem->weight, problem->hidden_dim * activation_bytes, false, plan->weight_prefetch != 0);
  add("mlp_intermediate", problem->mlp_intermediate, activation_bytes, false, false);
  add("hidden_states", problem->hidden_states, vector_bytes, false, false);
  add("attn_output", problem->attn_output, vector_bytes, false, false);
  add("bias", problem->bias, vector_bytes, false, false);
  add("out", problem->out, problem->is_partial_sums ? problem->hidden_dim * sizeof(float) : vector_bytes, true, false);

  *result = {};
  try {
    emulator::run(launch);
  } catch (const emulator::Violation& violation) {
    std::snprintf(result->check, sizeof result->check, "%s", violation.check);
    std::snprintf(result->report, sizeof result->report, "%s", violation.report.c_str());
  }
  result->num_switches = emulator::statistics.num_switches;
  result->num_landings = emulator::statistics.num_landings;
  result->num_phases = emulator::statistics.num_phases;
  result->bytes_prefetched = emulator::statistics.bytes_prefetched;
  return 0;
}

}  // extern "C"
