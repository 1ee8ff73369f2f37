// The plans of rows with adapters of their own: a pass or a lift of lowrank.h for each adapter's rows.
#pragma once

#include "../ops/segments.h"
#include "lowrank.h"
#ifdef SPECTRAL_OPS_HOST
#include <cstring>
#include <optional>

#include "run.h"
#endif

namespace spectral_ops::cpu {

// Row out_rows[t] of out becomes row x_rows[t] of x for every t < rows; null stands for t itself.
struct RowCopy {
  const void* x;
  void* out;
  const int64_t *x_rows, *out_rows;
  int64_t rows, bytes;
  int64_t x_stride, out_stride;  // bytes between rows
};

SPECTRAL_OPS_CPU_KERNEL(row_copy, RowCopy)

#ifdef SPECTRAL_OPS_HOST

inline void copy_rows(const RowCopy& a) { in_parallel(a, a.rows, grain_rows(a.bytes / 4, false)); }

// The rows of one adapter, by number, and whether they lie together.
struct OwnRows {
  const int64_t* numbers;
  int64_t count;
  bool together;
};

// f(s, its rows) for every adapter.
template <class Arguments, class F> void each_adapter(const Arguments& a, const F& f) {
  for (int64_t s = 0; s < a.n; ++s) {
    const int64_t first = a.offsets[s], end = a.offsets[s + 1];
    STD_TORCH_CHECK(0 <= first && first <= end && end <= a.rows, "offsets: got ", first, " before ", end,
                    ", wanted numbers that ascend from 0 to ", a.rows);
    OwnRows own{a.order + first, end - first, true};
    for (int64_t i = 0; i < own.count; ++i) {
      STD_TORCH_CHECK(0 <= own.numbers[i] && own.numbers[i] < a.rows, "order: got ", own.numbers[i], " of ", a.rows, " rows");
      own.together = own.together && own.numbers[i] == own.numbers[0] + i;
    }
    f(s, own);
  }
}

// An adapter's rows of a matrix: where they are if they lie together, else apart, moved there and back by read and write.
class OwnPart {
 public:
  OwnPart(const void* base, int64_t row_stride, int64_t columns, DType dtype, const OwnRows& own, const Tensor& like)
      : base_(static_cast<char*>(const_cast<void*>(base))), data_(base_), stride_(row_stride), size_(element_size(dtype)),
        base_stride_(size_ * row_stride), bytes_(size_ * columns), dtype_(dtype), own_(own) {
    if (own.together) {
      if (base_ && own.count) data_ += own.numbers[0] * base_stride_;
      return;
    }
    memory_.emplace(like, own.count * bytes_);
    data_ = memory_->data(), stride_ = columns;
  }

  const OwnPart& read() const {
    if (memory_) copy_rows({base_, data_, own_.numbers, nullptr, own_.count, bytes_, base_stride_, bytes_});
    return *this;
  }
  void write() const {
    if (memory_) copy_rows({data_, base_, nullptr, own_.numbers, own_.count, bytes_, bytes_, base_stride_});
  }
  void* data() const { return data_; }
  int64_t stride() const { return stride_; }
  Matrix rows() const { return matrix(data_, stride_, 1, dtype_); }

 private:
  char *base_, *data_;
  int64_t stride_, size_, base_stride_, bytes_;
  DType dtype_;
  const OwnRows& own_;
  std::optional<Workspace> memory_;
};

// The first element of matrix s of a stack.
inline const void* matrix_at(const void* stack, int64_t s, int64_t stride, int64_t size) {
  return stack ? static_cast<const char*>(stack) + s * stride * size : nullptr;
}

inline void run(const SegmentProject& a, const Tensor& like) {
  const int64_t size = element_size(a.dtype);
  const bool strangers = a.rows && (a.offsets[0] > 0 || a.offsets[a.n] < a.rows);
  if (strangers && a.r) std::memset(a.h, 0, static_cast<size_t>(size * a.rows * a.r));
  each_adapter(a, [&](int64_t s, const OwnRows& own) {
    if (own.count == 0) return;
    const OwnPart x(a.x, a.x_stride, a.columns, a.dtype, own, like), h(a.h, a.r, a.r, a.dtype, own, like);
    Pass pass;
    pass.x = x.read().rows();
    pass.m = matrix(matrix_at(a.A, s, a.A_strides[0], size), a.A_strides[2], a.A_strides[1], a.dtype);
    pass.rows = own.count, pass.columns = a.columns, pass.r = a.r;
    pass.row_product = h.data(), pass.row_product_stride = a.r, pass.row_product_dtype = a.dtype;
    run_products(pass, like);
    h.write();
  });
}

inline void run(const SegmentLift& a, const Tensor& like) {
  each_adapter(a, [&](int64_t s, const OwnRows& own) {
    if (own.count == 0) return;
    const OwnPart out(a.out, a.out_stride, a.columns, a.dtype, own, like), h(a.h, a.h_stride, a.r, a.dtype, own, like);
    Lift lift;
    lift.out = out.read().data(), lift.out_stride = out.stride(), lift.dtype = a.dtype;
    lift.h = h.read().rows();
    lift.m = matrix(matrix_at(a.B, s, a.B_strides[0], element_size(a.dtype)), a.B_strides[1], a.B_strides[2], a.dtype);
    lift.rows = own.count, lift.columns = a.columns, lift.r = a.r;
    run_lift(lift, like);
    out.write();
  });
}

inline void run(const SegmentOuter& a, const Tensor& like) {
  const int64_t count = a.r * a.columns, size = accumulator_size(a.dtype);
  each_adapter(a, [&](int64_t s, const OwnRows& own) {
    void* const out = const_cast<void*>(matrix_at(a.out, s, count, size));
    if (own.count == 0) {
      if (count) std::memset(out, 0, static_cast<size_t>(count * size));
      return;
    }
    const OwnPart x(a.x, a.x_stride, a.columns, a.dtype, own, like), u(a.u, a.u_stride, a.r, a.dtype, own, like);
    Pass pass;
    pass.x = x.read().rows();
    pass.h = u.read().rows();
    pass.rows = own.count, pass.columns = a.columns, pass.r = a.r;
    pass.column_product = out, pass.column_product_row = 1, pass.column_product_column = a.columns;
    run_products(pass, like);
  });
}

#endif

}  // namespace spectral_ops::cpu
