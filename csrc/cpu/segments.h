// The plans of rows with adapters of their own: a pass or a lift of lowrank.h for each part of an adapter's rows. A part has
// one thread and packs its own factors, so that many adapters of few rows keep all threads busy. Rows that lie apart are
// read and written where they are.
#pragma once

#include "../ops/segments.h"
#include "lowrank.h"
#ifdef SPECTRAL_OPS_HOST
#include <cstring>
#include <vector>

#include "transpose.h"
#endif

namespace spectral_ops::cpu {

#ifdef SPECTRAL_OPS_HOST

constexpr int64_t kPartRows = 256;     // of a project and a lift: packing a factor takes little beside as many rows
constexpr int64_t kPartColumns = 256;  // of an outer, whose parts have all rows of an adapter, and need no sums of parts

template <class Arguments> int64_t offset_at(const Arguments& a, int64_t s) {
  return a.wide ? static_cast<const int64_t*>(a.offsets)[s] : static_cast<const int32_t*>(a.offsets)[s];
}

// Offsets ascend and are places; the rows at theirs are there.
template <class Arguments> void check_groups(const Arguments& a, int64_t rows) {
  int64_t last = 0;
  for (int64_t s = 0; s <= a.n; ++s) {
    const int64_t next = offset_at(a, s);
    STD_TORCH_CHECK(last <= next && next <= a.rows, "offsets: got ", next, " after ", last,
                    ", wanted numbers that ascend from 0 to ", a.rows);
    last = next;
  }
  if (!a.order) return;
  for (int64_t i = offset_at(a, 0); i < last; ++i)
    STD_TORCH_CHECK(0 <= a.order[i] && a.order[i] < rows, "order: got ", a.order[i], ", wanted numbers of ", rows, " rows");
}

// Places [first, first + count) of an adapter; `begin`, of what has columns split.
struct Part {
  int64_t adapter, first, count, begin;
};

template <class F> void each_part(const std::vector<Part>& parts, int64_t work, const F& f) {
  const int64_t count = static_cast<int64_t>(parts.size());
  torch::stable::parallel_for(0, count, grain_of(count, work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(parts[static_cast<size_t>(i)]);
  });
}

template <class Arguments> std::vector<Part> parts_of_rows(const Arguments& a) {
  std::vector<Part> parts;
  for (int64_t s = 0; s < a.n; ++s)
    for (int64_t i = offset_at(a, s), end = offset_at(a, s + 1); i < end; i += kPartRows)
      parts.push_back({s, i, smaller(kPartRows, end - i), 0});
  return parts;
}

inline const void* element_at(const void* data, int64_t i, int64_t size) {
  return data ? static_cast<const char*>(data) + i * size : nullptr;
}

// The rows at a part's places, of a matrix whose element size is `size`.
inline Matrix rows_at(const void* data, int64_t stride, DType dtype, const int64_t* order, const Part& part) {
  if (!order) return matrix(element_at(data, part.first * stride, element_size(dtype)), stride, 1, dtype);
  Matrix rows = matrix(data, stride, 1, dtype);
  rows.places = order + part.first;
  return rows;
}

// The factors of a stack [n, rows, columns]: where they are, or copied one after the other if the adapters are fastest in
// memory (PEFT's lora_B of experts), where every number of one would come with a cache line of the others'.
class Factors {
 public:
  Factors(const void* stack, const int64_t (&strides)[3], int64_t n, int64_t rows, int64_t columns, DType dtype,
          const Tensor& like)
      : data_(static_cast<const char*>(stack)), adapter_(strides[0]), row_(strides[1]), column_(strides[2]), dtype_(dtype) {
    const int64_t each = rows * columns, least = smaller(row_, column_);
    const bool by_row = row_ == columns * column_, by_column = column_ == rows * row_;
    if (adapter_ != 1 || n < 2 || least < n || !(by_row || by_column)) return;
    copy_ = workspace(like, n * each * element_size(dtype));
    run(Transpose{stack, copy_->data_ptr(), each, n, least, each, dtype}, like);
    data_ = static_cast<const char*>(copy_->data_ptr()), adapter_ = each;
    row_ = by_row ? columns : 1, column_ = by_row ? 1 : rows;
  }

