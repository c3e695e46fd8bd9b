// What the host tells the kernel: the tensors, their sizes, and the run-time half of the plan. Plain C, no torch, no CUDA.
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

// How fast, never what: mlpdown/plan.py says what each member is for and chooses it. New members go to the end: a program that torch.export
// has saved holds its plans as the numbers that native/op.cpp unpacks. Such a number is full with these ten.
struct MlpDownPlan {
  unsigned int rows_in_registers;  // 0: the ring of mlp_down.cuh; else mlp_down_registers.cuh, to which the ring's members mean nothing
  unsigned int cluster_size;
  unsigned int rows_per_stage;
  unsigned int num_stages;
  unsigned int stages_in_flight;
  unsigned int num_consumer_warps;
  int weight_prefetch;
  int dependent_launch;
  int activation_in_registers;
  unsigned int stagger_rows;
};

// A share of the rows, from first_row on, for the clusters from first_cluster on: each takes min_rows, and the first num_longer one more.
struct MlpDownShare {
  unsigned int first_cluster;
  unsigned int first_row;
  unsigned int min_rows;
  unsigned int num_longer;
};

// How the launcher shares out the rows: early goes to the first clusters of the grid, which the device starts first.
struct MlpDownShares {
  struct MlpDownShare early;
  struct MlpDownShare late;
};

#ifdef __cplusplus
}
#endif
