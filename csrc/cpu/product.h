// The micro-kernel of every skinny product: c [n, width] += x m, with a block of c in registers.
#pragma once

#include "common.h"
#include "matrix.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

// Vectors of c that stay in registers: enough to hide the latency of the multiply-adds, and one row of m feeds several.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 8;
#endif

// Lines of the next tile, fetched while this one is worked on.
struct Ahead {
  const char* base = nullptr;
  int64_t stride = 0, rows = 0, lines = 0;  // bytes between rows; rows, and lines of a row
  int64_t row = 0;

  // Where the next `count` rows of a line start.
  const char* next(int64_t count) {
    const char* line = base + row * stride;
    row += count;
    if (row >= rows) row = 0, base += 64, --lines;
    if (lines <= 0) stride = 0;
    return line;
  }
};

// Two neighbouring bf16 values: one instruction multiplies them by two others and adds both products.
struct Pair { uint32_t bits; };

#ifdef __AVX512BF16__
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// What products of T multiply: pairs of bf16 where the processor has the instruction, else the accumulator's type.
template <class T> struct Factor { using type = acc_t<T>; };
template <> struct Factor<bfloat16> { using type = std::conditional_t<kPairs, Pair, float>; };
template <class T> using factor_t = typename Factor<T>::type;
template <class X> struct FactorAccumulator { using type = X; };
template <> struct FactorAccumulator<Pair> { using type = float; };
template <class X> constexpr int64_t kPerFactor = std::is_same_v<X, Pair> ? 2 : 1;  // values in an X
template <class X> inline int64_t factors(int64_t values) { return (values + kPerFactor<X> - 1) / kPerFactor<X>; }

template <class A, int L> struct Lanes { typedef A type __attribute__((vector_size(L * sizeof(A)))); };

// One vector at p. An array of vectors must not be copied whole: the compiler would then keep it in memory.
template <class Vec, class X> inline Vec bits_at(const X* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class Vec, class A> inline Vec multiply_add(Vec sum, Vec row, A x) { return sum + row * x; }
#ifdef __AVX512BF16__
template <class Vec> inline Vec multiply_add(Vec sum, Vec row, Pair x) {
  if constexpr (sizeof(Vec) == 64)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)_mm512_set1_epi32(static_cast<int>(x.bits)));
  else if constexpr (sizeof(Vec) == 32)
    return (Vec)_mm256_dpbf16_ps((__m256)sum, (__m256bh)row, (__m256bh)_mm256_set1_epi32(static_cast<int>(x.bits)));
  else
    return (Vec)_mm_dpbf16_ps((__m128)sum, (__m128bh)row, (__m128bh)_mm_set1_epi32(static_cast<int>(x.bits)));
}
#endif

