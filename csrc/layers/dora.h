// DoRA's layers, forward and backward, for any device: spectral_ops/functional/dora.py has the mathematics and the same
// steps in Python.
#pragma once

#include <limits>

#include "../ops/dora.h"
#include "lowrank.h"

namespace spectral_ops {

// gains [2 d]: g = m / c, then c.
inline Tensor gains_of(const Tensor& magnitude, const Tensor& norm, int64_t d) {
  for (const Tensor* t : {&magnitude, &norm})
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == d, "magnitude and norm: wanted vectors of ", d, " (the outputs)");
  check_same_device("magnitude", magnitude, norm);
  Tensor gains = empty(norm, {2 * d});
  call("aten::div", "out", cast_as(magnitude, norm), norm, elements_of(gains, 0, d));
  Tensor copy = elements_of(gains, d, d);
  torch::stable::copy_(copy, norm);
  return gains;
}

// g and c of gains.
inline std::pair<Tensor, Tensor> split_gains(const Tensor& gains, int64_t d) {
  STD_TORCH_CHECK(gains.dim() == 1 && gains.size(0) == 2 * d && gains.is_contiguous(), "gains: wanted a contiguous vector of ",
                  2 * d);
  return {elements_of(gains, 0, d), elements_of(gains, d, d)};
}

// g - 1 in the dtype of like.
inline Tensor minus_one(const Tensor& g, const Tensor& like) { return cast_as(torch::stable::subtract(g, ones_like(g)), like); }

// out [..., d] becomes g * (out - b + scale h Bᵀ) + b; returns h, gains and z (with a bias and need_z).
template <class Device>
std::tuple<Tensor, Tensor, Tensor> dora_update_forward_(Tensor out, Tensor x, Tensor A, Tensor B, Tensor magnitude,
                                                        MaybeTensor bias, Tensor norm, double scale, bool need_z) {
  const NoGrad guard;
  check_overwritten(out);
  const Tensor out2 = flat("out", out), b = cast_as(B, x);
  const int64_t d = out2.size(1);
  check_factors(x, d, A, B);
  Tensor gains = gains_of(magnitude, norm, d), h = mm<Device>(flat("x", x), transposed(cast_as(A, x))), z = nothing(x);
  const Tensor g = elements_of(gains, 0, d);
  MaybeTensor shift;
  if (bias) {
    shift = call("aten::mul", "Tensor", torch::stable::subtract(ones_like(g), g), cast_as(*bias, g));
    if (need_z) {
      z = cast_as(torch::stable::subtract(out2, *bias), out);
      add_product<Device>(z, h, transposed(b), scale);
    }
  }
  lowrank_update_<Device>(out2, h, b, scale, g, shift);
  return {h, gains, z};
}

// Results: y, h, gains and z (with a seed). Without a weight: of dora_update_forward_ on a copy of base_out.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> dora_linear_forward(Tensor x, MaybeTensor weight, MaybeTensor base_out, Tensor A,
                                                               Tensor B, Tensor magnitude, MaybeTensor bias, Tensor norm,
                                                               MaybeTensor seed, double scale, double p, bool need_z) {
  const NoGrad guard;
  check_tier(weight, base_out);
  if (!weight) {
    STD_TORCH_CHECK(!seed, "seed: got a tensor, wanted None, since there is no dropout without a weight");
    Tensor y = copy_of(*base_out);
    auto [h, gains, z] = dora_update_forward_<Device>(y, x, A, B, magnitude, bias, norm, scale, need_z);
    return {y, h, gains, z};
  }
  check_weight(x, *weight);
  const int64_t d = weight->size(0);
  check_factors(x, d, A, B);
  Tensor gains = gains_of(magnitude, norm, d), y = empty_rows(x, d);
  const Tensor g = elements_of(gains, 0, d), x2 = flat("x", x), y2 = flat("y", y), a = cast_as(A, x), b = cast_as(B, x);
  if (!seed) {
    Tensor h = mm<Device>(x2, transposed(a));
    adapted_into<Device>(y2, x2, *weight, h, b, scale, g, bias);
    return {y, h, gains, nothing(x)};
  }
  const Tensor dropped = seeded_dropout<Device>(x2, *seed, p);
  Tensor h = mm<Device>(dropped, transposed(a)), z = mm<Device>(dropped, transposed(*weight));
  add_product<Device>(z, h, transposed(b), scale);
  multiply_into(y2, z, minus_one(g, x));
  add_product<Device>(y2, x2, transposed(*weight));
  if (bias) lowrank_update_<Device>(y2, h, b, scale, std::nullopt, cast_as(*bias, g));
  else add_product<Device>(y2, h, transposed(b), scale);
  return {y, h, gains, z};
}

