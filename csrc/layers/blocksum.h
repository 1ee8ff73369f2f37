// Bone, MiSS, mini and DiSHA layers, forward and backward, for any device: spectral_ops/functional/blocksum.py has the
// mathematics and the same steps in Python.
#pragma once

#include "../ops/blocksum.h"
#include "library.h"

namespace spectral_ops {

// y [T, d] += expand(h D): a plain product where every output has its own column of D, else one tiling pass.
template <class Device> void expand(const Tensor& y, const Tensor& h, const Tensor& D, const MaybeTensor& out_offsets) {
  if (D.size(1) == y.size(1) && !out_offsets) add_product<Device>(y, h, D);
  else block_tile_<Device>(y, mm<Device>(h, D), out_offsets, std::nullopt, 0.0, true);
}

// y [T, d] = x Wᵀ + b + expand(h D)
template <class Device>
void expanded_into(const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& h, const Tensor& D,
                   const MaybeTensor& bias, const MaybeTensor& out_offsets) {
  if constexpr (has_kernel<Device, LowRankMatmul>) {
    if (D.size(1) == y.size(1) && !out_offsets)
      return matmul_into<Device>(y, x, weight, h, transposed(D), 1, std::nullopt, bias);
    if (!out_offsets) return block_matmul_into<Device>(y, x, weight, mm<Device>(h, D), bias);
  }
  linear_into<Device>(y, x, weight, bias);
  expand<Device>(y, h, D, out_offsets);
}

// h = block_sum(drop(x))
template <class Device>
Tensor bone_sums(const Tensor& x, const Tensor& D, const MaybeTensor& seed, double p, const MaybeTensor& in_offsets) {
  check_matrix("D", D);
  check_same_device("D", D, x);
  return block_sum<Device>(flat("x", x), D.size(0), in_offsets, seed, p);
}

// y [..., d] += expand(h D); returns h.
template <class Device>
Tensor bone_add(const Tensor& y, const Tensor& x, const Tensor& D, const MaybeTensor& seed, double p,
                const MaybeTensor& in_offsets, const MaybeTensor& out_offsets) {
  Tensor h = bone_sums<Device>(x, D, seed, p, in_offsets);
  expand<Device>(flat("out", y), h, cast_as(D, x), out_offsets);
  return h;
}

// Over a weight, or on a copy of base_out.
template <class Device>
std::tuple<Tensor, Tensor> bone_linear_forward(Tensor x, MaybeTensor weight, MaybeTensor base_out, Tensor D, MaybeTensor bias,
                                               MaybeTensor seed, double p, MaybeTensor in_offsets, MaybeTensor out_offsets) {
  const NoGrad guard;
  check_tier(weight, base_out);
  if (!weight) {
    Tensor y = copy_of(*base_out);
    Tensor h = bone_add<Device>(y, x, D, seed, p, in_offsets, out_offsets);
    return {y, h};
  }
  check_weight(x, *weight);
  Tensor y = empty_rows(x, weight->size(0)), h = bone_sums<Device>(x, D, seed, p, in_offsets);
  expanded_into<Device>(flat("y", y), flat("x", x), *weight, h, cast_as(D, x), bias, out_offsets);
  return {y, h};
}

template <class Device> Tensor bone_update_forward_(Tensor out, Tensor x, Tensor D, MaybeTensor seed, double p) {
  const NoGrad guard;
  check_overwritten(out);
  return bone_add<Device>(out, x, D, seed, p, std::nullopt, std::nullopt);
}

// dx [T, k] = dy W + mask * s[:, shard(i)], without a weight the second alone.
template <class Device>
void bone_input_gradient(const Tensor& dx, const Tensor& dy, const MaybeTensor& weight, const Tensor& s,
                         const MaybeTensor& in_offsets, const MaybeTensor& seed, double p) {
  if constexpr (has_kernel<Device, LowRankMatmul>) {
    if (weight && !in_offsets && !seed) return block_matmul_into<Device>(dx, dy, transposed(*weight), s, std::nullopt);
  }
  if (weight) mm_out<Device>(dx, dy, *weight);
  block_tile_<Device>(dx, s, in_offsets, seed, p, weight.has_value());
}

// Results: dx [..., k], dD, db; empty [0] where `needs` has no bit for it. Without a weight dx is the update's share alone.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> bone_linear_backward(Tensor dy, MaybeTensor weight, Tensor D, Tensor h, MaybeTensor seed,
                                                        double p, MaybeTensor in_offsets, MaybeTensor out_offsets, int64_t k,
                                                        int64_t needs) {
  const NoGrad guard;
  check_matrix("D", D);
  const Tensor dy2 = flat("dy", dy);
  const bool own_columns = D.size(1) == dy2.size(1) && !out_offsets;
  const Tensor sums = own_columns ? dy2 : block_sum<Device>(dy2, D.size(1), out_offsets, std::nullopt, 0.0);
  Tensor dx = nothing(dy);
  if (wants(needs, 0)) {
    dx = empty_rows(dy, k);
    const Tensor s = mm<Device>(sums, transposed(cast_as(D, dy)));
    bone_input_gradient<Device>(flat("dx", dx), dy2, weight, s, in_offsets, seed, p);
  }
  Tensor dD = wants(needs, 1) ? mm<Device>(transposed(h), sums, D.scalar_type()) : nothing(dy);
  Tensor db = wants(needs, 2) ? column_sum(dy2, dy.scalar_type()) : nothing(dy);
  return {dx, dD, db};
}

template <class Device> void bind_blocksum_layers(Bindings& rows) {
  rows.add<&bone_linear_forward<Device>>("bone_linear_forward");
  rows.add<&bone_linear_backward<Device>>("bone_linear_backward");
  rows.mutating<&bone_update_forward_<Device>>("bone_update_forward_");
}

}  // namespace spectral_ops
