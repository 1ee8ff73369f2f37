// The plans of Bat's CPU kernels, free of torch. As in skinny.h, which task adds what and in which order depends on the
// sizes only.
#pragma once

#include "skinny.h"

namespace spectral_ops::cpu {

// Columns in groups of r x r blocks: one where r fills a vector, else as many side by side as do, multiplied as one
// block-diagonal matrix. What is not finite in one block of a group then reaches the others in its row.
struct BlockGroups {
  int64_t r = 1, size = 1;  // of a block, of a group
  int64_t padded = 4;       // columns of a packed group
  int64_t count = 0, columns = 0;

  BlockGroups() = default;
  BlockGroups(int64_t columns, int64_t r)
      : r(r), size(at_least_one(smaller(16 / r, columns / r)) * r), padded(padded_rank(size)),
        count((columns + size - 1) / size), columns(columns) {}

  int64_t size_of(int64_t g) const { return smaller(size, columns - g * size); }
  int64_t panels() const { return tiles(padded) * size * kTile; }  // elements of a packed factor: see pack_panels
};

// Units (owner, part) of work, shared out to tasks.
struct BlockPlan {
  BlockGroups groups;
  int64_t owners = 0, parts = 1;
  int64_t tasks = 0, work = 0;  // multiply-adds of all tasks
  int64_t room = 0;             // bytes of workspace for whoever starts at a task
  char* memory = nullptr;       // [tasks, room], of which each thread touches one; null: room on its stack is enough
  void* partial = nullptr;      // what the parts of an owner add up to, one after the other

  static constexpr int64_t kSmallRoom = 1 << 16;

  // An owner can be cut into at most `most` parts.
  void divide(int64_t owners_, int64_t most, int64_t work_) {
    constexpr int64_t kUnits = 64, kWork = 1 << 22;
    owners = owners_, work = work_;
    parts = 1;
    if (owners > 0) parts = at_least_one(smaller(smaller(kUnits / owners, most), work / owners / kWork));
    tasks = smaller(owners * parts, kUnits);
  }
  int64_t first_unit(int64_t task) const { return owners * parts * task / tasks; }
};

inline int64_t part_begin(int64_t n, int64_t part, int64_t parts) { return n * part / parts; }

// The kernels' arguments.
struct BatWeightPass : BlockPlan {
  const BatWeight& bat;

  // Owners: block-rows, cut by rows; by column, groups.
  explicit BatWeightPass(const BatWeight& a) : bat(a) {
    groups = {a.columns, a.r};
    divide(a.by_column ? groups.count : a.columns ? a.rows / a.r : 0, a.by_column ? tiles(a.rows) : a.r,
           a.rows * a.columns * groups.size);
    room = accumulator_size(a.dtype) * (groups.panels() + a.r * groups.padded);
  }
};

constexpr int64_t kPairRows = 16;  // of pairs of bf16 groups that are multiplied at a time: with 32 the panels and sums fill L1

struct BatContractPass : BlockPlan {
  const BatContract& bat;

  // Owners: block-rows, cut by rows. partial: [parts, rows, r].
  explicit BatContractPass(const BatContract& a) : bat(a) {
    groups = {a.columns, a.r};
    divide(a.rows / a.r, a.r, a.rows * a.columns * groups.size);
    room = accumulator_size(a.dtype) * (groups.size + a.r) * groups.padded;
    if (a.dtype == DType::bfloat16) room += 2 * 4 * tiles(groups.padded) * kPairRows * kTile;
  }
};

// kTile tokens [first, first + count) at most, with features as rows: x is packed to turned [features, width].
struct BatMatmulPass : BlockPlan {
  const BatMatmul& bat;
  int64_t first, count, width;
  int64_t batch;  // groups that are worked on together
  void* turned = nullptr;

  // Owners: block-rows, cut by batches (transpose: batches, cut by block-rows). partial: [parts, features, width].
  BatMatmulPass(const BatMatmul& a, int64_t first) : bat(a), first(first), count(smaller(kTile, a.T - first)) {
    groups = {a.columns, a.r};
    width = padded_rank(count);
    constexpr int64_t kWork = 1 << 18;  // of an owner at least, as there are more than enough
    const int64_t block_rows = a.rows / a.r, together = 32768 / (groups.size * width);
    const int64_t enough = a.transpose ? kWork / at_least_one(2 * a.rows * groups.size * width) : groups.count;
    batch = at_least_one(smaller(together, smaller(groups.count, enough > groups.count / 16 ? enough : groups.count / 16)));
    const int64_t batches = (groups.count + batch - 1) / batch;
    divide(a.transpose ? batches : block_rows, a.transpose ? block_rows : batches, 2 * a.rows * a.columns * width);
    room = accumulator_size(a.dtype) * (groups.panels() + (batch + 1) * groups.size * width);
  }
  int64_t in_features() const { return bat.transpose ? bat.rows : bat.columns; }
  int64_t out_features() const { return bat.transpose ? bat.columns : bat.rows; }
};
struct BatMatmulPack { const BatMatmulPass& pass; };
struct BatMatmulFinish { const BatMatmulPass& pass; };

struct BatMixPass : BlockPlan {
  const BatMix& bat;
  void* factors = nullptr;  // [groups, panels]: Cᵀ

  // Owners: tiles of rows, cut by groups. partial: [parts, rows, r].
  explicit BatMixPass(const BatMix& a) : bat(a) {
    groups = {a.columns, a.r};
    divide(tiles(a.rows), groups.count, a.rows * a.columns * groups.size);
    room = accumulator_size(a.dtype) * kTile * groups.padded;
  }
};
struct BatMixPack { const BatMixPass& pass; };

struct BatMixBackwardPass : BlockPlan {
  const BatMixBackward& bat;

  // Owners: groups, cut by tiles of rows. partial: [parts, columns, r].
  explicit BatMixBackwardPass(const BatMixBackward& a) : bat(a) {
    groups = {a.columns, a.r};
    divide(groups.count, at_least_one(tiles(a.rows)), 2 * a.rows * a.columns * groups.size);
    room = accumulator_size(a.dtype) * (groups.panels() + groups.size * groups.padded + tiles(groups.padded) * kTile * kTile);
  }
};

// out [count] in dtype = the sum of parts [parts, count] in its accumulator.
struct PartSum {
  static constexpr int64_t kElements = 4096;  // of a task
  const void* partial;
  void* out;
  int64_t count, parts;
  DType dtype;

  int64_t tasks() const { return (count + kElements - 1) / kElements; }
};

}  // namespace spectral_ops::cpu
