// The host side of segment_project, segment_lift_ and segment_outer, and the grouping of rows that they work on.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "../ops.h"

namespace spectral_ops {

// Factors [n, rows, columns] of n adapters, any strides.
inline void check_factor_stack(const char* name, const Tensor& t, int64_t dim, int64_t size, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 3, name, ": got ", t.dim(), " dimensions, wanted one matrix for each adapter");
  check_size(name, t, dim, size, "that of the rows");
  check_same_device(name, t, like);
  check_dtype(name, t, dtype_of("the rows", like), "the rows");
}

template <class Arguments>
void set_groups(Arguments& a, const Tensor& order, const Tensor& offsets, int64_t n, const Tensor& like) {
  a.order = index_data<int64_t>("order", order, a.rows, like);
  a.offsets = index_data<int64_t>("offsets", offsets, n + 1, like);
  a.n = n;
}

template <class Device> Tensor segment_project(Tensor x, Tensor A, Tensor order, Tensor offsets) {
  check_matrix("x", x);
  SegmentProject a{};
  a.dtype = dtype_of("x", x);
  a.rows = x.size(0), a.columns = x.size(1);
  check_factor_stack("A", A, 2, a.columns, x);
  a.r = A.size(1);
  x = rows_of(x);
  Tensor h = empty(x, {a.rows, a.r});
  a.x = x.data_ptr(), a.A = A.data_ptr(), a.h = h.data_ptr();
  set_groups(a, order, offsets, A.size(0), x);
  a.x_stride = x.stride(0);
  for (int d = 0; d < 3; ++d) a.A_strides[d] = A.stride(d);
  Device::launch(a, x);
  return h;
}

template <class Device> void segment_lift_(Tensor out, Tensor h, Tensor B, Tensor order, Tensor offsets) {
  check_matrix("out", out);
  check_matrix("h", h);
  check_written_once("out", out);
  SegmentLift a{};
  a.dtype = dtype_of("out", out);
  a.rows = out.size(0), a.columns = out.size(1), a.r = h.size(1);
  h = checked_factor("h", h, a.rows, a.r, out, "out");
  check_factor_stack("B", B, 1, a.columns, out);
  check_size("B", B, 2, a.r, "the columns of h");
  Tensor target = rows_of(out);
  a.out = target.data_ptr(), a.h = h.data_ptr(), a.B = B.data_ptr();
  set_groups(a, order, offsets, B.size(0), out);
  a.out_stride = target.stride(0), a.h_stride = h.stride(0);
  for (int d = 0; d < 3; ++d) a.B_strides[d] = B.stride(d);
  Device::launch(a, out);
  if (!unit_inner_stride(out)) torch::stable::copy_(out, target);
}

template <class Device> Tensor segment_outer(Tensor u, Tensor x, Tensor order, Tensor offsets) {
  check_matrix("u", u);
  check_matrix("x", x);
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets: wanted a vector of one number more than adapters");
  SegmentOuter a{};
  a.dtype = dtype_of("x", x);
  a.rows = x.size(0), a.columns = x.size(1), a.r = u.size(1);
  x = rows_of(x);
  u = checked_factor("u", u, a.rows, a.r, x, "x");
  set_groups(a, order, offsets, offsets.size(0) - 1, x);
  Tensor out = empty(x, {a.n, a.r, a.columns}, accumulate_type(x));
  a.u = u.data_ptr(), a.x = x.data_ptr(), a.out = out.data_ptr();
  a.u_stride = u.stride(0), a.x_stride = x.stride(0);
  Device::launch(a, x);
  return out;
}

// order [T] and offsets [n + 1] of ids [m], of which each serves T / m rows in sequence: rows sorted by id, those of one id
// in their order, by counting in memory that the host reads.
template <class Device> std::tuple<Tensor, Tensor> group_rows(Tensor ids, int64_t T, int64_t n) {
  const int64_t m = ids.size(0), each = m ? T / m : 0;
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids.scalar_type() == ScalarType::Int, "ids: wanted int32 or int64");
  const void* const data = ids.data_ptr();
  const auto group = [&](int64_t i) {  // 0: before the first adapter; n + 1: after the last
    const int64_t at = i * ids.stride(0);
    const int64_t id = wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
    return id < 0 ? 0 : id < n ? id + 1 : n + 1;
  };
  std::vector<int64_t> starts(static_cast<size_t>(n + 3));
  for (int64_t i = 0; i < m; ++i) starts[static_cast<size_t>(group(i) + 1)] += each;
  for (size_t g = 1; g < starts.size(); ++g) starts[g] += starts[g - 1];
  Tensor order = empty(ids, {T}, ScalarType::Long), offsets = empty(ids, {n + 1}, ScalarType::Long);
  std::copy_n(starts.begin() + 1, n + 1, static_cast<int64_t*>(offsets.data_ptr()));
  int64_t* const rows = static_cast<int64_t*>(order.data_ptr());
  for (int64_t i = 0; i < m; ++i) {
    int64_t& next = starts[static_cast<size_t>(group(i))];
    for (int64_t t = i * each; t < (i + 1) * each; ++t) rows[next++] = t;
  }
  return {order, offsets};
}

}  // namespace spectral_ops
