// The plans of Bat's CPU kernels. As in lowrank.h, which task adds what and in which order depends on the sizes only.
#pragma once

#include "../ops/bat.h"
#include "matrix.h"
#ifdef SPECTRAL_OPS_HOST
#include <optional>

#include "run.h"
#endif

namespace spectral_ops::cpu {

// Columns in groups of r x r blocks. A group is one block where r fills a vector, else as many side by side as do. Those are
// multiplied as one block-diagonal matrix, so what is not finite in one of them reaches the others in its row.
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

// Tokens [first, first + count), at most kTile. x is packed into turned [features, width], features as rows.
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

SPECTRAL_OPS_CPU_KERNEL(bat_weight, BatWeightPass)
SPECTRAL_OPS_CPU_KERNEL(bat_contract, BatContractPass)
SPECTRAL_OPS_CPU_KERNEL(bat_matmul_pack, BatMatmulPack)
SPECTRAL_OPS_CPU_KERNEL(bat_matmul, BatMatmulPass)
SPECTRAL_OPS_CPU_KERNEL(bat_matmul_finish, BatMatmulFinish)
SPECTRAL_OPS_CPU_KERNEL(bat_mix_pack, BatMixPack)
SPECTRAL_OPS_CPU_KERNEL(bat_mix, BatMixPass)
SPECTRAL_OPS_CPU_KERNEL(bat_mix_backward, BatMixBackwardPass)
SPECTRAL_OPS_CPU_KERNEL(part_sum, PartSum)

#ifdef SPECTRAL_OPS_HOST

// Runs a pass. Each part of an owner leaves `count` partial sums: in `direct` where it is the only part, else in memory.
template <class Plan>
void add_up(Plan& pass, std::optional<Workspace>& memory, int64_t count, DType dtype, void* direct, const Tensor& like) {
  pass.room = (pass.room + 63) / 64 * 64;
  const int64_t rooms = pass.room <= BlockPlan::kSmallRoom ? 0 : pass.tasks * pass.room;
  const bool in_place = direct && pass.parts == 1;
  memory.emplace(like, rooms + (in_place ? 0 : accumulator_size(dtype) * pass.parts * count));
  pass.memory = rooms ? memory->data() : nullptr;
  pass.partial = in_place ? direct : memory->data() + rooms;
  in_parallel(pass, pass.tasks, grain_of(pass.tasks, pass.work));
}

inline void run(const BatWeight& a, const Tensor& like) {
  BatWeightPass pass(a);
  std::optional<Workspace> memory;
  add_up(pass, memory, 0, a.dtype, nullptr, like);
}

inline void run(const BatContract& a, const Tensor& like) {
  BatContractPass pass(a);
  const int64_t count = a.rows * a.r;
  std::optional<Workspace> memory;
  add_up(pass, memory, count, a.dtype, a.dB, like);
  if (pass.parts == 1) return;
  const PartSum sum{pass.partial, a.dB, count, pass.parts, accumulator(a.dtype)};
  in_parallel(sum, sum.tasks(), 16);
}

inline void run(const BatMatmul& a, const Tensor& like) {
  for (int64_t first = 0; first < a.T; first += kTile) {
    BatMatmulPass pass(a, first);
    Workspace turned(like, accumulator_size(a.dtype) * pass.in_features() * pass.width);
    pass.turned = turned.data();
    in_parallel(BatMatmulPack{pass}, tiles(pass.in_features()), 8);
    std::optional<Workspace> memory;
    add_up(pass, memory, pass.out_features() * pass.width, a.dtype, nullptr, like);
    in_parallel(BatMatmulFinish{pass}, tiles(pass.out_features()), 8);
  }
}

inline void run(const BatMix& a, const Tensor& like) {
  BatMixPass pass(a);
  Workspace factors(like, accumulator_size(a.dtype) * pass.groups.count * pass.groups.panels());
  pass.factors = factors.data();
  in_parallel(BatMixPack{pass}, pass.groups.count, 4);
  const int64_t count = a.rows * a.r;
  std::optional<Workspace> memory;
  add_up(pass, memory, count, a.dtype, nullptr, like);
  const PartSum sum{pass.partial, a.s, count, pass.parts, a.dtype};
  in_parallel(sum, sum.tasks(), 16);
}

inline void run(const BatMixBackward& a, const Tensor& like) {
  BatMixBackwardPass pass(a);
  const int64_t count = a.dC ? a.columns * a.r : 0;
  std::optional<Workspace> memory;
  add_up(pass, memory, count, a.dtype, a.dC, like);
  if (!a.dC || pass.parts == 1) return;
  const PartSum sum{pass.partial, a.dC, count, pass.parts, accumulator(a.dtype)};
  in_parallel(sum, sum.tasks(), 16);
}

#endif

}  // namespace spectral_ops::cpu
