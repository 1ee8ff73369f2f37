#include "csr.h"

#include "shuffle.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

// Calls f(row, p) for the entries p in [begin, end).
template <class F>
inline void for_entries(const int32_t* row_offsets, int64_t rows, int64_t begin, int64_t end, const F& f) {
  if (begin >= end) return;
  for (int64_t o = row_of_entry(row_offsets, rows, begin), p = begin; p < end; ++o)
    for (const int64_t last = smaller(row_offsets[o + 1], end); p < last; ++p) f(o, p);
}

// Calls f with null pointers of both types.
template <class F> inline void for_dtypes(DType first, DType second, const F& f) {
  for_dtype(first, [&](auto* t) { for_dtype(second, [&](auto* v) { f(t, v); }); });
}

// --- entries of a dense matrix ---

template <class T, class V> void scatter(const CsrScatter& a, int64_t begin, int64_t end) {
  T* const out = static_cast<T*>(a.out);
  const V* const values = static_cast<const V*>(a.values);
  for_entries(a.row_offsets, a.d, begin, end, [&](int64_t o, int64_t p) {
    T& place = out[o * a.out_strides[0] + a.columns[p] * a.out_strides[1]];
    const auto v = static_cast<acc_t<T>>(value(values[p]));
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

// --- blocks of vectors ---

template <class Vec, int... J> inline Vec pair_sums(Vec a, Vec b, std::integer_sequence<int, J...>) {
  return picked<(2 * J)...>(a, b) + picked<(2 * J + 1)...>(a, b);
}

// The vector whose lane i is the sum of v[i]; overwrites v.
template <class Vec> inline Vec lane_sums(Vec* v) {
#pragma GCC unroll 8
  for (int n = kWidth<Vec> / 2; n > 0; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = pair_sums(v[2 * i], v[2 * i + 1], positions<Vec>());
  return v[0];
}

// --- slabs ---

constexpr int64_t kRows = 32;  // of dyᵀ packed at a time, so that whole lines of dy are read
constexpr int64_t kAhead = 4;  // lines of x that are fetched ahead

// Lane l of a slab at x [tokens, .]: token l, or as pairs tokens 2 l and 2 l + 1; zero where there is none.
template <class X, class T> inline X lane_value(const T* x, int64_t stride, int64_t l, int64_t tokens) {
  if constexpr (std::is_same_v<X, Pair>) {
    const uint32_t low = 2 * l < tokens ? x[2 * l * stride].bits : 0, high = 2 * l + 1 < tokens ? x[(2 * l + 1) * stride].bits : 0;
    return {low | high << 16};
  } else {
    return l < tokens ? value(x[l * stride]) : X(0);
  }
}

template <class X, class T> inline vec<acc_t<T>> lane_values(const T* x, int64_t stride, int64_t l, int64_t tokens) {
  using Vec = vec<acc_t<T>>;
  constexpr int64_t ahead = kAhead * 64 / sizeof(T);
  if constexpr (std::is_same_v<X, Pair>) {
    u32_vec both = {};
    const T *low = x + 2 * l * stride, *high = low + stride;
    if (2 * l < tokens) both = __builtin_convertvector(bits_at<u16_half>(low), u32_vec), __builtin_prefetch(low + ahead);
    if (2 * l + 1 < tokens) both |= __builtin_convertvector(bits_at<u16_half>(high), u32_vec) << 16, __builtin_prefetch(high + ahead);
    return bits_as<Vec>(both);
  } else {
    if (l >= tokens) return Vec{};
    __builtin_prefetch(x + l * stride + ahead);
    return load(x + l * stride);
  }
}

// slab [columns, L] = the transpose of x [tokens, columns]
template <class X, class T>
inline void pack_slab(X* slab, int64_t L, const T* x, int64_t stride, int64_t tokens, int64_t columns) {
  using Vec = vec<acc_t<T>>;
  constexpr int N = kWidth<Vec>;
  int64_t c = 0;
  if (L % N == 0)
    for (; c + N <= columns; c += N)
      for (int64_t l = 0; l < L; l += N) {
        Vec v[N];
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) v[i] = lane_values<X>(x + c, stride, l + i, tokens);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) std::memcpy(slab + (c + i) * L + l, &v[i], sizeof(Vec));
      }
  for (; c < columns; ++c)
    for (int64_t l = 0; l < L; ++l) slab[c * L + l] = lane_value<X>(x + c, stride, l, tokens);
}

// out [tokens, rows] += the transpose of y [rows, tokens], whose token t is element (t % per_lane) * L + t / per_lane of
// its row [per_lane * L]. Of each row of out a long run is written at once: rows are often a power of two apart, so that
// their lines compete for few places in the cache.
template <class T>
inline void add_transposed(T* out, int64_t stride, const acc_t<T>* y, int64_t L, int64_t per_lane, int64_t tokens, int64_t rows) {
  using A = acc_t<T>;
  using Vec = vec<A>;
  constexpr int N = kWidth<Vec>;
  alignas(64) A z[N * kOutRows];
  int64_t o = 0;
  if (L % N == 0)
    for (int64_t h = 0; h < per_lane; ++h)
      for (int64_t l = 0; l * per_lane + h < tokens; l += N) {
        for (o = 0; o + N <= rows; o += N) {
          Vec v[N];
#pragma GCC unroll 16
          for (int i = 0; i < N; ++i) v[i] = bits_at<Vec>(y + ((o + i) * per_lane + h) * L + l);
          transpose(v);
#pragma GCC unroll 16
          for (int i = 0; i < N; ++i) std::memcpy(z + i * kOutRows + o, &v[i], sizeof(Vec));
        }
        for (int64_t i = 0, t = l * per_lane + h; i < N && t < tokens; ++i, t += per_lane)
          for (int64_t j = 0; j < o; j += N) store(out + t * stride + j, load(out + t * stride + j) + load(z + i * kOutRows + j));
      }
  for (; o < rows; ++o)
    for (int64_t t = 0; t < tokens; ++t) {
      T& place = out[t * stride + o];
      place = rounded<T>(value(place) + y[(o * per_lane + t % per_lane) * L + t / per_lane]);
    }
}

// Calls f with the number of lanes as a constant.
template <class F> inline void for_lanes(int64_t lanes, const F& f) {
  switch (lanes) {
    case 4: return f(std::integral_constant<int, 4>());
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 64: return f(std::integral_constant<int, 64>());
  }
}

template <class A, int L> using slab_vec = typename Lanes<A, (L < kLanes<A> ? L : kLanes<A>)>::type;

// Calls compute(slab number, the packed slab, part) for every task of a sweep over x [T, k].
template <class X, class T, class F>
inline void for_slabs(const Sweep& a, const T* x, int64_t tokens, int64_t stride, int64_t begin, int64_t end, const F& compute) {
  const Slabs& s = a.slabs;
  const int64_t step = s.lanes * s.per_lane;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / a.parts, part = task % a.parts;
    if (a.shared) {
      const int64_t slab = a.wave * s.groups + group;
      if (slab < s.count) compute(slab, reinterpret_cast<const X*>(a.room + group * s.bytes()), part);
      continue;
    }
    X* const room = reinterpret_cast<X*>(a.room);
    for (int64_t slab = group; slab < s.count; slab += s.groups) {
      const int64_t t = slab * step;
      pack_slab(room, s.lanes, x + t * stride, stride, smaller(step, tokens - t), s.columns);
      compute(slab, static_cast<const X*>(room), part);
    }
  }
}

template <class X, class T> void pack(const SlabPack& a, int64_t begin, int64_t end) {
  const Slabs& s = a.sweep.slabs;
  const int64_t step = s.lanes * s.per_lane, pieces = a.pieces();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / pieces, c = task % pieces * SlabPack::kPackColumns;
    const int64_t t = (a.sweep.wave * s.groups + group) * step;
    if (t >= a.T) continue;
    X* const slab = reinterpret_cast<X*>(a.sweep.room + group * s.bytes());
    pack_slab(slab + c * s.lanes, s.lanes, row<T>(a.x, t, a.x_stride) + c, a.x_stride, smaller(step, a.T - t),
              smaller(SlabPack::kPackColumns, s.columns - c));
  }
}

