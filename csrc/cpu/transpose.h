// The plan of the transpose: tasks of kTile rows.
#pragma once

#include "../ops/transpose.h"
#include "run.h"

namespace spectral_ops::cpu {

inline void run(const Transpose& a, const Tensor&) {
  in_parallel(a, tiles(a.rows), grain_of(tiles(a.rows), a.rows * a.columns));
}

}  // namespace spectral_ops::cpu
