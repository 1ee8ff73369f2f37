// dropout_project, dropout_outer, dropout_lift_ and seeded_dropout: their kernels' arguments, free of torch, and their host
// side for any device. Matrices have unit inner strides; x, A [r, columns], u and out are in dtype.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include "../ops.h"
#endif

namespace spectral_ops {

// h [rows, r] = drop(x) Aᵀ, contiguous in dtype.
struct DropoutProject {
  const void *x, *A;
  void* h;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t x_stride, A_stride;
  DType dtype;
};

// dA [r, columns] = uᵀ drop(x), u [rows, r]; contiguous in float32 (float64 for float64).
struct DropoutOuter {
  const void *u, *x;
  void* dA;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t u_stride, x_stride;
  DType dtype;
};

// out [rows, columns] += drop(u A)
struct DropoutLift {
  void* out;
  const void *u, *A;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t out_stride, u_stride, A_stride;
  DType dtype;
};

// out [rows, columns] = drop(x), contiguous.
struct SeededDropout {
  const void* x;
  void* out;
  const int64_t* seed;
  double p;
  int64_t rows, columns, x_stride;
  DType dtype;
};

namespace cpu {
SPECTRAL_OPS_CPU_KERNEL(seeded_dropout, SeededDropout)
}  // namespace cpu

#ifdef SPECTRAL_OPS_HOST

template <class Device> Tensor dropout_project(Tensor x, Tensor A, Tensor seed, double p) {
  if constexpr (!has_kernel<Device, DropoutProject>) {
    return call("spectral_ops::dropout_project", "", x, A, seed, p);
  } else {
    check_matrix("x", x);
    check_matrix("A", A);
    DropoutProject a{};
    a.dtype = dtype_of("x", x);
    a.rows = x.size(0), a.columns = x.size(1), a.r = A.size(0);
    x = rows_of(x);
    A = checked_factor("A", A, a.r, a.columns, x, "x");
    Tensor h = empty(x, {a.rows, a.r});
    a.x = x.data_ptr(), a.A = A.data_ptr(), a.h = h.data_ptr();
    a.seed = index_data<int64_t>("seed", seed, 1, x);
    a.p = p;
    a.x_stride = x.stride(0), a.A_stride = A.stride(0);
    Device::launch(a, x);
    return h;
  }
}

template <class Device> Tensor dropout_outer(Tensor u, Tensor x, Tensor seed, double p) {
  if constexpr (!has_kernel<Device, DropoutOuter>) {
    return call("spectral_ops::dropout_outer", "", u, x, seed, p);
  } else {
    check_matrix("u", u);
    check_matrix("x", x);
    DropoutOuter a{};
    a.dtype = dtype_of("x", x);
    a.rows = x.size(0), a.columns = x.size(1), a.r = u.size(1);
    x = rows_of(x);
    u = checked_factor("u", u, a.rows, a.r, x, "x");
    Tensor dA = empty(x, {a.r, a.columns}, accumulate_type(x));
    a.u = u.data_ptr(), a.x = x.data_ptr(), a.dA = dA.data_ptr();
    a.seed = index_data<int64_t>("seed", seed, 1, x);
    a.p = p;
    a.u_stride = u.stride(0), a.x_stride = x.stride(0);
    Device::launch(a, x);
    return dA;
  }
}

template <class Device> void dropout_lift_(Tensor out, Tensor u, Tensor A, Tensor seed, double p) {
  if constexpr (!has_kernel<Device, DropoutLift>) {
    call_void("spectral_ops::dropout_lift_", out, u, A, seed, p);
  } else {
    check_matrix("out", out);
    check_matrix("u", u);
    check_written_once("out", out);
    DropoutLift a{};
    a.dtype = dtype_of("out", out);
    a.rows = out.size(0), a.columns = out.size(1), a.r = u.size(1);
    u = checked_factor("u", u, a.rows, a.r, out, "out");
    A = checked_factor("A", A, a.r, a.columns, out, "out");
    Tensor target = rows_of(out);
    a.out = target.data_ptr(), a.u = u.data_ptr(), a.A = A.data_ptr();
    a.seed = index_data<int64_t>("seed", seed, 1, out);
    a.p = p;
    a.out_stride = target.stride(0), a.u_stride = u.stride(0), a.A_stride = A.stride(0);
    Device::launch(a, out);
    if (!unit_inner_stride(out)) torch::stable::copy_(out, target);
  }
}

template <class Device> Tensor seeded_dropout(Tensor x, Tensor seed, double p) {
  if constexpr (!has_kernel<Device, SeededDropout>) {
    return call("spectral_ops::seeded_dropout", "", x, seed, p);
  } else {
    check_matrix("x", x);
    SeededDropout a{};
    a.dtype = dtype_of("x", x);
    a.rows = x.size(0), a.columns = x.size(1);
    x = rows_of(x);
    Tensor out = empty(x, {a.rows, a.columns});
    a.x = x.data_ptr(), a.out = out.data_ptr();
    a.seed = index_data<int64_t>("seed", seed, 1, x);
    a.p = p;
    a.x_stride = x.stride(0);
    Device::launch(a, x);
    return out;
  }
}

template <class Device> void bind_dropout(Bindings& rows) {
  if constexpr (has_kernel<Device, DropoutProject>) rows.add<&dropout_project<Device>>("dropout_project");
  if constexpr (has_kernel<Device, DropoutOuter>) rows.add<&dropout_outer<Device>>("dropout_outer");
  if constexpr (has_kernel<Device, DropoutLift>) rows.mutating<&dropout_lift_<Device>>("dropout_lift_");
  if constexpr (has_kernel<Device, SeededDropout>) rows.add<&seeded_dropout<Device>>("seeded_dropout");
}

#endif

}  // namespace spectral_ops