// --- out += x Sᵀ ---

// One vector of a slab of bf16 pairs as the tokens in the lower halves, and as those in the upper ones.
template <class Vec, class Bits = typename Lanes<uint32_t, kWidth<Vec>>::type> inline Vec lower(Vec v) {
  return bits_as<Vec>(bits_as<Bits>(v) << 16);
}
template <class Vec, class Bits = typename Lanes<uint32_t, kWidth<Vec>>::type> inline Vec upper(Vec v) {
  return bits_as<Vec>(bits_as<Bits>(v) & 0xffff0000);
}

// y [per_lane, L] = the sum over entries [begin, end) of their values times their rows of the slab
template <int L, class X, class A>
inline void sum_entries(A* y, const X* slab, const A* values, const int32_t* columns, int64_t begin, int64_t end) {
  using Vec = slab_vec<A, L>;
  constexpr int N = kWidth<Vec>, H = kPerFactor<X>, V = L / N < 4 ? L / N : 4;
  for (int l = 0; l < L; l += V * N) {
    Vec sums[H][V] = {};
    for (int64_t p = begin; p < end; ++p) {
      const X* const from = slab + static_cast<int64_t>(columns[p]) * L + l;
      for (int v = 0; v < V; ++v) {
        const Vec x = bits_at<Vec>(from + v * N);
        if constexpr (H == 2)
          sums[0][v] += lower(x) * values[p], sums[1][v] += upper(x) * values[p];
        else
          sums[0][v] += x * values[p];
      }
    }
    for (int h = 0; h < H; ++h)
      for (int v = 0; v < V; ++v) std::memcpy(y + h * L + l + v * N, &sums[h][v], sizeof(Vec));
  }
}

