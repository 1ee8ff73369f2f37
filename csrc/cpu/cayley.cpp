#include "cayley.h"

#include "product.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

// a [r, width] = I + (X - Xᵀ) / 2, zero beyond r; X [r, r].
template <class T> void load_skew(acc_t<T>* a, const T* X, int64_t r, int64_t width) {
  using A = acc_t<T>;
  std::memset(a, 0, static_cast<size_t>(r * width) * sizeof(A));
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t k = 0; k < i; ++k) {
      const A half = (static_cast<A>(value(X[i * r + k])) - static_cast<A>(value(X[k * r + i]))) / 2;
      a[i * width + k] = half, a[k * width + i] = -half;
    }
    const A own = value(X[i * r + i]);
    a[i * width + i] = 1 + (own - own);  // NaN where it is not finite
  }
}

// The column where row [width] is greatest in size, of those that are open (1, else 0); there, a NaN counts as 0.
template <class A> int64_t greatest(const A* row, const A* open, A* sizes, int64_t width) {
  const vec<A> zero = {}, closed = zero - 1;
  vec<A> most = closed;
  for (int64_t k = 0; k < width; k += kLanes<A>) {
    const vec<A> x = load(row + k), size = x < zero ? -x : x;
    const vec<A> s = load(open + k) > zero ? (size >= zero ? size : zero) : closed;
    store(sizes + k, s);
    most = s > most ? s : most;
  }
  A best = most[0];
  for (int l = 1; l < kLanes<A>; ++l) best = most[l] > best ? most[l] : best;
  int64_t k = 0;
  while (sizes[k] != best) ++k;
  return k;
}

// a becomes its inverse with permuted rows and columns: with y = a x, row p of the result gives x[column[p]], and its
// column column[q] multiplies y[q]. Each row p is solved for one x, whose other uses are replaced: kExchanged rows among
// themselves first, then in all others at once.
template <class A>
void exchange(A* a, int64_t r, int64_t width, A* factors, A* open, A* sizes, int64_t* column) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t k = 0; k < width; ++k) open[k] = k < r;
  for (int64_t p = 0; p < r; p += kExchanged) {
    const int64_t count = smaller(kExchanged, r - p);
    A* const panel = a + p * width;
    for (int64_t t = 0; t < count; ++t) {
      A* const row = panel + t * width;
      const int64_t j = column[p + t] = greatest(row, open, sizes, width);
      open[j] = 0;
      const A inverse = 1 / row[j];
      for (int64_t k = 0; k < width; k += L) store(row + k, load(row + k) * -inverse);
      row[j] = inverse;
      for (int64_t u = 0; u < count; ++u) {
        if (u == t) continue;
        A* const other = panel + u * width;
        const A factor = other[j];
        other[j] = 0;
        for (int64_t k = 0; k < width; k += L) store(other + k, load(other + k) + factor * load(row + k));
      }
    }
    for (int64_t i = 0; i < r; ++i) {
      if (i == p) i += count;
      for (int64_t t = 0; i < r && t < count; ++t) {
        A& factor = a[i * width + column[p + t]];
        factors[i * kExchanged + t] = factor;
        factor = 0;
      }
    }
    product<kExchanged, 1>(a, width, factors, panel, width, p, count, {});
    const int64_t after = p + count;
    product<kExchanged, 1>(a + after * width, width, factors + after * kExchanged, panel, width, r - after, count, {});
  }
}

template <class T> void forward(const CayleyForwardPass& pass, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t r = pass.cayley.r, width = pass.width;
  A *const a = reinterpret_cast<A*>(pass.memory), *const factors = a + r * width;
  A *const open = factors + r * kExchanged, *const sizes = open + width;
  int64_t* const column = reinterpret_cast<int64_t*>(sizes + width);
  for (int64_t n = begin; n < end; ++n) {
    load_skew(a, static_cast<const T*>(pass.cayley.X) + n * r * r, r, width);
    exchange(a, r, width, factors, open, sizes, column);
    A* const Q = static_cast<A*>(pass.cayley.Q) + n * r * r;
    for (int64_t p = 0; p < r; ++p) {
      A* const out = Q + column[p] * r;
      for (int64_t q = 0; q < r; ++q) out[q] = 2 * a[p * width + column[q]];
      out[column[p]] -= 1;
    }
  }
}

// c [r, width] = x m, or xᵀ m; x [r, r] in rows of x_stride elements, m [r, width].
template <bool transpose, class A>
void multiply(A* c, const A* x, int64_t x_stride, const A* m, A* tile, int64_t r, int64_t width) {
  constexpr int si = transpose ? 1 : kTile, sk = transpose ? kTile : 1;
  const Matrix whole{x, x_stride};
  std::memset(c, 0, static_cast<size_t>(r * width) * sizeof(A));
  for (int64_t i = 0; i < r; i += kTile)
    for (int64_t k = 0; k < r; k += kTile) {
      const int64_t rows = smaller(kTile, r - i), count = smaller(kTile, r - k);
      transpose ? load_tile<A>(tile, whole, k, count, i, rows) : load_tile<A>(tile, whole, i, rows, k, count);
      product<si, sk>(c + i * width, width, tile, m + k * width, width, rows, count, {});
    }
}

template <class A> void backward(const CayleyBackwardPass& pass, int64_t begin, int64_t end) {
  const int64_t r = pass.cayley.r, width = pass.width, size = r * width;
  A *const M = reinterpret_cast<A*>(pass.memory), *const GM = M + size, *const V = GM + size, *const tile = V + size;
  for (int64_t n = begin; n < end; ++n) {
    const A *const Q = static_cast<const A*>(pass.cayley.Q) + n * r * r, *const G = static_cast<const A*>(pass.cayley.G) + n * r * r;
    std::memset(M, 0, static_cast<size_t>(size) * sizeof(A));
    for (int64_t i = 0; i < r; ++i) {
      std::memcpy(M + i * width, Q + i * r, static_cast<size_t>(r) * sizeof(A));
      M[i * width + i] += 1;
    }
    multiply<true>(GM, G, r, M, tile, r, width);
    multiply<false>(V, M, width, GM, tile, r, width);
    A* const dX = static_cast<A*>(pass.cayley.dX) + n * r * r;
    for (int64_t i = 0; i < r; ++i)
      for (int64_t k = 0; k <= i; ++k) {
        const A x = (V[i * width + k] - V[k * width + i]) / 4;
        dX[k * r + i] = -x, dX[i * r + k] = x;
      }
  }
}

}  // namespace

void cayley_forward(const CayleyForwardPass& pass, int64_t begin, int64_t end) {
  for_dtype(pass.cayley.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(pass, begin, end); });
}

void cayley_backward(const CayleyBackwardPass& pass, int64_t begin, int64_t end) {
  pass.cayley.dtype == DType::float64 ? backward<double>(pass, begin, end) : backward<float>(pass, begin, end);
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
