#include "dora.h"

#include "product.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

// Below this fraction of the terms' absolute sum, c² has lost digits (CANCELLATION in functional/dora.py).
constexpr double kCancellation = 1.0 / 64;

template <class A> inline A absolute(A x) { return x < 0 ? -x : x; }
inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// ‖W_o + scale (B A)_o‖² without expanding the square; b [r] is B's row.
template <class T> acc_t<T> exact_square(const ColumnNorm& a, int64_t o, const acc_t<T>* b) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const Matrix w{a.weight, a.weight_strides[0], a.weight_strides[1], a.dtype};
  const Matrix m{a.A, a.A_strides[0], a.A_strides[1], a.A_dtype};
  const A scale = static_cast<A>(a.scale);
  vec<A> sum = {};
  for (int64_t j = 0; j < a.columns; j += kTile) {
    const int64_t n = smaller(kTile, a.columns - j);
    A row[kTile], delta[kTile] = {};
    for (int64_t p = 0; p < a.r; ++p) {
      pack_rows(row, kTile, from_column(m, j), p, 1, n);
      for (int64_t i = 0; i < kTile; i += L) store(delta + i, load(delta + i) + b[p] * load(row + i));
    }
    pack_rows(row, kTile, from_column(w, j), o, 1, n);
    for (int64_t i = 0; i < kTile; i += L) {
      const vec<A> v = load(row + i) + scale * load(delta + i);
      sum += v * v;
    }
  }
  A total = 0;
  for (int l = 0; l < L; ++l) total += sum[l];
  return total;
}

// The sum of the squares of row o of W.
template <class A> inline A row_square(const Pass& pass, bool by_columns, int64_t o) {
  const int64_t chunks = by_columns ? pass.split.rows : pass.split.columns;
  const int64_t pitch = by_columns ? pass.padded_columns : pass.rows, lanes = by_columns ? 1 : kSquareLanes;
  const A* squares = static_cast<const A*>(by_columns ? pass.sums_part : pass.squares_part);
  A square = 0;
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t l = 0; l < lanes; ++l) square += squares[(c * pitch + o) * lanes + l];
  return square;
}

template <class T> void norms(const NormFinish& f, int64_t task) {
  using A = acc_t<T>;
  const ColumnNorm& a = f.norm;
  const Pass& pass = f.pass;
  const int64_t first = task * kTile, last = smaller(first + kTile, a.rows), r = a.r, width = pass.width;
  A* const packed = static_cast<A*>(f.packed_B) + first * r;
  pack_rows(packed, r, Matrix{a.B, a.B_strides[0], a.B_strides[1], a.B_dtype}, first, last - first, r);
  const int64_t chunks = f.by_columns ? pass.split.rows : pass.split.columns;
  const int64_t pitch = f.by_columns ? pass.padded_columns : a.rows;
  const A* products = static_cast<const A*>(f.by_columns ? pass.columns_part : pass.rows_part);
  const A* gram = static_cast<const A*>(f.gram);
  const A scale = static_cast<A>(a.scale), scale2 = static_cast<A>(a.scale * a.scale);
  for (int64_t o = first; o < last; ++o) {
    const A* b = packed + (o - first) * r;
    const A square = row_square<A>(pass, f.by_columns, o);
    A cross = 0, own = 0, size = 0;
    for (int64_t p0 = 0; p0 < r; p0 += kTile) {
      const int64_t n = smaller(kTile, r - p0);
      A product[kTile] = {}, image[kTile] = {};
      for (int64_t c = 0; c < chunks; ++c)
        for (int64_t p = 0; p < n; ++p) product[p] += products[(c * pitch + o) * width + p0 + p];
      for (int64_t q = 0; q < r; ++q)
        for (int64_t p = 0; p < n; ++p) image[p] += b[q] * gram[q * r + p0 + p];
      for (int64_t p = 0; p < n; ++p) {
        const A c = 2 * scale * (product[p] * b[p0 + p]), w = scale2 * (image[p] * b[p0 + p]);
        cross += c, own += w, size += absolute(c) + absolute(w);
      }
    }
    A c2 = square + cross + own;
    if (c2 < static_cast<A>(kCancellation) * (square + size))
      c2 = exact_square<T>(a, o, b);
    static_cast<A*>(a.norm)[o] = root(c2);
  }
}

