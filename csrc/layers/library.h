// What the operators of whole layers (csrc/layers/) need of torch besides our kernels: views, products and casts, once for
// every device. They go through torch's dispatcher, below autograd and any dispatch mode: a mode sees the layer's operator,
// and nothing that happens inside it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <initializer_list>
#include <utility>
#include <vector>

#include "../ops.h"

namespace spectral_ops {

using MaybeTensor = std::optional<Tensor>;

// Autograd records nothing of what a layer does inside, whoever calls its operator.
class NoGrad {
 public:
  NoGrad() : was_(aoti_torch_grad_mode_is_enabled()) {
    if (was_) aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() {
    if (was_) aoti_torch_grad_mode_set_enabled(true);
  }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool was_;
};

// --- memory ---

// What an operator returns for a gradient that nobody wants.
inline Tensor nothing(const Tensor& like) { return empty(like, {0}); }

// A contiguous [..., columns] with the leading dimensions of `like`.
inline Tensor empty_rows(const Tensor& like, int64_t columns) {
  const int64_t dim = like.dim();
  int64_t sizes[64];
  STD_TORCH_CHECK(dim >= 1 && dim <= 64, "got ", dim, " dimensions, wanted 1 to 64");
  for (int64_t i = 0; i + 1 < dim; ++i) sizes[i] = like.size(i);
  sizes[dim - 1] = columns;
  return empty_of(like, sizes, dim, dtype_code(like.scalar_type()));
}

// A view of t's memory, from its element `first` on.
template <size_t N>
Tensor strided(const Tensor& t, const int64_t (&sizes)[N], const int64_t (&strides)[N], int64_t first = 0) {
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), N, sizes, strides, first, &view));  // from t's own offset
  return Tensor(view);
}

inline Tensor as_matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                        int64_t first = 0) {
  return strided(t, {rows, columns}, {row_stride, column_stride}, first);
}

// Elements [first, first + n) of contiguous memory as a vector.
inline Tensor elements_of(const Tensor& t, int64_t first, int64_t n) { return strided(t, {n}, {1}, first); }

inline Tensor transposed(const Tensor& t) { return as_matrix(t, t.size(1), t.size(0), t.stride(1), t.stride(0)); }

// Columns [start, start + n) and rows [start, start + n) of a matrix, and n rows of `columns` out of contiguous memory.
inline Tensor columns_of(const Tensor& t, int64_t start, int64_t n) {
  return as_matrix(t, t.size(0), n, t.stride(0), t.stride(1), start * t.stride(1));
}
inline Tensor rows_of(const Tensor& t, int64_t start, int64_t n) {
  return as_matrix(t, n, t.size(1), t.stride(0), t.stride(1), start * t.stride(0));
}
inline Tensor part_of(const Tensor& memory, int64_t first, int64_t rows, int64_t columns) {
  return as_matrix(memory, rows, columns, at_least(columns, 1), 1, first);
}

// Contiguous memory as [a, b, c].
inline Tensor as_three(const Tensor& t, int64_t a, int64_t b, int64_t c) {
  return strided(t, {a, b, c}, {at_least(b * c, 1), at_least(c, 1), 1});
}

// t [n, m] with an axis of size 1 before its first, between the two or after them.
inline Tensor with_axis(const Tensor& t, int axis) {
  std::array<int64_t, 3> sizes{1, 1, 1}, strides{0, 0, 0};
  for (int from = 0, to = 0; to < 3; ++to)
    if (to != axis) sizes[to] = t.size(from), strides[to] = t.stride(from), ++from;
  return strided(t, {sizes[0], sizes[1], sizes[2]}, {strides[0], strides[1], strides[2]});
}

