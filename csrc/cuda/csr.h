// How the sparse CUDA kernels split work and how much workspace that takes: functions of the sizes alone, not of the GPU, so that
// results are the same on every GPU and tests can call them without one.
#pragma once

#include "../ops/csr.h"

namespace spectral_ops::cuda {

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
  const int64_t wide = dtype == DType::float64 ? 8 : 4, size = element_size(dtype);
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

inline int64_t workspace_bytes(const CsrSddmm& a) { return sampled_plan(a.T, a.d, a.k, a.nnz, a.dtype).bytes; }

}  // namespace spectral_ops::cuda
