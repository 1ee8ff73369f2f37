#include "../ops/importance.h"

#include "common.h"
#include "matrix.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

constexpr int64_t kFolded = 64;    // columns up to which lanes run over the rows of B
constexpr int64_t kColumns = 1024; // sums held at a time

template <class A> inline A absolute(A x) { return x < 0 ? -x : x; }

// Ī and Ū, and one step of both for some elements.
template <class A> struct Running {
  A *exp_avg, *uncertainty;
  A beta1, rest1, beta2, rest2;

  // Returns Ī Ū of element i, or of kLanes of them.
  template <class T> inline A one(const T* p, const T* g, int64_t i) const {
    const A size = absolute(static_cast<A>(value(p[i])) * static_cast<A>(value(g[i])));
    const A m = beta1 * exp_avg[i] + rest1 * size;
    const A u = beta2 * uncertainty[i] + rest2 * absolute(size - m);
    exp_avg[i] = m, uncertainty[i] = u;
    return m * u;
  }

  template <class T> inline vec<A> lanes(const T* p, const T* g, int64_t i) const {
    const vec<A> size = absolute(load(p + i) * load(g + i));
    const vec<A> m = beta1 * load(exp_avg + i) + rest1 * size;
    const vec<A> u = beta2 * load(uncertainty + i) + rest2 * absolute(size - m);
    store(exp_avg + i, m), store(uncertainty + i, u);
    return m * u;
  }

  Running from(int64_t n) const { return {exp_avg + n, uncertainty + n, beta1, rest1, beta2, rest2}; }
};

template <class T, class A> A span(const Running<A>& s, const T* p, const T* g, int64_t n) {
  constexpr int64_t L = kLanes<A>;
  vec<A> sums = {};
  int64_t i = 0;
  for (; i + L <= n; i += L) sums += s.lanes(p, g, i);
  A sum = 0;
  for (int l = 0; l < L; ++l) sum += sums[l];
  for (; i < n; ++i) sum += s.one(p, g, i);
  return sum;
}

// own [r] += the sums of the columns of [rows, r], over d. Where r is small, r vectors hold kLanes whole rows.
template <class T, class A>
void columns(const Running<A>& s, const T* p, const T* g, int64_t rows, int64_t r, A d, A* own) {
  if (rows == 0 || r == 0) return;
  constexpr int64_t L = kLanes<A>;
  const int64_t width = r <= kFolded ? r * L : r, n = rows * r, whole = n / width;
  for (int64_t c = 0; c < width; c += kColumns) {
    const int64_t count = smaller(kColumns, width - c);
    A sums[kColumns] = {};
    for (int64_t t = 0; t < whole; ++t) {
      const int64_t first = t * width + c;
      int64_t j = 0;
      for (; j + L <= count; j += L) store(sums + j, load(sums + j) + s.lanes(p, g, first + j));
      for (; j < count; ++j) sums[j] += s.one(p, g, first + j);
    }
    for (int64_t j = 0; j < count; ++j) own[(c + j) % r] += sums[j] / d;
  }
  for (int64_t i = whole * width; i < n; ++i) own[i % r] += s.one(p, g, i) / d;
}

template <class A> void layer(const ImportanceUpdate& a, const ImportanceLayer& l) {
  const Running<A> start{static_cast<A*>(a.exp_avg) + l.offset, static_cast<A*>(a.uncertainty) + l.offset,
                         static_cast<A>(a.beta1), static_cast<A>(1 - a.beta1), static_cast<A>(a.beta2),
                         static_cast<A>(1 - a.beta2)};
  const int64_t sizes[3] = {l.rows_A * l.k, l.rows_B * l.r, l.rows_E};
  A* const own = a.scores ? static_cast<A*>(a.scores) + l.first : nullptr;
  if (own)
    for (int64_t i = 0; i < l.r; ++i) own[i] = 0;
  int64_t offset = 0;
  for (int which = 0; which < 3; offset += sizes[which], ++which) {
    const Running<A> s = start.from(offset);
    for_dtype(l.dtypes[which], [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if constexpr (std::is_same_v<acc_t<T>, A>) {
        const T *p = static_cast<const T*>(l.p[which]), *g = static_cast<const T*>(l.g[which]);
        if (!own)
          span(s, p, g, sizes[which]);
        else if (which == 0)
          for (int64_t i = 0; i < l.rows_A; ++i)
            own[l.row_A + i] += span(s.from(i * l.k), p + i * l.k, g + i * l.k, l.k) / static_cast<A>(l.k);
        else if (which == 1)
          columns(s, p, g, l.rows_B, l.r, static_cast<A>(l.d), own);
        else
          for (int64_t i = 0; i < l.rows_E; ++i) own[l.row_E + i] += s.one(p, g, i);
      }
    });
  }
}

}  // namespace

void importance_update(const ImportanceUpdate& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    a.dtype == DType::float64 ? layer<double>(a, a.layers[i]) : layer<float>(a, a.layers[i]);
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
