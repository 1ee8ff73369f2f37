// Matrices, tiles of them and workspaces, as the plans of the CPU kernels know them; free of torch.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace spectral_ops::cpu {

constexpr int64_t kTile = 64;  // rows and columns of a tile

inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
inline int64_t at_least_one(int64_t n) { return n > 0 ? n : 1; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t accumulator_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }
inline DType accumulator(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// Lanes that a row of a packed skinny factor takes.
inline int64_t padded_rank(int64_t r) { return r == 0 ? 0 : r <= 4 ? 4 : r <= 8 ? 8 : (r + 15) / 16 * 16; }

// Any matrix: element (i, j) is at i * row + j * column. With pick, column j is column pick[j]; with places, which load_tile
// and load_pairs alone know, row i is row places[i]. Without data there is none.
struct Matrix {
  const void* data = nullptr;
  int64_t row = 0, column = 1;
  DType dtype = DType::float32;
  const int64_t* pick = nullptr;
  const int64_t* places = nullptr;

  Matrix transposed() const { return {data, column, row, dtype, nullptr}; }
  int64_t row_start(int64_t i) const { return (places ? places[i] : i) * row; }
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

}  // namespace spectral_ops::cpu
