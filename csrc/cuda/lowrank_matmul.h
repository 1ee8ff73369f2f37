// lowrank_matmul on Hopper: which arguments it takes, and how it splits work, functions of the sizes alone.
#pragma once

#include "../ops/lowrank.h"

namespace spectral_ops::cuda {

constexpr int kMatmulRows = 128, kMatmulColumns = 256, kMatmulDepth = 64;  // of y in a tile, and of one step
constexpr int kMatmulCluster = 2;                                          // blocks, whose tiles lie one above the other
constexpr int kMatmulRank = 256;                                           // the most

struct MatmulPlan {
  int64_t clusters_m, tiles_n;  // tiles of 256 rows, and of 256 columns
  int64_t clusters;             // of the grid
};

inline MatmulPlan matmul_plan(int64_t rows, int64_t columns, int64_t processors) {
  MatmulPlan plan{};
  plan.clusters_m = (rows + kMatmulCluster * kMatmulRows - 1) / (kMatmulCluster * kMatmulRows);
  plan.tiles_n = (columns + kMatmulColumns - 1) / kMatmulColumns;
  const int64_t fit = processors / kMatmulCluster > 1 ? processors / kMatmulCluster : 1;
  plan.clusters = plan.clusters_m * plan.tiles_n < fit ? plan.clusters_m * plan.tiles_n : fit;
  return plan;
}

// How a factor [n, k] lies: by rows of k, by columns (the transpose of one by rows), or in no way that the copy engine takes.
enum class Layout { rows, columns, other };

inline Layout layout_of(const void* p, const int64_t (&strides)[2], int64_t n, int64_t k) {
  const auto pitch = [&](int64_t stride, int64_t least) { return stride % 8 == 0 && stride >= least && stride < int64_t{1} << 38; };
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return Layout::other;
  if (strides[1] == 1 && pitch(strides[0], k)) return Layout::rows;
  if (strides[0] == 1 && pitch(strides[1], n)) return Layout::columns;
  return Layout::other;
}

// Whether the kernel takes these arguments: 16-bit elements in rows at multiples of 16 bytes, an even number of columns, whose g
// is float32 and whose bias is in dtype, both read two at a time.
inline bool matmul_takes(const LowRankMatmul& a) {
  const auto rows_of = [](const void* p, int64_t stride, int64_t columns) {
    const int64_t strides[2] = {stride, 1};
    return layout_of(p, strides, 1, columns) == Layout::rows;
  };
  const auto aligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  constexpr int64_t most = INT32_MAX - 1024;  // coordinates of the copy engine
  if (a.dtype != DType::bfloat16 && a.dtype != DType::float16) return false;
  if (a.rows < 1 || a.columns < 2 || a.columns % 2 || a.inner < 1 || a.r < 0 || a.r > kMatmulRank) return false;
  if (a.rows > most || a.columns > most || a.inner > most) return false;
  if (!rows_of(a.y, a.y_stride, a.columns) || !rows_of(a.x, a.x_stride, a.inner)) return false;
  if (layout_of(a.W, a.W_strides, a.columns, a.inner) == Layout::other) return false;
  if (a.r && (!rows_of(a.h, a.h_stride, a.r) || layout_of(a.B, a.B_strides, a.columns, a.r) == Layout::other)) return false;
  if (a.g && (a.g_dtype != DType::float32 || !aligned(a.g, 8))) return false;
  if (a.bias && (a.bias_dtype != a.dtype || !aligned(a.bias, 4))) return false;
  return !a.tile || (a.period >= 1 && a.period <= most);
}

#if defined(__CUDACC__) || defined(USE_CUDA) || defined(SPECTRAL_OPS_EMULATE)
// Whether the current device runs it (one of compute capability 9.0, with the extension compiled for 9.0a).
bool matmul_runs(DType dtype);
#endif

}  // namespace spectral_ops::cuda
