// The plans of DoRA's CPU kernels: passes over W and x, and what is made of their sums.
#pragma once

#include "../ops/dora.h"
#include "lowrank.h"
#ifdef SPECTRAL_OPS_HOST
#include <algorithm>
#include <vector>

#include "run.h"
#endif

namespace spectral_ops::cpu {

// norm from the sums of a pass over W, or over Wᵀ (then by_columns). Tasks take kTile rows of W.
struct NormFinish {
  const ColumnNorm& norm;
  const Pass& pass;
  bool by_columns;
  const void* gram;  // A Aᵀ [r, r], accumulator dtype
  void* packed_B;    // [rows, r], room for B in accumulator dtype

  static int64_t tasks(const ColumnNorm& a) { return tiles(a.rows); }
};

// The fingerprint of a [rows, columns], or of a sample of it. The elements read are numbered from `first`. A task's share of it
// is parts[2 * task] and the next.
struct Fingerprint {
  static constexpr int64_t kElements = 4096;  // of a task
  Matrix a;
  int64_t rows, columns, first;
  uint64_t* parts;
  WeightSample sample;  // {1, 1, columns}: every element

  int64_t tasks() const { return (rows * sample.per_row + kElements - 1) / kElements; }
};

// dm of every column by division, and which columns m has erased.
struct MagnitudeDivide {
  const MagnitudeGrad& magnitude;
  unsigned char* vanishing;  // [columns]
};

// dm of the columns pick [count], from z [rows, count] = x W_oᵀ in accumulator dtype.
struct MagnitudeExact {
  const MagnitudeGrad& magnitude;
  const void* z;
  const int64_t* pick;
  int64_t count;
};

SPECTRAL_OPS_CPU_KERNEL(norm_finish, NormFinish)
SPECTRAL_OPS_CPU_KERNEL(fingerprint, Fingerprint)
SPECTRAL_OPS_CPU_KERNEL(magnitude_divide, MagnitudeDivide)
SPECTRAL_OPS_CPU_KERNEL(magnitude_exact, MagnitudeExact)

#ifdef SPECTRAL_OPS_HOST

// Makes a pass over W [rows, columns] that multiplies it by skinny [columns, r] and sums the squares of each of its rows. It
// reads along memory: it is turned, a pass over Wᵀ, where W's columns are contiguous and its rows are not. Returns whether
// it is.
inline bool weight_pass(Pass& pass, const Matrix& weight, int64_t rows, int64_t columns, const Matrix& skinny, int64_t r) {
  const bool turned = weight.column != 1 && weight.row == 1;
  pass.x = turned ? weight.transposed() : weight;
  pass.rows = turned ? columns : rows, pass.columns = turned ? rows : columns, pass.r = r;
  (turned ? pass.h : pass.m) = skinny;
  pass.row_squares = !turned;
  pass.column_sums = pass.square = turned;
  return turned;
}

// ‖W_o + scale (B A)_o‖ into a.norm
inline void compute_norm(const ColumnNorm& a, const Tensor& like) {
  const DType wide = accumulator(a.dtype);
  const Matrix A = matrix(a.A, a.A_strides[0], a.A_strides[1], a.A_dtype);
  const Tensor room = workspace(like, accumulator_size(a.dtype) * a.r * (a.r + a.rows));
  char* const gram = static_cast<char*>(room.data_ptr());

  Pass pass;
  const Matrix weight = matrix(a.weight, a.weight_strides[0], a.weight_strides[1], a.dtype);
  const bool turned = weight_pass(pass, weight, a.rows, a.columns, A.transposed(), a.r);
  const Tensor memory = lay_out(pass, like);
  pack_and_add(pass);

  Pass small;  // A Aᵀ
  small.r = a.r;
  if (accumulator_size(a.A_dtype) >= accumulator_size(a.dtype)) {
    small.x = A, small.m = A.transposed();
    small.rows = a.r, small.columns = a.columns;
    small.row_product = gram, small.row_product_stride = a.r, small.row_product_dtype = wide;
  } else {  // A has been widened by the pass over W
    small.x = small.h = turned ? matrix(pass.packed_h, pass.h_stride, 1, wide) : matrix(pass.packed_m, pass.m_stride, 1, wide);
    small.rows = a.columns, small.columns = a.r;
    small.column_product = gram, small.column_product_row = a.r;
  }
  const Tensor small_memory = lay_out(small, like);
  pack_and_add(small);
  finish(small);

  const NormFinish last{a, pass, turned, gram, gram + accumulator_size(a.dtype) * a.r * a.r};
  in_parallel(last, NormFinish::tasks(a), 1);
}

inline void run(const ColumnNorm& a, const Tensor& like) {
  if (!a.stamp) return compute_norm(a, like);
  Fingerprint parts[] = {
      {{a.A, a.A_strides[0], a.A_strides[1], a.A_dtype}, a.r, a.columns, 0, nullptr, {1, 1, a.columns}},
      {{a.B, a.B_strides[0], a.B_strides[1], a.B_dtype}, a.rows, a.r, a.r * a.columns, nullptr, {1, 1, a.r}},
      {{a.weight, a.weight_strides[0], a.weight_strides[1], a.dtype},
       a.rows, a.columns, a.r * (a.columns + a.rows), nullptr, WeightSample::of(a.rows, a.columns)},
  };
  uint64_t sums[2] = {};
  for (Fingerprint& part : parts) {
    std::vector<uint64_t> shares(static_cast<size_t>(2 * part.tasks()));
    part.parts = shares.data();
    in_parallel(part, part.tasks(), 4);
    for (size_t i = 0; i < shares.size(); ++i) sums[i % 2] += shares[i];
  }
  const int64_t print[] = {static_cast<int64_t>(sums[0]), static_cast<int64_t>(sums[1])};
  if (!a.force && std::equal(print, print + 2, a.stamp)) return;
  compute_norm(a, like);
  std::copy(print, print + 2, a.stamp);
}

inline void run(const MagnitudeGrad& a, const Tensor& like) {
  std::vector<unsigned char> vanishing(static_cast<size_t>(a.columns));
  in_parallel(MagnitudeDivide{a, vanishing.data()}, a.columns, 1 << 14);
  std::vector<int64_t> pick;
  for (int64_t o = 0; o < a.columns; ++o)
    if (vanishing[static_cast<size_t>(o)]) pick.push_back(o);
  const Tensor z = workspace(like, accumulator_size(a.dtype) * a.rows * std::min<int64_t>(kTile, pick.size()));
  for (size_t first = 0; first < pick.size(); first += kTile) {  // kTile columns' x W_oᵀ at a time
    Pass pass;
    pass.x = matrix(a.x, a.x_stride, 1, a.dtype);
    pass.m = matrix(a.weight, a.weight_strides[1], a.weight_strides[0], a.dtype, pick.data() + first);
    pass.rows = a.rows, pass.columns = a.k, pass.r = std::min<int64_t>(kTile, pick.size() - first);
    pass.row_product = z.data_ptr(), pass.row_product_stride = pass.r, pass.row_product_dtype = accumulator(a.dtype);
    run_products(pass, like);
    in_parallel(MagnitudeExact{a, pass.row_product, pick.data() + first, pass.r}, pass.r, 1);
  }
}

#endif

}  // namespace spectral_ops::cpu