// Results: dx, dA, dB, dm, db, dout; empty [0] where `needs` has no bit for it. Without a weight: the update alone, over a
// base whose own node returns the rest of dx and db, and dout = g * dy.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dora_linear_backward(
    Tensor dy, MaybeTensor x, MaybeTensor weight, Tensor A, Tensor B, Tensor magnitude, MaybeTensor bias, Tensor gains,
    MaybeTensor h, MaybeTensor y, MaybeTensor z, MaybeTensor seed, double scale, double p, int64_t needs) {
  const NoGrad guard;
  if (weight) check_matrix("weight", *weight);
  const Tensor dy2 = flat("dy", dy), a = cast_as(A, dy), b = cast_as(B, dy);
  const auto [g, norm] = split_gains(gains, dy2.size(1));
  const bool need_x = wants(needs, 0), need_A = wants(needs, 1), need_m = wants(needs, 3), need_out = wants(needs, 5);
  const bool exact = weight && !seed;  // rows of dm that y does not determine come from W
  const Tensor hidden = saved_hidden(h, wants(needs, 2) || (need_m && exact), dy2, A.size(0));
  MaybeTensor x2, kept;
  if (x) x2 = flat("x", *x);
  if (need_m && (z || y)) kept = flat("y", z ? *z : *y);
  if (need_m && !kept) {
    kept = empty(dy, {dy2.size(0), dy2.size(1)});
    adapted_into<Device>(*kept, given("x", x2), given("weight", weight), hidden, b, scale, g, bias);
  }
  const bool need_gdy = need_out || (need_x && exact && scales_tokens(dy2.size(0), *weight, g));
  auto [u, dB, db, dyz, gdy] = lowrank_backward<Device>(dy2, hidden, b, scale, g, kept, exact ? bias : MaybeTensor(),
                                                        need_x || need_A, wants(needs, 2), wants(needs, 4), need_gdy);
  Tensor dx = nothing(dy), dm = nothing(dy);
  if (need_x && seed) {
    const Tensor& W = given("weight", weight);
    const Tensor through_dropout = mm<Device>(call("aten::mul", "Tensor", dy2, minus_one(g, dy)), W);
    add_product<Device>(through_dropout, u, a);
    const Tensor dx2 = seeded_dropout<Device>(through_dropout, *seed, p);
    add_product<Device>(dx2, dy2, W);
    dx = shaped_like(dy, dx2);
  } else if (need_x) {
    dx = empty_rows(dy, A.size(1));
    const Tensor dx2 = flat("dx", dx);
    if (weight) input_gradient<Device>(dx2, dy2, gdy, *weight, g, u, a, std::nullopt, 0);
    else mm_out<Device>(dx2, u, a);
  }
  Tensor dA = need_A ? A_gradient<Device>(u, given("x", x2), seed, p, A.scalar_type()) : nothing(dy);
  if (need_m && exact) {
    dm = cast_as(magnitude_grad<Device>(dyz, dy2, given("x", x2), hidden, *weight, b, scale, g, norm, bias), magnitude);
  } else if (need_m) {
    Tensor divisor = norm;
    if (!z) {  // y is g z; where m is zero z is lost, and the gradient 0, not a division by zero
      Tensor infinite = empty(g, {g.size(0)});
      torch::stable::fill_(infinite, std::numeric_limits<double>::infinity());
      divisor = call("aten::where", "self", call("aten::logical_not", "", g), infinite, call("aten::mul", "Tensor", g, norm));
    }
    dm = cast_as(call("aten::div", "Tensor", dyz, divisor), magnitude);
  }
  dB = wants(needs, 2) ? cast_as(dB, B) : nothing(dy);
  if (!wants(needs, 4)) db = nothing(dy);
  else db = cast_as(weight ? db : call("aten::mul", "Tensor", torch::stable::subtract(ones_like(g), g), db), dy);
  return {dx, dA, dB, dm, db, need_out ? shaped_like(dy, gdy) : nothing(dy)};
}

template <class Device> void bind_dora_layers(Bindings& rows) {
  rows.add<&dora_linear_forward<Device>>("dora_linear_forward");
  rows.add<&dora_linear_backward<Device>>("dora_linear_backward");
  rows.mutating<&dora_update_forward_<Device>>("dora_update_forward_");
}

}  // namespace spectral_ops
