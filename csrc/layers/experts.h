// Low-rank linear over a stack of experts, forward and backward, on the CPU: spectral_ops/functional/experts.py has the
// mathematics and the same steps in Python, which a GPU takes: the time of its kernels hides that of composing them.
#pragma once

#include <tuple>

#include "../ops/dropout.h"
#include "../ops/routing.h"
#include "../ops/segments.h"
#include "segments.h"

namespace spectral_ops {

// Where each expert's rows begin, int32 in memory that the host reads, for S rows in all.
inline const int32_t* begins_of(const Tensor& offsets, int64_t experts, int64_t S) {
  const int32_t* const begins = index_data<int32_t>("offsets", offsets, experts + 1, offsets);
  for (int64_t e = 0; e < experts; ++e)
    STD_TORCH_CHECK(0 <= begins[e] && begins[e] <= begins[e + 1] && begins[e + 1] <= S, "offsets: got ", begins[e], " before ",
                    begins[e + 1], ", wanted numbers that ascend from 0 to ", S);
  return begins;
}

// Matrix e of a stack, and row e of a matrix.
inline Tensor matrix_of(const Tensor& stack, int64_t e) {
  return strided(stack, {stack.size(1), stack.size(2)}, {stack.stride(1), stack.stride(2)}, e * stack.stride(0));
}
inline Tensor row_of(const Tensor& t, int64_t e) { return strided(t, {t.size(1)}, {t.stride(1)}, e * t.stride(0)); }

// A stack with its matrices transposed.
inline Tensor turned(const Tensor& stack) {
  return strided(stack, {stack.size(0), stack.size(2), stack.size(1)}, {stack.stride(0), stack.stride(2), stack.stride(1)});
}

inline void check_stack(const char* name, const Tensor& stack, int64_t experts, int64_t columns, const Tensor& like) {
  STD_TORCH_CHECK(stack.dim() == 3, name, ": got ", stack.dim(), " dimensions, wanted one matrix for each expert");
  check_size(name, stack, 0, experts, "the experts");
  check_size(name, stack, 2, columns, "the columns of its rows");
  check_same_device(name, stack, like);
}

// y [S, d] = x W_eᵀ + b_e, zero for rows without expert; with an order the rows of x that it names.
template <class Device>
void expert_product(const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& order,
                    const Tensor& offsets) {
  const int64_t E = weight.size(0), S = y.size(0);
  check_stack("weight", weight, E, x.size(1), x);
  if (bias) {
    check_matrix("bias", *bias);
    check_size("bias", *bias, 0, E, "the experts");
    check_size("bias", *bias, 1, weight.size(1), "the rows of each weight");
    check_same_device("bias", *bias, x);
  }
  const int32_t* const begins = begins_of(offsets, E, S);
  const auto nobody = [&](int64_t first, int64_t end) {
    if (first < end) torch::stable::fill_(rows_of(y, first, end - first), 0);
  };
  nobody(0, begins[0]);
  for (int64_t e = 0; e < E; ++e) {
    const int64_t first = begins[e], n = begins[e + 1] - first;
    if (n == 0) continue;
    const Tensor own = order ? call("aten::index_select", "", x, int64_t{0}, elements_of(*order, first, n)) : rows_of(x, first, n);
    const MaybeTensor shift = bias ? MaybeTensor(row_of(*bias, e)) : std::nullopt;
    linear_into<Device>(rows_of(y, first, n), own, matrix_of(weight, e), shift);
  }
  nobody(begins[E], S);
}

// γB in the dtype of `like`, rounded once: γ h might overflow in float16.
inline Tensor scaled_as(const Tensor& B, double scale, const Tensor& like) {
  return cast_as(scale == 1 ? B : call("aten::mul", "Tensor", B, scalar(scale)), like);
}

// Results: y [S, d] and h [S, r]; h is empty [0] without A and B.
template <class Device>
std::tuple<Tensor, Tensor> experts_forward(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor A, MaybeTensor B,
                                           MaybeTensor order, Tensor offsets, MaybeTensor seed, double scale, double p, bool) {
  const NoGrad guard;
  check_matrix("x", x);
  STD_TORCH_CHECK(weight.dim() == 3, "weight: got ", weight.dim(), " dimensions, wanted one matrix for each expert");
  const int64_t S = order ? order->size(0) : x.size(0);
  Tensor y = empty(x, {S, weight.size(1)}), h = nothing(x);
  expert_product<Device>(y, x, weight, bias, order, offsets);
  if (A) {
    const Tensor read = seed ? seeded_dropout<Device>(x, *seed, p) : x;
    h = segment_project<Device>(read, cast_as(*A, x), order, offsets);
    segment_lift_<Device>(y, h, scaled_as(given("B", B), scale, x), std::nullopt, offsets);
  }
  return {y, h};
}

// A stack [E, a, b] as [E, b, a] in the dtype of `like`, contiguous.
inline Tensor turned_as(const Tensor& stack, const Tensor& like) {
  Tensor out = empty(stack, {stack.size(0), stack.size(2), stack.size(1)}, like.scalar_type());
  torch::stable::copy_(out, turned(stack));
  return out;
}

// Results: dx, dA, dB and db; empty [0] where `needs` has no bit for it. With places [T, K] dx is the sum over a row's.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward(Tensor dy, MaybeTensor x, Tensor weight, MaybeTensor A, MaybeTensor B,
                                                            MaybeTensor order, MaybeTensor places, Tensor offsets,
                                                            MaybeTensor seed, MaybeTensor h, double scale, double p,
                                                            int64_t needs, bool) {
  const NoGrad guard;
  const bool need_x = wants(needs, 0), need_A = wants(needs, 1), need_B = wants(needs, 2), need_bias = wants(needs, 3);
  dy = flat("dy", dy);
  const int64_t S = dy.size(0), E = weight.size(0), k = weight.size(2);
  Tensor dx = nothing(dy), dA = nothing(dy), dB = nothing(dy), db = nothing(dy), u = nothing(dy);
  if (A && (need_x || need_A))
    u = segment_project<Device>(dy, turned(scaled_as(given("B", B), scale, dy)), std::nullopt, offsets);
  if (need_A) {
    const Tensor& from = given("x", x);
    check_matrix("x", from);
    check_size("x", from, 1, k, "the columns of each weight");
    dA = cast_as(segment_outer<Device>(u, seed ? seeded_dropout<Device>(from, *seed, p) : from, order, offsets), given("A", A));
  }
  if (need_B) {
    const Tensor hidden = saved_hidden(h, true, dy, given("B", B).size(2));
    const Tensor sums = segment_outer<Device>(hidden, dy, std::nullopt, offsets);
    if (scale != 1) scaled_into(sums, sums, scale);
    dB = turned_as(sums, *B);
  }
  if (need_bias) {
    const Tensor one = ones_like(dy);
    const Tensor sums = segment_outer<Device>(as_matrix(one, S, 1, 1, 1), dy, std::nullopt, offsets);
    db = copy_as(as_matrix(sums, E, dy.size(1), at_least(dy.size(1), 1), 1), dy);
  }
  if (need_x) {
    dx = empty(dy, {S, k});
    expert_product<Device>(dx, dy, turned(weight), std::nullopt, std::nullopt, offsets);
    Tensor share = dx;  // what the adapters add to
    if (A && seed) {
      share = empty(dy, {S, k});
      torch::stable::fill_(share, 0);
    }
    if (A) segment_lift_<Device>(share, u, turned(cast_as(*A, dy)), std::nullopt, offsets);
    const auto summed = [&](const Tensor& t) { return places ? routing_combine<Device>(t, std::nullopt, *places, offsets) : t; };
    dx = summed(dx);
    if (A && seed) dx = Device::sum_of(dx, seeded_dropout<Device>(summed(share), *seed, p));
  }
  return {dx, dA, dB, db};
}

template <class Device> void bind_experts_layers(Bindings& rows) {
  if constexpr (Device::on_host) {
    rows.add<&experts_forward<Device>>("experts_forward");
    rows.add<&experts_backward<Device>>("experts_backward");
  }
}

}  // namespace spectral_ops
