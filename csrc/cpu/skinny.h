// Products with a skinny factor [., r]: the plans that the CPU kernels of lowrank, dora and dropout share, free of torch.
//
// A Pass reads x [rows, columns] once, in tiles that stay in cache, and multiplies each tile from both sides:
//   rows_sum [rows, r] = x M, M [columns, r]     columns_sum [columns, r] = xᵀ H, H [rows, r]     and plain column sums.
// A Lift updates out [rows, columns] in place by h Mᵀ. Which task adds what, and in which order, depends on the sizes only,
// so that results do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../arguments.h"

namespace spectral_ops::cpu {

constexpr int64_t kTile = 64;         // rows and columns of a tile
constexpr int64_t kSquareLanes = 16;  // partial sums of a row's squares

inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
inline int64_t at_least_one(int64_t n) { return n > 0 ? n : 1; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t accumulator_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }
inline DType accumulator(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// Lanes that a row of a packed skinny factor takes.
inline int64_t padded_rank(int64_t r) { return r == 0 ? 0 : r <= 4 ? 4 : r <= 8 ? 8 : (r + 15) / 16 * 16; }

// Any matrix: element (i, j) is at i * row + j * column; with pick, column j is column pick[j]. Null data: absent.
struct Matrix {
  const void* data = nullptr;
  int64_t row = 0, column = 1;
  DType dtype = DType::float32;
  const int64_t* pick = nullptr;

  Matrix transposed() const { return {data, column, row, dtype, nullptr}; }
};

// A matrix that is there; an empty one may come with a null pointer.
inline Matrix matrix(const void* data, int64_t row, int64_t column, DType dtype, const int64_t* pick = nullptr) {
  static constexpr double empty = 0;
  return {data ? data : &empty, row, column, dtype, pick};
}

// Hands out consecutive aligned pieces of a workspace; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  void* take(int64_t bytes) {
    void* piece = base ? base + used : nullptr;
    used += (bytes + 63) / 64 * 64;
    return piece;
  }
};

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

  // What finish writes, where not null: scale times the products, and the sums.
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

// norm from the sums of a pass over W, or over Wᵀ (then by_columns). Tasks take kTile rows of W.
struct NormFinish {
  const ColumnNorm& norm;
  const Pass& pass;
  bool by_columns;
  const void* gram;  // A Aᵀ [r, r], accumulator dtype
  void* packed_B;    // [rows, r], room for B in accumulator dtype

  static int64_t tasks(const ColumnNorm& a) { return tiles(a.rows); }
};

// parts[2 * task] and the next are a task's share of the fingerprint of a [rows, columns], whose elements count from first.
struct Fingerprint {
  static constexpr int64_t kElements = 4096;  // of a task
  Matrix a;
  int64_t rows, columns, first;
  uint64_t* parts;

  int64_t tasks() const { return (rows * columns + kElements - 1) / kElements; }
};

// dm of every column by division, and which columns m has erased.
struct MagnitudeDivide {
  const MagnitudeGrad& magnitude;
  unsigned char* vanishing;  // [columns]
};

// dm of the columns pick [count], from z [rows, count] = x W_oᵀ in accumulator dtype.
struct MagnitudeExact {
  const MagnitudeGrad& magnitude;
  const void* z;
  const int64_t* pick;
  int64_t count;
};

}  // namespace spectral_ops::cpu