// Whether the leading dimensions of t [..., n] lie as one, and how far apart its rows are.
inline bool one_row_stride(const Tensor& t, int64_t& rows, int64_t& stride) {
  const int64_t last = t.dim() - 1;
  rows = 1, stride = 0;
  bool one = true;
  for (int64_t i = last; i-- > 0;) {
    const int64_t size = t.size(i);
    if (size != 1) {
      if (rows == 1) stride = t.stride(i);
      else one = one && t.stride(i) == stride * rows;
    }
    rows *= size;
  }
  if (rows <= 1) stride = at_least(t.size(last), 1);
  return one || rows == 0;
}

// t [..., n] as a matrix [T, n] with unit inner stride: a view wherever the strides allow one, else of a contiguous copy.
inline Tensor flat(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1, name, ": got no dimension, wanted at least one");
  const int64_t last = t.dim() - 1, columns = t.size(last);
  int64_t rows, stride;
  const bool view = one_row_stride(t, rows, stride);
  if (view && (t.stride(last) == 1 || columns <= 1)) return last == 1 && t.stride(1) == 1 ? t : as_matrix(t, rows, columns, stride, 1);
  const Tensor copy = torch::stable::contiguous(t);
  return as_matrix(copy, rows, columns, at_least(columns, 1), 1);
}

// Matrices one below the other (dim 0) or side by side (dim 1).
inline Tensor joined(const std::vector<Tensor>& parts, int64_t dim) { return call("aten::cat", "", parts, dim); }

// A contiguous copy of a matrix, in the dtype of `like`.
inline Tensor copy_as(const Tensor& t, const Tensor& like) {
  Tensor out = empty(t, {t.size(0), t.size(1)}, like.scalar_type());
  torch::stable::copy_(out, t);
  return out;
}

// A contiguous copy.
inline Tensor copy_of(const Tensor& t) {
  Tensor out = empty_rows(t, t.size(t.dim() - 1));
  torch::stable::copy_(out, t);
  return out;
}

// A fresh contiguous matrix [T, n] as [..., n], with the leading dimensions of `like`.
inline Tensor shaped_like(const Tensor& like, const Tensor& matrix) {
  const int64_t dim = like.dim();
  if (dim == 2) return matrix;
  int64_t sizes[64], strides[64], step = 1;
  for (int64_t i = dim; i-- > 0;) {
    sizes[i] = i == dim - 1 ? matrix.size(1) : like.size(i);
    strides[i] = step, step *= at_least(sizes[i], 1);
  }
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), dim, sizes, strides, 0, &view));
  return Tensor(view);
}

// --- dtypes ---

inline Tensor cast(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }
inline Tensor cast_as(const Tensor& t, const Tensor& like) { return cast(t, like.scalar_type()); }

inline Tensor ones_like(const Tensor& t) {
  Tensor out = empty(t, {t.size(0)});
  torch::stable::fill_(out, 1);
  return out;
}

// --- elementwise ---

// A number as a tensor [] on the CPU, which every device's operators take for a Scalar: `call` passes none of these.
inline Tensor scalar(double value) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::full({}, value, ScalarType::Double, std::nullopt, cpu);
}

// out = a * b, broadcast; out may be a.
inline void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) { call("aten::mul", "out", a, b, out); }

inline void copy_into(Tensor out, const Tensor& t) { torch::stable::copy_(out, t); }

// --- products: Device::mm_out and Device::addmm_out are torch's own, called past the dispatcher ---

template <class Device> void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  check_call(Device::mm_out(out.get(), a.get(), b.get()), "torch.mm");
}

// out = beta * self + alpha * a b
template <class Device>
void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta = 1, double alpha = 1) {
  check_call(Device::addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha), "torch.addmm");
}

template <class Device> void add_product(const Tensor& out, const Tensor& a, const Tensor& b, double alpha = 1) {
  addmm_out<Device>(out, out, a, b, 1, alpha);
}

template <class Device> Tensor mm(const Tensor& a, const Tensor& b) {
  Tensor out = empty(a, {a.size(0), b.size(1)});
  mm_out<Device>(out, a, b);
  return out;
}

