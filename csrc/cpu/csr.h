// The steps of the sparse products, as the arguments of their kernels; free of torch.
#pragma once

#include <cstdint>

#include "../arguments.h"
#include "../csr_plan.h"

namespace spectral_ops::cpu {

constexpr int64_t kOutRows = 256;  // of S that spmm works on before it writes columns of out

// A task of a sweep is a group of slabs, which it packs itself into its thread's room; or, `shared`, one part of slab
// `wave` of a group, which all threads have packed into that group's room.
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

}  // namespace spectral_ops::cpu
