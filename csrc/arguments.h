// The arguments of every kernel, free of torch: what the host side (csrc/ops/) fills and csrc/cpu and csrc/cuda read.
#pragma once

#include <cstdint>

namespace spectral_ops {

enum class DType : int32_t { float64, float32, bfloat16, float16 };

// h [rows, r] = sums of drop(x) over shards, x [rows, columns]; both with unit inner stride.
// offsets [r + 1], or null for the cyclic map; seed [1], or null without dropout; both live where x lives.
struct BlockSum {
  const void* x;
  void* h;
  const int32_t* offsets;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t x_stride, h_stride;  // elements between rows
  DType dtype;                 // of x and h
};

// out [rows, columns] gets (accumulate: is increased by) mask * s[:, shard(i)], s [rows, r]; unit inner strides.
struct BlockTile {
  void* out;
  const void* s;
  const int32_t* offsets;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t out_stride, s_stride;  // elements between rows
  DType dtype, s_dtype;          // of out, of s
  bool accumulate;
};

}  // namespace spectral_ops
