// Bat's layers, forward and backward, for any device: spectral_ops/functional/bat.py has the mathematics and the same steps
// in Python.
#pragma once

#include "../ops/bat.h"
#include "../ops/blocksum.h"
#include "scratch.h"

namespace spectral_ops {

// x W'ᵀ + b (transpose: x W') [T, n] by column, for x [T, k], with the leading dimensions of `like`.
template <class Device>
Tensor bat_product(const Tensor& like, const Tensor& x, const Tensor& weight, const Tensor& bat, const MaybeTensor& bias,
                   bool transpose, bool exact) {
  if (x.size(0) < bat.size(1)) {
    const Tensor y = bat_matmul<Device>(x, weight, bat, transpose);
    if (bias) add_bias<Device>(y, *bias);
    return shaped_like(like, y);
  }
  const ScalarType wide = accumulate_type(weight);
  exact = exact && weight.scalar_type() != wide;
  const bool apart = exact && !x.is_cpu();
  const Lease lease(weight, weight.size(0), weight.size(1), exact ? wide : weight.scalar_type());
  const Tensor& changed = lease.tensor();
  bat_weight_<Device>(changed, weight, bat, false, apart);
  if (!exact) {
    Tensor y = empty_rows(like, weight.size(transpose ? 1 : 0));
    if (transpose) mm_out<Device>(flat("y", y), x, changed);
    else linear_into<Device>(flat("y", y), x, changed, bias);
    return y;
  }
  const Tensor y = mm<Device>(cast(x, wide), transpose ? changed : transposed(changed));
  if (apart) add_<Device>(y, mm<Device>(x, transpose ? weight : transposed(weight), wide));
  if (bias) add_bias<Device>(y, *bias);
  return shaped_like(like, cast_as(y, x));
}

// weight [d, k], and its blocks, contiguous.
inline Tensor checked_bat(const Tensor& weight, const Tensor& bat, bool row) {
  check_matrix("weight", weight);
  const Tensor blocks = checked_blocks("bat", bat, weight.size(row ? 1 : 0), row ? "the columns of weight" : "the rows of weight", weight);
  check_divides(blocks.size(1), "weight", weight);
  return blocks;
}

template <class Device>
Tensor bat_linear_forward(Tensor x, Tensor weight, Tensor bat, MaybeTensor bias, bool row, bool exact) {
  const NoGrad guard;
  check_weight(x, weight);
  bat = checked_bat(weight, bat, row);
  const Tensor x2 = flat("x", x);
  if (!row) return bat_product<Device>(x, x2, weight, bat, bias, false, exact);
  const auto [z, s] = bat_mix<Device>(x2, bat);
  Tensor y = empty_rows(x, weight.size(0));
  const Tensor y2 = flat("y", y);
  linear_into<Device>(y2, z, weight, bias);
  block_tile_<Device>(y2, s, std::nullopt, std::nullopt, 0.0, true);
  return y;
}

// dB [d/r, r, r] in at least float32 from tiles of dyᵀx.
template <class Device> Tensor block_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight, int64_t r) {
  const Tensor dB = empty(weight, {weight.size(0) / r, r, r}, accumulate_type(weight));
  gradient_tiles<Device>(dy, x, r, [&](int64_t start, const Tensor& G) {
    const int64_t n = G.size(0);
    if (n == dB.size(0) * r) return bat_contract_<Device>(dB, weight, G);
    bat_contract_<Device>(strided(dB, {n / r, r, r}, {r * r, r, 1}, start * r), rows_of(weight, start, n), G);
  });
  return dB;
}

// Results: dx [..., k], dB, db; empty [0] where `needs` has no bit for it.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> bat_linear_backward(Tensor dy, MaybeTensor x, Tensor weight, Tensor bat, bool row, bool exact,
                                                       int64_t needs) {
  const NoGrad guard;
  bat = checked_bat(weight, bat, row);
  const bool need_x = wants(needs, 0), need_bat = wants(needs, 1);
  STD_TORCH_CHECK(x || !need_bat, "x: got None, wanted a tensor, which dB is made of");
  const Tensor dy2 = flat("dy", dy);
  check_size("dy", dy2, 1, weight.size(0), "the rows of weight");
  check_same_device("weight", weight, dy);
  MaybeTensor dx, dB;
  if (row && (need_x || need_bat)) {
    const Tensor g = empty_rows(dy, weight.size(1)), g2 = flat("dx", g);
    mm_out<Device>(g2, dy2, weight);
    const Tensor q = block_sum<Device>(dy2, bat.size(1), std::nullopt, std::nullopt, 0.0);
    const Tensor dC = bat_mix_backward_<Device>(g2, q, need_bat ? flat("x", given("x", x)) : g2, bat, need_x, need_bat);
    if (need_x) dx = g;
    if (need_bat) dB = cast_as(dC, bat);
  } else {
    if (need_x) dx = bat_product<Device>(dy, dy2, weight, bat, std::nullopt, true, exact);
    if (need_bat) dB = cast_as(block_gradient<Device>(dy2, flat("x", given("x", x)), weight, bat.size(1)), bat);
  }
  Tensor db = wants(needs, 2) ? column_sum(dy2, dy.scalar_type()) : nothing(dy);
  return {dx ? *dx : nothing(dy), dB ? *dB : nothing(dy), db};
}

template <class Device> Tensor bat_weight_forward(Tensor weight, Tensor bat, bool row) {
  const NoGrad guard;
  check_matrix("weight", weight);
  Tensor out = empty(weight, {weight.size(0), weight.size(1)});
  bat_weight_<Device>(out, weight, bat, row, false);
  return out;
}

// t [d, k] as [k, d] with its blocks turned round one another: those of one column are a row, each as it was.
inline Tensor turned_blocks(const Tensor& t, int64_t r) {
  const int64_t d = t.size(0), k = t.size(1);
  const int64_t row = t.stride(0), column = t.stride(1);
  const Tensor blocks = torch::stable::contiguous(strided(t, {k / r, r, d / r, r}, {r * column, row, r * row, column}));
  return as_matrix(blocks, k, d, at_least(d, 1), 1);
}

template <class Device> Tensor bat_weight_backward(Tensor dW, Tensor weight, Tensor bat, bool row) {
  const NoGrad guard;
  checked_bat(weight, bat, row);
  check_matrix("dW", dW);
  const int64_t r = bat.size(1);
  check_divides(r, "dW", dW);
  Tensor dB = empty(bat, {bat.size(0), r, r}, accumulate_type(weight));
  bat_contract_<Device>(dB, row ? turned_blocks(weight, r) : weight, row ? turned_blocks(dW, r) : dW);
  return cast_as(dB, bat);
}

template <class Device> void bind_bat_layers(Bindings& rows) {
  rows.add<&bat_linear_forward<Device>>("bat_linear_forward");
  rows.add<&bat_linear_backward<Device>>("bat_linear_backward");
  rows.add<&bat_weight_forward<Device>>("bat_weight_forward");
  rows.add<&bat_weight_backward<Device>>("bat_weight_backward");
}

}  // namespace spectral_ops
