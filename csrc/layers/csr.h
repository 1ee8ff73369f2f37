// RoSA layers and the sparse matrix alone, forward and backward, for any device: spectral_ops/functional/csr.py has the
// mathematics and the same steps in Python.
#pragma once

#include "../ops/csr.h"
#include "library.h"
#include "lowrank.h"
#include "scratch.h"

namespace spectral_ops {

// As ROUTES and GRADIENT_ROUTES of spectral_ops/functional/routes.py number them.
enum class Route : int64_t { resident, scatter, spmm };
enum class GradientRoute : int64_t { sampled, dense, compact };

inline Route route_of(int64_t route) {
  STD_TORCH_CHECK(route >= 0 && route <= 2, "route: got ", route, ", wanted 0 to 2");
  return static_cast<Route>(route);
}

inline GradientRoute gradient_route_of(int64_t route) {
  STD_TORCH_CHECK(route >= 0 && route <= 2, "gradient_route: got ", route, ", wanted 0 to 2");
  return static_cast<GradientRoute>(route);
}

// The rows, or columns of the transpose, that these offsets are of.
inline int64_t owners(const char* name, const Tensor& offsets) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, name, ": wanted a vector of at least one offset");
  return offsets.size(0) - 1;
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

// dS [nnz] out of tiles of dyᵀx, in at least float32.
template <class Device>
Tensor gathered(const Tensor& dy, const Tensor& x, Tensor row_offsets, const Tensor& columns) {
  STD_TORCH_CHECK(owners("row_offsets", row_offsets) == dy.size(1), "row_offsets: wanted one more than the columns of dy");
  Tensor out = empty(x, {columns.numel()}, accumulate_type(x));
  gradient_tiles<Device>(dy, x, 1, [&](int64_t start, const Tensor& G) {
    csr_gather_<Device>(out, G, torch::stable::narrow(row_offsets, 0, start, G.size(0) + 1), columns);
  });
  return out;
}

// Results: dx, dS, dA, dB, db; empty [0] where `needs` has no bit for it. Without a weight, on the spmm route: dx is the share
// of S alone, beside what the base layer's own node returns.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rosa_linear_backward(
    Tensor dy, MaybeTensor x, MaybeTensor weight, Tensor values, Tensor row_offsets, Tensor columns, MaybeTensor column_offsets,
    MaybeTensor entry_rows, MaybeTensor permutation, MaybeTensor active_rows, MaybeTensor active_columns,
    MaybeTensor compact_offsets, MaybeTensor compact_columns, MaybeTensor A, MaybeTensor B, MaybeTensor h, MaybeTensor seed,
    double scale, double p, int64_t route, int64_t gradient_route, int64_t needs) {
  const NoGrad guard;
  const bool need_x = wants(needs, 0), need_values = wants(needs, 1), need_A = wants(needs, 2), need_B = wants(needs, 3);
  const bool need_bias = wants(needs, 4), spmm = route_of(route) == Route::spmm;
  const Tensor dy2 = flat("dy", dy);
  Tensor dx = nothing(dy), dS = nothing(dy), dA = nothing(dy), dB = nothing(dy), db = nothing(dy);
  MaybeTensor dx2;
  if (need_x) {
    STD_TORCH_CHECK(weight || spmm, "weight: got None, wanted one, except on the spmm route");
    dx = empty_rows(dy, weight ? weight->size(1) : owners("column_offsets", given("column_offsets", column_offsets)));
    dx2 = flat("dx", dx);
    if (!weight) torch::stable::fill_(*dx2, 0);
    else with_delta<Device>(*weight, values, row_offsets, columns, route_of(route),
                            [&](const Tensor& total) { mm_out<Device>(*dx2, dy2, total); });
    if (spmm)
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
  if (need_values) {
    const Tensor x2 = flat("x", given("x", x));
    switch (gradient_route_of(gradient_route)) {
      case GradientRoute::sampled: dS = csr_sddmm<Device>(dy2, x2, row_offsets, columns); break;
      case GradientRoute::dense: dS = gathered<Device>(dy2, x2, row_offsets, columns); break;
      case GradientRoute::compact:
        dS = gathered<Device>(call("aten::index_select", "", dy2, int64_t{1}, given("active_rows", active_rows)),
                              call("aten::index_select", "", x2, int64_t{1}, given("active_columns", active_columns)),
                              given("compact_offsets", compact_offsets), given("compact_columns", compact_columns));
    }
    dS = cast_as(dS, values);
  }
  return {dx, dS, dA, dB, db};
}

// x Sᵀ [..., d], added to a copy of base_out where it is given.
template <class Device>
Tensor csr_spmm_forward(Tensor x, MaybeTensor base_out, Tensor values, Tensor row_offsets, Tensor columns,
                        MaybeTensor permutation) {
  const NoGrad guard;
  Tensor y = base_out ? copy_of(*base_out) : empty_rows(x, owners("row_offsets", row_offsets));
  if (!base_out) torch::stable::fill_(y, 0);
  csr_spmm_<Device>(flat("y", y), flat("x", x), values, row_offsets, columns, permutation);
  return y;
}

// W + S [d, k], rounded once, as a new tensor.
template <class Device> Tensor csr_add_forward(Tensor weight, Tensor values, Tensor row_offsets, Tensor columns) {
  const NoGrad guard;
  check_matrix("weight", weight);
  Tensor out = copy_of(weight);
  csr_scatter_<Device>(out, values, row_offsets, columns, true);
  return out;
}

// dW [d, k] at the pattern, in dtype.
template <class Device> Tensor csr_add_backward(Tensor dW, Tensor row_offsets, Tensor columns, ScalarType dtype) {
  const NoGrad guard;
  check_matrix("dW", dW);
  Tensor out = empty(dW, {columns.numel()}, dtype);
  csr_gather_<Device>(out, flat("dW", dW), row_offsets, columns);
  return out;
}

}  // namespace spectral_ops
