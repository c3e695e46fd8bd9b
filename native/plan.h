// What the host tells the kernels: the tensors and their sizes, and the plan. Plain C, no torch, no CUDA.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// One call. Tensors are 16-bit, row-major, on one device; weight and mlp_intermediate are 16-byte aligned.
struct MlpDownProblem {
  const void* hidden_states;     // [hidden_dim]; not read for partial sums
  const void* attn_output;       // [hidden_dim] or null
  const void* mlp_intermediate;  // [intermediate_dim]
  const void* weight;            // [hidden_dim, intermediate_dim]
  const void* bias;              // [hidden_dim] or null
  void* out;                     // [hidden_dim], 16-bit, or float32 for partial sums
  unsigned int hidden_dim;
  unsigned int intermediate_dim;
  int is_bfloat16;
  int is_partial_sums;  // steps 1 to 7 of the canonical order alone: out = weight @ mlp_intermediate in float32, unrounded
};

// The members of a plan, which decides how fast a call is and never what it computes; mlpdown/plan.py says what each is for. The op takes a
// plan as one number: so many bits for each member, the first one lowest. A program that torch.export has saved holds such numbers, so new
// members go to the end, where these programs have zeros. Python reads this list.
#define MLPDOWN_PLAN_MEMBERS(member)                                                                                                \
  member(cluster_size, 4)                                                                                                           \
  member(rows_per_stage, 4)                                                                                                         \
  member(num_stages, 5)                                                                                                             \
  member(stages_in_flight, 5)                                                                                                       \
  member(num_consumer_warps, 5)                                                                                                     \
  member(weight_prefetch, 1)                                                                                                        \
  member(dependent_launch, 1)                                                                                                       \
  member(rows_in_registers, 2)                                                                                                      \
  member(vectors_in_flight, 3)                                                                                                      \
  member(activation_in_registers, 1)                                                                                                \
  member(stagger_rows, 6)

struct MlpDownPlan {
#define MLPDOWN_MEMBER(name, bits) unsigned int name;
  MLPDOWN_PLAN_MEMBERS(MLPDOWN_MEMBER)
#undef MLPDOWN_MEMBER
};

#ifdef __cplusplus
}
#endif
