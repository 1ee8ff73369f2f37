// How DoRA's CUDA kernels split work and how much workspace that takes: functions of the sizes alone, not of the GPU, so that
// results are the same on every GPU and tests can call them without one.
#pragma once

#include <cstdint>

#include "../ops/dora.h"

namespace spectral_ops::cuda {

constexpr int64_t kProcessors = 132;  // of the GPU that the plans are made for

// column_norm: a first kernel leaves a copy of A as the second wants it, and partial sums of A Aᵀ. Blocks of tile_rows rows
// and split_columns columns of W then leave partial sums of W Aᵀ and ‖W‖², further blocks add up A Aᵀ. A third kernel adds up
// the rest. With a fingerprint, stamps[2 * kStampBlocks] and a flag follow.
struct NormPlan {
  bool matrix_units;
  int64_t ranks;  // worked on in one pass over W
  int64_t rank_pitch;  // of the products, whose last ones may be zero
  int64_t tile_rows, row_tiles;
  int64_t split_columns, splits;
  int64_t square_at, gram_at, gram_parts_at;  // elements; the products start at 0
  int64_t gram_columns, gram_splits, gram_blocks;
  int64_t pitch, factor_at;  // A's copy: elements of a row, zero beyond A, and its first byte
  int64_t stamp_at;          // bytes
  int64_t bytes;
};

constexpr int64_t kNormSplits = 32;  // at most
constexpr int64_t kStampBlocks = 256;
constexpr int64_t kGramPiece = 128;  // columns of A at once
constexpr int64_t kGramSums = 1024;  // elements of A Aᵀ that a block adds up

// wide: rows of W can be read 16 bytes at a time, to their end.
inline NormPlan norm_plan(int64_t rows, int64_t columns, int64_t r, DType dtype, bool wide, bool stamp) {
  const auto over = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  NormPlan plan{};
  plan.matrix_units = (dtype == DType::bfloat16 || dtype == DType::float16) && wide;
  plan.ranks = r < 64 ? r : 64;
  plan.rank_pitch = over(r, 4) * 4;
  plan.tile_rows = !plan.matrix_units ? 64 : plan.ranks <= 32 ? 128 : 256;
  plan.row_tiles = over(rows, plan.tile_rows);
  const int64_t rank_tiles = over(r, 64) > 1 ? over(r, 64) : 1, gram_size = 64 * 64 * rank_tiles * rank_tiles;
  plan.gram_blocks = gram_size / kGramSums;
  const int64_t slots = plan.tile_rows == 256 ? kProcessors : 2 * kProcessors;
  int64_t least = INT64_MAX;  // waves of blocks, by the columns of one and what it costs besides
  for (int64_t n = 1; n <= kNormSplits; ++n) {
    const int64_t split = over(over(columns, 64), n) * 64;
    if (n > 1 && split < 128) break;
    const int64_t cost = over(plan.row_tiles * n * rank_tiles + plan.gram_blocks, slots) * (split + plan.ranks + 32);
    if (cost < least) least = cost, plan.split_columns = split;
  }
  if (plan.split_columns < 64) plan.split_columns = 64;
  plan.splits = columns > 0 ? over(columns, plan.split_columns) : 1;
  const int64_t size = dtype == DType::float64 ? 8 : 4, pieces = columns > 0 ? over(columns, kGramPiece) : 1;
  int64_t gram_splits = r > 0 ? (1 << 18) / (r * r) : 1;
  gram_splits = gram_splits < 1 ? 1 : gram_splits < pieces ? gram_splits : pieces;
  plan.gram_columns = over(pieces, gram_splits) * kGramPiece;
  plan.gram_splits = over(pieces * kGramPiece, plan.gram_columns);
  plan.pitch = pieces * kGramPiece;
  plan.square_at = plan.splits * rows * plan.rank_pitch;
  plan.gram_at = over(plan.square_at + plan.splits * rows, 4) * 4;
  plan.gram_parts_at = plan.gram_at + gram_size;
  plan.factor_at = over((plan.gram_parts_at + plan.gram_splits * r * r) * size, 16) * 16;
  plan.stamp_at = plan.factor_at + r * plan.pitch * (plan.matrix_units ? 4 : size);  // 4: two 16-bit values
  plan.bytes = plan.stamp_at + (stamp ? 8 * (2 * kStampBlocks + 1) : 0);
  return plan;
}

inline NormPlan norm_plan(const ColumnNorm& a) {
  const int64_t size = element_size(a.dtype);
  const bool wide = (a.weight_strides[1] == 1 || a.columns <= 1) && reinterpret_cast<uintptr_t>(a.weight) % 16 == 0 &&
                    a.weight_strides[0] * size % 16 == 0 && a.columns * size % 16 == 0;
  return norm_plan(a.rows, a.columns, a.r, a.dtype, wide, a.stamp);
}

inline int64_t workspace_bytes(const ColumnNorm& a) { return norm_plan(a).bytes; }

// magnitude_grad: blocks of split_rows rows of dy leave partial sums of dm where m vanishes, [splits, columns].
struct MagnitudePlan {
  int64_t split_rows, splits, bytes;
};

constexpr int64_t kMagnitudeRows = 32;  // that a block works on at once

inline MagnitudePlan magnitude_plan(int64_t rows, int64_t columns, DType dtype) {
  MagnitudePlan plan{};
  plan.split_rows = (rows + kProcessors * kMagnitudeRows - 1) / (kProcessors * kMagnitudeRows) * kMagnitudeRows;
  plan.splits = rows > 0 ? (rows + plan.split_rows - 1) / plan.split_rows : 0;
  plan.bytes = plan.splits * columns * (dtype == DType::float64 ? 8 : 4);
  return plan;
}

inline int64_t workspace_bytes(const MagnitudeGrad& a) { return magnitude_plan(a.rows, a.columns, a.dtype).bytes; }

}  // namespace spectral_ops::cuda
