#include "bat.h"

#include "bat_blocks.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

// The groups of a row, row after row: view row v is group first_group + v % per_row of row first_row + v / per_row.
struct GroupRows {
  const BlockGroups& groups;
  int64_t first_row, first_group, per_row;

  // Calls f(t, row, group, count, size) for runs of `count` neighbouring groups of one size in view rows [v, v + n).
  template <class F> void runs(int64_t v, int64_t n, const F& f) const {
    int64_t row = first_row + v / per_row, g = first_group + v % per_row;
    for (int64_t t = 0; t < n;) {
      int64_t count = smaller(n - t, first_group + per_row - g);
      if (count > 1 && groups.size_of(g + count - 1) < groups.size) --count;
      f(t, row, g, count, groups.size_of(g));
      t += count, g += count;
      if (g == first_group + per_row) ++row, g = first_group;
    }
  }

  // tile [n, kTile] = columns [j, j + kTile) of the groups in view rows [v, v + n) of a.
  template <class T> void load(acc_t<T>* tile, const Matrix& a, int64_t v, int64_t n, int64_t j) const {
    runs(v, n, [&](int64_t t, int64_t row, int64_t g, int64_t count, int64_t size) {
      const T* first = at<T>(a.data, row * a.row + g * groups.size * a.column);
      load_tile<T>(tile + t * kTile, {first, groups.size * a.column, a.column, a.dtype, nullptr}, 0, count, j,
                   smaller(kTile, size - j));
    });
  }
};

// --- W' ---

constexpr int64_t kStreamed = 1024;  // elements of W that are widened at a time

// What the k-th row of a factor of X meets in x: an element, or a pair of them.
template <class X, class T> inline X met(const T* x, int64_t k) {
  if constexpr (std::is_same_v<X, T>) return x[k];
  else return bits_at<X>(x + kPerFactor<X> * k);
}

// out = added + x m + w (null: nothing) for N view rows by V vectors of columns, all in registers; steps: between view rows.
template <int N, int V, class X, class T, class U>
__attribute__((noinline)) void weight_block(U* out, const T* x, const T* w, int64_t step, const X* m, int64_t count,
                                            const acc_t<T>* added) {
  using Vec = vec<acc_t<T>>;
  constexpr int L = kLanes<acc_t<T>>;
  Vec sums[N][V];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = load(added + v * L);
  for (int64_t k = 0; k < count; ++k) {
    Vec row[V];
    for (int v = 0; v < V; ++v) row[v] = bits_at<Vec>(m + k * kTile + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] = multiply_add(sums[i][v], row[v], met<X>(x + i * step, k));
  }
  if (w)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] += load(w + i * step + v * L);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) store(out + i * step + v * L, sums[i][v]);
}

// The same for n view rows and all columns.
template <int V, class X, class T, class U>
inline int64_t weight_columns(U* out, const T* x, bool delta, int64_t size, const X* factor, const acc_t<T>* added, int64_t n,
                              int64_t e) {
  constexpr int L = kLanes<acc_t<T>>, N = kAccumulators / V;
  const int64_t count = size / kPerFactor<X>;
  for (; e + V * L <= size; e += V * L) {
    const X* const m = factor + e / kTile * size * kTile + e % kTile;
    int64_t i = 0;
    const auto block = [&](auto rows) {
      constexpr int M = decltype(rows)::value;
      for (; i + M <= n; i += M)
        weight_block<M, V>(out + i * size + e, x + i * size, delta ? nullptr : x + i * size + e, size, m, count, added + e);
    };
    block(std::integral_constant<int, N>{});
    if constexpr (N > 4) block(std::integral_constant<int, 4>{});
    block(std::integral_constant<int, 1>{});
  }
  return e;
}

// Packed rows of bf16 values, widened, as pairs of rows in the same place.
inline Pair* pair_rows(float* factor, int64_t size, int64_t padded) {
  Pair* const pairs = reinterpret_cast<Pair*>(factor);
  for (int64_t panel = 0; panel < tiles(padded); ++panel)
    for (int64_t k = 0; k < size; k += 2)
      for (int64_t j = 0; j < kTile; ++j) {
        const float* const first = factor + (panel * size + k) * kTile + j;
        const Pair pair{bits_as<uint32_t>(first[0]) >> 16 | bits_as<uint32_t>(first[kTile])};
        std::memcpy(pairs + (panel * size + k / 2) * kTile + j, &pair, sizeof pair);
      }
  return pairs;
}