// Sums over elements of well-mixed functions of (bits, position): their order does not matter.
template <class Bits> void fingerprint_of(const Fingerprint& f, int64_t task) {
  typedef Bits U __attribute__((may_alias));
  const auto [spacing, skew, per_row] = f.sample;
  const int64_t begin = task * f.kElements, end = smaller(begin + f.kElements, f.rows * per_row), stride = f.a.column * spacing;
  uint64_t low = 0, high = 0;
  int64_t i = begin / per_row, j = begin % per_row;
  for (int64_t e = begin; e < end; ++i, j = 0) {
    const int64_t column = (i * skew & (spacing - 1)) + j * spacing, there = (f.columns - column + spacing - 1) / spacing;
    const int64_t left = smaller(per_row - j, end - e), n = smaller(left, there);
    const U* x = static_cast<const U*>(f.a.data) + i * f.a.row + column * f.a.column;
    const uint64_t position = static_cast<uint64_t>(f.first + e) + 1;
    const auto add = [&](int64_t k, int64_t stride) {
      uint64_t z = x[k * stride] + (position + static_cast<uint64_t>(k)) * 0x9E3779B97F4A7C15;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
      low += z ^ (z >> 31);
      high += (z >> 32) * (z & 0xffffffff);
    };
    if (stride == 1)
      for (int64_t k = 0; k < n; ++k) add(k, 1);
    else
      for (int64_t k = 0; k < n; ++k) add(k, stride);
    e += left;
  }
  f.parts[2 * task] = low, f.parts[2 * task + 1] = high;
}

template <class A> A vector_value(const void* data, DType dtype, int64_t i) {
  A x{};
  for_dtype(dtype, [&](auto* type) { x = static_cast<A>(value(static_cast<decltype(type)>(const_cast<void*>(data))[i])); });
  return x;
}

template <class A> void divide(const MagnitudeDivide& f, int64_t begin, int64_t end) {
  const MagnitudeGrad& a = f.magnitude;
  const A *dyz = static_cast<const A*>(a.dyz), *g = static_cast<const A*>(a.g), *norm = static_cast<const A*>(a.norm);
  for (int64_t o = begin; o < end; ++o) {
    static_cast<A*>(a.dm)[o] = dyz[o] / (g[o] * norm[o]);
    const A size = absolute(g[o]);
    f.vanishing[o] = size < static_cast<A>(a.vanishing_g) ||
        (a.bias && size * norm[o] < absolute(vector_value<A>(a.bias, a.bias_dtype, o)) / static_cast<A>(a.vanishing_bias));
  }
}

template <class T> void exact_gradient(const MagnitudeExact& f, int64_t i) {
  using A = acc_t<T>;
  const MagnitudeGrad& a = f.magnitude;
  const int64_t o = f.pick[i];
  const T* b = row<T>(a.B, o, a.B_stride);
  A sum = 0;
  for (int64_t t = 0; t < a.rows; ++t) {
    const T* h = row<T>(a.h, t, a.h_stride);
    A delta = 0;
    for (int64_t p = 0; p < a.r; ++p) delta += value(h[p]) * value(b[p]);
    sum += value(row<T>(a.dy, t, a.dy_stride)[o]) *
           (static_cast<const A*>(f.z)[t * f.count + i] + static_cast<A>(a.scale) * delta);
  }
  static_cast<A*>(a.dm)[o] = sum / static_cast<const A*>(a.norm)[o];
}

}  // namespace

void norm_finish(const NormFinish& a, int64_t begin, int64_t end) {
  for_dtype(a.norm.dtype, [&](auto* type) {
    for (int64_t i = begin; i < end; ++i) norms<std::remove_pointer_t<decltype(type)>>(a, i);
  });
}

void fingerprint(const Fingerprint& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) switch (a.a.dtype) {
      case DType::float64: fingerprint_of<uint64_t>(a, i); break;
      case DType::float32: fingerprint_of<uint32_t>(a, i); break;
      default: fingerprint_of<uint16_t>(a, i);
    }
}

void magnitude_divide(const MagnitudeDivide& a, int64_t begin, int64_t end) {
  a.magnitude.dtype == DType::float64 ? divide<double>(a, begin, end) : divide<float>(a, begin, end);
}

void magnitude_exact(const MagnitudeExact& a, int64_t begin, int64_t end) {
  for_dtype(a.magnitude.dtype, [&](auto* type) {
    for (int64_t i = begin; i < end; ++i) exact_gradient<std::remove_pointer_t<decltype(type)>>(a, i);
  });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
