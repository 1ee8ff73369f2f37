// The product over two segments on Hopper: which arguments it takes, and where it runs.
#pragma once

#include "../ops/lowrank.h"

namespace spectral_ops::cuda {

constexpr int64_t kMatmulRanks = 256;  // at most

// Whether TMA reads a matrix [rows, columns] of 16-bit elements: one of its strides is 1 and the other, over `lines` lines, a
// multiple of 16 bytes.
inline bool matmul_rows(const void* data, int64_t stride, int64_t lines, int64_t length) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (lines <= 1 || (stride % 8 == 0 && stride >= length));
}
inline bool matmul_operand(const void* data, const int64_t (&strides)[2], int64_t rows, int64_t columns) {
  return (strides[1] == 1 && matmul_rows(data, strides[0], rows, columns)) ||
         (strides[0] == 1 && matmul_rows(data, strides[1], columns, rows));
}

// Whether the kernel takes these arguments, on a device that runs it.
inline bool matmul_takes(const LowRankMatmul& a) {
  constexpr int64_t most = INT32_MAX - (1 << 20);  // coordinates are 32 bits wide
  if (a.dtype != DType::bfloat16 && a.dtype != DType::float16) return false;
  if (a.rows < 1 || a.columns < 1 || a.inner < 1 || a.rows > most || a.columns > most || a.inner > most) return false;
  if (a.r < 0 || a.r > kMatmulRanks || (a.tile && a.period < 1)) return false;
  if (!matmul_rows(a.y, a.y_stride, a.rows, a.columns) || !matmul_rows(a.x, a.x_stride, a.rows, a.inner)) return false;
  if (!matmul_operand(a.W, a.W_strides, a.columns, a.inner)) return false;
  return a.r == 0 || (matmul_rows(a.h, a.h_stride, a.rows, a.r) && matmul_operand(a.B, a.B_strides, a.columns, a.r));
}

#if defined(__CUDACC__) || defined(USE_CUDA) || defined(SPECTRAL_OPS_EMULATE)
// Whether the current device runs it (one of compute capability 9.0, with the extension compiled for 9.0a).
bool matmul_runs(DType dtype);
#endif

}  // namespace spectral_ops::cuda
