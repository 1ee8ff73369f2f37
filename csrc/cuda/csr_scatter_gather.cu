// csr_scatter_ and csr_gather_ (METHODS 1.5): a thread for each entry.
#include "../ops/csr.h"
#include "common.cuh"

namespace spectral_ops::cuda {

namespace {

struct Pattern {
  const int32_t *row_offsets, *columns;
  int rows, nnz;
};

// The row of entry p: -1 before the first of these rows, `rows` after the last.
__device__ __forceinline__ int row_of(const Pattern& a, int p) {
  uint32_t low = 0, high = static_cast<uint32_t>(a.rows) + 1;  // how many offsets are <= p
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (a.row_offsets[middle] <= p) low = middle + 1;
    else high = middle;
  }
  return static_cast<int>(low) - 1;
}

template <class T>
__global__ void __launch_bounds__(kThreads) scatter(Pattern a, T* __restrict__ out, const void* __restrict__ values, DType values_dtype,
                                                    int64_t row_stride, int64_t column_stride, bool accumulate) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= a.nnz) return;
  const int64_t column = a.columns[p];  // both under way while the row is searched
  const acc_t<T> v = load_any<acc_t<T>>(values, p, values_dtype);
  const int64_t row = row_of(a, static_cast<int>(p));
  if (row < 0 || row >= a.rows) return;
  T* to = out + row * row_stride + column * column_stride;
  *to = rounded<T>(accumulate ? value(*to) + v : v);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gather(Pattern a, T* __restrict__ out, const void* __restrict__ dense, DType dense_dtype,
                                                   int64_t row_stride, int64_t column_stride) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= a.nnz) return;
  const int64_t column = a.columns[p];  // under way while the row is searched
  const int64_t row = row_of(a, static_cast<int>(p));
  if (row < 0 || row >= a.rows) return;
  out[p] = rounded<T>(load_any<acc_t<T>>(dense, row * row_stride + column * column_stride, dense_dtype));
}

}  // namespace

cudaError_t csr_scatter(const CsrScatter& a, cudaStream_t stream) {
  if (a.d >= INT32_MAX || a.nnz > INT32_MAX) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Pattern pattern{a.row_offsets, a.columns, static_cast<int>(a.d), static_cast<int>(a.nnz)};
    return enqueue(scatter<T>, ceil_div(a.nnz, kThreads), kThreads, 0, stream, pattern, static_cast<T*>(a.out), a.values,
                   a.values_dtype, a.out_strides[0], a.out_strides[1], a.accumulate);
  });
}

cudaError_t csr_gather(const CsrGather& a, cudaStream_t stream) {
  if (a.n >= INT32_MAX || a.nnz > INT32_MAX) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Pattern pattern{a.row_offsets, a.columns, static_cast<int>(a.n), static_cast<int>(a.nnz)};
    return enqueue(gather<T>, ceil_div(a.nnz, kThreads), kThreads, 0, stream, pattern, static_cast<T*>(a.out), a.dense,
                   a.dense_dtype, a.dense_strides[0], a.dense_strides[1]);
  });
}

}  // namespace spectral_ops::cuda
