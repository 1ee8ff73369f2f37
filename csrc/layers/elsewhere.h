// For a device that has no compiled kernel of some operators: a layer reaches them through torch's dispatcher, where Triton's
// or the reference is registered.
#pragma once

#include "../ops/bat.h"
#include "../ops/dropout.h"
#include "../ops/segments.h"
#include "../ops/transpose.h"
#include "library.h"

namespace spectral_ops {

// As `call`, for an operator that returns nothing, and for one that returns two tensors.
template <class... Arguments> void call_void(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{to_stack(arguments)...};
  check_call(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION), name);
}

template <class... Arguments>
std::tuple<Tensor, Tensor> call_two(const char* name, const char* overload, const Arguments&... arguments) {
  static_assert(sizeof...(Arguments) >= 2, "the results take the arguments' places");
  std::array<StableIValue, sizeof...(Arguments)> stack{to_stack(arguments)...};
  check_call(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// group_rows on the ids' device, which is not waited for.
inline std::tuple<Tensor, Tensor> group_rows_there(const Tensor& ids, int64_t T, int64_t n) {
  const int64_t m = ids.size(0), none = 0;
  const Tensor of_rows = as_matrix(ids, m, m ? T / m : 0, ids.stride(0), 0);  // expanded
  const Tensor each = cast(elements_of(torch::stable::contiguous(of_rows), 0, T), ScalarType::Long);
  const auto [sorted, order] = call_two("aten::sort", "stable", each, std::optional<bool>(true), none, false);
  const Tensor numbers = call("aten::_dim_arange", "", as_matrix(ids, n + 1, 0, 1, 1), none);
  return {order, call("aten::searchsorted", "Tensor", sorted, numbers, false, false, std::nullopt, std::nullopt)};
}

}  // namespace spectral_ops

#define SPECTRAL_OPS_ELSEWHERE(Device)                                                                                        \
  template <> inline Tensor dropout_project<Device>(Tensor x, Tensor A, Tensor seed, double p) {                              \
    return call("spectral_ops::dropout_project", "", x, A, seed, p);                                                          \
  }                                                                                                                           \
  template <> inline Tensor dropout_outer<Device>(Tensor u, Tensor x, Tensor seed, double p) {                                \
    return call("spectral_ops::dropout_outer", "", u, x, seed, p);                                                            \
  }                                                                                                                           \
  template <> inline void dropout_lift_<Device>(Tensor out, Tensor u, Tensor A, Tensor seed, double p) {                      \
    call_void("spectral_ops::dropout_lift_", out, u, A, seed, p);                                                             \
  }                                                                                                                           \
  template <> inline Tensor seeded_dropout<Device>(Tensor x, Tensor seed, double p) {                                         \
    return call("spectral_ops::seeded_dropout", "", x, seed, p);                                                              \
  }                                                                                                                           \
  template <> inline Tensor bat_matmul<Device>(Tensor x, Tensor weight, Tensor bat, bool transpose) {                         \
    return call("spectral_ops::bat_matmul", "", x, weight, bat, transpose);                                                   \
  }                                                                                                                           \
  template <> inline std::tuple<Tensor, Tensor> bat_mix<Device>(Tensor x, Tensor bat) {                                       \
    return call_two("spectral_ops::bat_mix", "", x, bat);                                                                     \
  }                                                                                                                           \
  template <> inline Tensor bat_mix_backward_<Device>(Tensor g, Tensor q, Tensor x, Tensor bat, bool need_g, bool need_dC) {  \
    return call("spectral_ops::bat_mix_backward_", "", g, q, x, bat, need_g, need_dC);                                        \
  }                                                                                                                           \
  template <> inline void transpose_<Device>(Tensor out, Tensor x) { torch::stable::copy_(out, transposed(x)); }              \
  template <> inline Tensor segment_project<Device>(Tensor x, Tensor A, Tensor order, Tensor offsets) {                       \
    return call("spectral_ops::segment_project", "", x, A, order, offsets);                                                   \
  }                                                                                                                           \
  template <> inline void segment_lift_<Device>(Tensor out, Tensor h, Tensor B, Tensor order, Tensor offsets) {               \
    call_void("spectral_ops::segment_lift_", out, h, B, order, offsets);                                                      \
  }                                                                                                                           \
  template <> inline Tensor segment_outer<Device>(Tensor u, Tensor x, Tensor order, Tensor offsets) {                         \
    return call("spectral_ops::segment_outer", "", u, x, order, offsets);                                                     \
  }                                                                                                                           \
  template <> inline std::tuple<Tensor, Tensor> group_rows<Device>(Tensor ids, int64_t T, int64_t n) {                        \
    return group_rows_there(ids, T, n);                                                                                       \
  }
