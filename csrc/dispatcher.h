// Calls of torch's own operators, and of ours that a device has no compiled kernel of, through torch's dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

// Torch has these from 2.13 on; before, an error inside torch reaches us without its message.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace spectral_ops {

using torch::stable::Tensor;

// Throws torch's own message where a call of its C API has failed.
inline void check_call(AOTITorchError error, const char* what) {
  if (error == AOTI_TORCH_SUCCESS) return;
  if (torch_exception_get_what_without_backtrace) throw std::runtime_error(torch_exception_get_what_without_backtrace());
  throw std::runtime_error(std::string(what) + " failed");
}

inline StableIValue to_stack(const Tensor& t) { return torch::stable::detail::from(t); }
template <class T> StableIValue to_stack(const T& value) { return torch::stable::detail::from(value); }

// Calls an operator that returns one tensor.
template <class... Arguments> Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{to_stack(arguments)...};
  check_call(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The same for an operator that returns nothing, and for one that returns two tensors.
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

}  // namespace spectral_ops
