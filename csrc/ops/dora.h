// column_norm, column_norm_cached_ and magnitude_grad: their kernels' arguments, free of torch, and their host side for any
// device.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include <utility>

#include "../ops.h"
#endif

namespace spectral_ops {

// norm [rows] = ‖weight_o + scale (B A)_o‖ in float32 (float64 for float64); A [r, columns], B [rows, r].
struct ColumnNorm {
  const void *weight, *A, *B;
  void* norm;
  int64_t* stamp;  // [2] fingerprint of A, B and a sample of W, or null where nothing is cached
  void* workspace;  // CUDA: norm_plan(...).bytes
  double scale;
  int64_t rows, columns, r;
  int64_t weight_strides[2], A_strides[2], B_strides[2];
  DType dtype, A_dtype, B_dtype;  // dtype: of weight
  bool force;                     // recompute even if the fingerprint is the stamp
};

// What the fingerprint reads of W [rows, columns]: of row o the columns (o * skew & spacing - 1) + u * spacing, u < per_row, as
// far as there are so many. spacing is a power of two and skew odd, spacing times the golden ratio: the entries read lie evenly,
// one to about `spacing` of W, at least one in each row and column; all of a W below 2 kSample entries.
struct WeightSample {
  static constexpr int64_t kSample = 4096;
  int64_t spacing, skew, per_row;

