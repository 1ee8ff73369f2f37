// The plan of the importance update: tasks are layers.
#pragma once

#include "../ops/importance.h"

#ifdef SPECTRAL_OPS_HOST

#include "run.h"

namespace spectral_ops::cpu {

inline void run(const ImportanceUpdate& a, const Tensor&) { in_parallel(a, a.count, 2); }

}  // namespace spectral_ops::cpu

#endif
