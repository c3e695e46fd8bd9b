// The C interface: one launch of the kernel, built from its own source, on the emulated machine.
#include <mlp_down.cuh>

#include <cstdio>

#include "machine.h"

// MLPDOWN_INSTANTIATIONS, from the command line, lists what is compiled in as INSTANTIATION(cluster_size, rows_per_warp).

namespace {

struct Arguments {
  MlpDownProblem problem;
  MlpDownPlan plan;
};

using Kernel = void (*)(const void* arguments);

template <class DType, uint32_t kClusterSize, uint32_t kRowsPerWarp>
void call(const void* arguments) {
  const Arguments& a = *static_cast<const Arguments*>(arguments);
  mlp_down<DType, kClusterSize, kRowsPerWarp>(a.problem, a.plan);
}

Kernel find_kernel(const Arguments& a) {
#define INSTANTIATION(cluster_size_, rows_per_warp_)                                            \
  if (a.plan.cluster_size == cluster_size_ && a.plan.rows_per_warp == rows_per_warp_) {         \
    return a.problem.is_bfloat16 ? &call<BFloat16, cluster_size_, rows_per_warp_> : &call<Float16, cluster_size_, rows_per_warp_>; \
  }
  MLPDOWN_INSTANTIATIONS
#undef INSTANTIATION
  return nullptr;
}

SharedLayout layout_of(const Arguments& a) {
  return SharedLayout(a.problem.intermediate_dim, a.plan.cluster_size, a.plan.rows_per_stage, a.plan.num_stages);
}

std::string name_shared_memory(const void* arguments, uint32_t offset) {
  const Arguments& a = *static_cast<const Arguments*>(arguments);
  const SharedLayout layout = layout_of(a);
  const auto element = [&](const char* array, uint32_t first, uint32_t bytes) {
    const uint32_t rest = (offset - first) % bytes;
    return array + ("[" + std::to_string((offset - first) / bytes) + "]") + (rest ? " + " + std::to_string(rest) + " bytes" : "");
  };
  if (offset < layout.empty_barriers) return element("full_barriers", layout.full_barriers, kBarrierBytes);
  if (offset < layout.partials_full) return element("empty_barriers", layout.empty_barriers, kBarrierBytes);
  if (offset < layout.partials_empty) return element("partials_full", layout.partials_full, kBarrierBytes);
  if (offset < layout.activation_barrier) return element("partials_empty", layout.partials_empty, kBarrierBytes);
  if (offset < layout.partials) return "activation_barrier";
  const uint32_t slot_bytes = layout.owned_rows_per_slot * kNumSegments * 4;
  if (offset < layout.partials + kNumPartialSlots * slot_bytes) return element("partials slot", layout.partials, slot_bytes);
  if (offset < layout.ring) return "activation + " + std::to_string(offset - layout.activation) + " bytes";
  return element("stage", layout.ring, layout.stage_bytes);
}

}  // namespace

extern "C" {

struct EmulatorResult {
  uint64_t num_switches;
  uint64_t num_landings;
  uint64_t num_phases;
  char check[32];  // the check that failed; empty if none did
  char report[8192];
};

size_t emulator_problem_bytes() { return sizeof(MlpDownProblem); }
size_t emulator_plan_bytes() { return sizeof(MlpDownPlan); }

// Arithmetic that has no other way to a test.
float emulator_cvt_f32_f16(uint16_t bits) { return ptx::cvt_f32_f16(bits); }
uint16_t emulator_cvt_rn_f16_f32(float value) { return ptx::cvt_rn_f16_f32(value); }
uint16_t emulator_cvt_rn_bf16_f32(float value) { return ptx::cvt_rn_bf16_f32(value); }

// Nonzero if this build lacks the instantiation.
int emulator_launch(const MlpDownProblem* problem, const MlpDownPlan* plan, uint32_t num_clusters, uint64_t seed, EmulatorResult* result) {
  const Arguments arguments{*problem, *plan};
  const Kernel kernel = find_kernel(arguments);
  if (kernel == nullptr) return 1;
  const size_t vector_bytes = problem->hidden_dim * sizeof(uint16_t);
  const size_t activation_bytes = problem->intermediate_dim * sizeof(uint16_t);
  emulator::Launch launch = {
      .num_clusters = num_clusters,
      .cluster_size = plan->cluster_size,
      .num_threads = (kFirstConsumerWarp + plan->num_consumer_warps) * kNumLanes,
      .shared_memory_bytes = layout_of(arguments).total_bytes,
      .num_barriers = layout_of(arguments).activation_barrier / kBarrierBytes + 1,
      .is_dependent = plan->dependent_launch != 0,
      .seed = seed,
      .tensors = {},
      .kernel = kernel,
      .arguments = &arguments,
      .name_shared_memory = &name_shared_memory,
  };
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
  return 0;
}

}  // extern "C"
