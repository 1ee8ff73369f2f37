// bat_weight_, bat_matmul, bat_contract_, bat_mix and bat_mix_backward_: their kernels' arguments, free of torch, and their
// host side for any device. Blocks are r x r, r divides rows and columns; bat [n, r, r] is contiguous, block i from bat + i r r.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include <tuple>

#include "../ops.h"
#endif

namespace spectral_ops {

// out [rows, columns] = W' of weight (delta: W' - W); W(o,j) meets block o of bat, n = rows / r, or with by_column block j,
// n = columns / r. out has unit inner stride.
struct BatWeight {
  const void *weight, *bat;
  void* out;
  int64_t rows, columns, r;
  int64_t weight_strides[2], out_stride;
  DType dtype, bat_dtype, out_dtype;  // dtype: of weight; out_dtype: that, or its accumulator
  bool by_column, delta;
};

// out [T, rows] = x W'ᵀ, x [T, columns] (transpose: out [T, columns] = x W', x [T, rows]); weight [rows, columns], block o of
// bat for block-row o. out is contiguous, x has unit inner stride; both in dtype.
struct BatMatmul {
  const void *x, *weight, *bat;
  void* out;
  void* workspace;  // CUDA: partial sums
  int64_t T, rows, columns, r;
  int64_t x_stride, weight_strides[2];
  DType dtype, bat_dtype;
  bool transpose;
};

// dB [rows / r, r, r] = Σ_j W(o,j)ᵀ G(o,j) + G(o,j), contiguous in float32 (float64 for float64). G [rows, columns] has unit
// inner stride.
struct BatContract {
  const void *weight, *G;
  void* dB;
  void* workspace;  // CUDA: partial sums
  int64_t rows, columns, r;
  int64_t weight_strides[2], G_stride;
  DType dtype, G_dtype;  // G_dtype: weight's dtype, or dB's
};

// z [rows, columns], z_j = x_j + x_j C_jᵀ, and s [rows, r] = Σ_j x_j C_jᵀ, contiguous in x's dtype; bat: C [columns / r, r, r].
struct BatMix {
  const void *x, *bat;
  void *z, *s;
  void* workspace;  // CUDA: partial sums
  int64_t rows, columns, r;
  int64_t x_stride;
  DType dtype, bat_dtype;
};

// With v_j = g_j + q: g_j becomes g_j + v_j C_j (need_g), and dC [columns / r, r, r], dC_j = v_jᵀ x_j, contiguous in float32
// (float64 for float64), or null. g, x [rows, columns] and q [rows, r] have unit inner strides.
struct BatMixBackward {
  void* g;
  const void *q, *x, *bat;
  void* dC;
  void* workspace;  // CUDA: partial sums
  int64_t rows, columns, r;
  int64_t g_stride, q_stride, x_stride;
  DType dtype, bat_dtype;
  bool need_g;
};

namespace cuda {
SPECTRAL_OPS_CUDA_KERNEL(bat_weight, BatWeight)
SPECTRAL_OPS_CUDA_KERNEL(bat_contract, BatContract)
}  // namespace cuda

#ifdef SPECTRAL_OPS_HOST

// Blocks [size / r, r, r] of any floating dtype, contiguous; name_of: what they tile.
inline Tensor checked_blocks(const char* name, const Tensor& t, int64_t size, const char* name_of, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == t.size(2) && t.size(1) >= 1 && t.size(0) * t.size(1) == size, name,
                  ": wanted [n, r, r] with n r = ", size, " (", name_of, ")");
  check_same_device(name, t, like);
  dtype_of(name, t);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline void check_divides(int64_t r, const char* name, const Tensor& t) {
  for (int64_t d = 0; d < 2; ++d)
    STD_TORCH_CHECK(t.size(d) % r == 0, name, ": got size ", t.size(d), " in dimension ", d, ", wanted a multiple of ", r);
}

inline void check_wide(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == accumulate_type(like), name, ": wanted float32 (float64 for float64)");
}

template <class Device> void bat_weight_(Tensor out, Tensor weight, Tensor bat, bool row, bool delta) {
  check_matrix("weight", weight);
  check_matrix("out", out);
  check_written_once("out", out);
  check_same_device("out", out, weight);
  BatWeight a{};
  a.rows = weight.size(0), a.columns = weight.size(1);
  check_size("out", out, 0, a.rows, "the rows of weight");
  check_size("out", out, 1, a.columns, "the columns of weight");
  a.dtype = dtype_of("weight", weight), a.out_dtype = dtype_of("out", out);
  if (a.out_dtype != a.dtype) check_wide("out", out, weight);
  bat = checked_blocks("bat", bat, row ? a.columns : a.rows, row ? "the columns of weight" : "the rows of weight", weight);
  a.r = bat.size(1);
  check_divides(a.r, "weight", weight);
  Tensor target = rows_of(out);
  a.weight = weight.data_ptr(), a.bat = bat.data_ptr(), a.out = target.data_ptr();
  set_strides(a.weight_strides, weight);
  a.out_stride = target.stride(0);
  a.bat_dtype = dtype_of("bat", bat);
  a.by_column = row, a.delta = delta;
  Device::launch(a, weight);
  if (!unit_inner_stride(out)) torch::stable::copy_(out, target);
}

