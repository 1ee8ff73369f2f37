// How the CUDA kernels split work and how much workspace that takes: functions of the sizes alone, not of the GPU, so that
// results are the same on every GPU and tests can call them without one.
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace spectral_ops::cuda {

// lowrank_backward: a block owns tile_columns columns of dy and sweeps over split_rows of its rows. It leaves partial sums
// of u for its columns (chunks of them) and of dB, db and dyz for its rows (splits of them), which a second kernel adds.
struct BackwardPlan {
  int64_t ranks;  // worked on in one pass over dy; a larger r takes several passes
  int64_t tile_columns, chunks;
  int64_t split_rows, splits;
  int64_t dB_at, db_at, dyz_at;  // where they start in the workspace, in elements; u starts at 0
  int64_t bytes;
};

inline BackwardPlan backward_plan(int64_t rows, int64_t columns, int64_t r, DType dtype, bool u, bool dB, bool db, bool dyz) {
  const bool matrix_units = dtype == DType::bfloat16 || dtype == DType::float16;
  const int64_t step = matrix_units ? 16 : 32;  // rows that a block works on at once
  BackwardPlan plan{};
  if (matrix_units) {
    plan.ranks = r < 64 ? r : 64;
    plan.tile_columns = plan.ranks <= 32 ? 512 : 256;
  } else {
    plan.ranks = r < 32 ? r : 32;
    plan.tile_columns = 128;
  }
  plan.chunks = (columns + plan.tile_columns - 1) / plan.tile_columns;
  // Two blocks for each of the 132 multiprocessors of an H100, or one where they are large. More would mean more partial sums.
  const int64_t blocks = matrix_units && plan.ranks > 16 ? 132 : 264;
  int64_t splits = plan.chunks > 0 ? blocks / plan.chunks : 1;
  const int64_t most = (rows + 4 * step - 1) / (4 * step);
  if (splits > most) splits = most;
  if (splits < 1) splits = 1;
  plan.split_rows = ((rows + splits - 1) / splits + step - 1) / step * step;
  if (plan.split_rows < step) plan.split_rows = step;
  plan.splits = rows > 0 ? (rows + plan.split_rows - 1) / plan.split_rows : 1;
  plan.dB_at = u ? plan.chunks * rows * plan.ranks : 0;
  plan.db_at = plan.dB_at + (dB ? plan.splits * columns * plan.ranks : 0);
  plan.dyz_at = plan.db_at + (db ? plan.splits * columns : 0);
  plan.bytes = (plan.dyz_at + (dyz ? plan.splits * columns : 0)) * (dtype == DType::float64 ? 8 : 4);
  return plan;
}

inline BackwardPlan backward_plan(const LowRankBackward& a) {
  return backward_plan(a.rows, a.columns, a.r, a.dtype, a.u, a.dB, a.db, a.dyz);
}

// column_norm: blocks of tile_rows rows and split_columns columns of W leave partial sums of W Aᵀ and ‖W‖²; further blocks
// form A Aᵀ; a second kernel adds them up. With a fingerprint, stamps[2 * kStampBlocks] and a flag follow.
struct NormPlan {
  bool matrix_units;
  int64_t ranks;  // worked on in one pass over W
  int64_t tile_rows, row_tiles;
  int64_t split_columns, splits;
  int64_t square_at, gram_at;  // elements; the products start at 0
  int64_t stamp_at;            // bytes
  int64_t bytes;
};

constexpr int64_t kStampBlocks = 64;
constexpr int64_t kNormPiece = 128;  // columns whose A is in shared memory at once

inline NormPlan norm_plan(int64_t rows, int64_t columns, int64_t r, DType dtype, bool unit_columns, bool stamp) {
  NormPlan plan{};
  plan.matrix_units = (dtype == DType::bfloat16 || dtype == DType::float16) && unit_columns;
  plan.ranks = r < 64 ? r : 64;
  plan.tile_rows = plan.matrix_units ? 128 : 64;
  plan.row_tiles = (rows + plan.tile_rows - 1) / plan.tile_rows;
  const int64_t pieces = (columns + kNormPiece - 1) / kNormPiece;
  int64_t splits = plan.row_tiles > 0 ? (2 * 132 + plan.row_tiles - 1) / plan.row_tiles : 1;
  if (splits > pieces) splits = pieces;
  if (splits > 16) splits = 16;
  if (splits < 1) splits = 1;
  plan.split_columns = (pieces + splits - 1) / splits * kNormPiece;
  if (plan.split_columns < kNormPiece) plan.split_columns = kNormPiece;
  plan.splits = pieces > 0 ? (columns + plan.split_columns - 1) / plan.split_columns : 1;
  const int64_t size = dtype == DType::float64 ? 8 : 4;
  plan.square_at = plan.splits * rows * r;
  plan.gram_at = plan.square_at + plan.splits * rows;
  plan.stamp_at = ((plan.gram_at + r * r) * size + 7) / 8 * 8;
  plan.bytes = plan.stamp_at + (stamp ? 8 * (2 * kStampBlocks + 1) : 0);
  return plan;
}

inline NormPlan norm_plan(const ColumnNorm& a) {
  return norm_plan(a.rows, a.columns, a.r, a.dtype, a.weight_strides[1] == 1 || a.columns <= 1, a.stamp);
}

// Bat: the blocks of r rows are cut into tiles; on the tensor cores such that each is whole.
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
  const int64_t size = a.dtype == DType::float64 ? 8 : a.dtype == DType::float32 ? 4 : 2;
  const bool aligned = aligned_fours(a.weight, a.weight_strides, size) && aligned_fours(a.G, G_strides, a.G_dtype == a.dtype ? size : 4);
  return contract_plan(a.rows, a.columns, a.r, a.dtype, aligned);
}