template <class T> void spmm(const SpmmSweep& sweep, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using X = std::conditional_t<std::is_same_v<T, bfloat16>, Pair, A>;
  const CsrSpmm& a = sweep.spmm;
  const A* const values = static_cast<const A*>(sweep.values);
  A* const y = reinterpret_cast<A*>(sweep.spare);
  const int64_t L = sweep.slabs.lanes, step = L * sweep.slabs.per_lane;
  for_slabs<X>(sweep, static_cast<const T*>(a.x), a.T, a.x_stride, begin, end, [&](int64_t number, const X* slab, int64_t part) {
    const int64_t first = row_share(a.row_offsets, a.d, sweep.parts, part);
    const int64_t last = row_share(a.row_offsets, a.d, sweep.parts, part + 1);
    const int64_t tokens = smaller(step, a.T - number * step);
    T* const out = row<T>(a.out, number * step, a.out_stride);
    for (int64_t o = first; o < last; o += kOutRows) {
      const int64_t rows = smaller(kOutRows, last - o);
      const int32_t* const offsets = a.row_offsets + o;
      if (offsets[0] == offsets[rows]) continue;
      for_lanes(L, [&](auto lanes) {
        for (int64_t i = 0; i < rows; ++i)
          sum_entries<lanes()>(y + i * step, slab, values, a.columns, offsets[i], offsets[i + 1]);
      });
      add_transposed(out + o, a.out_stride, y, L, sweep.slabs.per_lane, tokens, rows);
    }
  });
}

// --- dyᵀx at the pattern ---

template <class Vec> inline Vec add_products(Vec sum, Vec a, Vec b, const element_t<Vec>*) { return sum + a * b; }
#ifdef __AVX512BF16__
template <class Vec> inline Vec add_products(Vec sum, Vec a, Vec b, const Pair*) {
  if constexpr (sizeof(Vec) == 64)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  else if constexpr (sizeof(Vec) == 32)
    return (Vec)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
  else
    return (Vec)_mm_dpbf16_ps((__m128)sum, (__m128bh)a, (__m128bh)b);
}
#endif

// The sums of some consecutive entries, one vector each, until there are enough to add up their lanes together.
template <class Vec> struct Pending {
  using A = element_t<Vec>;
  Vec entries[kWidth<Vec>];
  A* to;
  bool add;
  int count = 0;

  void flush() {
    constexpr int N = kWidth<Vec>;
    const Vec sums = lane_sums(entries);
    A lanes[N];
    std::memcpy(lanes, &sums, sizeof sums);
    for (int i = 0; i < count; ++i) to[i] = add ? to[i] + lanes[i] : lanes[i];
    to += count, count = 0;
  }
  void push(Vec entry) {
    entries[count] = entry;
    if (++count == kWidth<Vec>) flush();
  }
};

