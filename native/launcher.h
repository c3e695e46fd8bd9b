// C interface to the kernels: no torch, no exceptions. Functions return 0, or nonzero with a message in `error` (of error_size bytes).
#pragma once

#include <plan.h>
#include <stddef.h>

#define MLPDOWN_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Enqueues one call on `stream` (a cudaStream_t) of the current device. Allocates nothing, synchronises nothing.
MLPDOWN_EXPORT int mlpdown_launch(const struct MlpDownProblem* problem, const struct MlpDownPlan* plan, void* stream, char* error, size_t error_size);

// Shared memory of one CTA of the plan's ring in bytes; 0 if it was not compiled in for this size. Needs no device.
MLPDOWN_EXPORT unsigned int mlpdown_shared_memory_bytes(unsigned int intermediate_dim, const struct MlpDownPlan* plan);

#ifdef __cplusplus
}
#endif
