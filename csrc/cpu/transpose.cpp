#include "../ops/transpose.h"

#include "shuffle.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

// Squares of 16 bytes a side: longer vectors gain nothing, since the time goes to memory. A task's columns of out are
// written to the end of a cache line before it leaves the cache.
template <class E> void turn(const Transpose& a, int64_t task) {
  constexpr int64_t N = 16 / sizeof(E);
  using Vec = typename Lanes<E, N>::type;
  const int64_t first = task * kTile, rows = smaller(kTile, a.rows - first);
  const E* const x = row<E>(a.x, first, a.x_stride);
  E* const out = static_cast<E*>(a.out) + first;
  const int64_t whole_rows = rows / N * N, whole_columns = a.columns / N * N;
  for (int64_t j = 0; j < whole_columns; j += N)
    for (int64_t t = 0; t < whole_rows; t += N) {
      Vec v[N];
#pragma GCC unroll 8
      for (int64_t i = 0; i < N; ++i) v[i] = bits_at<Vec>(x + (t + i) * a.x_stride + j);
      transpose(v);
#pragma GCC unroll 8
      for (int64_t i = 0; i < N; ++i) std::memcpy(out + (j + i) * a.out_stride + t, &v[i], sizeof(Vec));
    }
  for (int64_t j = 0; j < a.columns; ++j)
    for (int64_t t = j < whole_columns ? whole_rows : 0; t < rows; ++t) out[j * a.out_stride + t] = x[t * a.x_stride + j];
}

}  // namespace

void transpose(const Transpose& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* type) {
    constexpr int bytes = sizeof(*type);
    using Element = std::conditional_t<bytes == 8, uint64_t, std::conditional_t<bytes == 4, uint32_t, uint16_t>>;
    for (int64_t task = begin; task < end; ++task) turn<Element>(a, task);
  });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
