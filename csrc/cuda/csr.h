// How the sparse CUDA kernels split work and how much workspace that takes: functions of the sizes alone, not of the GPU, so that
// results are the same on every GPU and tests can call them without one.
#pragma once

#include "../ops/csr.h"

namespace spectral_ops::cuda {

constexpr int64_t kBlockColumns = 512;  // of x in shared memory at a time
constexpr int64_t kSlabBytes = 128;     // of tokens, for each feature in shared memory

// csr_spmm_: a block takes `rows` chunks of kProductRows rows of S and a slab of tokens. S is listed first, by chunk and by
// block of columns, so that it is searched and converted once and not for every slab.
struct ProductPlan {
  bool few;                      // tokens: nothing is listed
  bool whole;                    // x and out are read 16 bytes at a time, without a tail
  int64_t rows, tiles, slabs;    // of kSlabBytes of tokens
  int64_t chunks, blocks;        // of rows, of columns
  int64_t sections_at, bytes;    // the list starts at 0
};

constexpr int64_t kProductRows = 64;
constexpr int64_t kManyRows = 6, kFewRows = 2;  // chunks of a block: many read x less often, few make more blocks

inline ProductPlan product_plan(int64_t T, int64_t d, int64_t k, int64_t nnz, DType dtype, bool aligned) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  ProductPlan plan{};
  plan.few = T <= 16;
  if (plan.few) return plan;
  plan.slabs = ceil(T * element_size(dtype), kSlabBytes);
  plan.whole = aligned && d * element_size(dtype) % 16 == 0 && k * element_size(dtype) % 16 == 0;
  // few where their blocks run at once on the 132 multiprocessors of an H100, and in the slow form
  plan.rows = !plan.whole || plan.slabs * ceil(d, kFewRows * kProductRows) <= 132 ? kFewRows : kManyRows;
  plan.tiles = ceil(d, plan.rows * kProductRows);
  plan.chunks = plan.tiles * plan.rows, plan.blocks = ceil(k, kBlockColumns);
  plan.sections_at = nnz * (dtype == DType::float64 ? 16 : 8);
  plan.bytes = plan.sections_at + 8 * kProductRows * (plan.chunks * plan.blocks + 2);
  return plan;
}

// csr_sddmm: a block takes kBlockColumns columns, a part of the chunks of kSampledRows rows, and a split of the slabs of
// tokens; each split has partial sums of its own, which a last kernel adds.
struct SampledPlan {
  int64_t chunks, blocks;       // of rows, of columns
  int64_t slabs;                // of kSlabBytes of tokens
  int64_t split_slabs, splits;  // 0 splits without tokens
  int64_t part_chunks, parts;
  int64_t list_at, source_at, sections_at;  // bytes; the partial sums start at 0
  int64_t bytes;
};

constexpr int64_t kSampledRows = 256;
constexpr int64_t kSampledBytes = int64_t{64} << 20;   // of partial sums, at most (one split always has its own)

inline SampledPlan sampled_plan(int64_t T, int64_t d, int64_t k, int64_t nnz, DType dtype) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto between = [](int64_t low, int64_t n, int64_t high) { return n > high ? high : n < low ? low : n; };
  const int64_t wide = dtype == DType::float64 ? 8 : 4, size = element_size(dtype);
  SampledPlan plan{};
  plan.chunks = ceil(d, kSampledRows), plan.blocks = ceil(k, kBlockColumns), plan.slabs = ceil(T * size, kSlabBytes);
  // At most two blocks for each of the 132 multiprocessors of an H100, which run at once; splits first, because a part of the
  // rows stages x again.
  const int64_t wanted = between(1, 264 / (plan.blocks > 0 ? plan.blocks : 1), 264);
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

inline ProductPlan product_plan(const CsrSpmm& a) {
  const auto aligned = [&](const void* p, int64_t stride) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * element_size(a.dtype) % 16 == 0;
  };
  return product_plan(a.T, a.d, a.k, a.nnz, a.dtype, aligned(a.x, a.x_stride) && aligned(a.out, a.out_stride));
}

inline int64_t workspace_bytes(const CsrSpmm& a) { return product_plan(a).bytes; }
inline int64_t workspace_bytes(const CsrSddmm& a) { return sampled_plan(a.T, a.d, a.k, a.nnz, a.dtype).bytes; }

}  // namespace spectral_ops::cuda
