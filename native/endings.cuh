// Endings: what becomes of a row's sum. Each has load(), which fetches what it needs for a row while the weights are on their way, and write().
#pragma once

#include <formats.cuh>
#include <plan.h>
#include <ptx.cuh>

// Steps 8 and 9: bias, residuals, one rounding.
template <class Format>
struct Residuals {
  uint16_t bias = 0;
  uint16_t attn_output = 0;
  uint16_t hidden_states = 0;

  MLPDOWN_DEVICE void load(const MlpDownProblem& problem, uint32_t row) {
    if (problem.bias) bias = ptx::ld_global(static_cast<const uint16_t*>(problem.bias) + row);
    if (problem.attn_output) attn_output = ptx::ld_global(static_cast<const uint16_t*>(problem.attn_output) + row);
    hidden_states = ptx::ld_global(static_cast<const uint16_t*>(problem.hidden_states) + row);
  }

  MLPDOWN_DEVICE void write(const MlpDownProblem& problem, uint32_t row, float sum) const {
    if (problem.bias) sum = ptx::add_rn(sum, Format::to_float(bias));
    if (problem.attn_output) sum = ptx::add_rn(sum, Format::to_float(attn_output));
    sum = ptx::add_rn(sum, Format::to_float(hidden_states));
    ptx::st_global(static_cast<uint16_t*>(problem.out) + row, Format::round_once(sum));
  }
};

// Nothing: the sum itself, in float32.
struct Unrounded {
  MLPDOWN_DEVICE static void write(const MlpDownProblem& problem, uint32_t row, float sum) {
    ptx::st_global(static_cast<float*>(problem.out) + row, sum);
  }
};

// The ending that the problem asks for: one branch a row, where a template would double the kernels.
template <class Format>
struct Ending {
  Residuals<Format> residuals;

  MLPDOWN_DEVICE void load(const MlpDownProblem& problem, uint32_t row) {
    if (!problem.is_partial_sums) residuals.load(problem, row);
  }

  MLPDOWN_DEVICE void write(const MlpDownProblem& problem, uint32_t row, float sum) const {
    if (problem.is_partial_sums) {
      Unrounded::write(problem, row, sum);
    } else {
      residuals.write(problem, row, sum);
    }
  }
};
