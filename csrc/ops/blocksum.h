// block_sum, block_tile_ and block_matmul (lowrank.h has its kernel): their kernels' arguments, free of torch, and their host
// side for any device.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include "lowrank.h"
#endif

namespace spectral_ops {

// h [rows, r] = sums of drop(x) over shards, x [rows, columns]; both with unit inner stride.
// offsets [r + 1], or null for the cyclic map; seed [1], or null without dropout; both live where x lives.
struct BlockSum {
  const void* x;
  void* h;
  const int32_t* offsets;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t x_stride, h_stride;  // elements between rows
  DType dtype;                 // of x and h
};

// out [rows, columns] = mask * s[:, shard(i)] (accumulate: +=), s [rows, r]; unit inner strides.
struct BlockTile {
  void* out;
  const void* s;
  const int32_t* offsets;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t out_stride, s_stride;  // elements between rows
  DType dtype, s_dtype;          // of out, of s
  bool accumulate;
};

namespace cpu {
SPECTRAL_OPS_CPU_KERNEL(block_sum, BlockSum)
SPECTRAL_OPS_CPU_KERNEL(block_tile, BlockTile)
}  // namespace cpu

namespace cuda {
SPECTRAL_OPS_CUDA_KERNEL(block_sum, BlockSum)
SPECTRAL_OPS_CUDA_KERNEL(block_tile, BlockTile)
}  // namespace cuda

#ifdef SPECTRAL_OPS_HOST

inline const int32_t* checked_offsets(const std::optional<Tensor>& offsets, int64_t r, int64_t columns, const Tensor& x) {
  const int32_t* data = index_data<int32_t>("offsets", offsets, r + 1, x);
  if (!data || !x.is_cpu()) return data;  // on a GPU reading them would wait for it
  STD_TORCH_CHECK(data[0] == 0 && data[r] == columns, "offsets: got a range of ", data[0], " to ", data[r],
                  ", wanted 0 to ", columns);
  for (int64_t p = 0; p < r; ++p)
    STD_TORCH_CHECK(data[p] <= data[p + 1], "offsets: decreases after element ", p);
  return data;
}

template <class Device>
Tensor block_sum(Tensor x, int64_t r, std::optional<Tensor> offsets, std::optional<Tensor> seed, double p) {
  check_matrix("x", x);
  STD_TORCH_CHECK(r >= 1, "r: got ", r, ", wanted at least 1");
  const DType dtype = dtype_of("x", x);
  x = rows_of(x);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor h = empty(x, {rows, r});
  BlockSum a{};
  a.x = x.data_ptr();
  a.h = h.data_ptr();
  a.offsets = checked_offsets(offsets, r, columns, x);
  a.seed = index_data<int64_t>("seed", seed, 1, x);
  a.p = p;
  a.rows = rows, a.columns = columns, a.r = r;
  a.x_stride = x.stride(0), a.h_stride = r;
  a.dtype = dtype;
  Device::launch(a, x);
  return h;
}

template <class Device>
void block_tile_(Tensor out, Tensor s, std::optional<Tensor> offsets, std::optional<Tensor> seed, double p,
                 bool accumulate) {
  check_matrix("out", out);
  check_matrix("s", s);
  check_size("s", s, 0, out.size(0), "the rows of out");
  check_same_device("s", s, out);
  check_written_once("out", out);
  const int64_t rows = out.size(0), columns = out.size(1), r = s.size(1);
  STD_TORCH_CHECK(r >= 1, "s: got no columns, wanted at least 1");
  s = rows_of(s);
  Tensor target = rows_of(out);
  BlockTile a{};
  a.out = target.data_ptr();
  a.s = s.data_ptr();
  a.offsets = checked_offsets(offsets, r, columns, out);
  a.seed = index_data<int64_t>("seed", seed, 1, out);
  a.p = p;
  a.rows = rows, a.columns = columns, a.r = r;
  a.out_stride = target.stride(0), a.s_stride = s.stride(0);
  a.dtype = dtype_of("out", out), a.s_dtype = dtype_of("s", s);
  a.accumulate = accumulate;
  Device::launch(a, out);
  if (!unit_inner_stride(out)) torch::stable::copy_(out, target);
}

// out [rows, columns] += t, rounded once more.
template <class Device> void add_(const Tensor& out, const Tensor& t) {
  check_size("t", t, 1, out.size(1), "the columns of out");
  if (out.size(1) > 0) block_tile_<Device>(out, t, std::nullopt, std::nullopt, 0.0, true);
}

// y [T, n] += b [n], rounded once more.
template <class Device> void add_bias(const Tensor& y, const Tensor& bias) {
  STD_TORCH_CHECK(bias.dim() == 1, "bias: got ", bias.dim(), " dimensions, wanted a vector");
  check_size("bias", bias, 0, y.size(1), "the outputs");
  add_<Device>(y, as_matrix(bias, y.size(0), y.size(1), 0, bias.stride(0)));
}

// y [T, n] = x Wᵀ + bias + s[:, j mod r], of any strides, where Device has the kernel: by the route of least cost.
template <class Device>
void block_matmul_into(const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& s, MaybeTensor bias) {
  check_product(y, x, weight);
  check_matrix("s", s);
  check_size("s", s, 0, x.size(0), "the rows of x");
  check_same_device("s", s, x);
  check_dtype("s", s, dtype_of("x", x), "x");
  STD_TORCH_CHECK(s.size(1) >= 1, "s: got no columns, wanted at least 1");
  LowRankMatmul a = matmul_arguments(y, x, weight, 0);
  if (bias) bias = checked_cast("bias", *bias, x.scalar_type());
  a.bias = vector_data("bias", bias, a.columns, x, a.bias_dtype);
  if (a.rows == 0 || a.columns == 0) return;
  const Tensor tile = rows_of(s);
  a.tile = tile.data_ptr(), a.tile_stride = tile.stride(0), a.period = s.size(1);
  const MatmulRoute route = matmul_route(a, false, bias.has_value(), true, matmul_fuses(a, y, x));
  if (route == MatmulRoute::fused) return Device::launch(a, y);
  if (route == MatmulRoute::update_first && !bias) {  // the product adds to what is tiled before it rounds
    block_tile_<Device>(y, tile, std::nullopt, std::nullopt, 0.0, false);
    return add_product<Device>(y, x, transposed(weight));
  }
  linear_into<Device>(y, x, weight, bias);
  block_tile_<Device>(y, tile, std::nullopt, std::nullopt, 0.0, true);
}

template <class Device> Tensor block_matmul(Tensor x, Tensor weight, Tensor s, MaybeTensor bias) {
  const NoGrad guard;
  check_matrix("x", x);
  check_matrix("weight", weight);
  Tensor y = empty(x, {x.size(0), weight.size(0)});
  block_matmul_into<Device>(y, x, weight, s, bias);
  return y;
}

template <class Device> void bind_blocksum(Bindings& rows) {
  if constexpr (has_kernel<Device, BlockSum>) rows.add<&block_sum<Device>>("block_sum");
  if constexpr (has_kernel<Device, BlockTile>) rows.mutating<&block_tile_<Device>>("block_tile_");
  if constexpr (has_kernel<Device, LowRankMatmul>) rows.add<&block_matmul<Device>>("block_matmul");
}

#endif

}  // namespace spectral_ops
