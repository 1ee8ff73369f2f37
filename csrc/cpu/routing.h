// The plans of the routing kernels: tokens.
#pragma once

#include "../ops/routing.h"
#ifdef SPECTRAL_OPS_HOST
#include <cstring>
#include <vector>
#endif
#include "run.h"

namespace spectral_ops::cpu {

inline void run(const RoutingCombine& a, const Tensor&) { in_parallel(a, a.rows, grain_rows((a.K + 1) * a.columns, false)); }

// A token writes its rows; rows of no token are cleared, which are those from `end` on where places are a permutation.
inline void run(const RoutingCombineBackward& a, const Tensor&) {
  const int64_t row = a.columns * element_size(a.dtype);
  std::vector<bool> written(static_cast<size_t>(a.end));
  for (int64_t i = 0; i < a.rows * a.K; ++i)
    if (a.places[i] < a.end) written[static_cast<size_t>(a.places[i])] = true;
  for (int64_t i = 0; row && i < a.y_rows; ++i)
    if (i >= a.end || !written[static_cast<size_t>(i)])
      std::memset(static_cast<char*>(a.dy) + i * row, 0, static_cast<size_t>(row));
  in_parallel(a, a.rows, grain_rows((2 * a.K + 1) * a.columns, false));
}

}  // namespace spectral_ops::cpu
