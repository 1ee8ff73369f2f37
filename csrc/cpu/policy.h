// The plans of the policy kernels: rows, shared out as with dropout. An exponential costs about as much as a random word.
#pragma once

#include "../ops/policy.h"
#include "run.h"

namespace spectral_ops::cpu {

inline void run(const TargetLogprob& a, const Tensor&) { in_parallel(a, a.rows, grain_rows(a.columns, true)); }

inline void run(const SoftmaxGradient& a, const Tensor&) { in_parallel(a, a.rows, grain_rows(a.columns, true)); }

}  // namespace spectral_ops::cpu
