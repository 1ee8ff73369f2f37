// segment_project, segment_lift_ and segment_outer: their kernels' arguments, free of torch, and their host side for any
// device. Adapter s has places offsets[s] to offsets[s + 1] - 1, and place i has row order[i], or i without an order. Factors
// [n, ., .] have any strides.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include "../ops.h"
#endif

namespace spectral_ops {

// h [rows, r] = x A_sᵀ by place, x [x_rows, columns], A [n, r, columns]; contiguous, zero at a place without adapter.
struct SegmentProject {
  const void *x, *A;
  void* h;
  const int64_t* order;  // [rows], or null
  const void* offsets;   // [n + 1] int64 where `wide`, else int32
  bool wide;
  int64_t rows, x_rows, columns, r, n;
  int64_t x_stride, A_strides[3];
  DType dtype;
};

// out [out_rows, columns] += h B_sᵀ, h [rows, r] by place, B [n, columns, r].
struct SegmentLift {
  void* out;
  const void *h, *B;
  const int64_t* order;
  const void* offsets;
  bool wide;
  int64_t rows, out_rows, columns, r, n;
  int64_t out_stride, h_stride, B_strides[3];
  DType dtype;
};

// out [n, r, columns] = Σ uᵀ x over each adapter's places, u [rows, r] by place, x [x_rows, columns]; contiguous in float32
// (float64 for float64).
struct SegmentOuter {
  const void *u, *x;
  void* out;
  const int64_t* order;
  const void* offsets;
  bool wide;
  int64_t rows, x_rows, columns, r, n;
  int64_t u_stride, x_stride;
  DType dtype;
};

#ifdef SPECTRAL_OPS_HOST

// Factors [n, rows, columns] of n adapters, any strides.
inline void check_factor_stack(const char* name, const Tensor& t, int64_t dim, int64_t size, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 3, name, ": got ", t.dim(), " dimensions, wanted one matrix for each adapter");
  check_size(name, t, dim, size, "that of the rows");
  check_same_device(name, t, like);
  check_dtype(name, t, dtype_of("the rows", like), "the rows");
}

// How many places there are, for a matrix of `rows` rows.
inline int64_t places_of(const std::optional<Tensor>& order, int64_t rows) {
  if (!order) return rows;
  STD_TORCH_CHECK(order->dim() == 1, "order: got ", order->dim(), " dimensions, wanted a vector");
  return order->size(0);
}

template <class Arguments>
void set_groups(Arguments& a, const std::optional<Tensor>& order, const Tensor& offsets, int64_t n, const Tensor& like) {
  a.order = index_data<int64_t>("order", order, a.rows, like);
  a.wide = offsets.scalar_type() != ScalarType::Int;
  if (a.wide) a.offsets = index_data<int64_t>("offsets", offsets, n + 1, like);
  else a.offsets = index_data<int32_t>("offsets", offsets, n + 1, like);
  a.n = n;
}

template <class Device> Tensor segment_project(Tensor x, Tensor A, std::optional<Tensor> order, Tensor offsets) {
  if constexpr (!has_kernel<Device, SegmentProject>) {
    return call("spectral_ops::segment_project", "", x, A, order, offsets);
  } else {
    check_matrix("x", x);
    SegmentProject a{};
    a.dtype = dtype_of("x", x);
    a.x_rows = x.size(0), a.columns = x.size(1), a.rows = places_of(order, a.x_rows);
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
}

template <class Device>
void segment_lift_(Tensor out, Tensor h, Tensor B, std::optional<Tensor> order, Tensor offsets) {
  if constexpr (!has_kernel<Device, SegmentLift>) {
    call_void("spectral_ops::segment_lift_", out, h, B, order, offsets);
  } else {
    check_matrix("out", out);
    check_matrix("h", h);
    check_written_once("out", out);
    SegmentLift a{};
    a.dtype = dtype_of("out", out);
    a.out_rows = out.size(0), a.columns = out.size(1), a.r = h.size(1), a.rows = places_of(order, a.out_rows);
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
}

template <class Device> Tensor segment_outer(Tensor u, Tensor x, std::optional<Tensor> order, Tensor offsets) {
  if constexpr (!has_kernel<Device, SegmentOuter>) {
    return call("spectral_ops::segment_outer", "", u, x, order, offsets);
  } else {
    check_matrix("u", u);
    check_matrix("x", x);
    STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets: wanted a vector of one number more than adapters");
    SegmentOuter a{};
    a.dtype = dtype_of("x", x);
    a.x_rows = x.size(0), a.columns = x.size(1), a.r = u.size(1), a.rows = places_of(order, a.x_rows);
    x = rows_of(x);
    u = checked_factor("u", u, a.rows, a.r, x, "x");
    set_groups(a, order, offsets, offsets.size(0) - 1, x);
    Tensor out = empty(x, {a.n, a.r, a.columns}, accumulate_type(x));
    a.u = u.data_ptr(), a.x = x.data_ptr(), a.out = out.data_ptr();
    a.u_stride = u.stride(0), a.x_stride = x.stride(0);
    Device::launch(a, x);
    return out;
  }
}

template <class Device> void bind_segments(Bindings& rows) {
  if constexpr (has_kernel<Device, SegmentProject>) rows.add<&segment_project<Device>>("segment_project");
  if constexpr (has_kernel<Device, SegmentLift>) rows.mutating<&segment_lift_<Device>>("segment_lift_");
  if constexpr (has_kernel<Device, SegmentOuter>) rows.add<&segment_outer<Device>>("segment_outer");
}

#endif

}  // namespace spectral_ops
