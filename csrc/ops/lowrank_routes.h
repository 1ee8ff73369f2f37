// How lowrank_matmul and block_matmul may be computed, and what each way costs.
#pragma once

#include <cstdint>
#include <limits>

namespace spectral_ops {

enum class MatmulRoute { library, update_first, fused, triton };

struct MatmulSizes {
  int64_t rows, columns, inner, r;
  bool scaled, bias, tiled, fused_runs, triton_runs;
};

struct MatmulCosts {
  double seconds[4];  // infinity where a route cannot run
  MatmulRoute best() const {
    int best = 0;
    for (int i = 1; i < 4; ++i)
      if (seconds[i] < seconds[best]) best = i;
    return static_cast<MatmulRoute>(best);
  }
};

inline MatmulCosts matmul_costs(const MatmulSizes& s) {
  constexpr double never = std::numeric_limits<double>::infinity();
  const bool large = s.rows >= 1024 && s.rows * s.columns >= 1 << 20;
  return {{1, s.scaled || s.tiled ? never : 0.9, s.fused_runs && large ? 0.5 : never, never}};
}

}  // namespace spectral_ops