// The entries [p, end) of one row, whose part of dy is y [L].
template <int L, class X, class Vec>
inline void dot_entries(Pending<Vec>& pending, const X* y, const X* slab, const int32_t* columns, int64_t begin, int64_t end) {
  constexpr int N = kWidth<Vec>;
  for (int64_t p = begin; p < end; ++p) {
    const X* const from = slab + static_cast<int64_t>(columns[p]) * L;
    Vec sum = {};
#pragma GCC unroll 16
    for (int l = 0; l < L; l += N) sum = add_products(sum, bits_at<Vec>(from + l), bits_at<Vec>(y + l), from);
    pending.push(sum);
  }
}

template <class T> void sddmm(const SddmmSweep& sweep, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using X = factor_t<T>;
  const CsrSddmm& a = sweep.sddmm;
  const Slabs& s = sweep.slabs;
  const int64_t step = s.lanes * s.per_lane;
  alignas(64) X y[kRows * kMostLanes];
  for_slabs<X>(sweep, static_cast<const T*>(a.x), a.T, a.x_stride, begin, end, [&](int64_t number, const X* slab, int64_t part) {
    const int64_t first = entry_share(a.nnz, sweep.parts, part), last = entry_share(a.nnz, sweep.parts, part + 1);
    if (first >= last) return;
    const int64_t t = number * step, tokens = smaller(step, a.T - t);
    A* const sums = static_cast<A*>(sweep.sums) + number % s.groups * a.nnz + first;
    for_lanes(s.lanes, [&](auto lanes) {
      constexpr int L = lanes();
      Pending<slab_vec<A, L>> pending{{}, sums, number >= s.groups};
      for (int64_t o = row_of_entry(a.row_offsets, a.d, first); o < a.d && a.row_offsets[o] < last; o += kRows) {
        const int64_t rows = smaller(kRows, a.d - o);
        if (a.row_offsets[o] == a.row_offsets[o + rows]) continue;
        pack_slab(y, L, row<T>(a.dy, t, a.dy_stride) + o, a.dy_stride, tokens, rows);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t p = a.row_offsets[o + i], q = a.row_offsets[o + i + 1];
          dot_entries<L>(pending, y + i * L, slab, a.columns, p < first ? first : p, smaller(q, last));
        }
      }
      if (pending.count) pending.flush();
    });
  });
}

template <class A> void finish(const SddmmFinish& a, int64_t begin, int64_t end) {
  const int64_t nnz = a.sddmm.nnz;
  const A* const sums = static_cast<const A*>(a.sums);
  A* const out = static_cast<A*>(a.sddmm.out);
  for (int64_t p = begin; p < end; ++p) {
    A sum = 0;
    for (int64_t g = 0; g < a.groups; ++g) sum += sums[g * nnz + p];
    out[p] = sum;
  }
}

template <class A, class V> void widen(const CsrWiden& a, int64_t begin, int64_t end) {
  const V* const from = static_cast<const V*>(a.spmm.values);
  const int32_t* const permutation = a.spmm.permutation;
  A* const to = static_cast<A*>(a.values);
  if (permutation)
    for (int64_t p = begin; p < end; ++p) to[p] = static_cast<A>(value(from[permutation[p]]));
  else
    for (int64_t p = begin; p < end; ++p) to[p] = static_cast<A>(value(from[p]));
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

void csr_widen(const CsrWiden& a, int64_t begin, int64_t end) {
  for_dtype(a.spmm.values_dtype, [&](auto* v) {
    using V = std::remove_pointer_t<decltype(v)>;
    a.spmm.dtype == DType::float64 ? widen<double, V>(a, begin, end) : widen<float, V>(a, begin, end);
  });
}

void slab_pack(const SlabPack& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if constexpr (std::is_same_v<T, bfloat16>)
      if (a.sweep.slabs.per_lane == 2) return pack<Pair, T>(a, begin, end);
    pack<acc_t<T>, T>(a, begin, end);
  });
}

void spmm_sweep(const SpmmSweep& a, int64_t begin, int64_t end) {
  for_dtype(a.spmm.dtype, [&](auto* t) { spmm<std::remove_pointer_t<decltype(t)>>(a, begin, end); });
}

void sddmm_sweep(const SddmmSweep& a, int64_t begin, int64_t end) {
  for_dtype(a.sddmm.dtype, [&](auto* t) { sddmm<std::remove_pointer_t<decltype(t)>>(a, begin, end); });
}

void sddmm_finish(const SddmmFinish& a, int64_t begin, int64_t end) {
  a.sddmm.dtype == DType::float64 ? finish<double>(a, begin, end) : finish<float>(a, begin, end);
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
