// How Bat's CUDA kernels split work and how much workspace that takes: functions of the sizes alone, not of the GPU, so that
// results are the same on every GPU and tests can call them without one.
#pragma once

#include "../ops/bat.h"

namespace spectral_ops::cuda {

// The side of the tiles of an r x r block. On the tensor cores r is a multiple of 16, so that every tile is whole.
inline int64_t block_tile_of(int64_t r) { return r % 64 == 0 ? 64 : r % 32 == 0 ? 32 : 16; }

// Whether four neighbours of a row, from a multiple of four on, can be read at once.
inline bool aligned_fours(const void* p, const int64_t (&strides)[2], int64_t element_size) {
  return strides[1] == 1 && strides[0] % 4 == 0 && reinterpret_cast<uintptr_t>(p) % (4 * static_cast<uintptr_t>(element_size)) == 0;
}

// bat_contract_: tiles of tile x tile of each block's dB, each for split_rows of the `columns` rows of length r that the
// blocks W(o,j) of a block-row have together.
struct ContractPlan {
  bool matrix_units;
  int64_t tile, tiles;         // of a block
  int64_t split_rows, splits;  // 0 splits without columns
  int64_t bytes;
};

inline ContractPlan contract_plan(int64_t rows, int64_t columns, int64_t r, DType dtype, bool aligned) {
  ContractPlan plan{};
  plan.matrix_units = (dtype == DType::bfloat16 || dtype == DType::float16) && aligned && r % 16 == 0;
  plan.tile = plan.matrix_units ? block_tile_of(r) : r <= 16 ? 16 : 64;
  plan.tiles = ((r + plan.tile - 1) / plan.tile) * ((r + plan.tile - 1) / plan.tile);
  const int64_t blocks = rows / r * plan.tiles, steps = (columns + 15) / 16;
  int64_t splits = blocks > 0 ? (264 + blocks - 1) / blocks : 1;
  const int64_t most = (steps + 15) / 16;  // two turns of each of eight warps, at least
  if (splits > most) splits = most;
  plan.split_rows = splits > 0 ? (steps + splits - 1) / splits * 16 : 16;
  plan.splits = (columns + plan.split_rows - 1) / plan.split_rows;
  plan.bytes = plan.splits * rows * r * (dtype == DType::float64 ? 8 : 4);
  return plan;
}

inline ContractPlan contract_plan(const BatContract& a) {
  const int64_t G_strides[2] = {a.G_stride, 1};
  const int64_t size = element_size(a.dtype);
  const bool aligned = aligned_fours(a.weight, a.weight_strides, size) && aligned_fours(a.G, G_strides, a.G_dtype == a.dtype ? size : 4);
  return contract_plan(a.rows, a.columns, a.r, a.dtype, aligned);
}

inline int64_t workspace_bytes(const BatContract& a) { return contract_plan(a).bytes; }

}  // namespace spectral_ops::cuda
