// How DoRA's CUDA kernels split work and how much workspace that takes: functions of the sizes alone, not of the GPU, so that
// results are the same on every GPU and tests can call them without one.
#pragma once

#include "../ops/dora.h"

namespace spectral_ops::cuda {

// column_norm: blocks of tile_rows rows and split_columns columns of W leave partial sums of W Aᵀ and ‖W‖²; further blocks
// form A Aᵀ; a second kernel adds them up. With a fingerprint, stamps[2 * kStampBlocks] and a flag follow.
struct NormPlan {
  bool matrix_units;
  int64_t ranks;  // worked on in one pass over W
  int64_t tile_rows, row_tiles;
  int64_t split_columns, splits;
  int64_t square_at, gram_at;  // elements; the products start at 0
  int64_t stamp_at;            // bytes
  int64_t bytes;
};

constexpr int64_t kStampBlocks = 64;
constexpr int64_t kNormPiece = 128;  // columns whose A is in shared memory at once

inline NormPlan norm_plan(int64_t rows, int64_t columns, int64_t r, DType dtype, bool unit_columns, bool stamp) {
  NormPlan plan{};
  plan.matrix_units = (dtype == DType::bfloat16 || dtype == DType::float16) && unit_columns;
  plan.ranks = r < 64 ? r : 64;
  plan.tile_rows = plan.matrix_units ? 128 : 64;
  plan.row_tiles = (rows + plan.tile_rows - 1) / plan.tile_rows;
  const int64_t pieces = (columns + kNormPiece - 1) / kNormPiece;
  int64_t splits = plan.row_tiles > 0 ? (2 * 132 + plan.row_tiles - 1) / plan.row_tiles : 1;
  if (splits > pieces) splits = pieces;
  if (splits > 16) splits = 16;
  if (splits < 1) splits = 1;
  plan.split_columns = (pieces + splits - 1) / splits * kNormPiece;
  if (plan.split_columns < kNormPiece) plan.split_columns = kNormPiece;
  plan.splits = pieces > 0 ? (columns + plan.split_columns - 1) / plan.split_columns : 1;
  const int64_t size = dtype == DType::float64 ? 8 : 4;
  plan.square_at = plan.splits * rows * r;
  plan.gram_at = plan.square_at + plan.splits * rows;
  plan.stamp_at = ((plan.gram_at + r * r) * size + 7) / 8 * 8;
  plan.bytes = plan.stamp_at + (stamp ? 8 * (2 * kStampBlocks + 1) : 0);
  return plan;
}

inline NormPlan norm_plan(const ColumnNorm& a) {
  return norm_plan(a.rows, a.columns, a.r, a.dtype, a.weight_strides[1] == 1 || a.columns <= 1, a.stamp);
}

inline int64_t workspace_bytes(const ColumnNorm& a) { return norm_plan(a).bytes; }

}  // namespace spectral_ops::cuda
