// lowrank_matmul, block_matmul, lowrank_update_ and lowrank_backward: their kernels' arguments, free of torch, and their host
// side for any device.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include <cstdlib>
#include <initializer_list>
#include <string_view>
#include <tuple>

#include "../layers/library.h"
#include "lowrank_routes.h"
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

// y [rows, columns] = g * (x Wᵀ + scale h Bᵀ) + bias + tile[:, j % period], rounded once: x [rows, inner], W [columns, inner],
// h [rows, r] and B [columns, r] (r = 0: none), tile [rows, period] or null. W and B have a unit stride along either
// dimension, the others along the inner one; what else is wanted, cuda/lowrank_matmul.h says.
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
// Of cuda/lowrank_matmul.h: whether the kernel takes these arguments, and whether the current device has it.
bool matmul_takes(const LowRankMatmul& a);
bool matmul_runs(DType dtype);
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

// --- lowrank_matmul ---

inline int64_t whole_chunks(int64_t n) { return (n + 7) / 8 * 8; }  // of 16 bytes

// The strides by which TMA reads a matrix: where a dimension has one element, such as it takes.
inline void tile_strides(int64_t (&strides)[2], const Tensor& t) {
  strides[0] = t.stride(0), strides[1] = t.stride(1);
  if (t.size(1) <= 1) strides[1] = strides[0] == 1 && t.size(0) > 1 ? whole_chunks(t.size(0)) : 1;
  if (t.size(0) <= 1) strides[0] = strides[1] == 1 ? whole_chunks(t.size(1)) : 1;
}
inline int64_t row_pitch(const Tensor& t) { return t.size(0) <= 1 ? whole_chunks(t.size(1)) : t.stride(0); }

// A factor as TMA reads it: itself, or a copy whose rows start at multiples of 16 bytes. It is small beside x and y.
inline Tensor tile_factor(const Tensor& t, bool either_order) {
  int64_t s[2];
  tile_strides(s, t);
  const bool by_rows = s[1] == 1 && s[0] % 8 == 0 && s[0] >= t.size(1);
  const bool by_columns = either_order && s[0] == 1 && s[1] % 8 == 0 && s[1] >= t.size(0);
  if (reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && (by_rows || by_columns)) return t;
  const int64_t pitch = whole_chunks(t.size(1));
  Tensor copy = as_matrix(empty(t, {t.size(0), pitch}), t.size(0), t.size(1), pitch, 1);
  torch::stable::copy_(copy, t);
  return copy;
}

// The arguments of y [T, d] from x [T, k] and W [d, k], and of a second segment of r ranks as tile_factor would lay it out.
inline LowRankMatmul matmul_arguments(const Tensor& y, const Tensor& x, const Tensor& weight, int64_t r) {
  LowRankMatmul a{};
  a.dtype = dtype_of("x", x);
  a.y = y.data_ptr(), a.x = x.data_ptr(), a.W = weight.data_ptr();
  a.rows = x.size(0), a.columns = weight.size(0), a.inner = x.size(1), a.r = r;
  a.y_stride = row_pitch(y), a.x_stride = row_pitch(x);
  tile_strides(a.W_strides, weight);
  if (r) a.h = a.B = a.y, a.h_stride = a.B_strides[0] = whole_chunks(r), a.B_strides[1] = 1;
  return a;
}

// Whether the kernel runs for these, which are not yet complete, on the device of x.
inline bool matmul_fuses(const LowRankMatmul& a, const Tensor& y, const Tensor& x) {
  if (!unit_inner_stride(x) || !unit_inner_stride(y) || !cuda::matmul_takes(a)) return false;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (!x.is_cpu()) guard.emplace(x.get_device_index());
  return cuda::matmul_runs(a.dtype);
}

// The route of least cost; SPECTRAL_OPS_MATMUL names another, for tests and measurements, where it can run.
inline MatmulRoute matmul_route(const LowRankMatmul& a, bool scaled, bool bias, bool tiled, bool fuses) {
  if (const char* name = std::getenv("SPECTRAL_OPS_MATMUL")) {
    const std::string_view route = name;
    if (route == "library") return MatmulRoute::library;
    if (route == "update_first" && !scaled) return MatmulRoute::update_first;
    if (route == "fused" && fuses) return MatmulRoute::fused;
    STD_TORCH_CHECK(route == "library" || route == "update_first" || route == "fused", "SPECTRAL_OPS_MATMUL: got ", name,
                    ", wanted library, update_first or fused");
  }
  if (element_size(a.dtype) != 2) return MatmulRoute::library;  // the costs are those of tensor cores
  return matmul_costs({a.rows, a.columns, a.inner, a.r, scaled, bias, tiled, fuses, false}).best();
}

