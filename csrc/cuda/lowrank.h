// How lowrank's CUDA kernels split work and how much workspace that takes: functions of the sizes alone, not of the GPU, so that
// results are the same on every GPU and tests can call them without one. The form for Hopper (lowrank_wgmma.h) adds in another order.
#pragma once

#include "../ops/lowrank.h"
#include "lowrank_matmul.h"
#include "lowrank_wgmma.h"

namespace spectral_ops::cuda {

// lowrank_backward: a block owns tile_columns columns of dy and sweeps over split_rows of its rows. It leaves partial sums
// of u for its columns (chunks of them) and of dB, db and dyz for its rows (splits of them), which a second kernel adds.
struct BackwardPlan {
  int64_t ranks;  // worked on in one pass over dy; a larger r takes several passes
  bool all;       // the kernel that also reads y and writes gdy, and has db for more than 32 ranks
  int64_t tile_columns, chunks;
  int64_t split_rows, splits;
  int64_t dB_at, db_at, dyz_at;  // where they start in the workspace, in elements; u starts at 0
  int64_t bytes;
};

inline BackwardPlan backward_plan(int64_t rows, int64_t columns, int64_t r, DType dtype, bool u, bool dB, bool db, bool dyz,
                                  bool gdy) {
  const bool matrix_units = dtype == DType::bfloat16 || dtype == DType::float16;
  const int64_t step = matrix_units ? 16 : 32;  // rows that a block works on at once
  BackwardPlan plan{};
  if (matrix_units) {
    plan.ranks = r < 64 ? r : 64;
    plan.all = dyz || gdy || (db && r > 32);
    plan.tile_columns = plan.all ? 256 : plan.ranks <= 32 ? 512 : 384;
  } else {
    plan.ranks = r < 32 ? r : 32;
    plan.tile_columns = 128;
  }
  plan.chunks = (columns + plan.tile_columns - 1) / plan.tile_columns;
  // One block for each of the 132 multiprocessors of an H100, or two where they are small. More would mean more partial sums.
  const int64_t blocks = matrix_units ? 132 : 264;
  int64_t splits = plan.chunks > 0 ? blocks / plan.chunks : 1;
  const int64_t most = (rows + 4 * step - 1) / (4 * step);
  if (splits > most) splits = most;
  if (splits < 1) splits = 1;
  plan.split_rows = ((rows + splits - 1) / splits + step - 1) / step * step;
  if (plan.split_rows < step) plan.split_rows = step;
  plan.splits = rows > 0 ? (rows + plan.split_rows - 1) / plan.split_rows : 1;
  plan.dB_at = u ? plan.chunks * rows * plan.ranks : 0;
  plan.db_at = plan.dB_at + (dB ? plan.splits * columns * plan.ranks : 0);
  plan.dyz_at = plan.db_at + (db ? plan.splits * columns : 0);
  plan.bytes = (plan.dyz_at + (dyz ? plan.splits * columns : 0)) * (dtype == DType::float64 ? 8 : 4);
  return plan;
}

inline BackwardPlan backward_plan(const LowRankBackward& a) {
  return backward_plan(a.rows, a.columns, a.r, a.dtype, a.u, a.dB, a.db, a.dyz, a.gdy);
}

// Enough for either form: which one runs depends on the GPU.
inline int64_t workspace_bytes(const LowRankBackward& a) {
  const int64_t bytes = backward_plan(a).bytes, wgmma = wgmma_takes(a) ? wgmma_plan(a.rows, a.columns, a.r).bytes : 0;
  return bytes > wgmma ? bytes : wgmma;
}

}  // namespace spectral_ops::cuda
