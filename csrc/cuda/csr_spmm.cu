// csr_spmm_ (METHODS 1.5): out += x Sᵀ.
#include "csr.cuh"

namespace spectral_ops::cuda {

namespace {

template <class T> struct Product {
  T* out;
  const T* x;
  const void* values;
  const int32_t *row_offsets, *columns, *permutation;
  int64_t T_, out_stride, x_stride;
  int d, k, row_tiles;
  DType values_dtype;
  bool wide;

  __device__ __forceinline__ acc_t<T> entry(int64_t p) const {
    return load_any<acc_t<T>>(values, permutation ? permutation[p] : p, values_dtype);
  }
};

// Rows of S that eight lanes sum in their registers. More of them read x less often: once for kMany * kGroups rows.
constexpr int kMany = 12;

// Many tokens: a block holds kColumns columns of a slab of x at a time. It sums all entries of kGroups * R rows of S. Eight
// lanes share a row of S, and each has its own tokens, so that nothing is added across threads.
template <class T, int R> __global__ void __launch_bounds__(kThreads, R == kMany ? 1 : 2) spmm_slab(Product<T> a) {
  using A = acc_t<T>;
  constexpr int L = kLanes<T>, kPitch = kGroups + 1;
  uint4* x = reinterpret_cast<uint4*>(dynamic_shared());  // [kColumns, 8]
  A* turned = reinterpret_cast<A*>(x);                    // [kTokens, kPitch], once x has been used
  static_assert(sizeof(A) * kTokens<T> * kPitch <= kSlabBytes * kColumns);
  const int j = threadIdx.x % 8, group = threadIdx.x / 8;
  const int64_t row0 = int64_t{blockIdx.x % static_cast<unsigned>(a.row_tiles)} * (kGroups * R) + group;
  const int64_t token0 = int64_t{blockIdx.x / static_cast<unsigned>(a.row_tiles)} * kTokens<T>;
  const int tokens = static_cast<int>(min_of<int64_t>(a.T_ - token0, kTokens<T>));
  A sum[R][L] = {};
  int next[R];  // the entry that each row has come to
#pragma unroll
  for (int i = 0; i < R; ++i) next[i] = a.row_offsets[min_of<int64_t>(row0 + i * kGroups, a.d)];
  for (int column0 = 0; column0 < a.k; column0 += kColumns) {
    __syncthreads();  // the previous columns have been used
    stage_columns(x, a.x + token0 * a.x_stride + column0, a.x_stride, tokens, a.k - column0, a.wide);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int end = a.row_offsets[min_of<int64_t>(row0 + i * kGroups + 1, a.d)];
      for (; next[i] < end; ++next[i]) {
        const int column = a.columns[next[i]] - column0;
        if (column >= kColumns) break;
        const A s = a.entry(next[i]);
        A v[L];
        unpack<T>(chunk_of<T>(x, column, j), v);
#pragma unroll
        for (int t = 0; t < L; ++t) sum[i][t] += s * v[t];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {  // kGroups rows at a time, turned so that neighbours write neighbours
    __syncthreads();
#pragma unroll
    for (int t = 0; t < L; ++t) turned[(j * L + t) * kPitch + group] = sum[i][t];
    __syncthreads();
    const int64_t row = row0 - group + i * kGroups + threadIdx.x % kGroups;
    for (int t = threadIdx.x / kGroups; t < tokens && row < a.d; t += kThreads / kGroups) {
      T* to = a.out + (token0 + t) * a.out_stride + row;
      *to = rounded<T>(value(*to) + turned[t * kPitch + threadIdx.x % kGroups]);
    }
  }
}

// Few tokens: a warp for each row of S, 32 entries at a time, eight tokens of x straight from the caches.
template <class T> __global__ void __launch_bounds__(kThreads) spmm_few(Product<T> a) {
  using A = acc_t<T>;
  constexpr int kFew = 8, kTile = kThreads / kFew;
  __shared__ A sums[kFew][kTile];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = int64_t{blockIdx.x % static_cast<unsigned>(a.row_tiles)} * kTile;
  const int64_t token0 = int64_t{blockIdx.x / static_cast<unsigned>(a.row_tiles)} * kFew;
  for (int i = warp; i < kTile && row0 + i < a.d; i += kWarps) {
    const int end = a.row_offsets[row0 + i + 1];
    A sum[kFew] = {};
    for (int64_t p = int64_t{a.row_offsets[row0 + i]} + lane; p < end; p += 32) {
      const T* x = a.x + token0 * a.x_stride + a.columns[p];
      const A s = a.entry(p);
#pragma unroll
      for (int t = 0; t < kFew; ++t)
        if (token0 + t < a.T_) sum[t] += s * value(x[t * a.x_stride]);
    }
#pragma unroll
    for (int t = 0; t < kFew; ++t) {
      const A total = warp_sum(sum[t]);
      if (lane == 0) sums[t][i] = total;
    }
  }
  __syncthreads();
  const int64_t row = row0 + threadIdx.x % kTile, token = token0 + threadIdx.x / kTile;
  if (row >= a.d || token >= a.T_) return;
  T* to = a.out + token * a.out_stride + row;
  *to = rounded<T>(value(*to) + sums[threadIdx.x / kTile][threadIdx.x % kTile]);
}

template <class T> cudaError_t launch_spmm(const CsrSpmm& from, cudaStream_t stream) {
  Product<T> a{static_cast<T*>(from.out), static_cast<const T*>(from.x), from.values,
               from.row_offsets, from.columns, from.permutation,
               from.T, from.out_stride, from.x_stride,
               static_cast<int>(from.d), static_cast<int>(from.k), 0,
               from.values_dtype, aligned_rows(from.x, from.x_stride, sizeof(T))};
  const auto run = [&](auto kernel, int64_t rows, int64_t tokens, int64_t shared) {
    a.row_tiles = static_cast<int>(ceil_div(from.d, rows));
    return enqueue(kernel, a.row_tiles * ceil_div(from.T, tokens), kThreads, shared, stream, a);
  };
  if (from.T <= 16) return run(spmm_few<T>, kThreads / 8, 8, 0);
  const int64_t slabs = ceil_div(from.T, kTokens<T>);
  if (slabs * ceil_div(from.d, kMany * kGroups) < 64)  // fewer rows in a block, so that there are blocks enough
    return run(spmm_slab<T, 2>, 2 * kGroups, kTokens<T>, kSlabBytes * kColumns);
  return run(spmm_slab<T, kMany>, kMany * kGroups, kTokens<T>, kSlabBytes * kColumns);
}

}  // namespace

cudaError_t csr_spmm(const CsrSpmm& a, cudaStream_t stream) {
  if (a.T == 0 || a.d == 0 || a.nnz == 0) return cudaSuccess;
  if (a.d > kMaxColumns || a.k > kMaxColumns) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) { return launch_spmm<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
