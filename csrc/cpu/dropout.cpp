#include "../ops/dropout.h"

#include "common.h"
#include "matrix.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

template <class T> void drop_rows(const SeededDropout& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const Dropout dropout(*a.seed, a.p);
  const A keep_rate = static_cast<A>(1 - a.p);
  uint32_t buffer[kMaxTile + kKeepSlack];
  for (int64_t t = begin; t < end; ++t) {
    const T* x = row<T>(a.x, t, a.x_stride);
    T* out = row<T>(a.out, t, a.columns);
    for (int64_t j = 0; j < a.columns; j += kMaxTile) {
      const int64_t n = smaller(kMaxTile, a.columns - j);
      const uint64_t first = static_cast<uint64_t>(t) * static_cast<uint64_t>(a.columns) + static_cast<uint64_t>(j);
      const uint32_t* keep = keep_words(buffer, dropout, first, n);
      int64_t i = 0;
      for (; i + L <= n; i += L) store(out + j + i, masked(load(x + j + i) / keep_rate, keep + i));
      for (; i < n; ++i) out[j + i] = rounded<T>(keep[i] ? static_cast<A>(value(x[j + i])) / keep_rate : A(0));
    }
  }
}

}  // namespace

void seeded_dropout(const SeededDropout& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* type) { drop_rows<std::remove_pointer_t<decltype(type)>>(a, begin, end); });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
