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

constexpr int64_t kBatSlots = 132;  // multiprocessors of an H100
constexpr int kWeightWarps = 6;
constexpr int64_t kMostItems = 1 << 30;  // that are counted in 32 bits

// bat_weight_ on the tensor cores: `parts` thread blocks share the items of all blocks of bat, for each panel of tile columns.
// All of them run at once, two on a multiprocessor.
struct WeightPlan {
  bool matrix_units;
  int64_t tile, panels;
  int64_t groups, items;  // groups: of the blocks of W that meet one block of bat; an item is 16 rows of one
  int64_t parts, shared;  // bytes
};

inline WeightPlan weight_plan(int64_t blocks, int64_t others, int64_t r, int64_t bat_parts) {
  WeightPlan plan{};
  if (r % 16 != 0) return plan;
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  plan.tile = block_tile_of(r), plan.panels = r / plan.tile;
  plan.groups = ceil(others, 64 / plan.tile), plan.items = blocks * (r / 16) * plan.groups;
  const int64_t slots = 2 * kBatSlots / plan.panels;
  const int64_t most = ceil(plan.items, 2 * kWeightWarps);  // two turns of each warp, at least
  plan.parts = slots < 1 ? 1 : slots < most ? slots : most;
  plan.shared = r * plan.tile * 2 * bat_parts;
  plan.matrix_units = plan.shared <= 96 * 1024 && plan.items <= kMostItems;
  return plan;
}

// bat_contract_: a tile of a block's dB is a sum over the `columns` rows of length r that the blocks W(o,j) of a block-row have
// together, in steps of 16 rows. `grid` thread blocks take `share` steps each, those of one tile after those of another, and
// leave a partial sum for every tile that they met; a second kernel adds the partial sums of each tile.
struct ContractPlan {
  bool matrix_units;
  int64_t tile, tiles;   // tiles of tile x tile, of all blocks
  int64_t steps, share;  // steps of a tile
  int64_t grid, splits;  // splits: thread blocks that meet one tile, at most
  int64_t bytes;
};

inline ContractPlan contract_plan(int64_t rows, int64_t columns, int64_t r, DType dtype, bool aligned) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto tiles = [&](int64_t tile) { return rows / r * ceil(r, tile) * ceil(r, tile); };
  ContractPlan plan{};
  plan.steps = ceil(columns, 16);
  plan.matrix_units = (dtype == DType::bfloat16 || dtype == DType::float16) && aligned && r % 16 == 0 &&
                      tiles(block_tile_of(r)) * plan.steps <= kMostItems;
  plan.tile = plan.matrix_units ? block_tile_of(r) : r <= 16 ? 16 : 64;
  plan.tiles = tiles(plan.tile);
  const int64_t total = plan.tiles * plan.steps;
  plan.share = ceil(total, plan.matrix_units && plan.tile == 64 ? kBatSlots : 2 * kBatSlots);
  if (plan.share < 16) plan.share = 16;  // two turns of each of eight warps, at least
  if (plan.steps > 0) {
    // A share that ends where a tile does saves partial sums: taken if it is hardly larger.
    const int64_t cut = plan.share < plan.steps ? ceil(plan.steps, plan.steps / plan.share)
                                                : ceil(plan.share, plan.steps) * plan.steps;
    if (16 * cut <= 17 * plan.share) plan.share = cut;
    plan.splits = plan.share % plan.steps == 0 ? 1 : ceil(plan.steps, plan.share) + (plan.steps % plan.share != 0);
  }
  plan.grid = ceil(total, plan.share);
  plan.bytes = plan.splits * plan.tiles * plan.tile * plan.tile * (dtype == DType::float64 ? 8 : 4);
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
