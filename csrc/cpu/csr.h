// The plans of the sparse kernels: entries shared out, and sweeps over slabs of tokens.
#pragma once

#include "../csr_plan.h"
#include "../ops/csr.h"
#include "matrix.h"
#ifdef SPECTRAL_OPS_HOST
#include "run.h"
#endif

namespace spectral_ops::cpu {

constexpr int64_t kOutRows = 256;  // of S that spmm works on before it writes columns of out

// A task of a sweep is a group of slabs, which it packs into its thread's room. In a `shared` sweep it is one part of slab
// `wave` of a group, which all threads have packed into the group's room.
struct Sweep {
  Slabs slabs{};
  int64_t parts = 1, wave = 0;
  bool shared = false;
  char* room = nullptr;   // a slab, or the groups' slabs
  char* spare = nullptr;  // the thread's
};
struct CsrWiden {
  const CsrSpmm& spmm;
  void* values;  // [nnz] in accumulator dtype gets the values, permuted
};
struct SlabPack {  // tasks: kPackColumns columns of a group's slab each
  static constexpr int64_t kPackColumns = 256;
  Sweep sweep;
  const void* x;
  int64_t T, x_stride;
  DType dtype;

  int64_t pieces() const { return (sweep.slabs.columns + kPackColumns - 1) / kPackColumns; }
};
struct SpmmSweep : Sweep {
  const CsrSpmm& spmm;
  const void* values;  // [nnz] in accumulator dtype
};
struct SddmmSweep : Sweep {
  const CsrSddmm& sddmm;
  void* sums;  // [groups, nnz] in accumulator dtype
};
struct SddmmFinish {
  const CsrSddmm& sddmm;
  const void* sums;
  int64_t groups;
};

SPECTRAL_OPS_CPU_KERNEL(csr_widen, CsrWiden)
SPECTRAL_OPS_CPU_KERNEL(slab_pack, SlabPack)
SPECTRAL_OPS_CPU_KERNEL(spmm_sweep, SpmmSweep)
SPECTRAL_OPS_CPU_KERNEL(sddmm_sweep, SddmmSweep)
SPECTRAL_OPS_CPU_KERNEL(sddmm_finish, SddmmFinish)

#ifdef SPECTRAL_OPS_HOST

inline void run(const CsrScatter& a, const Tensor&) { in_parallel(a, a.nnz, kEntriesPerThread); }

inline void run(const CsrGather& a, const Tensor&) {
  in_parallel(a, a.row_offsets[a.n] - a.row_offsets[0], kEntriesPerThread);
}

// Runs a sweep over x [T, k]. Each thread takes whole groups of slabs. Where the groups cannot be shared out evenly, all
// threads take parts of the same slabs instead: of one slab of every group, then of the next.
template <class S>
void run_sweep(S sweep, const void* x, int64_t T, int64_t x_stride, DType dtype, int64_t nnz, int64_t spare_bytes,
               const Tensor& like) {
  const Slabs& slabs = sweep.slabs;
  const int64_t threads = torch::stable::get_num_threads(), groups = slabs.groups, bytes = slabs.bytes();
  const int64_t work = T * (nnz + 4 * slabs.columns), grain = grain_of(groups, work);
  const int64_t busy = smaller(threads, (groups + grain - 1) / grain), rounds = (groups + busy - 1) / busy;
  sweep.shared = work >= threads << 18 && 4 * rounds * threads > 5 * groups;
  const Tensor room = workspace(like, bytes * (sweep.shared ? groups : threads)), spare = workspace(like, spare_bytes * threads);
  sweep.room = static_cast<char*>(room.data_ptr());
  const auto run_tasks = [&](int64_t tasks, int64_t least) {
    torch::stable::parallel_for(0, tasks, least, [&](int64_t begin, int64_t end) {
      uint32_t thread = 0;
      TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
      S mine = sweep;
      mine.spare = static_cast<char*>(spare.data_ptr()) + thread * spare_bytes;
      if (!mine.shared) mine.room += thread * bytes;
      kernel_for(mine)(mine, begin, end);
    });
  };
  if (!sweep.shared) return run_tasks(groups, grain);
  sweep.parts = (4 * threads + groups - 1) / groups;
  for (; sweep.wave * groups < slabs.count; ++sweep.wave) {
    const SlabPack pack{sweep, x, T, x_stride, dtype};
    in_parallel(pack, groups * pack.pieces(), 1);
    run_tasks(groups * sweep.parts, 1);
  }
}

inline void run(const CsrSpmm& a, const Tensor& like) {
  if (a.T == 0 || a.nnz == 0) return;
  SpmmSweep sweep{{}, a, a.values};
  Tensor values = like;
  if (a.permutation || a.values_dtype != accumulator(a.dtype)) {
    values = workspace(like, accumulator_size(a.dtype) * a.nnz);
    in_parallel(CsrWiden{a, values.data_ptr()}, a.nnz, kEntriesPerThread);
    sweep.values = values.data_ptr();
  }
  const int64_t size = accumulator_size(a.dtype), per_lane = a.dtype == DType::bfloat16 ? 2 : 1;
  sweep.slabs = slabs_of(a.T, a.k, size, per_lane);
  run_sweep(sweep, a.x, a.T, a.x_stride, a.dtype, a.nnz, size * kOutRows * sweep.slabs.lanes * per_lane, like);
}

inline void run(const CsrSddmm& a, const Tensor& like) {
  constexpr int64_t kMostBytes = 1 << 25;  // of partial sums
  const int64_t size = accumulator_size(a.dtype), per_lane = active_isa() == Isa::avx512_bf16 && a.dtype == DType::bfloat16 ? 2 : 1;
  SddmmSweep sweep{{}, a, a.out};
  sweep.slabs = slabs_of(a.T, a.k, size, per_lane, smaller(kGroups, at_least_one(kMostBytes / at_least_one(size * a.nnz))));
  const int64_t groups = a.T == 0 ? 0 : sweep.slabs.groups;
  Tensor sums = like;
  if (groups > 1) {
    sums = workspace(like, size * groups * a.nnz);
    sweep.sums = sums.data_ptr();
  }
  if (groups && a.nnz) run_sweep(sweep, a.x, a.T, a.x_stride, a.dtype, a.nnz, 0, like);
  if (groups != 1) in_parallel(SddmmFinish{a, sweep.sums, groups}, a.nnz, kEntriesPerThread);
}

#endif

}  // namespace spectral_ops::cpu
