// Runs the CPU kernels of an operator's arguments on torch's threads. What every plan needs; a plan of its own, with its
// workspace and its steps in order, a stem has in <stem>.h.
#pragma once

#include <optional>

#include "../ops.h"
#include "matrix.h"
#include "tiling.h"

namespace spectral_ops::cpu {

// The kernel of these arguments on the active instruction set.
template <class Arguments> Kernel<Arguments> kernel_for(const Arguments&) {
  return Kernels<Arguments>::compiled[static_cast<int>(active_isa())];
}

template <class Arguments> void in_parallel(const Arguments& a, int64_t tasks, int64_t grain) {
  const Kernel<Arguments> kernel = kernel_for(a);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// Where a stem says nothing else, its kernel's tasks are rows.
template <class Arguments> auto run(const Arguments& a, const Tensor&) -> decltype(Kernels<Arguments>::compiled, void()) {
  in_parallel(a, a.rows, grain_rows(a.columns, a.seed != nullptr));
}

inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, ScalarType::Byte);
}

// Memory for a plan, which takes its pieces of it twice: to count them, then to have them.
template <class Plan> Tensor lay_out(Plan& plan, const Tensor& like) {
  Plan counted = plan;
  Arena count{nullptr};
  counted.plan(count);
  Tensor memory = workspace(like, count.used);
  Arena arena{static_cast<char*>(memory.data_ptr())};
  plan.plan(arena);
  return memory;
}

// How many tasks are worth waking a thread for, where all tasks together do `work` multiply-adds.
inline int64_t grain_of(int64_t tasks, int64_t work) {
  constexpr int64_t kWork = 1 << 18;
  return work <= kWork ? at_least_one(tasks) : at_least_one(tasks * kWork / work);
}

// Uninitialised memory. A small piece is on the stack, because allocating it would take longer than filling it.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) : data_(small_) {
    if (bytes <= static_cast<int64_t>(sizeof small_)) return;
    large_ = workspace(like, bytes);
    data_ = static_cast<char*>(large_->data_ptr());
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() { return data_; }

 private:
  alignas(64) char small_[1 << 14];
  std::optional<Tensor> large_;
  char* data_;
};

}  // namespace spectral_ops::cpu