  Matrix of(int64_t s) const { return matrix(element_at(data_, s * adapter_, element_size(dtype_)), row_, column_, dtype_); }

 private:
  const char* data_;
  int64_t adapter_, row_, column_;
  DType dtype_;
  std::optional<Tensor> copy_;
};

inline void run(const SegmentProject& a, const Tensor& like) {
  check_groups(a, a.x_rows);
  const int64_t size = element_size(a.dtype), first = offset_at(a, 0), last = offset_at(a, a.n);
  const auto clear = [&](int64_t from, int64_t to) {
    const int64_t bytes = (to - from) * a.r * size;
    if (bytes) std::memset(static_cast<char*>(a.h) + from * a.r * size, 0, static_cast<size_t>(bytes));
  };
  clear(0, first);
  clear(last, a.rows);
  const Factors factors(a.A, a.A_strides, a.n, a.r, a.columns, a.dtype, like);
  each_part(parts_of_rows(a), (last - first) * a.columns * (a.r + 4), [&](const Part& part) {
    Pass pass;
    pass.x = rows_at(a.x, a.x_stride, a.dtype, a.order, part);
    pass.m = factors.of(part.adapter).transposed();
    pass.rows = part.count, pass.columns = a.columns, pass.r = a.r;
    pass.row_product = const_cast<void*>(element_at(a.h, part.first * a.r, size));
    pass.row_product_stride = a.r, pass.row_product_dtype = a.dtype;
    run_products(pass, like);
  });
}

inline void run(const SegmentLift& a, const Tensor& like) {
  check_groups(a, a.out_rows);
  const int64_t size = element_size(a.dtype), count = offset_at(a, a.n) - offset_at(a, 0);
  const Factors factors(a.B, a.B_strides, a.n, a.columns, a.r, a.dtype, like);
  each_part(parts_of_rows(a), count * a.columns * (a.r + 4), [&](const Part& part) {
    Lift lift;
    lift.out = a.order ? a.out : const_cast<void*>(element_at(a.out, part.first * a.out_stride, size));
    lift.places = a.order ? a.order + part.first : nullptr;
    lift.out_stride = a.out_stride, lift.dtype = a.dtype;
    lift.h = rows_at(a.h, a.h_stride, a.dtype, nullptr, part);
    lift.m = factors.of(part.adapter);
    lift.rows = part.count, lift.columns = a.columns, lift.r = a.r;
    run_lift(lift, like);
  });
}

inline void run(const SegmentOuter& a, const Tensor& like) {
  check_groups(a, a.x_rows);
  const int64_t size = element_size(a.dtype), wide = accumulator_size(a.dtype);
  std::vector<Part> parts;
  for (int64_t s = 0; s < a.n; ++s)
    for (int64_t j = 0; j < a.columns; j += kPartColumns)
      parts.push_back({s, offset_at(a, s), offset_at(a, s + 1) - offset_at(a, s), j});
  const int64_t count = offset_at(a, a.n) - offset_at(a, 0);
  each_part(parts, (count + a.n) * a.columns * (a.r + 4), [&](const Part& part) {
    const int64_t columns = smaller(kPartColumns, a.columns - part.begin);
    char* const out = static_cast<char*>(a.out) + (part.adapter * a.r * a.columns + part.begin) * wide;
    if (part.count == 0) {
      for (int64_t p = 0; p < a.r; ++p) std::memset(out + p * a.columns * wide, 0, static_cast<size_t>(columns * wide));
      return;
    }
    Pass pass;
    pass.x = rows_at(element_at(a.x, part.begin, size), a.x_stride, a.dtype, a.order, part);
    pass.h = rows_at(a.u, a.u_stride, a.dtype, nullptr, part);
    pass.rows = part.count, pass.columns = columns, pass.r = a.r;
    pass.column_product = out, pass.column_product_row = 1, pass.column_product_column = a.columns;
    run_products(pass, like);
  });
}

#endif

}  // namespace spectral_ops::cpu