  static WeightSample of(int64_t rows, int64_t columns) {
    int64_t spacing = 1;
    while (2 * spacing <= rows && 2 * spacing <= columns && 2 * spacing * kSample <= rows * columns) spacing *= 2;
    return {spacing, spacing * 40503 >> 16 | 1, (columns + spacing - 1) / spacing};
  }
};

// dm [columns] = dyz / (g norm), or where |g| < vanishing_g, or |g| norm < |bias| / vanishing_bias,
// Σ_t dy (x·weight_o + scale h·B_o) / norm. dy [rows, columns], x [rows, k], h [rows, r], B [columns, r] with unit inner strides.
struct MagnitudeGrad {
  const void *dyz, *g, *norm;  // [columns] float32 (float64 for float64)
  const void *dy, *x, *h, *weight, *B;
  const void* bias;  // or null
  void* dm;
  void* workspace;  // CUDA: magnitude_plan(...).bytes
  double scale, vanishing_g, vanishing_bias;
  int64_t rows, columns, k, r;
  int64_t dy_stride, x_stride, h_stride, B_stride;
  int64_t weight_strides[2];
  DType dtype, bias_dtype;  // dtype: of dy, x, h, weight and B
};

namespace cuda {
SPECTRAL_OPS_CUDA_KERNEL(column_norm, ColumnNorm)
SPECTRAL_OPS_CUDA_KERNEL(magnitude_grad, MagnitudeGrad)
}  // namespace cuda

#ifdef SPECTRAL_OPS_HOST

// The arguments of both norms.
inline ColumnNorm norm_arguments(const Tensor& weight, const Tensor& A, const Tensor& B, double scale, const Tensor& norm) {
  check_matrix("A", A);
  check_matrix("B", B);
  const int64_t rows = weight.size(0), columns = weight.size(1), r = A.size(0);
  check_size("A", A, 1, columns, "the columns of weight");
  check_size("B", B, 0, rows, "the rows of weight");
  check_size("B", B, 1, r, "the rows of A");
  check_same_device("A", A, weight);
  check_same_device("B", B, weight);
  ColumnNorm a{};
  a.weight = weight.data_ptr();
  a.A = A.data_ptr();
  a.B = B.data_ptr();
  a.norm = norm.data_ptr();
  a.scale = scale;
  a.rows = rows, a.columns = columns, a.r = r;
  set_strides(a.weight_strides, weight);
  set_strides(a.A_strides, A);
  set_strides(a.B_strides, B);
  a.dtype = dtype_of("weight", weight), a.A_dtype = dtype_of("A", A), a.B_dtype = dtype_of("B", B);
  return a;
}

template <class Device> Tensor column_norm(Tensor weight, Tensor A, Tensor B, double scale) {
  check_matrix("weight", weight);
  Tensor norm = empty(weight, {weight.size(0)}, accumulate_type(weight));
  ColumnNorm a = norm_arguments(weight, A, B, scale, norm);
  Device::launch(a, weight);
  return norm;
}

template <class Device>
void column_norm_cached_(Tensor norm, Tensor stamp, Tensor weight, Tensor A, Tensor B, double scale, bool force) {
  check_matrix("weight", weight);
  STD_TORCH_CHECK(norm.dim() == 1 && norm.size(0) == weight.size(0) && norm.is_contiguous() &&
                      norm.scalar_type() == accumulate_type(weight),
                  "norm: wanted a contiguous float32 (float64 for float64) vector of ", weight.size(0));
  check_same_device("norm", norm, weight);
  ColumnNorm a = norm_arguments(weight, A, B, scale, norm);
  a.stamp = const_cast<int64_t*>(index_data<int64_t>("stamp", stamp, 2, weight));
  a.force = force;
  Device::launch(a, weight);
  bump_version(norm);
  bump_version(stamp);
}

template <class Device>
Tensor magnitude_grad(Tensor dyz, Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor B, double scale, Tensor g, Tensor norm,
                      std::optional<Tensor> bias) {
  check_matrix("dy", dy);
  check_matrix("x", x);
  check_matrix("B", B);
  check_matrix("weight", weight);
  MagnitudeGrad a{};
  a.dtype = dtype_of("dy", dy);
  a.rows = dy.size(0), a.columns = dy.size(1), a.k = x.size(1), a.r = B.size(1);
  check_size("weight", weight, 0, a.columns, "the columns of dy");
  check_size("weight", weight, 1, a.k, "the columns of x");
  check_same_device("weight", weight, dy);
  check_dtype("weight", weight, a.dtype, "dy");
  dy = rows_of(dy);
  x = checked_factor("x", x, a.rows, a.k, dy, "dy");
  h = checked_factor("h", h, a.rows, a.r, dy, "dy");
  B = checked_factor("B", B, a.columns, a.r, dy, "dy");
  DType wide;
  std::optional<Tensor> vectors[] = {dyz, g, norm};  // each a copy where it is strided, alive until the launch
  for (const auto& [i, name, data] : {std::tuple{0, "dyz", &a.dyz}, {1, "g", &a.g}, {2, "norm", &a.norm}}) {
    STD_TORCH_CHECK(vectors[i]->scalar_type() == accumulate_type(dy), name, ": wanted float32 (float64 for float64)");
    *data = vector_data(name, vectors[i], a.columns, dy, wide);
  }
  a.bias = vector_data("bias", bias, a.columns, dy, a.bias_dtype);
  Tensor dm = empty(dy, {a.columns}, accumulate_type(dy));
  a.dy = dy.data_ptr(), a.x = x.data_ptr(), a.h = h.data_ptr(), a.weight = weight.data_ptr(), a.B = B.data_ptr();
  a.dm = dm.data_ptr();
  a.scale = scale;
  a.vanishing_g = 1.0 / 16384, a.vanishing_bias = 64;  // as in spectral_ops/functional/dora.py
  a.dy_stride = dy.stride(0), a.x_stride = x.stride(0), a.h_stride = h.stride(0), a.B_stride = B.stride(0);
  set_strides(a.weight_strides, weight);
  Device::launch(a, dy);
  return dm;
}

template <class Device> void bind_dora(Bindings& rows) {
  if constexpr (has_kernel<Device, ColumnNorm>) rows.add<&column_norm<Device>>("column_norm");
  if constexpr (has_kernel<Device, ColumnNorm>) rows.add<&column_norm_cached_<Device>>("column_norm_cached_");
  if constexpr (has_kernel<Device, MagnitudeGrad>) rows.add<&magnitude_grad<Device>>("magnitude_grad");
}

#endif

}  // namespace spectral_ops