// The whole unit where groups fill vectors and memory is in order.
template <class X, class T, class U>
void weight_stream(const BatWeightPass& a, const GroupRows& view, int64_t total, const X* factor, const acc_t<T>* added) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  constexpr bool widened = !std::is_same_v<T, A> && std::is_same_v<X, A>;
  const BatWeight& w = a.bat;
  const int64_t size = a.groups.size;
  alignas(64) A wide[kStreamed];
  const int64_t at_once = widened ? kStreamed / size : total;
  for (int64_t v = 0; v < total; v += at_once)
    view.runs(v, smaller(at_once, total - v), [&](int64_t, int64_t row, int64_t g, int64_t n, int64_t) {
      const T* const source = at<T>(w.weight, row * w.weight_strides[0] + g * size);
      U* const out = at<U>(w.out, row * w.out_stride + g * size);
      const A* const add = added + row % w.r * a.groups.padded;
      const auto columns = [&](const auto* x) {
        int64_t e = 0;
        if constexpr (kAccumulators == 16) e = weight_columns<4>(out, x, w.delta, size, factor, add, n, e);
        e = weight_columns<2>(out, x, w.delta, size, factor, add, n, e);
        weight_columns<1>(out, x, w.delta, size, factor, add, n, e);
      };
      if constexpr (widened) {
        for (int64_t i = 0; i < n * size; i += L) store(wide + i, load(source + i));
        columns(wide);
      } else columns(source);
    });
}

template <class T, class U> void weight_unit(const BatWeightPass& a, int64_t owner, int64_t part, acc_t<T>* memory) {
  using A = acc_t<T>;
  const BatWeight& w = a.bat;
  const BlockGroups& groups = a.groups;
  const int64_t rows = w.by_column ? w.rows : w.r, first = w.by_column ? 0 : owner * w.r;
  const int64_t begin = first + part_begin(rows, part, a.parts), end = first + part_begin(rows, part + 1, a.parts);
  const int64_t together = groups.size / w.r, step = w.by_column ? 1 : 0;
  const int64_t block = w.by_column ? owner * together : owner;
  const int64_t size = w.by_column ? groups.size_of(owner) : groups.size;

  A *const factor = memory, *const added = memory + groups.panels();  // added [r, padded]: row i of the blocks
  pack_panels(factor, groups, size, w.bat, w.bat_dtype, block, step, false);
  zero(added, w.r * groups.padded);
  for (int64_t b = 0; b < size; b += w.r)
    for (int64_t i = 0; i < w.r; ++i)
      for_panels(b, w.r, [&](int64_t j, int64_t panel, int64_t column, int64_t n) {
        std::memcpy(added + i * groups.padded + b + j, factor + (panel * groups.size + b + i) * kTile + column, n * sizeof(A));
      });

  alignas(64) A tile[kTile * kTile], c[kTile * kTile];
  const Matrix weight{w.weight, w.weight_strides[0], w.weight_strides[1], w.dtype, nullptr};
  const GroupRows view{groups, begin, w.by_column ? owner : 0, w.by_column ? 1 : groups.count};
  const int64_t total = (end - begin) * view.per_row;
  const bool whole = w.columns % groups.size == 0 && groups.size % kLanes<A> == 0 && groups.size <= 2 * kTile;
  if (whole && !w.by_column && weight.column == 1) {
    if constexpr (kPairs && std::is_same_v<T, bfloat16>)  // exact products; subnormal factors count as zero
      if (w.bat_dtype == DType::bfloat16)
        return weight_stream<Pair, T, U>(a, view, total, pair_rows(factor, size, groups.padded), added);
    return weight_stream<A, T, U>(a, view, total, factor, added);
  }
  for (int64_t v = 0; v < total; v += kTile) {
    const int64_t n = smaller(kTile, total - v);
    for (int64_t e = 0; e < size; e += kTile) {
      const int64_t width = smaller(kTile, groups.padded - e);
      view.runs(v, n, [&](int64_t t, int64_t row, int64_t, int64_t count, int64_t) {
        for (int64_t i = t; i < t + count; ++i)
          std::memcpy(c + i * width, added + row % w.r * groups.padded + e, width * sizeof(A));
      });
      for (int64_t k = 0; k < size; k += kTile) {
        view.load<T>(tile, weight, v, n, k);
        product<kTile, 1>(c, width, tile, factor + e * groups.size + k * kTile, kTile, n, smaller(kTile, size - k), Ahead{});
      }
      view.runs(v, n, [&](int64_t t, int64_t row, int64_t g, int64_t count, int64_t size) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t column = (g + i) * groups.size + e;
          const T* base = w.delta ? nullptr : at<T>(weight.data, row * weight.row + column * weight.column);
          put(at<U>(w.out, row * w.out_stride + column), c + (t + i) * width, base, weight.column, smaller(width, size - e));
        }
      });
    }
  }
}

