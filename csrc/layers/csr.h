// Layers of the sparse matrix alone, for any device: spectral_ops/functional/csr.py has the mathematics and the same steps
// in Python.
#pragma once

#include "../ops/csr.h"
#include "library.h"
#include "scratch.h"

namespace spectral_ops {

// As GRADIENT_ROUTES of spectral_ops/functional/rosa_routes.py numbers them.
enum class GradientRoute : int64_t { sampled, dense, compact };

inline GradientRoute gradient_route_of(int64_t route) {
  STD_TORCH_CHECK(route >= 0 && route <= 2, "gradient_route: got ", route, ", wanted 0 to 2");
  return static_cast<GradientRoute>(route);
}

// The rows, or columns of the transpose, that these offsets are of.
inline int64_t owners(const char* name, const Tensor& offsets) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, name, ": wanted a vector of at least one offset");
  return offsets.size(0) - 1;
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

// dS [nnz] = (dyᵀx) at the pattern, in the values' dtype.
template <class Device>
Tensor values_gradient(const Tensor& dy, const MaybeTensor& x, const Tensor& values, const Tensor& row_offsets,
                       const Tensor& columns, const MaybeTensor& active_rows, const MaybeTensor& active_columns,
                       const MaybeTensor& compact_offsets, const MaybeTensor& compact_columns, GradientRoute route) {
  const Tensor x2 = flat("x", given("x", x));
  Tensor dS;
  switch (route) {
    case GradientRoute::sampled: dS = csr_sddmm<Device>(dy, x2, row_offsets, columns); break;
    case GradientRoute::dense: dS = gathered<Device>(dy, x2, row_offsets, columns); break;
    case GradientRoute::compact:
      dS = gathered<Device>(call("aten::index_select", "", dy, int64_t{1}, given("active_rows", active_rows)),
                            call("aten::index_select", "", x2, int64_t{1}, given("active_columns", active_columns)),
                            given("compact_offsets", compact_offsets), given("compact_columns", compact_columns));
  }
  return cast_as(dS, values);
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

// Results: dx, dS; empty [0] where `needs` has no bit for it.
template <class Device>
std::tuple<Tensor, Tensor> csr_spmm_backward(Tensor dy, MaybeTensor x, Tensor values, Tensor row_offsets, Tensor columns,
                                             MaybeTensor column_offsets, MaybeTensor entry_rows, MaybeTensor permutation,
                                             MaybeTensor active_rows, MaybeTensor active_columns, MaybeTensor compact_offsets,
                                             MaybeTensor compact_columns, int64_t gradient_route, int64_t needs) {
  const NoGrad guard;
  const Tensor dy2 = flat("dy", dy);
  Tensor dx = nothing(dy), dS = nothing(dy);
  if (wants(needs, 0)) {
    dx = empty_rows(dy, owners("column_offsets", given("column_offsets", column_offsets)));
    torch::stable::fill_(dx, 0);
    csr_spmm_<Device>(flat("dx", dx), dy2, values, *column_offsets, given("entry_rows", entry_rows),
                      given("permutation", permutation));
  }
  if (wants(needs, 1))
    dS = values_gradient<Device>(dy2, x, values, row_offsets, columns, active_rows, active_columns, compact_offsets,
                                 compact_columns, gradient_route_of(gradient_route));
  return {dx, dS};
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

template <class Device> void bind_csr_layers(Bindings& rows) {
  rows.add<&csr_spmm_forward<Device>>("csr_spmm_forward");
  rows.add<&csr_spmm_backward<Device>>("csr_spmm_backward");
  rows.add<&csr_add_forward<Device>>("csr_add_forward");
  rows.add<&csr_add_backward<Device>>("csr_add_backward");
}

}  // namespace spectral_ops
