#include "../ops/blocksum.h"

#include "common.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

// Copies of the shard period that a row is worked on with: dropout generates its words in longer runs.
inline int64_t copies_for(int64_t columns, int64_t r, bool dropout) {
  return period_copies(columns, r, dropout ? 256 : 64);
}

// --- sums ---

constexpr int64_t kShortRun = 256;

// acc[i] += drop(x)[i], i < n; first: the element number of x[0].
template <class T>
inline void add_segment(acc_t<T>* acc, const T* x, int64_t n, const Dropout* dropout, uint64_t first) {
  using A = acc_t<T>;
  uint32_t buffer[kMaxTile + kKeepSlack];
  int64_t i = 0;
  if (dropout) {
    const uint32_t* keep = keep_words(buffer, *dropout, first, n);
    for (; i + kLanes<A> <= n; i += kLanes<A>) store(acc + i, load(acc + i) + masked(load(x + i), keep + i));
    for (; i < n; ++i) acc[i] += keep[i] ? value(x[i]) : A(0);
  } else {
    for (; i + kLanes<A> <= n; i += kLanes<A>) store(acc + i, load(acc + i) + load(x + i));
    for (; i < n; ++i) acc[i] += value(x[i]);
  }
}

// acc [N vectors] = sums over the `blocks` segments x[j * period ...], held in registers.
template <int N, class T>
inline void add_blocks(acc_t<T>* acc, const T* x, int64_t blocks, int64_t period) {
  using A = acc_t<T>;
  vec<A> sums[N] = {};
  for (int64_t j = 0; j < blocks; ++j, x += period)
    for (int v = 0; v < N; ++v) sums[v] += load(x + v * kLanes<A>);
  for (int v = 0; v < N; ++v) store(acc + v * kLanes<A>, sums[v]);
}

// acc[i] = sum over j of drop(x)[c0 + i + j * period], i < width <= kMaxTile, over the n elements of x.
template <class T>
void period_sum(acc_t<T>* acc, const T* x, int64_t n, int64_t period, int64_t c0, int64_t width, const Dropout* dropout,
                uint64_t first) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  int64_t base = c0, i = 0;
  if (!dropout && period <= 256 && n >= period) {  // c0 is 0; longer periods lose to reading x in order
    const int64_t blocks = n / period;
    if constexpr (kVectorBytes == 64)  // as many registers as half the file
      for (; i + 16 * L <= width; i += 16 * L) add_blocks<16>(acc + i, x + i, blocks, period);
    for (; i + 8 * L <= width; i += 8 * L) add_blocks<8>(acc + i, x + i, blocks, period);
    for (; i + 4 * L <= width; i += 4 * L) add_blocks<4>(acc + i, x + i, blocks, period);
    for (; i + L <= width; i += L) add_blocks<1>(acc + i, x + i, blocks, period);
    for (; i < width; ++i) {
      acc[i] = 0;
      for (int64_t j = 0; j < blocks; ++j) acc[i] += value(x[i + j * period]);
    }
    base = blocks * period;
  } else {
    std::memset(acc, 0, width * sizeof(A));
  }
  for (; base < n; base += period)
    add_segment(acc, x + base, n - base < width ? n - base : width, dropout, first + static_cast<uint64_t>(base));
}

// Adds the copies of a period, acc [copies * r], into acc [r].
template <class A> inline void fold(A* acc, int64_t copies, int64_t r) {
  while (copies > 1) {
    const int64_t half = (copies + 1) / 2, n = (copies - half) * r;
    for (int64_t i = 0; i < n; ++i) acc[i] += acc[half * r + i];
    copies = half;
  }
}

// The sum of drop(x) over a short run x [n], in 16 lanes whatever the instruction set.
template <class T>
inline acc_t<T> run_sum(const T* x, int64_t n, const Dropout* dropout, uint64_t first) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, N = 16 / L;
  uint32_t buffer[kShortRun + kKeepSlack];
  const uint32_t* keep = dropout ? keep_words(buffer, *dropout, first, n) : nullptr;
  vec<A> sums[N] = {};
  A lanes[16];
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int v = 0; v < N; ++v) {
      const vec<A> loaded = load(x + i + v * L);
      sums[v] += keep ? masked(loaded, keep + i + v * L) : loaded;
    }
  for (int v = 0; v < N; ++v) store(lanes + v * L, sums[v]);
  for (int l = 0; i < n; ++i, ++l) lanes[l] += !keep || keep[i] ? value(x[i]) : A(0);
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// h[p] = sum of drop(x) over i = p mod r, x [n].
template <class T>
inline void cyclic_sum(T* h, const T* x, int64_t n, int64_t r, int64_t copies, const Dropout* dropout, uint64_t first) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  A acc[kMaxTile];
  const A scale = dropout ? static_cast<A>(dropout->scale) : A(1);
  for (int64_t c0 = 0; c0 < r; c0 += kMaxTile) {  // one pass, unless r exceeds the tile; then copies is 1
    const int64_t left = r * copies - c0, width = left < kMaxTile ? left : kMaxTile;
    period_sum(acc, x, n, r * copies, c0, width, dropout, first);
    fold(acc, copies, r);
    const int64_t out = width < r ? width : r;
    int64_t i = 0;
    for (; i + L <= out; i += L) store(h + c0 + i, load(acc + i) * scale);
    for (; i < out; ++i) h[c0 + i] = rounded<T>(acc[i] * scale);
  }
}