// --- dB ---

#ifdef __AVX512BF16__

// One row of pairs [tiles(size), kPairRows, kTile]: elements of two neighbouring groups of `first` and `second` columns side
// by side, zero beyond them.
inline void pair_groups(Pair* slot, const bfloat16* x, int64_t size, int64_t first, int64_t second) {
  constexpr int64_t kPanel = kPairRows * kTile;
  int64_t j = 0;
  for (; j + 16 <= first && j + 16 <= second; j += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + j)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + size + j)));
    _mm512_storeu_si512(slot + j / kTile * kPanel + j % kTile, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  for (; j < size; j += 16) {
    const __mmask16 here = first - j >= 16 ? 0xffff : first > j ? (1 << (first - j)) - 1 : 0;
    const __mmask16 there = second - j >= 16 ? 0xffff : second > j ? (1 << (second - j)) - 1 : 0;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, x + j));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x + size + j));
    _mm512_storeu_si512(slot + j / kTile * kPanel + j % kTile, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// The sums of contract_unit over rows [begin, end): bf16 products are exact in float32, and two take one instruction.
void contract_pairs(const BatContractPass& a, int64_t begin, int64_t end, float* c, float* sums) {
  const BatContract& w = a.bat;
  const BlockGroups& groups = a.groups;
  const int64_t size = groups.size;
  constexpr int64_t kPanel = kPairRows * kTile;
  Pair* const W_pairs = reinterpret_cast<Pair*>(sums + w.r * groups.padded);
  Pair* const G_pairs = W_pairs + tiles(groups.padded) * kPanel;
  zero(W_pairs, 2 * tiles(groups.padded) * kPanel);
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  int64_t filled = 0;
  // Multiplies what is filled, while lines of what comes next, W's and G's, are fetched.
  const auto flush = [&](const bfloat16* next_W, const bfloat16* next_G) {
    const auto ahead = [&](const bfloat16* next) {
      return Ahead{reinterpret_cast<const char*>(next), 4 * size, kPairRows, 4 * size / 64};
    };
    int64_t call = 0;
    for (int64_t e = 0; e < size; e += kTile) {
      const int64_t width = smaller(kTile, groups.padded - e);
      for (int64_t i = 0; i < size; i += kTile / 2, ++call)
        product<1, kTile>(c + e * size + i * width, width, W_pairs + i / kTile * kPanel + i % kTile, G_pairs + e * kPairRows, kTile,
                          smaller(kTile / 2, size - i), filled, call == 0 ? ahead(next_W) : call == 1 ? ahead(next_G) : Ahead{});
    }
    filled = 0;
  };
  for (int64_t row = begin; row < end; ++row) {
    const bfloat16* const W_row = at<bfloat16>(w.weight, row * w.weight_strides[0]);
    const bfloat16* const G_row = at<bfloat16>(w.G, row * w.G_stride);
    float* const sum = sums + row % w.r * groups.padded;
    for (int64_t g = 0; g < groups.count; g += 2) {
      const int64_t j = g * size, first = groups.size_of(g), second = g + 1 < groups.count ? groups.size_of(g + 1) : 0;
      Pair* const G_slot = G_pairs + filled * kTile;
      pair_groups(W_pairs + filled * kTile, W_row + j, size, first, second);
      pair_groups(G_slot, G_row + j, size, first, second);
      for (int64_t e = 0; e < first; e += 16) {
        const __m512i x = _mm512_loadu_si512(G_slot + e / kTile * kPanel + e % kTile);
        _mm512_storeu_ps(sum + e, _mm512_dpbf16_ps(_mm512_loadu_ps(sum + e), (__m512bh)x, (__m512bh)ones));
      }
      if (++filled == kPairRows) flush(W_row + j + 2 * size, G_row + j + 2 * size);
    }
  }
  flush(nullptr, nullptr);
}

#endif

template <class T, class U> void contract_unit(const BatContractPass& a, int64_t owner, int64_t part, acc_t<T>* memory) {
  using A = acc_t<T>;
  const BatContract& w = a.bat;
  const BlockGroups& groups = a.groups;
  const int64_t begin = part_begin(w.r, part, a.parts), end = part_begin(w.r, part + 1, a.parts);
  A *const c = memory, *const sums = memory + groups.size * groups.padded;
  zero(c, (groups.size + w.r) * groups.padded);
  alignas(64) A tile[kTile * kTile], G_tile[kTile * kTile];
  const Matrix weight{w.weight, w.weight_strides[0], w.weight_strides[1], w.dtype, nullptr};
  const Matrix G{w.G, w.G_stride, 1, w.G_dtype, nullptr};
  const GroupRows view{groups, owner * w.r + begin, 0, at_least_one(groups.count)};
  bool paired = false;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<U, bfloat16>)
    if ((paired = weight.column == 1 && groups.padded % 16 == 0)) contract_pairs(a, owner * w.r + begin, owner * w.r + end, c, sums);
#endif
  const int64_t total = paired ? 0 : (end - begin) * groups.count;
  for (int64_t v = 0; v < total; v += kTile) {
    const int64_t n = smaller(kTile, total - v);
    for (int64_t i = 0; i < groups.size; i += kTile) {
      view.load<T>(tile, weight, v, n, i);
      for (int64_t e = 0; e < groups.size; e += kTile) {
        const int64_t width = smaller(kTile, groups.padded - e);
        view.load<U>(G_tile, G, v, n, e);
        product<1, kTile>(c + e * groups.size + i * width, width, tile, G_tile, kTile, smaller(kTile, groups.size - i), n,
                          Ahead{});
        if (i == 0)
          view.runs(v, n, [&](int64_t t, int64_t row, int64_t, int64_t count, int64_t) {
            for (int64_t s = t; s < t + count; ++s)
              add_to(sums + row % w.r * groups.padded + e, G_tile + s * kTile, width);
          });
      }
    }
  }
  A* const out = at<A>(a.partial, (part * w.rows + owner * w.r) * w.r);
  put_blocks(out, groups, groups.size, c, 0);
  for (int64_t i = 0; i < w.r; ++i)
    for (int64_t b = 0; b < groups.size; b += w.r) add_to(out + i * w.r, sums + i * groups.padded + b, w.r);
}

