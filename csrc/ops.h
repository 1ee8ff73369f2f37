// What the host side of every operator (csrc/ops/) needs: torch's stable tensors, and checks that say what they got.
// The Python functions have checked already; these guard the kernels against direct calls of torch.ops.spectral_ops.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "dispatcher.h"
#include "kernels.h"

namespace spectral_ops {

using torch::headeronly::ScalarType;

// Whether Device runs a kernel of its own for these arguments. An operator without one is not registered on that device, and
// a layer reaches it through torch's dispatcher, where Triton's or the reference is.
template <class Device, class Arguments, class = void> inline constexpr bool has_kernel = false;
template <class Device, class Arguments>
inline constexpr bool has_kernel<
    Device, Arguments,
    std::void_t<decltype(Device::launch(std::declval<const Arguments&>(), std::declval<const Tensor&>()))>> = true;

inline int64_t at_least(int64_t n, int64_t least) { return n < least ? least : n; }

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    case ScalarType::Bool: return aoti_torch_dtype_bool();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    default: STD_TORCH_CHECK(false, "got scalar type ", static_cast<int>(dtype), " for a new tensor");
  }
}

inline Tensor empty_of(const Tensor& like, const int64_t* sizes, int64_t dim, int32_t dtype) {
  int64_t strides[64], step = 1;
  STD_TORCH_CHECK(dim <= 64, "got ", dim, " dimensions, wanted at most 64");
  for (int64_t i = dim; i-- > 0;) strides[i] = step, step *= at_least(sizes[i], 1);
  int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made = nullptr;
  check_call(aoti_torch_empty_strided(dim, sizes, strides, dtype, device, index, &made), "torch.empty");
  return Tensor(made);
}

// A contiguous tensor on the device of `like`; in its dtype where none is given. Past the dispatcher, which costs more.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_of(like, sizes.begin(), static_cast<int64_t>(sizes.size()), dtype_code(dtype));
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) { return empty(like, sizes, like.scalar_type()); }

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, name, ": got scalar type ", static_cast<int>(t.scalar_type()),
                             ", wanted float64, float32, bfloat16 or float16");
  }
}

inline void check_matrix(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": got ", t.dim(), " dimensions, wanted a matrix");
}

inline void check_size(const char* name, const Tensor& t, int64_t dim, int64_t wanted, const char* what) {
  STD_TORCH_CHECK(t.size(dim) == wanted, name, ": got size ", t.size(dim), " in dimension ", dim, ", wanted ", wanted,
                  " (", what, ")");
}

inline void check_same_device(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), name,
                  ": is on another device than the first argument");
}

// The data of a contiguous 1-D index tensor of `length` elements on the device of like; null for None.
template <class T>
const T* index_data(const char* name, const std::optional<Tensor>& t, int64_t length, const Tensor& like) {
  if (!t) return nullptr;
  constexpr ScalarType wanted = sizeof(T) == 4 ? ScalarType::Int : ScalarType::Long;
  STD_TORCH_CHECK(t->scalar_type() == wanted, name, ": wanted int", 8 * sizeof(T));
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == length && t->is_contiguous(), name, ": got ", t->numel(),
                  " elements in ", t->dim(), " dimensions, wanted a contiguous vector of ", length);
  check_same_device(name, *t, like);
  return static_cast<const T*>(t->data_ptr());
}

inline bool unit_inner_stride(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1; }

// t [rows, columns] with unit inner stride: itself, or a contiguous copy.
inline Tensor rows_of(const Tensor& t) { return unit_inner_stride(t) ? t : torch::stable::contiguous(t); }

// The strides of a matrix; where there is one element, those of a contiguous one.
inline void set_strides(int64_t (&strides)[2], const Tensor& t) {
  for (int d = 0; d < 2; ++d) strides[d] = t.size(d) <= 1 ? (d == 1 ? 1 : t.size(1)) : t.stride(d);
}

// The data of a floating vector [length] with unit stride, in any dtype (put into dtype); null for None.
inline const void* vector_data(const char* name, std::optional<Tensor>& t, int64_t length, const Tensor& like, DType& dtype) {
  if (!t) return nullptr;
  dtype = dtype_of(name, *t);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == length, name, ": got ", t->numel(), " elements in ", t->dim(),
                  " dimensions, wanted a vector of ", length);
  check_same_device(name, *t, like);
  if (!t->is_contiguous()) t = torch::stable::contiguous(*t);
  return t->data_ptr();
}

inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const char* name, const Tensor& t, DType wanted, const char* what) {
  STD_TORCH_CHECK(dtype_of(name, t) == wanted, name, ": got scalar type ", static_cast<int>(t.scalar_type()),
                  ", wanted that of ", what);
}

// A factor [rows, columns] in the dtype of `like`, with unit inner stride.
inline Tensor checked_factor(const char* name, const Tensor& t, int64_t rows, int64_t columns, const Tensor& like,
                             const char* like_name) {
  check_matrix(name, t);
  check_size(name, t, 0, rows, like_name);
  check_size(name, t, 1, columns, like_name);
  check_same_device(name, t, like);
  check_dtype(name, t, dtype_of(like_name, like), like_name);
  return rows_of(t);
}

inline void check_written_once(const char* name, const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d)
    STD_TORCH_CHECK(t.stride(d) != 0 || t.size(d) <= 1, name, ": is expanded in dimension ", d,
                    ", so several of its elements share memory; it cannot be written");
}

// Tells autograd that a kernel wrote into t: torch's copy of a tensor onto itself moves nothing and bumps its version.
inline void bump_version(Tensor t) { torch::stable::copy_(t, t); }

// An operator that writes into its first argument, with that tensor's version bumped after it, so that autograd notices.
// Layers call the function itself: what they write into nobody else has seen.
template <auto F> struct Mutating;
template <class R, class... Rest, R (*F)(Tensor, Rest...)> struct Mutating<F> {
  static R run(Tensor first, Rest... rest) {
    if constexpr (std::is_void_v<R>) {
      F(first, rest...);
      bump_version(first);
    } else {
      R result = F(first, rest...);
      bump_version(first);
      return result;
    }
  }
};

// What an extension registers: rows of an operator's name and its function, boxed.
struct Binding {
  const char* name;
  void (*function)(StableIValue*, uint64_t, uint64_t);
};

struct Bindings : std::vector<Binding> {
  template <auto F> void add(const char* name) { push_back({name, TORCH_BOX(F)}); }
  template <auto F> void mutating(const char* name) { add<&Mutating<F>::run>(name); }  // F writes into its first argument
};

}  // namespace spectral_ops