template <class T> void block_sum_rows(const BlockSum& a, int64_t begin, int64_t end) {
  const Dropout drawn(a.seed ? *a.seed : 0, a.p);
  const Dropout* dropout = a.seed ? &drawn : nullptr;
  const int64_t copies = copies_for(a.columns, a.r, dropout);
  const auto scale = static_cast<acc_t<T>>(dropout ? dropout->scale : 1);
  for (int64_t t = begin; t < end; ++t) {
    const T* x = row<T>(a.x, t, a.x_stride);
    T* h = row<T>(a.h, t, a.h_stride);
    const uint64_t first = static_cast<uint64_t>(t) * static_cast<uint64_t>(a.columns);
    if (!a.offsets) {
      cyclic_sum(h, x, a.columns, a.r, copies, dropout, first);
      continue;
    }
    for (int64_t p = 0; p < a.r; ++p) {  // a run is a cyclic sum with period 1
      const int64_t from = a.offsets[p], n = a.offsets[p + 1] - from;
      const uint64_t at = first + static_cast<uint64_t>(from);
      if (n > kShortRun)
        cyclic_sum(h + p, x + from, n, 1, copies_for(n, 1, dropout), dropout, at);
      else
        h[p] = rounded<T>(run_sum(x + from, n, dropout, at) * scale);
    }
  }
}

// --- tiling ---

// out[i] gets (accumulate: is increased by) mask * tile[i], i < n; first: the element number of out[0].
template <class T>
inline void put_segment(T* out, const acc_t<T>* tile, int64_t n, bool accumulate, const Dropout* dropout,
                        uint64_t first) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  uint32_t buffer[kMaxTile + kKeepSlack];
  const uint32_t* keep = dropout ? keep_words(buffer, *dropout, first, n) : nullptr;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    vec<A> v = load(tile + i);
    if (keep) v = masked(v, keep + i);
    store(out + i, accumulate ? load(out + i) + v : v);
  }
  for (; i < n; ++i) {
    const A v = keep && !keep[i] ? A(0) : tile[i];
    out[i] = rounded<T>(accumulate ? value(out[i]) + v : v);
  }
}

// out[base + j * period ...] gets tile [width], for all j, over the n elements of out.
template <class T>
void put_tile(T* out, const acc_t<T>* tile, int64_t n, int64_t period, int64_t c0, int64_t width,
                     bool accumulate, const Dropout* dropout, uint64_t first) {
  if (!accumulate && !dropout && width == period) {  // converted once, then copied, each time twice as much
    int64_t done = n < width ? n : width;
    put_segment(out, tile, done, false, nullptr, 0);
    for (int64_t more = done; done < n; done += more) {
      more = n - done < done ? n - done : done;
      std::memcpy(out + done, out, more * sizeof(T));
    }
    return;
  }
  for (int64_t base = c0; base < n; base += period)
    put_segment(out + base, tile, n - base < width ? n - base : width, accumulate, dropout,
                first + static_cast<uint64_t>(base));
}

// tile[i] = scale * s[(c0 + i) mod r], s of a.s_dtype at element `at` of a.s
template <class A>
void fill_tile(A* tile, const BlockTile& a, int64_t at, int64_t c0, int64_t width, int64_t r, A scale) {
  const int64_t once = width < r - c0 ? width : r - c0;
  for_dtype(a.s_dtype, [&](auto* type) {
    const auto* s = static_cast<decltype(type)>(const_cast<void*>(a.s)) + at + c0;
    for (int64_t i = 0; i < once; ++i) tile[i] = static_cast<A>(value(s[i])) * scale;
  });
  for (int64_t i = once; i < width; ++i) tile[i] = tile[i - r];
}

template <class T> void block_tile_rows(const BlockTile& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const Dropout drawn(a.seed ? *a.seed : 0, a.p);
  const Dropout* dropout = a.seed ? &drawn : nullptr;
  const A scale = dropout ? static_cast<A>(dropout->scale) : A(1);
  const int64_t period = a.r * period_copies(a.columns, a.r, dropout || a.accumulate ? 256 : 64);
  A tile[kMaxTile];
  for (int64_t t = begin; t < end; ++t) {
    T* out = row<T>(a.out, t, a.out_stride);
    const int64_t s = t * a.s_stride;
    const uint64_t first = static_cast<uint64_t>(t) * static_cast<uint64_t>(a.columns);
    if (!a.offsets) {
      for (int64_t c0 = 0; c0 < period; c0 += kMaxTile) {
        const int64_t width = period - c0 < kMaxTile ? period - c0 : kMaxTile;
        fill_tile(tile, a, s, c0, width, a.r, scale);
        put_tile(out, tile, a.columns, period, c0, width, a.accumulate, dropout, first);
      }
      continue;
    }
    for (int64_t p = 0; p < a.r; ++p) {
      const int64_t from = a.offsets[p], n = a.offsets[p + 1] - from, width = n < 256 ? n : 256;
      if (n == 0) continue;
      fill_tile(tile, a, s + p, 0, width, 1, scale);
      put_tile(out + from, tile, n, width, 0, width, a.accumulate, dropout, first + static_cast<uint64_t>(from));
    }
  }
}

}  // namespace

void block_sum(const BlockSum& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* t) { block_sum_rows<std::remove_pointer_t<decltype(t)>>(a, begin, end); });
}

void block_tile(const BlockTile& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* t) { block_tile_rows<std::remove_pointer_t<decltype(t)>>(a, begin, end); });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