// --- x W'ᵀ and x W' ---

template <class T> void matmul_unit(const BatMatmulPass& a, int64_t owner, int64_t part, acc_t<T>* memory) {
  using A = acc_t<T>;
  const BatMatmul& w = a.bat;
  const BlockGroups& groups = a.groups;
  const int64_t width = a.width, batches = (groups.count + a.batch - 1) / a.batch;
  const Matrix weight{w.weight, w.weight_strides[0], w.weight_strides[1], w.dtype, nullptr};
  A *const factor = memory, *const u = memory + groups.panels(), *const mixed = u + groups.size * width;
  alignas(64) A tile[kTile * kTile];

  if (!w.transpose) {  // y_o += (x_j + u_j) W(o,j)ᵀ + u_j, u_j = x_j B_oᵀ
    A* const y = at<A>(a.partial, (part * w.rows + owner * w.r) * width);
    zero(y, w.r * width);
    pack_panels(factor, groups, groups.size, w.bat, w.bat_dtype, owner, 0, false);
    for (int64_t b = part_begin(batches, part, a.parts); b < part_begin(batches, part + 1, a.parts); ++b) {
      const int64_t first = b * a.batch, last = smaller(first + a.batch, groups.count);
      const int64_t begin = first * groups.size, columns = smaller(last * groups.size, w.columns) - begin;
      for (int64_t g = first; g < last; ++g) {
        const int64_t size = groups.size_of(g);
        const A* const x = at<A>(a.turned, g * groups.size * width);
        zero(u, size * width);
        for (int64_t k = 0; k < size; k += kTile)
          product<kTile, 1>(u, width, factor + k * groups.size, x + k * width, width, size, smaller(kTile, size - k), Ahead{});
        for (int64_t i = 0; i < size; i += w.r) add_to(y, u + i * width, w.r * width);
        add_to(u, x, size * width);
        std::memcpy(mixed + (g - first) * groups.size * width, u, size * width * sizeof(A));
      }
      for (int64_t i = 0; i < w.r; i += kTile)
        for (int64_t j = 0; j < columns; j += kTile) {
          const int64_t rows = smaller(kTile, w.r - i), n = smaller(kTile, columns - j);
          load_tile<T>(tile, weight, owner * w.r + i, rows, begin + j, n);
          product<kTile, 1>(y + i * width, width, tile, mixed + j * width, width, rows, n, Ahead{});
        }
    }
    return;
  }

  // dx_j += p + (p + dy_o) B_o, p = dy_o W(o,j)
  const int64_t first = owner * a.batch, last = smaller(first + a.batch, groups.count);
  const int64_t begin = first * groups.size, columns = smaller(last * groups.size, w.columns) - begin;
  A* const dx = at<A>(a.partial, (part * w.columns + begin) * width);
  zero(dx, columns * width);
  const int64_t block_rows = w.rows / w.r;
  for (int64_t o = part_begin(block_rows, part, a.parts); o < part_begin(block_rows, part + 1, a.parts); ++o) {
    const A* const dy = at<A>(a.turned, o * w.r * width);
    pack_panels(factor, groups, groups.size, w.bat, w.bat_dtype, o, 0, false);
    zero(mixed, columns * width);
    for (int64_t i = 0; i < w.r; i += kTile)
      for (int64_t j = 0; j < columns; j += kTile) {
        const int64_t rows = smaller(kTile, w.r - i), n = smaller(kTile, columns - j);
        load_tile<T>(tile, weight, o * w.r + i, rows, begin + j, n);
        product<1, kTile>(mixed + j * width, width, tile, dy + i * width, width, n, rows, Ahead{});
      }
    add_to(dx, mixed, columns * width);
    for (int64_t j = 0; j < columns; j += w.r) add_to(mixed + j * width, dy, w.r * width);
    for (int64_t j = 0; j < columns; j += groups.size) {
      const int64_t size = smaller(groups.size, columns - j);
      for (int64_t e = 0; e < size; e += kTile)
        product<1, kTile>(dx + (j + e) * width, width, factor + e * groups.size, mixed + j * width, width,
                          smaller(kTile, size - e), size, Ahead{});
    }
  }
}