inline void check_product(const Tensor& y, const Tensor& x, const Tensor& weight) {
  check_matrix("x", x);
  check_matrix("weight", weight);
  check_size("weight", weight, 1, x.size(1), "the columns of x");
  check_same_device("weight", weight, x);
  check_dtype("weight", weight, dtype_of("x", x), "x");
  check_size("y", y, 0, x.size(0), "the rows of x");
  check_size("y", y, 1, weight.size(0), "the rows of weight");
  check_dtype("y", y, dtype_of("x", x), "x");
}

inline Tensor checked_cast(const char* name, const Tensor& t, ScalarType dtype) {
  dtype_of(name, t);  // floating
  return cast(t, dtype);
}

// y [T, d] = g * (x Wᵀ + scale h Bᵀ) + bias, of any strides, where Device has the kernel: by the route of least cost.
template <class Device>
void matmul_into(const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& h, const Tensor& B, double scale,
                 MaybeTensor g, MaybeTensor bias) {
  check_product(y, x, weight);
  check_matrix("h", h);
  check_matrix("B", B);
  const int64_t T = x.size(0), d = weight.size(0), r = B.size(1);
  check_size("h", h, 0, T, "the rows of x");
  check_size("h", h, 1, r, "the rank");
  check_size("B", B, 0, d, "the rows of weight");
  for (const Tensor* t : {&h, &B}) {
    check_same_device(t == &h ? "h" : "B", *t, x);
    check_dtype(t == &h ? "h" : "B", *t, dtype_of("x", x), "x");
  }
  LowRankMatmul a = matmul_arguments(y, x, weight, r);
  a.scale = scale;
  if (g) g = checked_cast("g", *g, accumulate_type(x));
  if (bias) bias = checked_cast("bias", *bias, x.scalar_type());
  a.g = vector_data("g", g, d, x, a.g_dtype);
  a.bias = vector_data("bias", bias, d, x, a.bias_dtype);
  if (T == 0 || d == 0) return;
  const MatmulRoute route = matmul_route(a, g.has_value(), bias.has_value(), false, matmul_fuses(a, y, x));
  if (route == MatmulRoute::fused) {
    MaybeTensor left, right;
    if (r) {
      left = tile_factor(h, false), right = tile_factor(B, true);
      a.h = left->data_ptr(), a.h_stride = row_pitch(*left);
      a.B = right->data_ptr();
      tile_strides(a.B_strides, *right);
    }
    return Device::launch(a, y);
  }
  if (g) {
    mm_out<Device>(y, x, transposed(weight));
    return lowrank_update_<Device>(y, h, B, scale, g, bias ? MaybeTensor(cast_as(*bias, *g)) : MaybeTensor());
  }
  if (route == MatmulRoute::update_first && r) {  // the larger product adds to it before it rounds
    if (bias) addmm_out<Device>(y, *bias, h, transposed(B), 1, scale);
    else addmm_out<Device>(y, y, h, transposed(B), 0, scale);
    return add_product<Device>(y, x, transposed(weight));
  }
  linear_into<Device>(y, x, weight, bias);
  if (r) add_product<Device>(y, h, transposed(B), scale);
}

template <class Device>
Tensor lowrank_matmul(Tensor x, Tensor weight, Tensor h, Tensor B, double scale, MaybeTensor g, MaybeTensor bias) {
  const NoGrad guard;
  check_matrix("x", x);
  check_matrix("weight", weight);
  Tensor y = empty(x, {x.size(0), weight.size(0)});
  matmul_into<Device>(y, x, weight, h, B, scale, g, bias);
  return y;
}

template <class Device> void bind_lowrank(Bindings& rows) {
  if constexpr (has_kernel<Device, LowRankMatmul>) rows.add<&lowrank_matmul<Device>>("lowrank_matmul");
  if constexpr (has_kernel<Device, LowRankUpdate>) rows.mutating<&lowrank_update_<Device>>("lowrank_update_");
  if constexpr (has_kernel<Device, LowRankBackward>) rows.add<&lowrank_backward<Device>>("lowrank_backward");
}

#endif

}  // namespace spectral_ops
