// Whole layers with a low-rank update, forward and backward, for any device: spectral_ops/functional/lowrank.py has the
// mathematics and the same steps in Python.
#pragma once

#include "../ops/dropout.h"
#include "../ops/lowrank.h"
#include "library.h"

namespace spectral_ops {

// h [T, r] = drop(x) Aᵀ
template <class Device> Tensor project(const Tensor& x, const Tensor& A, const MaybeTensor& seed, double p) {
  return seed ? dropout_project<Device>(x, A, *seed, p) : mm<Device>(x, transposed(A));
}

// out [T, k] += mask * (u A)
template <class Device> void lift(const Tensor& out, const Tensor& u, const Tensor& A, const MaybeTensor& seed, double p) {
  if (seed) dropout_lift_<Device>(out, u, A, *seed, p);
  else add_product<Device>(out, u, A);
}

// dA [r, k] = uᵀ drop(x) in dtype
template <class Device>
Tensor A_gradient(const Tensor& u, const Tensor& x, const MaybeTensor& seed, double p, ScalarType dtype) {
  return seed ? cast(dropout_outer<Device>(u, x, *seed, p), dtype) : mm<Device>(transposed(u), x, dtype);
}

// A core is diagonal, [r] or [r, 1], or full, [r, r].
inline bool is_diagonal(const Tensor& core) { return core.dim() == 1 || core.size(1) == 1; }

// A diagonal core as a row [1, r].
inline Tensor as_row(const Tensor& core) { return as_matrix(core, 1, core.size(0), 1, core.stride(0)); }

// h' = h C; h itself without a core.
template <class Device> Tensor apply_core(const Tensor& h, const MaybeTensor& core) {
  if (!core) return h;
  const Tensor C = cast_as(*core, h);
  return is_diagonal(C) ? call("aten::mul", "Tensor", h, as_row(C)) : mm<Device>(h, C);
}

// u' = u Cᵀ
template <class Device> Tensor core_input(const Tensor& u, const MaybeTensor& core) {
  if (!core) return u;
  const Tensor C = cast_as(*core, u);
  return is_diagonal(C) ? call("aten::mul", "Tensor", u, as_row(C)) : mm<Device>(u, transposed(C));
}

template <class Device> Tensor core_gradient(const Tensor& h, const Tensor& u, const Tensor& core) {
  if (!is_diagonal(core)) return mm<Device>(transposed(h), u, core.scalar_type());
  Tensor sums = column_dot(h, u, core.scalar_type());
  return core.dim() == 1 ? sums : as_matrix(sums, core.size(0), 1, 1, 1);
}

// y [T, d] = g * (x Wᵀ + scale h Bᵀ) + b
template <class Device>
void adapted_into(const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& h, const Tensor& B, double scale,
                  const MaybeTensor& g, const MaybeTensor& bias) {
  if constexpr (has_kernel<Device, LowRankMatmul>) return matmul_into<Device>(y, x, weight, h, B, scale, g, bias);
  linear_into<Device>(y, x, weight, g ? MaybeTensor() : bias);
  if (!g) return add_product<Device>(y, h, transposed(B), scale);
  lowrank_update_<Device>(y, h, B, scale, g, bias ? MaybeTensor(cast_as(*bias, *g)) : MaybeTensor());
}

// Whether dx = (g * dy) W is formed by scaling dy rather than W: as scales_tokens of lowrank.py.
inline bool scales_tokens(int64_t T, const Tensor& weight, const MaybeTensor& g) { return g && T <= 2 * weight.size(1); }

// dx [T, k] = (g * dy) W + mask * (u A) into dx, from gdy where scales_tokens chose to form it.
template <class Device>
void input_gradient(const Tensor& dx, const Tensor& dy, const Tensor& gdy, const Tensor& weight, const MaybeTensor& g,
                    const Tensor& u, const Tensor& A, const MaybeTensor& seed, double p) {
  const bool by_tokens = scales_tokens(dy.size(0), weight, g);
  const Tensor left = by_tokens ? gdy : dy;
  Tensor W = weight;
  if (g && !by_tokens) W = cast_as(call("aten::mul", "Tensor", weight, as_matrix(*g, g->size(0), 1, g->stride(0), 1)), weight);
  if constexpr (has_kernel<Device, LowRankMatmul>) {
    if (!seed) return matmul_into<Device>(dx, left, transposed(W), u, transposed(A), 1, std::nullopt, std::nullopt);
  }
  mm_out<Device>(dx, left, W);
  lift<Device>(dx, u, A, seed, p);
}

// A [r, k] and B [d, r] are matrices that fit x [..., k] and d outputs; the products and kernels check the rest.
inline void check_factors(const Tensor& x, int64_t d, const Tensor& A, const Tensor& B) {
  check_matrix("A", A);
  check_matrix("B", B);
  STD_TORCH_CHECK(x.dim() >= 1, "x: got no dimension, wanted at least one");
  check_size("A", A, 1, x.size(x.dim() - 1), "the last dimension of x");
  check_size("B", B, 0, d, "the outputs");
  check_size("B", B, 1, A.size(0), "the rows of A");
  check_same_device("A", A, x);
  check_same_device("B", B, x);
}

// out [..., d] becomes g * (out - b + scale h' Bᵀ) + b; returns h.
template <class Device>
Tensor lowrank_update_forward_(Tensor out, Tensor x, Tensor A, Tensor B, MaybeTensor bias, MaybeTensor core, MaybeTensor g,
                               MaybeTensor seed, double scale, double p) {
  const NoGrad guard;
  check_overwritten(out);
  const Tensor out2 = flat("out", out);
  check_factors(x, out2.size(1), A, B);
  Tensor h = project<Device>(flat("x", x), cast_as(A, x), seed, p);
  const Tensor hc = apply_core<Device>(h, core), b = cast_as(B, x);
  if (!g) {
    add_product<Device>(out2, hc, transposed(b), scale);
  } else {
    MaybeTensor shift;
    if (bias) shift = call("aten::mul", "Tensor", torch::stable::subtract(ones_like(*g), *g), cast_as(*bias, *g));
    lowrank_update_<Device>(out2, hc, b, scale, g, shift);
  }
  return h;
}

// Over a weight, or on a copy of base_out.
template <class Device>
std::tuple<Tensor, Tensor> lowrank_linear_forward(Tensor x, MaybeTensor weight, MaybeTensor base_out, Tensor A, Tensor B,
                                                  MaybeTensor bias, MaybeTensor core, MaybeTensor g, MaybeTensor seed,
                                                  double scale, double p) {
  const NoGrad guard;
  check_tier(weight, base_out);
  if (!weight) {
    Tensor y = copy_of(*base_out);
    Tensor h = lowrank_update_forward_<Device>(y, x, A, B, bias, core, g, seed, scale, p);
    return {y, h};
  }
  check_weight(x, *weight);
  check_factors(x, weight->size(0), A, B);
  Tensor y = empty_rows(x, weight->size(0));
  const Tensor x2 = flat("x", x), y2 = flat("y", y);
  Tensor h = project<Device>(x2, cast_as(A, x), seed, p);
  adapted_into<Device>(y2, x2, *weight, apply_core<Device>(h, core), cast_as(B, x), scale, g, bias);
  return {y, h};
}

// Results: dx, dA, dB, db, dcore, dout; empty [0] where `needs` has no bit for it. Without a weight: the update alone, over
// a base whose own node returns the rest of dx and db, and dout = g * dy (only with g).
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lowrank_linear_backward(
    Tensor dy, MaybeTensor x, MaybeTensor weight, Tensor A, Tensor B, MaybeTensor core, MaybeTensor g, MaybeTensor h,
    MaybeTensor seed, double scale, double p, int64_t needs) {
  const NoGrad guard;
  const Tensor dy2 = flat("dy", dy);
  const bool need_x = wants(needs, 0), need_A = wants(needs, 1), need_B = wants(needs, 2), need_core = wants(needs, 4);
  const bool need_out = wants(needs, 5), need_u = need_x || need_A || need_core;
  const Tensor a = cast_as(A, dy), b = cast_as(B, dy);
  const Tensor hidden = saved_hidden(h, need_B || need_core, dy2, A.size(0));
  const Tensor hc = need_B ? apply_core<Device>(hidden, core) : hidden;
  const bool need_gdy = need_out || (need_x && weight && scales_tokens(dy2.size(0), *weight, g));
  auto [u, dB, db, dyz, gdy] = lowrank_backward<Device>(dy2, hc, b, scale, g, std::nullopt, std::nullopt, need_u, need_B,
                                                        wants(needs, 3), need_gdy);
  Tensor dcore = need_core ? core_gradient<Device>(hidden, u, given("core", core)) : nothing(dy);
  if (need_u) u = core_input<Device>(u, core);
  Tensor dx = nothing(dy);
  if (need_x) {
    dx = empty_rows(dy, A.size(1));
    const Tensor dx2 = flat("dx", dx);
    if (weight) {
      input_gradient<Device>(dx2, dy2, gdy, *weight, g, u, a, seed, p);
    } else if (seed) {
      torch::stable::fill_(dx2, 0);
      lift<Device>(dx2, u, a, seed, p);
    } else {
      mm_out<Device>(dx2, u, a);
    }
  }
  Tensor dA = need_A ? A_gradient<Device>(u, flat("x", given("x", x)), seed, p, A.scalar_type()) : nothing(dy);
  dB = need_B ? cast_as(dB, B) : nothing(dy);
  if (wants(needs, 3) && !weight) db = call("aten::mul", "Tensor", db, torch::stable::subtract(ones_like(given("g", g)), *g));
  db = cast_as(db, dy);
  return {dx, dA, dB, db, dcore, need_out ? shaped_like(dy, gdy) : nothing(dy)};
}

template <class Device> void bind_lowrank_layers(Bindings& rows) {
  rows.add<&lowrank_linear_forward<Device>>("lowrank_linear_forward");
  rows.add<&lowrank_linear_backward<Device>>("lowrank_linear_backward");
  rows.mutating<&lowrank_update_forward_<Device>>("lowrank_update_forward_");
}

}  // namespace spectral_ops