template <class T> void matmul_finish(const BatMatmulPass& a, int64_t block) {
  using A = acc_t<T>;
  const int64_t features = a.out_features(), first = block * kTile, n = smaller(kTile, features - first);
  A* const sums = at<A>(a.partial, first * a.width);
  for (int64_t p = 1; p < a.parts; ++p) add_to(sums, sums + p * features * a.width, n * a.width);
  for (int64_t t = 0; t < a.count; ++t) {
    T* const out = at<T>(a.bat.out, (a.first + t) * features + first);
    for (int64_t f = 0; f < n; ++f) out[f] = rounded<T>(sums[f * a.width + t]);
  }
}

}  // namespace

void bat_weight(const BatWeightPass& a, int64_t begin, int64_t end) {
  for_dtype(a.bat.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    for_units<A>(a, begin, end, [&](int64_t owner, int64_t part, A* memory) {
      if (a.bat.out_dtype == a.bat.dtype) weight_unit<T, T>(a, owner, part, memory);
      else weight_unit<T, A>(a, owner, part, memory);
    });
  });
}

void bat_contract(const BatContractPass& a, int64_t begin, int64_t end) {
  for_dtype(a.bat.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    for_units<A>(a, begin, end, [&](int64_t owner, int64_t part, A* memory) {
      if (a.bat.G_dtype == a.bat.dtype) contract_unit<T, T>(a, owner, part, memory);
      else contract_unit<T, A>(a, owner, part, memory);
    });
  });
}

void bat_matmul_pack(const BatMatmulPack& a, int64_t begin, int64_t end) {
  const BatMatmulPass& pass = a.pass;
  for_dtype(pass.bat.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const Matrix x{at<T>(pass.bat.x, pass.first * pass.bat.x_stride), 1, pass.bat.x_stride, pass.bat.dtype, nullptr};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kTile, n = smaller(kTile, pass.in_features() - first);
      pack_rows(at<A>(pass.turned, first * pass.width), pass.width, x, first, n, pass.count);
    }
  });
}

void bat_matmul(const BatMatmulPass& a, int64_t begin, int64_t end) {
  for_dtype(a.bat.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_units<acc_t<T>>(a, begin, end, [&](int64_t owner, int64_t part, acc_t<T>* memory) {
      matmul_unit<T>(a, owner, part, memory);
    });
  });
}

void bat_matmul_finish(const BatMatmulFinish& a, int64_t begin, int64_t end) {
  for_dtype(a.pass.bat.dtype, [&](auto* type) {
    for (int64_t block = begin; block < end; ++block) matmul_finish<std::remove_pointer_t<decltype(type)>>(a.pass, block);
  });
}

void part_sum(const PartSum& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * PartSum::kElements, n = smaller(PartSum::kElements, a.count - first);
      alignas(64) A sums[PartSum::kElements];
      std::memcpy(sums, at<A>(a.partial, first), n * sizeof(A));
      for (int64_t p = 1; p < a.parts; ++p) add_to(sums, at<A>(a.partial, p * a.count + first), n);
      put(at<T>(a.out, first), sums, static_cast<const T*>(nullptr), 1, n);
    }
  });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