template <class Device> Tensor bat_matmul(Tensor x, Tensor weight, Tensor bat, bool transpose) {
  if constexpr (!has_kernel<Device, BatMatmul>) {
    return call("spectral_ops::bat_matmul", "", x, weight, bat, transpose);
  } else {
    check_matrix("x", x);
    check_matrix("weight", weight);
    BatMatmul a{};
    a.T = x.size(0), a.rows = weight.size(0), a.columns = weight.size(1);
    x = checked_factor("x", x, a.T, transpose ? a.rows : a.columns, weight, "weight");
    bat = checked_blocks("bat", bat, a.rows, "the rows of weight", weight);
    a.r = bat.size(1);
    check_divides(a.r, "weight", weight);
    Tensor out = empty(x, {a.T, transpose ? a.columns : a.rows});
    a.x = x.data_ptr(), a.weight = weight.data_ptr(), a.bat = bat.data_ptr(), a.out = out.data_ptr();
    a.x_stride = x.stride(0);
    set_strides(a.weight_strides, weight);
    a.dtype = dtype_of("weight", weight), a.bat_dtype = dtype_of("bat", bat);
    a.transpose = transpose;
    Device::launch(a, weight);
    return out;
  }
}

template <class Device> void bat_contract_(Tensor dB, Tensor weight, Tensor G) {
  check_matrix("weight", weight);
  check_matrix("G", G);
  check_written_once("dB", dB);
  BatContract a{};
  a.rows = weight.size(0), a.columns = weight.size(1);
  check_size("G", G, 0, a.rows, "the rows of weight");
  check_size("G", G, 1, a.columns, "the columns of weight");
  check_same_device("G", G, weight);
  a.dtype = dtype_of("weight", weight), a.G_dtype = dtype_of("G", G);
  if (a.G_dtype != a.dtype) check_wide("G", G, weight);
  check_wide("dB", dB, weight);
  Tensor target = checked_blocks("dB", dB, a.rows, "the rows of weight", weight);
  a.r = dB.size(1);
  check_divides(a.r, "weight", weight);
  G = rows_of(G);
  a.weight = weight.data_ptr(), a.G = G.data_ptr(), a.dB = target.data_ptr();
  set_strides(a.weight_strides, weight);
  a.G_stride = G.stride(0);
  Device::launch(a, weight);
  if (!dB.is_contiguous()) torch::stable::copy_(dB, target);
}

template <class Device> std::tuple<Tensor, Tensor> bat_mix(Tensor x, Tensor bat) {
  if constexpr (!has_kernel<Device, BatMix>) {
    return call_two("spectral_ops::bat_mix", "", x, bat);
  } else {
    check_matrix("x", x);
    BatMix a{};
    a.rows = x.size(0), a.columns = x.size(1);
    a.dtype = dtype_of("x", x);
    x = rows_of(x);
    bat = checked_blocks("bat", bat, a.columns, "the columns of x", x);
    a.r = bat.size(1);
    Tensor z = empty(x, {a.rows, a.columns});
    Tensor s = empty(x, {a.rows, a.r});
    a.x = x.data_ptr(), a.bat = bat.data_ptr(), a.z = z.data_ptr(), a.s = s.data_ptr();
    a.x_stride = x.stride(0);
    a.bat_dtype = dtype_of("bat", bat);
    Device::launch(a, x);
    return {z, s};
  }
}

template <class Device>
Tensor bat_mix_backward_(Tensor g, Tensor q, Tensor x, Tensor bat, bool need_g, bool need_dC) {
  if constexpr (!has_kernel<Device, BatMixBackward>) {
    return call("spectral_ops::bat_mix_backward_", "", g, q, x, bat, need_g, need_dC);
  } else {
    check_matrix("g", g);
    if (need_g) check_written_once("g", g);
    BatMixBackward a{};
    a.rows = g.size(0), a.columns = g.size(1);
    a.dtype = dtype_of("g", g);
    bat = checked_blocks("bat", bat, a.columns, "the columns of g", g);
    a.r = bat.size(1);
    q = checked_factor("q", q, a.rows, a.r, g, "g");
    if (need_dC) {
      x = checked_factor("x", x, a.rows, a.columns, g, "g");
      a.x = x.data_ptr(), a.x_stride = x.stride(0);
    }
    Tensor dC = need_dC ? empty(g, {a.columns / a.r, a.r, a.r}, accumulate_type(g))
                        : empty(g, {0}, accumulate_type(g));
    if (!need_g && !need_dC) return dC;
    Tensor target = rows_of(g);
    a.g = target.data_ptr(), a.q = q.data_ptr(), a.bat = bat.data_ptr();
    a.dC = need_dC ? dC.data_ptr() : nullptr;
    a.g_stride = target.stride(0), a.q_stride = q.stride(0);
    a.bat_dtype = dtype_of("bat", bat);
    a.need_g = need_g;
    Device::launch(a, g);
    if (need_g && !unit_inner_stride(g)) torch::stable::copy_(g, target);
    return dC;
  }
}

template <class Device> void bind_bat(Bindings& rows) {
  if constexpr (has_kernel<Device, BatWeight>) rows.mutating<&bat_weight_<Device>>("bat_weight_");
  if constexpr (has_kernel<Device, BatMatmul>) rows.add<&bat_matmul<Device>>("bat_matmul");
  if constexpr (has_kernel<Device, BatContract>) rows.mutating<&bat_contract_<Device>>("bat_contract_");
  if constexpr (has_kernel<Device, BatMix>) rows.add<&bat_mix<Device>>("bat_mix");
  if constexpr (has_kernel<Device, BatMixBackward>) rows.mutating<&bat_mix_backward_<Device>>("bat_mix_backward_");
}

#endif

}  // namespace spectral_ops
