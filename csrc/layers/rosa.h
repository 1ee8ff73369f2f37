// RoSA's layer, for any device: spectral_ops/functional/rosa.py has the mathematics and the same steps in Python.
#pragma once

#include "csr.h"
#include "lowrank.h"

namespace spectral_ops {

// As ROUTES of spectral_ops/functional/rosa_routes.py numbers them.
enum class Route : int64_t { resident, scatter, spmm };

inline Route route_of(int64_t route) {
  STD_TORCH_CHECK(route >= 0 && route <= 2, "route: got ", route, ", wanted 0 to 2");
  return static_cast<Route>(route);
}

// f(W + S), rounded to W's dtype, in scratch memory on the scatter route; f(weight) on any other.
template <class Device, class F>
void with_delta(const Tensor& weight, const Tensor& values, const Tensor& row_offsets, const Tensor& columns, Route route,
                const F& f) {
  if (route != Route::scatter) return f(weight);
  dtype_of("weight", weight);
  const Lease lease(weight, weight.size(0), weight.size(1), weight.scalar_type());
  Tensor total = lease.tensor();
  torch::stable::copy_(total, weight);
  csr_scatter_<Device>(total, values, row_offsets, columns, true);
  f(total);
}

template <class Device>
std::tuple<Tensor, Tensor> rosa_linear_forward(Tensor x, Tensor weight, Tensor values, Tensor row_offsets, Tensor columns,
                                               MaybeTensor A, MaybeTensor B, MaybeTensor bias, MaybeTensor seed, double scale,
                                               double p, int64_t route) {
  const NoGrad guard;
  check_weight(x, weight);
  if (A) check_factors(x, weight.size(0), *A, given("B", B));
  Tensor y = empty_rows(x, weight.size(0)), h = nothing(x);
  const Tensor x2 = flat("x", x), y2 = flat("y", y);
  with_delta<Device>(weight, values, row_offsets, columns, route_of(route),
                     [&](const Tensor& total) { linear_into<Device>(y2, x2, total, bias); });
  if (route_of(route) == Route::spmm) csr_spmm_<Device>(y2, x2, values, row_offsets, columns, std::nullopt);
  if (A) {
    h = project<Device>(x2, cast_as(*A, x), seed, p);
    add_product<Device>(y2, h, transposed(cast_as(*B, x)), scale);
  }
  return {y, h};
}

// Results: dx, dS, dA, dB, db; empty [0] where `needs` has no bit for it.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rosa_linear_backward(
    Tensor dy, MaybeTensor x, Tensor weight, Tensor values, Tensor row_offsets, Tensor columns, MaybeTensor column_offsets,
    MaybeTensor entry_rows, MaybeTensor permutation, MaybeTensor active_rows, MaybeTensor active_columns,
    MaybeTensor compact_offsets, MaybeTensor compact_columns, MaybeTensor A, MaybeTensor B, MaybeTensor h, MaybeTensor seed,
    double scale, double p, int64_t route, int64_t gradient_route, int64_t needs) {
  const NoGrad guard;
  const bool need_x = wants(needs, 0), need_values = wants(needs, 1), need_A = wants(needs, 2), need_B = wants(needs, 3);
  const bool need_bias = wants(needs, 4);
  const Tensor dy2 = flat("dy", dy);
  Tensor dx = nothing(dy), dS = nothing(dy), dA = nothing(dy), dB = nothing(dy), db = nothing(dy);
  MaybeTensor dx2;
  if (need_x) {
    dx = empty_rows(dy, weight.size(1));
    dx2 = flat("dx", dx);
    with_delta<Device>(weight, values, row_offsets, columns, route_of(route),
                       [&](const Tensor& total) { mm_out<Device>(*dx2, dy2, total); });
    if (route_of(route) == Route::spmm)
      csr_spmm_<Device>(*dx2, dy2, values, given("column_offsets", column_offsets), given("entry_rows", entry_rows),
                        given("permutation", permutation));
  }
  if (A && (need_x || need_A || need_B || need_bias)) {
    const bool need_u = need_x || need_A;
    const Tensor hidden = saved_hidden(h, need_B, dy2, A->size(0));
    auto [u, wide_dB, wide_db, dyz, gdy] = lowrank_backward<Device>(dy2, hidden, cast_as(given("B", B), dy), scale, std::nullopt,
                                                                    std::nullopt, std::nullopt, need_u, need_B, need_bias, false);
    if (need_B) dB = cast_as(wide_dB, *B);
    if (need_bias) db = cast_as(wide_db, dy);
    if (need_x) lift<Device>(*dx2, u, cast_as(*A, dy), seed, p);
    if (need_A) dA = A_gradient<Device>(u, flat("x", given("x", x)), seed, p, A->scalar_type());
  } else if (need_bias) {
    db = column_sum(dy2, dy.scalar_type());
  }
  if (need_values)
    dS = values_gradient<Device>(dy2, x, values, row_offsets, columns, active_rows, active_columns, compact_offsets,
                                 compact_columns, gradient_route_of(gradient_route));
  return {dx, dS, dA, dB, db};
}

template <class Device> void bind_rosa_layers(Bindings& rows) {
  rows.add<&rosa_linear_forward<Device>>("rosa_linear_forward");
  rows.add<&rosa_linear_backward<Device>>("rosa_linear_backward");
}

}  // namespace spectral_ops
