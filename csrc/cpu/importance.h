// The plan of the importance update: tasks are layers.
#pragma once

#include "../ops/importance.h"
#include "run.h"

namespace spectral_ops::cpu {

inline void run(const ImportanceUpdate& a, const Tensor&) { in_parallel(a, a.count, 2); }

}  // namespace spectral_ops::cpu
