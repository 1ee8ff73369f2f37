#include "../ops/routing.h"

#include "common.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

constexpr int64_t kColumns = 1024;  // of a token's sum that stay in L1

template <class A> inline A weight_of(const void* weights, DType dtype, int64_t i) {
  if (!weights) return A(1);
  A result = 0;
  for_dtype(dtype, [&](auto* type) {
    result = static_cast<A>(value(static_cast<const std::remove_pointer_t<decltype(type)>*>(weights)[i]));
  });
  return result;
}

// sums [n] += weight x
template <class T> inline void add_row(acc_t<T>* sums, const T* x, acc_t<T> weight, int64_t n) {
  constexpr int L = kLanes<acc_t<T>>;
  int64_t c = 0;
  for (; c + L <= n; c += L) store(sums + c, load(sums + c) + load(x + c) * weight);
  for (; c < n; ++c) sums[c] += value(x[c]) * weight;
}

// out [n] = weight x, in out's dtype
template <class T, class X> inline void scaled_row(T* out, const X* x, acc_t<T> weight, int64_t n) {
  constexpr int L = kLanes<acc_t<T>>;
  int64_t c = 0;
  for (; c + L <= n; c += L) store(out + c, load(x + c) * weight);
  for (; c < n; ++c) out[c] = rounded<T>(value(x[c]) * weight);
}

template <class T> inline acc_t<T> dot_rows(const T* x, const T* y, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  vec<A> sums[2] = {};
  int64_t c = 0;
  for (; c + 2 * L <= n; c += 2 * L)
    for (int v = 0; v < 2; ++v) sums[v] += load(x + c + v * L) * load(y + c + v * L);
  const vec<A> both = sums[0] + sums[1];
  A total = 0;
  for (int l = 0; l < L; ++l) total += both[l];
  for (; c < n; ++c) total += value(x[c]) * value(y[c]);
  return total;
}

template <class T> void combine(const RoutingCombine& a, int64_t t) {
  using A = acc_t<T>;
  alignas(64) A sums[kColumns];
  for (int64_t begin = 0; begin < a.columns; begin += kColumns) {
    const int64_t n = a.columns - begin < kColumns ? a.columns - begin : kColumns;
    std::memset(sums, 0, static_cast<size_t>(n) * sizeof(A));
    for (int64_t j = 0; j < a.K; ++j) {
      const int64_t pair = t * a.K + j, place = a.places[pair];
      if (place >= a.end) continue;
      add_row(sums, row<T>(a.y, place, a.y_stride) + begin, weight_of<A>(a.weights, a.weights_dtype, pair), n);
    }
    scaled_row(row<T>(a.out, t, a.columns) + begin, sums, A(1), n);
  }
}

template <class T> void combine_backward(const RoutingCombineBackward& a, int64_t t) {
  using A = acc_t<T>;
  const T* const dout = row<T>(a.dout, t, a.dout_stride);
  for (int64_t j = 0; j < a.K; ++j) {
    const int64_t pair = t * a.K + j, place = a.places[pair];
    const bool live = place < a.end;
    if (live) scaled_row(row<T>(a.dy, place, a.columns), dout, weight_of<A>(a.weights, a.weights_dtype, pair), a.columns);
    if (!a.dweights) continue;
    const A product = live ? dot_rows(dout, row<T>(a.y, place, a.y_stride), a.columns) : A(0);
    for_dtype(a.weights_dtype, [&](auto* type) {
      using W = std::remove_pointer_t<decltype(type)>;
      static_cast<W*>(a.dweights)[pair] = rounded<W>(static_cast<acc_t<W>>(product));
    });
  }
}

}  // namespace

void routing_combine(const RoutingCombine& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* type) {
    for (int64_t t = begin; t < end; ++t) combine<std::remove_pointer_t<decltype(type)>>(a, t);
  });
}

void routing_combine_backward(const RoutingCombineBackward& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* type) {
    for (int64_t t = begin; t < end; ++t) combine_backward<std::remove_pointer_t<decltype(type)>>(a, t);
  });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
