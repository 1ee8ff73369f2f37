// VeRA's layers, forward and backward, for any device: spectral_ops/functional/vera.py has the mathematics and the same steps in
// Python.
#pragma once

#include "lowrank.h"
#include "scratch.h"

namespace spectral_ops {

inline Tensor as_column(const Tensor& v) { return as_matrix(v, v.size(0), 1, v.stride(0), 1); }

// v [n] in dtype, as a column; checked against the side of a basis.
inline void check_side(const char* name, const Tensor& v, int64_t n, const char* what) {
  STD_TORCH_CHECK(v.dim() == 1, name, ": got ", v.dim(), " dimensions, wanted a vector");
  check_size(name, v, 0, n, what);
}

// Memory for B' [d, r], and with a weight for W' [d, k].
struct VeraMemory {
  VeraMemory(const Tensor& B, ScalarType dtype, const MaybeTensor& weight)
      : lease(B, 1, B.size(0) * (B.size(1) + (weight ? weight->size(1) : 0)), dtype),
        scaled(part_of(lease.tensor(), 0, B.size(0), B.size(1))) {
    if (weight) changed = part_of(lease.tensor(), B.size(0) * B.size(1), B.size(0), weight->size(1));
  }
  Lease lease;
  Tensor scaled;
  MaybeTensor changed;
};

// B' = diag(λ_b) B diag(λ_d) into out.
template <class Device>
void scale_basis(const Tensor& out, const Tensor& B, const Tensor& lambda_d, const Tensor& lambda_b) {
  const ScalarType wide = accumulate_type(out);
  multiply_into(out, B, mm<Device>(as_column(cast(lambda_b, wide)), as_row(cast(lambda_d, wide))));
}

// W' = W + B' A
template <class Device>
const Tensor& merge_basis(const VeraMemory& memory, const Tensor& weight, const Tensor& A) {
  addmm_out<Device>(*memory.changed, weight, memory.scaled, A);
  return *memory.changed;
}

// Whether W + B'A may be formed: nothing is dropped, and no small change rounded away.
inline bool vera_merges(const MaybeTensor& weight, const MaybeTensor& seed, const Tensor& x) {
  return weight && !seed && x.scalar_type() == accumulate_type(x);
}

inline void check_vera(const Tensor& A, const Tensor& B, const Tensor& lambda_d, const Tensor& lambda_b) {
  check_matrix("A", A);
  check_matrix("B", B);
  check_size("B", B, 1, A.size(0), "the rows of A");
  check_side("lambda_d", lambda_d, A.size(0), "the rank");
  check_side("lambda_b", lambda_b, B.size(0), "the outputs");
}

// Results: y [..., d], and h [T, r], empty [0] where it is not to be kept.
template <class Device>
std::tuple<Tensor, Tensor> vera_linear_forward(Tensor x, MaybeTensor weight, MaybeTensor base_out, Tensor A, Tensor B,
                                               Tensor lambda_d, Tensor lambda_b, MaybeTensor bias, MaybeTensor seed, double p,
                                               bool keep) {
  const NoGrad guard;
  check_vera(A, B, lambda_d, lambda_b);
  check_tier(weight, base_out);
  const Tensor x2 = flat("x", x), a = cast_as(A, x);
  check_size("A", A, 1, x2.size(1), "the last dimension of x");
  if (weight) check_shape("weight", *weight, B.size(0), A.size(1));
  const int64_t T = x2.size(0);
  const bool merged = vera_merges(weight, seed, x) && A.size(1) < T;
  Tensor h = keep || !merged ? project<Device>(x2, a, seed, p) : nothing(x);
  if (merged) {
    Tensor y = empty_rows(x, B.size(0));
    const VeraMemory memory(B, x.scalar_type(), weight);
    scale_basis<Device>(memory.scaled, B, lambda_d, lambda_b);
    linear_into<Device>(flat("y", y), x2, merge_basis<Device>(memory, *weight, a), bias);
    return {y, h};
  }
  Tensor y = base_output<Device>(x, weight, base_out, bias);
  const Tensor y2 = flat("y", y);
  check_shape("base_out", y2, T, B.size(0));
  if (T < A.size(0)) {
    const Tensor z = mm<Device>(call("aten::mul", "Tensor", h, as_row(cast_as(lambda_d, x))), transposed(cast_as(B, x)));
    multiply_into(z, z, as_row(cast_as(lambda_b, x)));
    add_<Device>(y2, z);
  } else {
    const VeraMemory memory(B, x.scalar_type(), std::nullopt);
    scale_basis<Device>(memory.scaled, B, lambda_d, lambda_b);
    add_product<Device>(y2, h, transposed(memory.scaled));
  }
  return {y, keep ? h : nothing(x)};
}

// Results: dx, dλ_d, dλ_b, db; empty [0] where `needs` has no bit for it. Without a weight dx is the update's share.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> vera_linear_backward(Tensor dy, MaybeTensor weight, Tensor A, Tensor B,
                                                                Tensor lambda_d, Tensor lambda_b, MaybeTensor h,
                                                                MaybeTensor seed, double p, int64_t needs) {
  const NoGrad guard;
  check_vera(A, B, lambda_d, lambda_b);
  const bool need_x = wants(needs, 0), need_d = wants(needs, 1), need_b = wants(needs, 2);
  const Tensor dy2 = flat("dy", dy), a = cast_as(A, dy);
  const int64_t T = dy2.size(0), d = B.size(0), k = A.size(1), r = A.size(0);
  check_size("dy", dy2, 1, d, "the rows of B");
  if (weight) check_shape("weight", *weight, d, k);
  const ScalarType dtype = dy.scalar_type(), wide = accumulate_type(dy);
  const Tensor hidden = saved_hidden(h, need_d || need_b, dy2, r);
  const bool merged = T >= r && need_x && vera_merges(weight, seed, dy) && d * k < T * (d + k);
  Tensor dx = need_x ? empty_rows(dy, k) : nothing(dy), dd = nothing(dy), db = nothing(dy);
  MaybeTensor u;
  if (T < r) {
    const Tensor b = cast_as(B, dy), row = as_row(cast_as(lambda_d, dy));
    if (need_x || need_d) u = mm<Device>(call("aten::mul", "Tensor", dy2, as_row(cast_as(lambda_b, dy))), b);
    if (need_b) db = column_dot(mm<Device>(call("aten::mul", "Tensor", hidden, row), transposed(b)), dy2, wide);
    if (need_d) dd = column_dot(hidden, *u, wide);
    if (need_x) multiply_into(*u, *u, row);
  } else {
    const VeraMemory memory(B, dtype, merged ? weight : MaybeTensor());
    const Tensor& scaled = memory.scaled;
    if (need_x) scale_basis<Device>(scaled, B, lambda_d, lambda_b);
    if (merged) mm_out<Device>(flat("dx", dx), dy2, merge_basis<Device>(memory, *weight, a));
    else if (need_x) u = mm<Device>(dy2, scaled);
    if (need_d || need_b) {  // into the same memory: B' has been read
      Tensor Q = scaled;
      if (dtype == wide) mm_out<Device>(Q, transposed(dy2), hidden);
      else Q = mm<Device>(transposed(dy2), hidden, wide);
      multiply_into(Q, Q, B);
      if (need_d) dd = elements_of(mm<Device>(as_row(cast(lambda_b, wide)), Q), 0, r);
      if (need_b) db = elements_of(mm<Device>(Q, as_column(cast(lambda_d, wide))), 0, d);
    }
  }
  if (u && need_x) {
    const Tensor dx2 = flat("dx", dx);
    if (weight) mm_out<Device>(dx2, dy2, *weight);
    else if (seed) torch::stable::fill_(dx, 0);
    if (weight || seed) lift<Device>(dx2, *u, a, seed, p);
    else mm_out<Device>(dx2, *u, a);
  }
  return {dx, need_d ? cast_as(dd, lambda_d) : dd, need_b ? cast_as(db, lambda_b) : db,
          wants(needs, 3) ? column_sum(dy2, dtype) : nothing(dy)};
}

template <class Device> void bind_vera_layers(Bindings& rows) {
  rows.add<&vera_linear_forward<Device>>("vera_linear_forward");
  rows.add<&vera_linear_backward<Device>>("vera_linear_backward");
}

}  // namespace spectral_ops
