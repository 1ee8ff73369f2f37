// magnitude_grad (METHODS 1.2): dm = dyz / (g c). Where m vanishes, dyz says nothing of dm: it is then summed from dy, x and h.
#include "../ops/dora.h"
#include "common.cuh"

namespace spectral_ops::cuda {

namespace {

template <class T> struct Magnitude {
  const acc_t<T>*dyz, *g, *norm;
  const T *dy, *x, *h, *weight, *B;
  const void* bias;
  acc_t<T>* dm;
  acc_t<T> scale, vanishing_g, vanishing_bias;
  int64_t rows, columns, k, r, dy_stride, x_stride, h_stride, B_stride, weight_row, weight_column;
  DType bias_dtype;
};

// A block has 32 columns of dy. On each column where m vanishes the whole block works together.
template <class T> __global__ void __launch_bounds__(kThreads) magnitude_division(Magnitude<T> a) {
  using A = acc_t<T>;
  __shared__ int vanishing[32];
  __shared__ A parts[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t{blockIdx.x} * 32;
  if (warp == 0) {
    const int64_t o = first + lane;
    bool vanishes = false;
    if (o < a.columns) {
      const A size = magnitude(a.g[o]);
      vanishes = size < a.vanishing_g;
      if (a.bias) vanishes |= size * a.norm[o] < magnitude(load_any<A>(a.bias, o, a.bias_dtype)) / a.vanishing_bias;
      if (!vanishes) a.dm[o] = a.dyz[o] / (a.g[o] * a.norm[o]);
    }
    vanishing[lane] = vanishes;
  }
  __syncthreads();
  for (int j = 0; j < 32; ++j) {
    if (!vanishing[j]) continue;
    const int64_t o = first + j;
    A sum = 0;
    for (int64_t t = warp; t < a.rows; t += kThreads / 32) {
      A z = 0, delta = 0;
      for (int64_t c = lane; c < a.k; c += 32)
        z += value(a.x[t * a.x_stride + c]) * value(a.weight[o * a.weight_row + c * a.weight_column]);
      for (int64_t p = lane; p < a.r; p += 32) delta += value(a.h[t * a.h_stride + p]) * value(a.B[o * a.B_stride + p]);
      sum += value(a.dy[t * a.dy_stride + o]) * (z + a.scale * delta);
    }
    sum = warp_sum(sum);
    if (lane == 0) parts[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kThreads / 32; ++w) sum += parts[w];
      a.dm[o] = sum / a.norm[o];
    }
    __syncthreads();
  }
}

template <class T> cudaError_t launch_magnitude(const MagnitudeGrad& from, cudaStream_t stream) {
  using A = acc_t<T>;
  Magnitude<T> a{};
  a.dyz = static_cast<const A*>(from.dyz), a.g = static_cast<const A*>(from.g), a.norm = static_cast<const A*>(from.norm);
  a.dy = static_cast<const T*>(from.dy), a.x = static_cast<const T*>(from.x), a.h = static_cast<const T*>(from.h);
  a.weight = static_cast<const T*>(from.weight), a.B = static_cast<const T*>(from.B);
  a.bias = from.bias, a.bias_dtype = from.bias_dtype;
  a.dm = static_cast<A*>(from.dm);
  a.scale = static_cast<A>(from.scale);
  a.vanishing_g = static_cast<A>(from.vanishing_g), a.vanishing_bias = static_cast<A>(from.vanishing_bias);
  a.rows = from.rows, a.columns = from.columns, a.k = from.k, a.r = from.r;
  a.dy_stride = from.dy_stride, a.x_stride = from.x_stride, a.h_stride = from.h_stride, a.B_stride = from.B_stride;
  a.weight_row = from.weight_strides[0], a.weight_column = from.weight_strides[1];
  return enqueue(magnitude_division<T>, ceil_div(from.columns, 32), kThreads, 0, stream, a);
}

}  // namespace

cudaError_t magnitude_grad(const MagnitudeGrad& a, cudaStream_t stream) {
  return for_dtype(a.dtype, [&](auto* t) { return launch_magnitude<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