// c[i] += sum over k of x[i * si + k * sk] * m[k], i < N, each row of c and m V vectors of L lanes.
template <int L, int N, int V, int si, int sk, class A, class X>
inline void product_block(A* c, int64_t c_stride, const X* x, const X* m, int64_t m_stride, int64_t count, Ahead& ahead) {
  using Vec = typename Lanes<A, L>::type;
  const int64_t step = ahead.stride;
  const char* line = ahead.next(count);
  Vec sums[N][V];
#pragma GCC unroll 16  // else they go through memory
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = bits_at<Vec>(c + i * c_stride + v * L);
  for (int64_t k = 0; k < count; ++k, line += step) {
    __builtin_prefetch(line);
    Vec row[V];
    for (int v = 0; v < V; ++v) row[v] = bits_at<Vec>(m + k * m_stride + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] = multiply_add(sums[i][v], row[v], x[i * si + k * sk]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) std::memcpy(c + i * c_stride + v * L, &sums[i][v], sizeof(Vec));
}

template <int L, int V, int si, int sk, class A, class X>
inline void product_rows(A* c, int64_t c_stride, const X* x, const X* m, int64_t m_stride, int64_t n, int64_t count,
                         Ahead& ahead) {
  constexpr int N = kAccumulators / V, some = N > 4 ? 4 : 2;
  int64_t i = 0;
  for (; i + N <= n; i += N) product_block<L, N, V, si, sk>(c + i * c_stride, c_stride, x + i * si, m, m_stride, count, ahead);
  for (; i + some <= n; i += some)
    product_block<L, some, V, si, sk>(c + i * c_stride, c_stride, x + i * si, m, m_stride, count, ahead);
  for (; i < n; ++i) product_block<L, 1, V, si, sk>(c + i * c_stride, c_stride, x + i * si, m, m_stride, count, ahead);
}

// c [n, width] += x m, x(i, k) = x[i * si + k * sk], m [count, m_stride]; width: a padded_rank.
template <int si, int sk, class A, class X>
inline void product(A* c, int64_t width, const X* x, const X* m, int64_t m_stride, int64_t n, int64_t count, Ahead ahead) {
  constexpr int L = kLanes<A>;
  int64_t v = 0;
  if constexpr (kAccumulators == 16)
    for (; v + 4 * L <= width; v += 4 * L) product_rows<L, 4, si, sk>(c + v, width, x, m + v, m_stride, n, count, ahead);
  for (; v + 2 * L <= width; v += 2 * L) product_rows<L, 2, si, sk>(c + v, width, x, m + v, m_stride, n, count, ahead);
  for (; v + L <= width; v += L) product_rows<L, 1, si, sk>(c + v, width, x, m + v, m_stride, n, count, ahead);
  if constexpr (L > 8)
    for (; v + 8 <= width; v += 8) product_rows<8, 1, si, sk>(c + v, width, x, m + v, m_stride, n, count, ahead);
  if constexpr (L > 4)
    for (; v + 4 <= width; v += 4) product_rows<4, 1, si, sk>(c + v, width, x, m + v, m_stride, n, count, ahead);
}

template <class A> inline A* at(const void* base, int64_t element) {
  return static_cast<A*>(const_cast<void*>(base)) + element;
}

template <class A> inline void zero(A* p, int64_t count) {
  if (count > 0) std::memset(p, 0, count * sizeof(A));
}

// packed [count, stride] = rows [first, first + count) of a, r columns, zero beyond them.
template <class A>
inline void pack_rows(A* packed, int64_t stride, const Matrix& a, int64_t first, int64_t count, int64_t r) {
  for_dtype(a.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(const_cast<void*>(a.data)) + first * a.row;
    for (int64_t i = 0; i < count; ++i, data += a.row, packed += stride) {
      if (a.column == 1 && !a.pick)
        for (int64_t j = 0; j < r; ++j) packed[j] = static_cast<A>(value(data[j]));
      else
        for (int64_t j = 0; j < r; ++j) packed[j] = static_cast<A>(value(data[(a.pick ? a.pick[j] : j) * a.column]));
      for (int64_t j = r; j < stride; ++j) packed[j] = 0;
    }
  });
}

// packed [factors(count), stride] = the same rows of a bf16 matrix, two at a time, zero where there is none.
inline void pack_rows(Pair* packed, int64_t stride, const Matrix& a, int64_t first, int64_t count, int64_t r) {
  const bfloat16* data = static_cast<const bfloat16*>(a.data) + first * a.row;
  for (int64_t i = 0; i < count; i += 2, data += 2 * a.row, packed += stride) {
    const int64_t second = i + 1 < count ? a.row : 0;
    const uint32_t kept = i + 1 < count ? 0xffff : 0;
    for (int64_t j = 0; j < r; ++j) {
      const bfloat16* at = data + (a.pick ? a.pick[j] : j) * a.column;
      packed[j] = {uint32_t{at[0].bits} | (at[second].bits & kept) << 16};
    }
    for (int64_t j = r; j < stride; ++j) packed[j] = {0};
  }
}

// a without its first j columns
inline Matrix from_column(Matrix a, int64_t j) {
  for_dtype(a.dtype, [&](auto* type) { a.data = static_cast<decltype(type)>(const_cast<void*>(a.data)) + j * a.column; });
  return a;
}

// The tile of a [rows, columns] at (t, j), widened to A [kTile, kTile] and zero beyond its last column.
template <class T>
inline void load_tile(acc_t<T>* tile, const Matrix& a, int64_t t, int64_t rows, int64_t j, int64_t columns) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const T* const first = static_cast<const T*>(a.data) + j * a.column;
  for (int64_t i = 0; i < rows; ++i, tile += kTile) {
    const T* const x = first + a.row_start(t + i);
    int64_t c = 0;
    if (a.column == 1) {
      for (; c + 4 * L <= columns; c += 4 * L)
        for (int v = 0; v < 4; ++v) store(tile + c + v * L, load(x + c + v * L));
      for (; c + L <= columns; c += L) store(tile + c, load(x + c));
    }
    for (; c < columns; ++c) tile[c] = value(x[c * a.column]);
    if (c == kTile) continue;
    for (; c % L != 0; ++c) tile[c] = 0;
#pragma GCC unroll 16  // as a loop it would become a string instruction, which is slow to start
    for (int64_t v = 0; v < kTile; v += L)
      if (v >= c) store(tile + v, vec<A>{});
  }
}

// The dropout mask of kTile elements from `first`, `count` of which are wanted.
struct KeepTile {
  uint32_t buffer[kTile + kKeepSlack];
  const uint32_t* words(const Dropout& dropout, uint64_t first, int64_t count) {
    return keep_words(buffer, dropout, first, count);
  }
};

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
