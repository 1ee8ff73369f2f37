// Products with a skinny factor [., r]: the plans that the CPU kernels of lowrank, dora, dropout and segments share.
//
// A Pass (lowrank_backward.cpp) reads x [rows, columns] once, in tiles that stay in cache. It multiplies each from both sides:
//   rows_sum [rows, r] = x M, M [columns, r]     columns_sum [columns, r] = xᵀ H, H [rows, r]     and plain column sums.
// A Lift (lowrank_update.cpp) updates out [rows, columns] in place by h Mᵀ. Which task adds what, and in which order, depends
// on the sizes only, so that results do not depend on the number of threads.
#pragma once

#include "../ops/lowrank.h"
#include "matrix.h"
#ifdef SPECTRAL_OPS_HOST
#include "run.h"
#endif

namespace spectral_ops::cpu {

// How many chunks rows and columns are split into: chunks of rows cost partial sums for every column and vice versa.
struct Chunks {
  int64_t row_tiles, column_tiles;  // of a chunk
  int64_t rows, columns;            // number of chunks
};

inline Chunks chunks(int64_t rows, int64_t columns, bool sums_over_columns, bool sums_over_rows) {
  const int64_t row_tiles = at_least_one(tiles(rows)), column_tiles = at_least_one(tiles(columns));
  const int64_t most = smaller(at_least_one(row_tiles * column_tiles / 16), 64);
  int64_t by_row = 1, by_column = 1;
  while (by_row * by_column < most) {
    const bool can_row = 2 * by_row <= row_tiles, can_column = 2 * by_column <= column_tiles;
    const int64_t row_cost = sums_over_rows ? by_row * columns : 0, column_cost = sums_over_columns ? by_column * rows : 0;
    const bool row = can_row && (!can_column || row_cost <= column_cost);
    if (!row && !can_column) break;
    if ((row ? row_cost : column_cost) > 0 && by_row * by_column >= 32) break;
    (row ? by_row : by_column) *= 2;
  }
  const int64_t r = (row_tiles + by_row - 1) / by_row, c = (column_tiles + by_column - 1) / by_column;
  return {r, c, (row_tiles + r - 1) / r, (column_tiles + c - 1) / c};
}

constexpr int64_t kSquareLanes = 16;  // partial sums of a row's squares

struct Pass {
  Matrix x;              // [rows, columns]
  Matrix m, h;           // [columns, r], [rows, r]
  Matrix y;              // [rows, columns] in x's dtype, unit inner stride
  Matrix g, bias;        // [1, columns]
  void* scaled = nullptr;  // gets g * x, contiguous in x's dtype
  bool column_sums = false, square = false;  // sums over rows of x, or of x²
  bool row_squares = false;
  const int64_t* seed = nullptr;
  double p = 0;
  int64_t rows = 0, columns = 0, r = 0;

  // Outputs of finish, each unless null. scale multiplies the products, not the sums.
  double scale = 1;
  void* row_product = nullptr;  // [rows, row_product_stride] in row_product_dtype; zero from column r on
  int64_t row_product_stride = 0;
  DType row_product_dtype = DType::float32;
  void* column_product = nullptr;  // accumulator dtype
  int64_t column_product_row = 0, column_product_column = 1;
  void *sums = nullptr, *y_sums = nullptr;  // [columns], accumulator dtype: sums over rows of x, of x * (y - bias)

  // Laid out by plan, in accumulator dtype.
  int64_t width = 0, padded_columns = 0;
  Chunks split{};
  const void *packed_m = nullptr, *packed_h = nullptr, *packed_g = nullptr, *packed_bias = nullptr;
  int64_t m_stride = 0, h_stride = 0;
  void *rows_part = nullptr;     // [split.columns, rows, width]
  void *columns_part = nullptr;  // [split.rows, padded_columns, width]
  void *sums_part = nullptr, *y_sums_part = nullptr;  // [split.rows, padded_columns]
  void *squares_part = nullptr;                       // [split.columns, rows, kSquareLanes]

  int64_t pack_tasks() const { return tiles(columns) + tiles(rows); }
  int64_t tile_tasks() const { return split.rows * split.columns; }
  int64_t finish_tasks() const { return tiles(rows) + tiles(columns); }

  // A factor already in the layout that packing would give is read where it is.
  bool is_packed(const Matrix& factor) const {
    return factor.dtype == accumulator(x.dtype) && factor.column == 1 && !factor.pick && width == r;
  }

  void plan(Arena& arena) {
    const int64_t size = accumulator_size(x.dtype);
    width = padded_rank(r);
    padded_columns = tiles(columns) * kTile;
    split = chunks(rows, columns, m.data || row_squares, h.data || column_sums || y.data);
    if (m.data) {
      m_stride = is_packed(m) ? m.row : width;
      packed_m = is_packed(m) ? m.data : arena.take(size * columns * width);
      rows_part = arena.take(size * split.columns * rows * width);
    }
    if (h.data) {
      h_stride = is_packed(h) ? h.row : width;
      packed_h = is_packed(h) ? h.data : arena.take(size * rows * width);
      columns_part = arena.take(size * split.rows * padded_columns * width);
    }
    if (g.data) packed_g = arena.take(size * padded_columns);
    if (bias.data) packed_bias = arena.take(size * padded_columns);
    if (column_sums) sums_part = arena.take(size * split.rows * padded_columns);
    if (y.data) y_sums_part = arena.take(size * split.rows * padded_columns);
    if (row_squares) squares_part = arena.take(size * split.columns * rows * kSquareLanes);
  }
};

struct Lift {
  void* out = nullptr;  // [rows, columns], unit inner stride
  int64_t out_stride = 0;
  const int64_t* places = nullptr;  // row t of out is row places[t]
  DType dtype = DType::float32;
  Matrix h, m;      // [rows, r], [columns, r]
  Matrix g, shift;  // [1, columns]
  const int64_t* seed = nullptr;
  double p = 0, scale = 1;
  int64_t rows = 0, columns = 0, r = 0;

