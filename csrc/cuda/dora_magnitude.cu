// magnitude_grad (METHODS 1.2): dm = dyz / (g c). Where m vanishes, dyz says nothing of dm: it is then summed from dy, x and h.
//
// A first kernel leaves partial sums of the columns where m vanishes, over ranges of rows; where there are none its blocks only
// read g. A second kernel divides or adds them up.
#include "common.cuh"
#include "dora.h"

namespace spectral_ops::cuda {

namespace {

template <class T> struct Magnitude {
  const acc_t<T>*dyz, *g, *norm;
  const T *dy, *x, *h, *weight, *B;
  const void* bias;
  acc_t<T>*dm, *parts;  // parts [splits, columns], written where m vanishes
  acc_t<T> scale, vanishing_g, bias_share;
  int64_t rows, columns, k, r, dy_stride, x_stride, h_stride, B_stride, weight_row, weight_column, split_rows;
  int splits;
  DType bias_dtype;
};

// Whether m vanishes at column o.
template <class T> __device__ __forceinline__ bool vanishes(const Magnitude<T>& a, int64_t o) {
  using A = acc_t<T>;
  const A size = magnitude(a.g[o]);
  if (size < a.vanishing_g) return true;
  return a.bias && size * a.norm[o] < magnitude(load_any<A>(a.bias, o, a.bias_dtype)) * a.bias_share;
}

// Whether m vanishes anywhere, as far as the calling thread's columns go: the loop has no branches, so its loads need not wait.
template <class T, class Bias> __device__ __forceinline__ bool any_vanishes(const Magnitude<T>& a, const Bias* bias) {
  using A = acc_t<T>;
  bool any = false;
#pragma unroll 16
  for (int64_t o = threadIdx.x; o < a.columns; o += kThreads) {
    const A size = magnitude(a.g[o]);
    any |= size < a.vanishing_g;
    if constexpr (!std::is_same_v<Bias, void>)
      any |= size * a.norm[o] < magnitude(static_cast<A>(value(bias[o]))) * a.bias_share;
  }
  return any;
}

// The first n of 16 bytes' worth of elements, `stride` apart, the others zero. kWide: all or none, together and aligned.
template <bool kWide, class T> __device__ __forceinline__ uint4 load_vector(const T* p, int64_t stride, int64_t n) {
  if constexpr (kWide) {
    return n > 0 ? load16(p) : make_uint4(0, 0, 0, 0);
  } else {
    acc_t<T> v[kLanes<T>];
#pragma unroll
    for (int e = 0; e < kLanes<T>; ++e) v[e] = e < n ? value(p[e * stride]) : acc_t<T>(0);
    return pack<T>(v);
  }
}

// Eight columns where m vanishes: a warp sums four rows at a time, a lane 16 bytes of x and W.
constexpr int kGroup = 8, kRows = static_cast<int>(kMagnitudeRows) / kWarps;

template <class T, bool kWide>
__device__ __forceinline__ void sum_group(const Magnitude<T>& a, const int (&columns)[kGroup], int count, int64_t begin,
                                          int64_t end, acc_t<T> (&parts)[kWarps][kGroup]) {
  using A = acc_t<T>;
  constexpr int V = kLanes<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  A total[kGroup] = {};
  for (int64_t t0 = begin + warp * kRows; t0 < end; t0 += kMagnitudeRows) {
    int64_t t[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m) t[m] = min_of(t0 + m, end - 1);
    A z[kRows][kGroup] = {};
    uint4 next[kRows];
    auto fetch = [&](int64_t c) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) next[m] = load_vector<kWide>(a.x + t[m] * a.x_stride + c, 1, a.k - c);
    };
    fetch(lane * V);
    for (int64_t c = lane * V; c < a.k; c += 32 * V) {
      A x[kRows][V];
#pragma unroll
      for (int m = 0; m < kRows; ++m) unpack<T>(next[m], x[m]);
      fetch(c + 32 * V);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j >= count) break;
        A w[V];
        const T* p = a.weight + columns[j] * a.weight_row + c * a.weight_column;
        unpack<T>(load_vector<kWide>(p, a.weight_column, a.k - c), w);
#pragma unroll
        for (int m = 0; m < kRows; ++m)
#pragma unroll
          for (int e = 0; e < V; ++e) z[m][j] += x[m][e] * w[e];
      }
    }
    for (int64_t p = lane; p < a.r; p += 32) {
      A h[kRows];
#pragma unroll
      for (int m = 0; m < kRows; ++m) h[m] = a.scale * value(a.h[t[m] * a.h_stride + p]);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j >= count) break;
        const A b = value(a.B[columns[j] * a.B_stride + p]);
#pragma unroll
        for (int m = 0; m < kRows; ++m) z[m][j] += h[m] * b;
      }
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (j >= count) break;
#pragma unroll
      for (int m = 0; m < kRows; ++m)
        if (t0 + m < end) total[j] += value(a.dy[t[m] * a.dy_stride + columns[j]]) * z[m][j];
    }
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    total[j] = warp_sum(total[j]);
    if (lane == 0) parts[warp][j] = total[j];
  }
}

