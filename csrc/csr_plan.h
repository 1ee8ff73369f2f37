// How the sparse kernels split their work, as plain functions that the tests call too; free of torch. Static, because each
// instruction set must have its own copy (csrc/cpu/common.h).
#pragma once

#include <cstdint>

namespace spectral_ops {

constexpr int64_t kEntriesPerThread = 4096;  // at least, where each is one load and one store

// The row that entry p is in: the last one that starts at or before it. row_offsets [rows + 1], the last beyond p.
static inline int64_t row_of_entry(const int32_t* row_offsets, int64_t rows, int64_t p) {
  int64_t low = 0, high = rows;  // row_offsets[low] <= p < row_offsets[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (row_offsets[middle] <= p ? low : high) = middle;
  }
  return low;
}

}  // namespace spectral_ops