  // Laid out by plan, in accumulator dtype.
  int64_t chunk_columns = 0, h_stride = 0;
  const void* packed_h = nullptr;
  void* panels = nullptr;  // [tiles(columns), r, kTile]
  void *packed_g = nullptr, *packed_shift = nullptr;

  int64_t pack_tasks() const { return tiles(columns) + tiles(rows); }
  int64_t tile_tasks() const { return tiles(rows) * ((columns + chunk_columns - 1) / chunk_columns); }

  void plan(Arena& arena) {
    const int64_t size = accumulator_size(dtype);
    chunk_columns = 4 * kTile;
    const bool direct = h.dtype == accumulator(dtype) && h.column == 1;
    h_stride = direct ? h.row : r;
    packed_h = direct ? h.data : arena.take(size * rows * r);
    panels = arena.take(size * tiles(columns) * r * kTile);
    if (g.data) packed_g = arena.take(size * tiles(columns) * kTile);
    if (shift.data) packed_shift = arena.take(size * tiles(columns) * kTile);
  }
};

// The steps of a plan, as the arguments of their kernels.
struct PassPack { const Pass& pass; };
struct PassTiles { const Pass& pass; };
struct PassFinish { const Pass& pass; };
struct LiftPack { const Lift& lift; };
struct LiftTiles { const Lift& lift; };

// All of LowRankBackward in one thread and one go, without packing or partial sums: for work that takes less than those.
struct SmallBackward {
  static constexpr int64_t kWork = 1 << 15, kRank = 64;
  const LowRankBackward& backward;

  static bool fits(const LowRankBackward& a) { return a.r <= kRank && a.rows * a.columns * (a.r + 4) <= kWork; }
};

SPECTRAL_OPS_CPU_KERNEL(pass_pack, PassPack)
SPECTRAL_OPS_CPU_KERNEL(pass_tiles, PassTiles)
SPECTRAL_OPS_CPU_KERNEL(pass_finish, PassFinish)
SPECTRAL_OPS_CPU_KERNEL(lift_pack, LiftPack)
SPECTRAL_OPS_CPU_KERNEL(lift_tiles, LiftTiles)
SPECTRAL_OPS_CPU_KERNEL(small_backward, SmallBackward)

#ifdef SPECTRAL_OPS_HOST

inline void pack_and_add(const Pass& pass) {
  in_parallel(PassPack{pass}, pass.pack_tasks(), 8);
  in_parallel(PassTiles{pass}, pass.tile_tasks(), grain_of(pass.tile_tasks(), pass.rows * pass.columns * (pass.width + 4)));
}

inline void finish(const Pass& pass) { in_parallel(PassFinish{pass}, pass.finish_tasks(), 4); }

inline void run_products(Pass& pass, const Tensor& like) {
  const Tensor memory = lay_out(pass, like);
  pack_and_add(pass);
  finish(pass);
}

inline void run_lift(Lift& lift, const Tensor& like) {
  const Tensor memory = lay_out(lift, like);
  in_parallel(LiftPack{lift}, lift.pack_tasks(), 8);
  in_parallel(LiftTiles{lift}, lift.tile_tasks(), grain_of(lift.tile_tasks(), lift.rows * lift.columns * (lift.r + 4)));
}

inline void run(const LowRankUpdate& a, const Tensor& like) {
  const DType wide = accumulator(a.dtype);
  Lift lift;
  lift.out = a.out, lift.out_stride = a.out_stride, lift.dtype = a.dtype;
  lift.h = matrix(a.h, a.h_stride, 1, a.dtype), lift.m = matrix(a.B, a.B_stride, 1, a.dtype);
  lift.g = {a.g, 0, 1, wide}, lift.shift = {a.shift, 0, 1, wide};
  lift.scale = a.scale;
  lift.rows = a.rows, lift.columns = a.columns, lift.r = a.r;
  run_lift(lift, like);
}

inline void run(const LowRankBackward& a, const Tensor& like) {
  if (SmallBackward::fits(a)) {
    const SmallBackward small{a};
    return kernel_for(small)(small, 0, 1);
  }
  Pass pass;
  pass.x = matrix(a.dy, a.dy_stride, 1, a.dtype);
  if (a.u) pass.m = matrix(a.B, a.B_stride, 1, a.dtype);
  if (a.dB) pass.h = matrix(a.h, a.h_stride, 1, a.dtype);
  if (a.dyz) pass.y = matrix(a.y, a.y_stride, 1, a.dtype), pass.bias = {a.bias, 0, 1, a.bias_dtype};
  pass.g = {a.g, 0, 1, a.g_dtype};
  pass.scaled = a.gdy;
  pass.column_sums = a.db != nullptr;
  pass.rows = a.rows, pass.columns = a.columns, pass.r = a.r;
  pass.scale = a.scale;
  pass.row_product = a.u, pass.row_product_stride = a.r, pass.row_product_dtype = a.dtype;
  pass.column_product = a.dB, pass.column_product_row = a.r;
  pass.sums = a.db, pass.y_sums = a.dyz;
  run_products(pass, like);
}

#endif

}  // namespace spectral_ops::cpu
