#include "../csr_plan.h"
#include "product.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

// Calls f(row, p) for the entries p in [begin, end).
template <class F>
inline void for_entries(const int32_t* row_offsets, int64_t rows, int64_t begin, int64_t end, const F& f) {
  if (begin >= end) return;
  for (int64_t o = row_of_entry(row_offsets, rows, begin), p = begin; p < end; ++o)
    for (const int64_t last = smaller(row_offsets[o + 1], end); p < last; ++p) f(o, p);
}

template <class T, class V> void scatter(const CsrScatter& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  T* const out = static_cast<T*>(a.out);
  const V* const values = static_cast<const V*>(a.values);
  for_entries(a.row_offsets, a.d, begin, end, [&](int64_t o, int64_t p) {
    T& place = out[o * a.out_strides[0] + a.columns[p] * a.out_strides[1]];
    const A v = static_cast<A>(value(values[p]));
    place = rounded<T>(a.accumulate ? value(place) + v : v);
  });
}

template <class T, class D> void gather(const CsrGather& a, int64_t begin, int64_t end) {
  const D* const dense = static_cast<const D*>(a.dense);
  T* const out = static_cast<T*>(a.out);
  const int64_t first = a.row_offsets[0];
  for_entries(a.row_offsets, a.n, first + begin, first + end, [&](int64_t o, int64_t p) {
    out[p] = rounded<T>(static_cast<acc_t<T>>(value(dense[o * a.dense_strides[0] + a.columns[p] * a.dense_strides[1]])));
  });
}

template <class T, class V> void spmm(const CsrSpmm& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const V* const values = static_cast<const V*>(a.values);
  for (int64_t t = begin; t < end; ++t)
    for (int64_t o = 0; o < a.d; ++o) {
      A sum = 0;
      for (int64_t p = a.row_offsets[o]; p < a.row_offsets[o + 1]; ++p)
        sum += static_cast<A>(value(values[a.permutation ? a.permutation[p] : p])) * value(row<T>(a.x, t, a.x_stride)[a.columns[p]]);
      T& place = row<T>(a.out, t, a.out_stride)[o];
      place = rounded<T>(value(place) + sum);
    }
}

template <class T> void sddmm(const CsrSddmm& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for_entries(a.row_offsets, a.d, begin, end, [&](int64_t o, int64_t p) {
    A sum = 0;
    for (int64_t t = 0; t < a.T; ++t) sum += value(row<T>(a.dy, t, a.dy_stride)[o]) * value(row<T>(a.x, t, a.x_stride)[a.columns[p]]);
    static_cast<A*>(a.out)[p] = sum;
  });
}

// Calls f with null pointers of both types.
template <class F> inline void for_dtypes(DType first, DType second, const F& f) {
  for_dtype(first, [&](auto* t) { for_dtype(second, [&](auto* v) { f(t, v); }); });
}

}  // namespace

void csr_scatter(const CsrScatter& a, int64_t begin, int64_t end) {
  for_dtypes(a.dtype, a.values_dtype, [&](auto* t, auto* v) {
    scatter<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(v)>>(a, begin, end);
  });
}

void csr_gather(const CsrGather& a, int64_t begin, int64_t end) {
  for_dtypes(a.dtype, a.dense_dtype, [&](auto* t, auto* v) {
    gather<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(v)>>(a, begin, end);
  });
}

void csr_spmm(const CsrSpmm& a, int64_t begin, int64_t end) {
  for_dtypes(a.dtype, a.values_dtype, [&](auto* t, auto* v) {
    spmm<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(v)>>(a, begin, end);
  });
}

void csr_sddmm(const CsrSddmm& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* t) { sddmm<std::remove_pointer_t<decltype(t)>>(a, begin, end); });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