template <class T, bool kWide> __global__ void __launch_bounds__(kThreads) magnitude_sums(Magnitude<T> a) {
  using A = acc_t<T>;
  constexpr int kWords = 64;
  __shared__ uint32_t words[kWords];  // of a window of columns: where m vanishes
  __shared__ A parts[kWarps][kGroup];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool any;
  if (!a.bias) any = any_vanishes<T, void>(a, nullptr);
  else if (a.bias_dtype == DType::float64) any = any_vanishes(a, static_cast<const double*>(a.bias));
  else if (a.bias_dtype == DType::float32) any = any_vanishes(a, static_cast<const float*>(a.bias));
  else if (a.bias_dtype == DType::bfloat16) any = any_vanishes(a, static_cast<const bfloat16*>(a.bias));
  else any = any_vanishes(a, static_cast<const float16*>(a.bias));
  const int found = warp_sum(static_cast<int>(any));
  if (lane == 0) words[warp] = found;
  __syncthreads();
  uint32_t sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += words[w];
  if (sum == 0) return;
  const int64_t begin = int64_t{blockIdx.x} * a.split_rows, end = min_of(begin + a.split_rows, a.rows);
  A* to = a.parts + int64_t{blockIdx.x} * a.columns;
  for (int64_t o0 = 0; o0 < a.columns; o0 += 32 * kWords) {
    __syncthreads();  // the words have been read
    for (int w = warp; w < kWords; w += kWarps) {
      const int64_t o = o0 + 32 * w + lane;
      const uint32_t bit = o < a.columns && vanishes(a, o);
      const uint32_t bits = warp_sum(bit << lane);
      if (lane == 0) words[w] = bits;
    }
    __syncthreads();
    uint32_t bits = words[0];
    for (int w = 0; w < kWords;) {  // the same in every thread
      int columns[kGroup], count = 0;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        while (bits == 0 && ++w < kWords) bits = words[w];
        if (bits == 0) break;
        columns[j] = static_cast<int>(o0) + 32 * w + __ffs(static_cast<int>(bits)) - 1;
        bits &= bits - 1, ++count;
      }
      if (count == 0) break;
      sum_group<T, kWide>(a, columns, count, begin, end, parts);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (j < count && threadIdx.x == j) {
          A total = 0;
#pragma unroll
          for (int m = 0; m < kWarps; ++m) total += parts[m][j];
          to[columns[j]] = total;
        }
      __syncthreads();  // the parts have been read
    }
  }
}

// A block has 32 columns, its warps share the partial sums.
template <class T> __global__ void __launch_bounds__(kThreads) magnitude_division(Magnitude<T> a) {
  using A = acc_t<T>;
  __shared__ A parts[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t o = int64_t{blockIdx.x} * 32 + lane;
  const bool inside = o < a.columns, sums = inside && vanishes(a, o);
  A sum = 0;
  if (sums) {
#pragma unroll 4
    for (int s = warp; s < a.splits; s += kWarps) sum += a.parts[s * a.columns + o];
  }
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || !inside) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += parts[w][lane];
  a.dm[o] = sums ? sum / a.norm[o] : a.dyz[o] / (a.g[o] * a.norm[o]);
}

template <class T> cudaError_t launch_magnitude(const MagnitudeGrad& from, cudaStream_t stream) {
  using A = acc_t<T>;
  const MagnitudePlan plan = magnitude_plan(from.rows, from.columns, from.dtype);
  Magnitude<T> a{};
  a.dyz = static_cast<const A*>(from.dyz), a.g = static_cast<const A*>(from.g), a.norm = static_cast<const A*>(from.norm);
  a.dy = static_cast<const T*>(from.dy), a.x = static_cast<const T*>(from.x), a.h = static_cast<const T*>(from.h);
  a.weight = static_cast<const T*>(from.weight), a.B = static_cast<const T*>(from.B);
  a.bias = from.bias, a.bias_dtype = from.bias_dtype;
  a.dm = static_cast<A*>(from.dm), a.parts = static_cast<A*>(from.workspace);
  a.scale = static_cast<A>(from.scale);
  a.vanishing_g = static_cast<A>(from.vanishing_g), a.bias_share = static_cast<A>(1 / from.vanishing_bias);
  a.rows = from.rows, a.columns = from.columns, a.k = from.k, a.r = from.r;
  a.dy_stride = from.dy_stride, a.x_stride = from.x_stride, a.h_stride = from.h_stride, a.B_stride = from.B_stride;
  a.weight_row = from.weight_strides[0], a.weight_column = from.weight_strides[1];
  a.split_rows = plan.split_rows, a.splits = static_cast<int>(plan.splits);
  const bool wide = a.weight_column == 1 && aligned_rows(from.weight, a.weight_row, sizeof(T)) &&
                    aligned_rows(from.x, a.x_stride, sizeof(T)) && a.k % kLanes<T> == 0;
  const int64_t grid = from.columns > 0 ? plan.splits : 0;
  const cudaError_t error = wide ? enqueue(magnitude_sums<T, true>, grid, kThreads, 0, stream, a)
                                 : enqueue(magnitude_sums<T, false>, grid, kThreads, 0, stream, a);
  if (error != cudaSuccess) return error;
  return enqueue(magnitude_division<T>, ceil_div(from.columns, 32), kThreads, 0, stream, a);
}

}  // namespace

cudaError_t magnitude_grad(const MagnitudeGrad& a, cudaStream_t stream) {
  return for_dtype(a.dtype, [&](auto* t) { return launch_magnitude<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