// a b in dtype: on CUDA a float32 result of half-precision factors is not rounded on the way.
template <class Device> Tensor mm(const Tensor& a, const Tensor& b, ScalarType dtype) {
  if (dtype == a.scalar_type()) return mm<Device>(a, b);
  if constexpr (!Device::on_host) {
    if (dtype == ScalarType::Float && a.scalar_type() != ScalarType::Double) return Device::wide_mm(a, b);
  }
  return cast(mm<Device>(a, b), dtype);
}

// a b for every pair of matrices of two batches.
inline Tensor bmm(const Tensor& a, const Tensor& b) { return call("aten::bmm", "", a, b); }

// y [T, d] = x Wᵀ + b
template <class Device> void linear_into(const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  if (bias) addmm_out<Device>(y, *bias, x, transposed(weight));
  else mm_out<Device>(y, x, transposed(weight));
}

// Σ over rows of t [T, n], in at least float32, then in dtype.
inline Tensor column_sum(const Tensor& t, ScalarType dtype) {
  const int64_t rows[] = {0};
  return cast(torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(rows, 1), false, accumulate_type(t)), dtype);
}

// Σ over rows of a * b [T, n], in at least float32, then in dtype.
inline Tensor column_dot(const Tensor& a, const Tensor& b, ScalarType dtype) {
  const ScalarType wide = accumulate_type(a);
  return column_sum(call("aten::mul", "Tensor", cast(a, wide), cast(b, wide)), dtype);
}

inline void check_shape(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check_matrix(name, t);
  STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == columns, name, ": got [", t.size(0), ", ", t.size(1), "], wanted [", rows, ", ",
                  columns, "]");
}

// A frozen weight [d, k] for x [..., k].
inline void check_weight(const Tensor& x, const Tensor& weight) {
  check_matrix("weight", weight);
  STD_TORCH_CHECK(x.dim() >= 1, "x: got no dimension, wanted at least one");
  check_size("weight", weight, 1, x.size(x.dim() - 1), "the last dimension of x");
  check_same_device("weight", weight, x);
}

// An argument that is needed for what is asked for.
inline const Tensor& given(const char* name, const MaybeTensor& t) {
  STD_TORCH_CHECK(t, name, ": got None, wanted a tensor for what is asked for");
  return *t;
}

// A forward is over a weight or over what somebody else's layer computed.
inline void check_tier(const MaybeTensor& weight, const MaybeTensor& base_out) {
  STD_TORCH_CHECK(weight.has_value() != base_out.has_value(), "weight and base_out: wanted exactly one of them");
}

// y [..., d] = x Wᵀ + b; without a weight a copy of base_out, which somebody else computed as that.
template <class Device>
Tensor base_output(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& base_out, const MaybeTensor& bias) {
  check_tier(weight, base_out);
  if (!weight) return copy_of(*base_out);
  check_weight(x, *weight);
  Tensor y = empty_rows(x, weight->size(0));
  linear_into<Device>(flat("y", y), flat("x", x), *weight, bias);
  return y;
}

// The output of a base layer, which an operator overwrites.
inline void check_overwritten(const Tensor& out) {
  STD_TORCH_CHECK(out.dim() >= 1 && out.is_contiguous(), "out: wanted a contiguous tensor of at least one dimension");
}

// --- what a caller wants of a backward ---

// h [T, r] that forward saved; where it did not, and nobody reads it, memory of that shape.
inline Tensor saved_hidden(const MaybeTensor& h, bool read, const Tensor& dy, int64_t r) {
  if (!h && !read) return empty(dy, {dy.size(0), r});
  check_matrix("h", given("h", h));
  check_size("h", *h, 0, dy.size(0), "the rows of dy");
  check_size("h", *h, 1, r, "the rank");
  return *h;
}

// Bit i of `needs`: whether result i is wanted.
inline bool wants(int64_t needs, int result) { return (needs >> result & 1) != 0; }

}  // namespace spectral_ops
