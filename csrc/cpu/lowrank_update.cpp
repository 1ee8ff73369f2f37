#include "lowrank.h"

#include "product.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

// What becomes of out and the product, for columns [j, j + kTile).
template <class A> struct Epilogue {
  A scale;
  const A *g, *shift;  // or null
};

// out[v lanes] after the update; keep: the dropout words of these lanes, or null.
template <class A>
inline vec<A> updated(vec<A> out, vec<A> product, const Epilogue<A>& e, int64_t j, const uint32_t* keep) {
  product *= e.scale;
  out += keep ? masked(product, keep) : product;
  if (e.g) out *= load(e.g + j);
  if (e.shift) out += load(e.shift + j);
  return out;
}

// The rows out [N], the V vectors from column j of the tile: h [N, r], panel [r, kTile], r in factors. ahead: the rows after
// those, or null.
template <class T, int N, int V>
inline void lift_block(T* const* out, const factor_t<T>* h, int64_t h_stride, const factor_t<T>* panel, int64_t r, int64_t j,
                       const Epilogue<acc_t<T>>& epilogue, const uint32_t* const* keep, const T* const* ahead) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, lines = V * L * sizeof(T) >= 64 ? V * L * sizeof(T) / 64 : 1;
  vec<A> sums[N][V] = {};
  for (int64_t p = 0; p < r; ++p) {
    if (ahead && p < N * lines)
      __builtin_prefetch(ahead[p / lines] + j + (p % lines) * static_cast<int64_t>(64 / sizeof(T)), 1);
    vec<A> row[V];
    for (int v = 0; v < V; ++v) row[v] = bits_at<vec<A>>(panel + p * kTile + j + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] = multiply_add(sums[i][v], row[v], h[i * h_stride + p]);
  }
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) {
      const int64_t c = j + v * L;
      T* const at = out[i] + c;
      store(at, updated(load(at), sums[i][v], epilogue, c, keep[i] ? keep[i] + c : nullptr));
    }
}

// N rows of out by one panel.
template <class T, int N>
inline void lift_rows(const Lift& a, int64_t t, int64_t panel, const Dropout& dropout) {
  using A = acc_t<T>;
  using X = factor_t<T>;
  constexpr int L = kLanes<A>, V = kAccumulators / 4;
  const int64_t j = panel * kTile, columns = smaller(kTile, a.columns - j);
  KeepTile tiles[N];
  const uint32_t* keep[N] = {};
  if (a.seed)
    for (int i = 0; i < N; ++i) {
      const uint64_t first = static_cast<uint64_t>(t + i) * static_cast<uint64_t>(a.columns) + static_cast<uint64_t>(j);
      keep[i] = tiles[i].words(dropout, first, columns);
    }
  const A* g = static_cast<const A*>(a.packed_g);
  const A* shift = static_cast<const A*>(a.packed_shift);
  const A scale = static_cast<A>(a.seed ? a.scale * dropout.scale : a.scale);
  const Epilogue<A> epilogue{scale, g ? g + j : nullptr, shift ? shift + j : nullptr};
  const int64_t r = factors<X>(a.r), h_stride = factors<X>(a.h_stride);
  const X* h = static_cast<const X*>(a.packed_h) + t * h_stride;
  const X* m = static_cast<const X*>(a.panels) + panel * r * kTile;
  T *rows[N], *ahead[N];
  const bool more = t + 2 * N <= a.rows;
  for (int i = 0; i < N; ++i) {
    rows[i] = static_cast<T*>(a.out) + (a.places ? a.places[t + i] : t + i) * a.out_stride + j;
    if (more) ahead[i] = static_cast<T*>(a.out) + (a.places ? a.places[t + N + i] : t + N + i) * a.out_stride + j;
  }
  if (columns == kTile) {
    for (int64_t c = 0; c < kTile; c += V * L)
      lift_block<T, N, V>(rows, h, h_stride, m, r, c, epilogue, keep, more ? ahead : nullptr);
    return;
  }
  T edge[N * kTile] = {}, *edges[N];
  for (int i = 0; i < N; ++i) std::memcpy(edges[i] = edge + i * kTile, rows[i], columns * sizeof(T));
  for (int64_t c = 0; c < kTile; c += V * L) lift_block<T, N, V>(edges, h, h_stride, m, r, c, epilogue, keep, nullptr);
  for (int i = 0; i < N; ++i) std::memcpy(rows[i], edge + i * kTile, columns * sizeof(T));
}

// Task: kTile rows by one chunk of columns.
template <class T> void lift(const Lift& a, int64_t task) {
  const int64_t chunks = (a.columns + a.chunk_columns - 1) / a.chunk_columns;
  const int64_t t_begin = task / chunks * kTile, t_end = smaller(t_begin + kTile, a.rows);
  const int64_t first = task % chunks * (a.chunk_columns / kTile);
  const int64_t last = smaller(first + a.chunk_columns / kTile, tiles(a.columns));
  const Dropout dropout(a.seed ? *a.seed : 0, a.p);
  int64_t t = t_begin;
  for (; t + 4 <= t_end; t += 4)
    for (int64_t panel = first; panel < last; ++panel) lift_rows<T, 4>(a, t, panel, dropout);
  for (; t < t_end; ++t)
    for (int64_t panel = first; panel < last; ++panel) lift_rows<T, 1>(a, t, panel, dropout);
}

template <class T> void pack(const Lift& a, int64_t task) {
  using A = acc_t<T>;
  using X = factor_t<T>;
  if (task >= tiles(a.columns)) {
    const int64_t t = (task - tiles(a.columns)) * kTile, rows = smaller(kTile, a.rows - t);
    X* const h = static_cast<X*>(const_cast<void*>(a.packed_h)) + t * factors<X>(a.r);
    if constexpr (std::is_same_v<X, Pair>)
      for (int64_t i = 0; i < rows; ++i)  // h's row as a column
        pack_rows(h + i * factors<X>(a.r), 1, Matrix{row<T>(a.h.data, t + i, a.h.row), a.h.column, 0, a.h.dtype}, 0, a.r, 1);
    else if (a.packed_h != a.h.data)
      pack_rows(h, a.r, a.h, t, rows, a.r);
    return;
  }
  const int64_t j = task * kTile, columns = smaller(kTile, a.columns - j);
  pack_rows(static_cast<X*>(a.panels) + j * factors<X>(a.r), kTile, from_column(a.m.transposed(), j), 0, a.r, columns);
  if (a.packed_g) pack_rows(static_cast<A*>(a.packed_g) + j, kTile, from_column(a.g, j), 0, 1, columns);
  if (a.packed_shift) pack_rows(static_cast<A*>(a.packed_shift) + j, kTile, from_column(a.shift, j), 0, 1, columns);
}

}  // namespace

void lift_pack(const LiftPack& a, int64_t begin, int64_t end) {
  for_dtype(a.lift.dtype, [&](auto* type) {
    for (int64_t i = begin; i < end; ++i) pack<std::remove_pointer_t<decltype(type)>>(a.lift, i);
  });
}

void lift_tiles(const LiftTiles& a, int64_t begin, int64_t end) {
  for_dtype(a.lift.dtype, [&](auto* type) {
    for (int64_t i = begin; i < end; ++i) lift<std::remove_pointer_t<decltype(type)>>(a.lift, i);
  });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