// csr_sddmm: a block takes kSampledColumns columns, a part of the chunks of kSampledRows rows, and a split of the slabs of
// tokens; each split has partial sums of its own, which a last kernel adds.
struct SampledPlan {
  int64_t chunks, blocks;       // of rows, of columns
  int64_t slabs;                // of kSlabBytes of tokens
  int64_t split_slabs, splits;  // 0 splits without tokens
  int64_t part_chunks, parts;
  int64_t list_at, source_at, sections_at;  // bytes; the partial sums start at 0
  int64_t bytes;
};

constexpr int64_t kSampledRows = 256, kSampledColumns = 512;
constexpr int64_t kSlabBytes = 128;                    // of tokens, for each feature in shared memory
constexpr int64_t kSampledBytes = int64_t{64} << 20;   // of partial sums, at most (one split always has its own)

inline SampledPlan sampled_plan(int64_t T, int64_t d, int64_t k, int64_t nnz, DType dtype) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto between = [](int64_t low, int64_t n, int64_t high) { return n > high ? high : n < low ? low : n; };
  const int64_t wide = dtype == DType::float64 ? 8 : 4, size = dtype == DType::float64 || dtype == DType::float32 ? wide : 2;
  SampledPlan plan{};
  plan.chunks = ceil(d, kSampledRows), plan.blocks = ceil(k, kSampledColumns), plan.slabs = ceil(T * size, kSlabBytes);
  // Two blocks for each of the 132 multiprocessors of an H100; splits first, because a part of the rows stages x again.
  const int64_t wanted = ceil(264, plan.blocks > 0 ? plan.blocks : 1);
  const int64_t affordable = between(1, kSampledBytes / (wide * (nnz > 0 ? nnz : 1)), wanted);
  plan.split_slabs = ceil(plan.slabs, between(1, plan.slabs, affordable));
  plan.splits = plan.slabs > 0 ? ceil(plan.slabs, plan.split_slabs) : 0;
  plan.part_chunks = plan.chunks > 0 ? ceil(plan.chunks, between(1, wanted / (plan.splits > 0 ? plan.splits : 1), plan.chunks)) : 1;
  plan.parts = ceil(plan.chunks, plan.part_chunks);
  plan.list_at = plan.splits * nnz * wide;
  plan.source_at = plan.list_at + 4 * nnz;
  plan.sections_at = plan.source_at + 4 * nnz;
  plan.bytes = plan.sections_at + 8 * plan.chunks * plan.blocks;
  return plan;
}

// Bytes of workspace that the kernel of these arguments wants; most want none.
template <class Arguments> int64_t workspace_bytes(const Arguments&) { return 0; }
inline int64_t workspace_bytes(const LowRankBackward& a) { return backward_plan(a).bytes; }
inline int64_t workspace_bytes(const ColumnNorm& a) { return norm_plan(a).bytes; }
inline int64_t workspace_bytes(const BatContract& a) { return contract_plan(a).bytes; }
inline int64_t workspace_bytes(const CsrSddmm& a) { return sampled_plan(a.T, a.d, a.k, a.nnz, a.dtype).bytes; }

template <class Arguments> void set_workspace(Arguments&, void*) {}
inline void set_workspace(LowRankBackward& a, void* workspace) { a.workspace = workspace; }
inline void set_workspace(ColumnNorm& a, void* workspace) { a.workspace = workspace; }
inline void set_workspace(BatContract& a, void* workspace) { a.workspace = workspace; }
inline void set_workspace(CsrSddmm& a, void* workspace) { a.workspace = workspace; }

}  // namespace spectral_ops::cuda
