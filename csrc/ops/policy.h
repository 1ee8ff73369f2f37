// target_logprob and softmax_gradient_: their kernels' arguments, free of torch, and their host side for any device. A target
// of targets [rows] is ignore_index, or 0 <= target < columns, else the results are NaN.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include <tuple>

#include "../ops.h"
#endif

namespace spectral_ops {

// logprob, logsumexp [rows] in float32 (float64 for float64) of scale * logits [rows, columns], unit inner stride.
struct TargetLogprob {
  const void* logits;
  const int64_t* targets;
  void *logprob, *logsumexp;
  double scale;
  int64_t rows, columns, logits_stride, ignore_index;
  DType dtype;  // of logits
};

// logits becomes scale * dlogp * (onehot - exp(scale * logits - logsumexp)); logsumexp, dlogp [rows] as above.
struct SoftmaxGradient {
  void* logits;
  const int64_t* targets;
  const void *logsumexp, *dlogp;
  double scale;
  int64_t rows, columns, logits_stride, ignore_index;
  DType dtype;  // of logits
};

namespace cpu {
SPECTRAL_OPS_CPU_KERNEL(target_logprob, TargetLogprob)
SPECTRAL_OPS_CPU_KERNEL(softmax_gradient, SoftmaxGradient)
}  // namespace cpu

#ifdef SPECTRAL_OPS_HOST

template <class Device>
std::tuple<Tensor, Tensor> target_logprob(Tensor logits, Tensor targets, double scale, int64_t ignore_index) {
  check_matrix("logits", logits);
  TargetLogprob a{};
  a.rows = logits.size(0), a.columns = logits.size(1);
  a.dtype = dtype_of("logits", logits);
  logits = rows_of(logits);
  Tensor logprob = empty(logits, {a.rows}, accumulate_type(logits));
  Tensor logsumexp = empty(logits, {a.rows}, accumulate_type(logits));
  a.logits = logits.data_ptr(), a.logits_stride = logits.stride(0);
  a.targets = index_data<int64_t>("targets", targets, a.rows, logits);
  a.logprob = logprob.data_ptr(), a.logsumexp = logsumexp.data_ptr();
  a.scale = scale, a.ignore_index = ignore_index;
  Device::launch(a, logits);
  return {logprob, logsumexp};
}

// The data of a contiguous vector [length] in the dtype that logits are summed in.
inline const void* wide_vector(const char* name, const Tensor& t, int64_t length, const Tensor& logits) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == length && t.is_contiguous(), name, ": got ", t.numel(), " elements in ",
                  t.dim(), " dimensions, wanted a contiguous vector of ", length);
  STD_TORCH_CHECK(t.scalar_type() == accumulate_type(logits), name, ": wanted float32 (float64 for float64)");
  check_same_device(name, t, logits);
  return t.data_ptr();
}

template <class Device>
void softmax_gradient_(Tensor logits, Tensor targets, Tensor logsumexp, Tensor dlogp, double scale, int64_t ignore_index) {
  check_matrix("logits", logits);
  check_written_once("logits", logits);
  SoftmaxGradient a{};
  a.rows = logits.size(0), a.columns = logits.size(1);
  a.dtype = dtype_of("logits", logits);
  Tensor target = rows_of(logits);
  a.logits = target.data_ptr(), a.logits_stride = target.stride(0);
  a.targets = index_data<int64_t>("targets", targets, a.rows, logits);
  a.logsumexp = wide_vector("logsumexp", logsumexp, a.rows, logits);
  a.dlogp = wide_vector("dlogp", dlogp, a.rows, logits);
  a.scale = scale, a.ignore_index = ignore_index;
  Device::launch(a, logits);
  if (!unit_inner_stride(logits)) torch::stable::copy_(logits, target);
}

template <class Device> void bind_policy(Bindings& rows) {
  if constexpr (has_kernel<Device, TargetLogprob>) rows.add<&target_logprob<Device>>("target_logprob");
  if constexpr (has_kernel<Device, SoftmaxGradient>) rows.mutating<&softmax_gradient_<Device>>("softmax_gradient_");
}

#endif

}  // namespace spectral_ops
