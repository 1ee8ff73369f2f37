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

// The row that part `part` of `parts` begins with, where a row costs one more than it has entries.
static inline int64_t row_share(const int32_t* row_offsets, int64_t rows, int64_t parts, int64_t part) {
  const int64_t wanted = (row_offsets[rows] - row_offsets[0] + rows) * part / parts;
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (row_offsets[middle] - row_offsets[0] + middle < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The entry that it begins with, where entries are shared out: a multiple of 16.
static inline int64_t entry_share(int64_t nnz, int64_t parts, int64_t part) {
  return part == parts ? nnz : (nnz / 16) * part / parts * 16;
}

// Tokens are the lanes of the sparse products: a slab is x of some tokens, transposed to [k, lanes], so that an entry
// costs a few vector operations for all of them. It should stay in a core's cache while every entry is worked through.
// Slabs g, g + groups, ... form group g, which sums of tokens are taken over first. All this depends on the sizes only.
struct Slabs {
  int64_t lanes;      // 4, 16, 32 or 64
  int64_t per_lane;   // tokens in one: two of bf16, where the kernel takes pairs
  int64_t columns;    // k
  int64_t count, groups;
  int64_t size;       // bytes of a lane

  int64_t bytes() const { return columns * lanes * size; }
};

constexpr int64_t kSlabBytes = 1 << 18, kMostLanes = 64, kGroups = 16;

static inline Slabs slabs_of(int64_t tokens, int64_t columns, int64_t size, int64_t per_lane, int64_t most_groups = kGroups) {
  int64_t lanes = tokens <= 2 ? 4 : 16;  // fewer than 16 cannot be transposed by whole vectors
  while (lanes >= 16 && lanes < kMostLanes && lanes * per_lane < tokens && 2 * lanes * size * columns <= kSlabBytes) lanes *= 2;
  const int64_t count = (tokens + lanes * per_lane - 1) / (lanes * per_lane);
  const int64_t groups = count < most_groups ? count : most_groups;
  return {lanes, per_lane, columns, count, groups < 1 ? 1 : groups, size};
}

}  // namespace spectral_ops
