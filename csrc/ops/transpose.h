// out [n, T] gets xᵀ, bit for bit: no operator of its own, but a step of a weight gradient (layers/scratch.h).
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include "../ops.h"
#endif

namespace spectral_ops {

// out [columns, rows] = xᵀ, x [rows, columns]; unit inner strides.
struct Transpose {
  const void* x;
  void* out;
  int64_t rows, columns;
  int64_t x_stride, out_stride;  // elements between rows
  DType dtype;
};

namespace cpu {
SPECTRAL_OPS_CPU_KERNEL(transpose, Transpose)
}  // namespace cpu

#ifdef SPECTRAL_OPS_HOST

template <class Device> void transpose_(Tensor out, Tensor x) {
  check_matrix("x", x);
  check_matrix("out", out);
  check_written_once("out", out);
  check_same_device("x", x, out);
  Transpose a{};
  a.rows = x.size(0), a.columns = x.size(1);
  check_size("out", out, 0, a.columns, "the columns of x");
  check_size("out", out, 1, a.rows, "the rows of x");
  a.dtype = dtype_of("out", out);
  check_dtype("x", x, a.dtype, "out");
  x = rows_of(x);
  Tensor target = rows_of(out);
  a.x = x.data_ptr(), a.out = target.data_ptr();
  a.x_stride = x.stride(0), a.out_stride = target.stride(0);
  Device::launch(a, out);
  if (!unit_inner_stride(out)) torch::stable::copy_(out, target);
}

#endif

}  // namespace spectral_ops
