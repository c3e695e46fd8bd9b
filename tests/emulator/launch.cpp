// The C interface: one launch of a kernel, built from its own source, on the emulated machine.
#include <mlp_down.cuh>
#include <mlp_down_registers.cuh>
#include <shares.h>

#include <cstdio>

#include "machine.h"

// The two MLPDOWN_FOR_EACH macros, which the product gets from a header that its build makes, come from the command line.

namespace {

struct Arguments {
  MlpDownProblem problem;
  MlpDownPlan plan;
  MlpDownShares shares;
};

using Kernel = void (*)(const void* arguments);

template <auto kKernel>
void call_ring(const void* arguments) {
  const Arguments& a = *static_cast<const Arguments*>(arguments);
  kKernel(a.problem, a.plan, a.shares);
}

template <auto kKernel>
void call_registers(const void* arguments) {
  const Arguments& a = *static_cast<const Arguments*>(arguments);
  kKernel(a.problem, a.plan);
}

uint32_t vectors_in_registers(const MlpDownProblem& problem, const MlpDownPlan& plan) {
  return plan.activation_in_registers ? vectors_per_lane(problem.intermediate_dim) : 0;
}

template <class DType>
Kernel find_kernel(const MlpDownProblem& problem, const MlpDownPlan& plan) {
  const uint32_t vectors = vectors_in_registers(problem, plan);
#define RING(cluster_size_, rows_, vectors_)                                                                                           \
  if (plan.rows_in_registers == 0 && plan.cluster_size == cluster_size_ && plan.rows_per_stage == rows_ && vectors == vectors_) {      \
    return &call_ring<&mlp_down<DType, cluster_size_, rows_, vectors_>>;                                                               \
  }
#define REGISTERS(rows_) \
  if (plan.rows_in_registers == rows_) return &call_registers<&mlp_down_registers<DType, rows_>>;
  MLPDOWN_FOR_EACH_INSTANTIATION(RING)
  MLPDOWN_FOR_EACH_REGISTERS_INSTANTIATION(REGISTERS)
#undef RING
#undef REGISTERS
  return nullptr;
}

// Where the arrays of the ring kernel stand, which is at compile time for each cluster size and number of rows.
struct Layout {
  uint32_t full_barriers, empty_barriers, partials_full, partials_empty, activation_barrier, partials, slot_bytes, activation, ring, stage_bytes, total_bytes;
};

Layout layout_of(const Arguments& a) {
  const uint32_t vectors = vectors_in_registers(a.problem, a.plan);
#define RING(cluster_size_, rows_, vectors_)                                                                                          \
  if (a.plan.cluster_size == cluster_size_ && a.plan.rows_per_stage == rows_ && vectors == vectors_) {                                \
    using L = SharedLayout<cluster_size_, rows_>;                                                                                     \
    const L layout(a.problem.intermediate_dim, vectors_ > 0);                                                                         \
    return {L::kFullBarriers, L::kEmptyBarriers, L::kPartialsFull, L::kPartialsEmpty, L::kActivationBarrier, L::kPartials,            \
            L::kOwnedRows * kNumSegments * 4, L::kActivation, layout.ring, layout.stage_bytes, layout.total_bytes(a.plan.num_stages)}; \
  }
  MLPDOWN_FOR_EACH_INSTANTIATION(RING)
#undef RING
  return {};
}

std::string name_shared_memory(const void* arguments, uint32_t offset) {
  const Arguments& a = *static_cast<const Arguments*>(arguments);
  const auto element = [&](const char* array, uint32_t first, uint32_t bytes) {
    const uint32_t rest = (offset - first) % bytes;
    return array + ("[" + std::to_string((offset - first) / bytes) + "]") + (rest ? " + " + std::to_string(rest) + " bytes" : "");
  };
  if (a.plan.rows_in_registers > 0) return element("partials row", 0, kNumSegments * sizeof(float));
  const Layout layout = layout_of(a);
  if (offset < layout.empty_barriers) return element("full_barriers", layout.full_barriers, kBarrierBytes);
  if (offset < layout.partials_full) return element("empty_barriers", layout.empty_barriers, kBarrierBytes);
  if (offset < layout.partials_empty) return element("partials_full", layout.partials_full, kBarrierBytes);
  if (offset < layout.activation_barrier) return element("partials_empty", layout.partials_empty, kBarrierBytes);
  if (offset < layout.partials) return "activation_barrier";
  if (offset < layout.partials + kNumPartialSlots * layout.slot_bytes) return element("partials slot", layout.partials, layout.slot_bytes);
  if (offset < layout.ring) return "activation + " + std::to_string(offset - layout.activation) + " bytes";
  return element("stage", layout.ring, layout.stage_bytes);
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
  const Arguments arguments{*problem, *plan, share_out(problem->hidden_dim, num_clusters, plan->stagger_rows)};
  const Kernel kernel = problem->is_bfloat16 ? find_kernel<BFloat16>(*problem, *plan) : find_kernel<Float16>(*problem, *plan);
  if (kernel == nullptr) return 1;
  const size_t vector_bytes = problem->hidden_dim * sizeof(uint16_t);
  const size_t activation_bytes = problem->intermediate_dim * sizeof(uint16_t);
  emulator::Launch launch = {};
  if (const uint32_t num_rows = plan->rows_in_registers; num_rows > 0) {
    launch.num_clusters = (problem->hidden_dim + num_rows - 1) / num_rows;
    launch.cluster_size = 1;
    launch.num_threads = kRegistersThreads;
    launch.shared_memory_bytes = num_rows * kNumSegments * sizeof(float);
  } else {
    const Layout layout = layout_of(arguments);
    launch.num_clusters = num_clusters;
    launch.cluster_size = plan->cluster_size;
    launch.num_threads = (kFirstConsumerWarp + plan->num_consumer_warps) * kNumLanes;
    launch.shared_memory_bytes = layout.total_bytes;
    launch.num_barriers = layout.activation_barrier / kBarrierBytes + 1;
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
