// lowrank_matmul, block_matmul, lowrank_update_ and lowrank_backward: their kernels' arguments, free of torch, and their host
// side for any device.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include <initializer_list>
#include <tuple>

#include "../layers/library.h"
#endif

namespace spectral_ops {

// out [rows, columns] becomes g * (out + scale h Bᵀ) + shift, h [rows, r], B [columns, r]; unit inner strides.
struct LowRankUpdate {
  void* out;
  const void *h, *B;
  const void *g, *shift;  // [columns] float32 (float64 for float64), or null
  double scale;
  int64_t rows, columns, r;
  int64_t out_stride, h_stride, B_stride;
  DType dtype;  // of out, h and B
};

// One pass over dy [rows, columns] (and y, where given); a null output is not wanted. Unit inner strides.
// u [rows, r] = scale (g * dy) B, gdy [rows, columns] = g * dy, in dtype and contiguous; dB [columns, r] =
// scale (g * dy)ᵀ h, db [columns] = Σ dy, dyz [columns] = Σ dy * (y - bias), contiguous in float32 (float64 for float64).
struct LowRankBackward {
  const void *dy, *h, *B;
  const void *g, *y, *bias;  // or null
  void *u, *dB, *db, *dyz, *gdy;
  void* workspace;  // CUDA: backward_plan(...).bytes of partial sums
  double scale;
  int64_t rows, columns, r;
  int64_t dy_stride, h_stride, B_stride, y_stride;
  DType dtype, g_dtype, bias_dtype;  // dtype: of dy, h, B and y
};

// y [rows, columns] = g * (x Wᵀ + scale h Bᵀ) + bias + tile[:, j % period]; x [rows, inner], W [columns, inner], h [rows, r] and
// B [columns, r] (r = 0: none), tile [rows, period] or null. W and B have a unit stride along either dimension, the others along
// the inner one; which strides and sizes are taken, cuda/lowrank_matmul.h says.
struct LowRankMatmul {
  void* y;
  const void *x, *W, *h, *B;
  const void *g, *bias;  // [columns], or null
  const void* tile;
  double scale;
  int64_t rows, columns, inner, r, period;
  int64_t y_stride, x_stride, W_strides[2], h_stride, B_strides[2], tile_stride;
  DType dtype, g_dtype, bias_dtype;  // dtype: of y, x, W, h, B and tile
};

namespace cuda {
SPECTRAL_OPS_CUDA_KERNEL(lowrank_matmul, LowRankMatmul)
SPECTRAL_OPS_CUDA_KERNEL(lowrank_update, LowRankUpdate)
SPECTRAL_OPS_CUDA_KERNEL(lowrank_backward, LowRankBackward)
}  // namespace cuda

#ifdef SPECTRAL_OPS_HOST

template <class Device>
void lowrank_update_(Tensor out, Tensor h, Tensor B, double scale, std::optional<Tensor> g, std::optional<Tensor> shift) {
  check_matrix("out", out);
  check_matrix("B", B);
  check_written_once("out", out);
  LowRankUpdate a{};
  a.dtype = dtype_of("out", out);
  a.rows = out.size(0), a.columns = out.size(1), a.r = B.size(1);
  h = checked_factor("h", h, a.rows, a.r, out, "out");
  B = checked_factor("B", B, a.columns, a.r, out, "out");
  for (const std::optional<Tensor>* t : {&g, &shift})
    STD_TORCH_CHECK(!*t || (*t)->scalar_type() == accumulate_type(out), "g and shift: wanted float32 (float64 for float64)");
  Tensor target = rows_of(out);
  a.out = target.data_ptr(), a.h = h.data_ptr(), a.B = B.data_ptr();
  DType wide;
  a.g = vector_data("g", g, a.columns, out, wide);
  a.shift = vector_data("shift", shift, a.columns, out, wide);
  a.scale = scale;
  a.out_stride = target.stride(0), a.h_stride = h.stride(0), a.B_stride = B.stride(0);
  Device::launch(a, out);
  if (!unit_inner_stride(out)) torch::stable::copy_(out, target);
}

// Whether u and dB are left to two products of the library, which read dy twice. Our kernel passes over it once for every 64
// ranks, and makes the other results in its first pass, which would then be one more.
template <class Device> bool by_products(const LowRankBackward& a, bool others) {
  return !Device::on_host && element_size(a.dtype) == 2 && a.rows > 0 && a.columns > 0 && a.r > (others ? 128 : 64);
}

template <class Device>
void lowrank_products(Tensor& u, Tensor& dB, const Tensor& dy, const Tensor& h, const Tensor& B, double scale,
                      const std::optional<Tensor>& g, bool need_u, bool need_dB) {
  const NoGrad guard;
  Tensor factors;  // g as a column, times scale
  if (g) factors = as_matrix(*g, g->size(0), 1, g->stride(0), 1);
  if (need_u) addmm_out<Device>(u, u, dy, g ? cast_as(call("aten::mul", "Tensor", B, factors), B) : B, 0, scale);
  if (!need_dB) return;
  dB = mm<Device>(transposed(dy), h, ScalarType::Float);
  if (scale != 1) {
    Tensor one = empty(dB, {1, 1});
    torch::stable::fill_(one, scale);
    factors = g ? call("aten::mul", "Tensor", factors, one) : one;
  }
  if (g || scale != 1) call("aten::mul_", "Tensor", dB, cast(factors, ScalarType::Float));
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lowrank_backward(
    Tensor dy, Tensor h, Tensor B, double scale, std::optional<Tensor> g, std::optional<Tensor> y,
    std::optional<Tensor> bias, bool need_u, bool need_dB, bool need_db, bool need_gdy) {
  check_matrix("dy", dy);
  check_matrix("B", B);
  LowRankBackward a{};
  a.dtype = dtype_of("dy", dy);
  a.rows = dy.size(0), a.columns = dy.size(1), a.r = B.size(1);
  dy = rows_of(dy);
  h = checked_factor("h", h, a.rows, a.r, dy, "dy");
  B = checked_factor("B", B, a.columns, a.r, dy, "dy");
  if (y) {
    y = checked_factor("y", *y, a.rows, a.columns, dy, "dy");
    a.y = y->data_ptr(), a.y_stride = y->stride(0);
  }
  const auto output = [&](bool wanted, std::initializer_list<int64_t> shape, ScalarType type, void*& data) {
    Tensor t = wanted ? empty(dy, shape, type) : empty(dy, {0}, type);
    data = wanted ? t.data_ptr() : nullptr;
    return t;
  };
  const ScalarType sums = accumulate_type(dy);
  Tensor u = output(need_u, {a.rows, a.r}, dy.scalar_type(), a.u);
  Tensor dB = output(need_dB, {a.columns, a.r}, sums, a.dB);
  Tensor db = output(need_db, {a.columns}, sums, a.db);
  Tensor dyz = output(y.has_value(), {a.columns}, sums, a.dyz);
  Tensor gdy = output(need_gdy, {a.rows, a.columns}, dy.scalar_type(), a.gdy);
  a.dy = dy.data_ptr(), a.h = h.data_ptr(), a.B = B.data_ptr();
  a.g = vector_data("g", g, a.columns, dy, a.g_dtype);
  a.bias = vector_data("bias", bias, a.columns, dy, a.bias_dtype);
  a.scale = scale;
  a.dy_stride = dy.stride(0), a.h_stride = h.stride(0), a.B_stride = B.stride(0);
  const bool others = need_db || y || need_gdy;
  const bool products = (need_u || need_dB) && by_products<Device>(a, others);
  if (products) lowrank_products<Device>(u, dB, dy, h, B, scale, g, need_u, need_dB);
  if (products) a.u = a.dB = nullptr, a.r = 0;
  if (!products || others) Device::launch(a, dy);
  return {u, dB, db, dyz, gdy};
}

template <class Device> void bind_lowrank(Bindings& rows) {
  if constexpr (has_kernel<Device, LowRankUpdate>) rows.mutating<&lowrank_update_<Device>>("lowrank_update_");
  if constexpr (has_kernel<Device, LowRankBackward>) rows.add<&lowrank_backward<Device>>("lowrank_backward");
}

#endif

}  // namespace spectral_ops
