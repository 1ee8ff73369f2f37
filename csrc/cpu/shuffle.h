// Vectors whose lanes trade places.
#pragma once

#include <utility>

#include "product.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

template <class Vec> using element_t = std::remove_reference_t<decltype(std::declval<Vec&>()[0])>;
template <class Vec> constexpr int kWidth = sizeof(Vec) / sizeof(element_t<Vec>);
template <class Vec> using positions = std::make_integer_sequence<int, kWidth<Vec>>;

// The elements I... of a followed by b.
template <int... I, class Vec> inline Vec picked(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  constexpr int bytes = sizeof(element_t<Vec>);
  using Position = std::conditional_t<bytes == 8, int64_t, std::conditional_t<bytes == 4, int32_t, int16_t>>;
  return __builtin_shuffle(a, b, typename Lanes<Position, kWidth<Vec>>::type{I...});
#endif
}

template <bool high, class Vec, int... J> inline Vec interleaved(Vec a, Vec b, std::integer_sequence<int, J...>) {
  constexpr int N = kWidth<Vec>;
  return picked<((high ? N / 2 : 0) + J / 2 + J % 2 * N)...>(a, b);
}

// v becomes its transpose: each of the log2 N rounds moves the upper bit of the row number below the column's.
template <class Vec> inline void transpose(Vec (&v)[kWidth<Vec>]) {
  constexpr int N = kWidth<Vec>;
  for (int round = 1; round < N; round *= 2) {
    Vec w[N];
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      w[2 * i] = interleaved<false>(v[i], v[i + N / 2], positions<Vec>());
      w[2 * i + 1] = interleaved<true>(v[i], v[i + N / 2], positions<Vec>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = w[i];
  }
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
