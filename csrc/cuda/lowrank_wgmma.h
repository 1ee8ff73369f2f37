// lowrank_backward on Hopper for up to 64 ranks: how it splits work and the workspace it takes, functions of the sizes alone.
#pragma once

#include "../ops/lowrank.h"

namespace spectral_ops::cuda {

// A block owns tile_columns columns of dy and sweeps over split_rows of its rows, 64 at a time. Its cluster adds u over the
// blocks' columns. Partial sums are left of u for each of `groups` clusters side by side, and of dB for each of the splits.
struct WgmmaPlan {
  int64_t tile_columns, groups;
  int64_t split_rows, splits;
  int64_t pitch;  // of partial sums: r, rounded up to 4
  int64_t dB_at;  // in the workspace, in elements; u starts at 0
  int64_t bytes;
};

constexpr int kWgmmaCluster = 4;
// Clusters of four that an H100 holds at once, one block to a multiprocessor: its larger parts have 18, of which 16 are used.
constexpr int64_t kWgmmaClusters = 32;

inline WgmmaPlan wgmma_plan(int64_t rows, int64_t columns, int64_t r) {
  WgmmaPlan plan{};
  plan.groups = 1;  // a power of two, so that groups x splits fill the GPU
  while (plan.groups * kWgmmaCluster * 512 < columns) plan.groups *= 2;
  const int64_t blocks = plan.groups * kWgmmaCluster;
  plan.tile_columns = ((columns + blocks - 1) / blocks + 63) / 64 * 64;
  plan.groups = (columns + kWgmmaCluster * plan.tile_columns - 1) / (kWgmmaCluster * plan.tile_columns);
  int64_t splits = kWgmmaClusters / plan.groups;
  const int64_t most = (rows + 255) / 256;  // four steps at least
  if (splits > most) splits = most;
  if (splits < 1) splits = 1;
  plan.split_rows = ((rows + splits - 1) / splits + 63) / 64 * 64;
  plan.splits = (rows + plan.split_rows - 1) / plan.split_rows;
  plan.pitch = (r + 3) / 4 * 4;
  plan.dB_at = plan.groups * rows * plan.pitch;
  plan.bytes = 4 * (plan.dB_at + plan.splits * columns * plan.pitch);
  return plan;
}

// Whether the form takes these arguments: u and dB alone, rows that can be read 16 bytes at a time.
inline bool wgmma_takes(const LowRankBackward& a) {
  const auto aligned = [](const void* p, int64_t stride) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 8 == 0; };
  return (a.dtype == DType::bfloat16 || a.dtype == DType::float16) && a.r > 32 && a.r <= 64 && a.rows > 0 && a.columns > 0 &&
         a.u && a.dB && !a.db && !a.dyz && !a.gdy && aligned(a.dy, a.dy_stride) && aligned(a.h, a.h_stride);
}

#if defined(__CUDACC__) || defined(USE_CUDA) || defined(SPECTRAL_OPS_EMULATE)
// Whether the current device runs it (one of compute capability 9.0, with the extension compiled for 9.0a).
bool wgmma_runs(DType dtype);
// As lowrank_backward, with wgmma_plan(...).bytes of workspace, where wgmma_takes(a) and wgmma_runs(a.dtype).
cudaError_t lowrank_backward_wgmma(const LowRankBackward& a, cudaStream_t stream);
#endif

}  // namespace spectral_ops::cuda
