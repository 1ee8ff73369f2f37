#include "lowrank.h"

#include "product.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

// --- passes over one tile [kTile, kTile] in cache ---

// sums[j] += sum over the tile's rows of x, or of x².
template <class A> inline void add_columns(A* sums, const A* x, int64_t rows, bool square) {
  constexpr int L = kLanes<A>;
  for (int64_t j = 0; j < kTile; j += 4 * L) {
    vec<A> s[4] = {};  // of this tile, then added: a chain of additions over all rows would lose digits
    for (int64_t t = 0; t < rows; ++t)
      for (int v = 0; v < 4; ++v) {
        const vec<A> value = load(x + t * kTile + j + v * L);
        s[v] += square ? value * value : value;
      }
    for (int v = 0; v < 4; ++v) store(sums + j + v * L, load(sums + j + v * L) + s[v]);
  }
}

// sums[j] += sum over the tile's rows of x * (y - bias)
template <class A> inline void add_products(A* sums, const A* x, const A* y, const A* bias, int64_t rows) {
  constexpr int L = kLanes<A>;
  for (int64_t j = 0; j < kTile; j += 4 * L) {
    vec<A> s[4] = {}, b[4] = {};
    if (bias)
      for (int v = 0; v < 4; ++v) b[v] = load(bias + j + v * L);
    for (int64_t t = 0; t < rows; ++t)
      for (int v = 0; v < 4; ++v) {
        const int64_t e = t * kTile + j + v * L;
        s[v] += load(x + e) * (load(y + e) - b[v]);
      }
    for (int v = 0; v < 4; ++v) store(sums + j + v * L, load(sums + j + v * L) + s[v]);
  }
}

// squares[t] [kSquareLanes] += the squares of row t
template <class A> inline void add_squares(A* squares, const A* x, int64_t rows) {
  constexpr int L = kLanes<A>;
  for (int64_t t = 0; t < rows; ++t, squares += kSquareLanes, x += kTile)
    for (int64_t l = 0; l < kSquareLanes; l += L) {
      vec<A> s = load(squares + l);
      for (int64_t j = l; j < kTile; j += kSquareLanes) s += load(x + j) * load(x + j);
      store(squares + l, s);
    }
}

template <class A> inline void multiply_columns(A* x, const A* g, int64_t rows) {
  constexpr int L = kLanes<A>;
  for (int64_t t = 0; t < rows; ++t, x += kTile)
    for (int64_t j = 0; j < kTile; j += L) store(x + j, load(x + j) * load(g + j));
}

template <class T>
inline void store_tile(T* out, int64_t stride, const acc_t<T>* x, int64_t rows, int64_t columns) {
  constexpr int L = kLanes<acc_t<T>>;
  for (int64_t t = 0; t < rows; ++t, out += stride, x += kTile) {
    int64_t j = 0;
    for (; j + L <= columns; j += L) store(out + j, load(x + j));
    for (; j < columns; ++j) out[j] = rounded<T>(x[j]);
  }
}

template <class A>
inline void drop_tile(A* x, const Dropout& dropout, uint64_t first, int64_t pitch, int64_t rows, int64_t columns) {
  constexpr int L = kLanes<A>;
  KeepTile keep;
  for (int64_t t = 0; t < rows; ++t, x += kTile, first += static_cast<uint64_t>(pitch)) {
    const uint32_t* words = keep.words(dropout, first, columns);
    for (int64_t j = 0; j < kTile; j += L) store(x + j, masked(load(x + j), words + j));
  }
}

// --- the pass ---

// A task's chunk of rows by chunk of columns, and the sums over it, which only this task adds to.
template <class A> struct Task {
  int64_t t_begin, t_end, j_begin, j_end;
  A *row_products, *squares, *column_products, *sums, *y_sums;

  Task(const Pass& a, int64_t task) {
    const int64_t chunk = task / a.split.columns, column_chunk = task % a.split.columns;
    t_begin = chunk * a.split.row_tiles * kTile, t_end = smaller(t_begin + a.split.row_tiles * kTile, a.rows);
    j_begin = column_chunk * a.split.column_tiles * kTile;
    j_end = smaller(j_begin + a.split.column_tiles * kTile, a.columns);
    const int64_t j_padded = tiles(j_end) * kTile;
    row_products = at<A>(a.rows_part, column_chunk * a.rows * a.width);
    squares = at<A>(a.squares_part, column_chunk * a.rows * kSquareLanes);
    column_products = at<A>(a.columns_part, chunk * a.padded_columns * a.width);
    sums = at<A>(a.sums_part, chunk * a.padded_columns);
    y_sums = at<A>(a.y_sums_part, chunk * a.padded_columns);
    if (a.rows_part) zero(row_products + t_begin * a.width, (t_end - t_begin) * a.width);
    if (a.squares_part) zero(squares + t_begin * kSquareLanes, (t_end - t_begin) * kSquareLanes);
    if (a.columns_part) zero(column_products + j_begin * a.width, (j_padded - j_begin) * a.width);
    if (a.sums_part) zero(sums + j_begin, j_padded - j_begin);
    if (a.y_sums_part) zero(y_sums + j_begin, j_padded - j_begin);
  }

  // The tile after the one at (t, j).
  template <class T> Ahead after(const Pass& a, int64_t t, int64_t j) const {
    if (a.x.column != 1 || a.x.places) return {};
    j += kTile;
    if (j >= j_end) t += kTile, j = j_begin;
    if (t >= t_end) return {};
    const T* next = static_cast<const T*>(a.x.data) + t * a.x.row + j;
    return {reinterpret_cast<const char*>(next), a.x.row * static_cast<int64_t>(sizeof(T)), smaller(kTile, t_end - t),
            static_cast<int64_t>(kTile * sizeof(T) / 64)};
  }
};

inline uint64_t element(const Pass& a, int64_t t, int64_t j) {
  return static_cast<uint64_t>(t) * static_cast<uint64_t>(a.columns) + static_cast<uint64_t>(j);
}

template <class T> void run_tiles(const Pass& a, int64_t number) {
  using A = acc_t<T>;
  const Task<A> task(a, number);
  const Dropout dropout(a.seed ? *a.seed : 0, a.p);
  alignas(64) A tile[kTile * kTile], y_tile[kTile * kTile];
  for (int64_t t = task.t_begin; t < task.t_end; t += kTile)
    for (int64_t j = task.j_begin; j < task.j_end; j += kTile) {
      const int64_t rows = smaller(kTile, task.t_end - t), columns = smaller(kTile, task.j_end - j);
      load_tile<T>(tile, a.x, t, rows, j, columns);
      if (a.sums_part) add_columns(task.sums + j, tile, rows, a.square);
      if (a.squares_part) add_squares(task.squares + t * kSquareLanes, tile, rows);
      if (a.y_sums_part) {
        load_tile<T>(y_tile, a.y, t, rows, j, columns);
        add_products(task.y_sums + j, tile, y_tile, a.packed_bias ? at<A>(a.packed_bias, j) : nullptr, rows);
      }
      if (a.packed_g) multiply_columns(tile, at<A>(a.packed_g, j), rows);
      if (a.scaled) store_tile(at<T>(a.scaled, t * a.columns + j), a.columns, tile, rows, columns);
      if (a.seed) drop_tile(tile, dropout, element(a, t, j), a.columns, rows, columns);
      const Ahead ahead = task.template after<T>(a, t, j);
      if (a.rows_part)
        product<kTile, 1>(task.row_products + t * a.width, a.width, tile, at<A>(a.packed_m, j * a.m_stride), a.m_stride,
                          rows, columns, ahead);
      if (a.columns_part)
        product<1, kTile>(task.column_products + j * a.width, a.width, tile, at<A>(a.packed_h, t * a.h_stride), a.h_stride,
                          columns, rows, a.rows_part ? Ahead{} : ahead);
    }
}

// --- the pass over bf16 in pairs, where nothing but products and plain sums is wanted of it ---

inline bool in_pairs(const Pass& a) {
  return kPairs && a.x.dtype == DType::bfloat16 && a.x.column == 1 && (!a.m.data || a.m.dtype == DType::bfloat16) &&
         (!a.h.data || a.h.dtype == DType::bfloat16) && !a.g.data && !a.y.data && !a.scaled;
}

#ifdef __AVX512BF16__

constexpr int64_t kHalf = kTile / 2;

inline __m512i pairs_at(const Pair* p) { return _mm512_loadu_si512(p); }

// The tile of a at (t, j) as it is, [kTile, kTile / 2] pairs along rows, zero beyond the last row and column.
inline void load_pairs(Pair* tile, const Matrix& a, int64_t t, int64_t rows, int64_t j, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i, tile += kHalf) {
    const bfloat16* const x = static_cast<const bfloat16*>(a.data) + a.row_start(t + i) + j;
    if (columns == kTile) {  // a constant size, hence no call
      std::memcpy(tile, x, kTile * sizeof(bfloat16));
      continue;
    }
    std::memset(tile, 0, kHalf * sizeof(Pair));
    std::memcpy(tile, x, columns * sizeof(bfloat16));
  }
  if (rows % 2) std::memset(tile, 0, kHalf * sizeof(Pair));
}

// turned [kTile / 2, kTile]: the tile's elements in pairs along columns.
inline void turn_pairs(Pair* turned, const Pair* tile, int64_t rows) {
  for (int64_t t = 0; t < rows; t += 2, tile += 2 * kHalf, turned += kTile)
    for (int64_t j = 0; j < kHalf; j += 8) {
      const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + j));
      const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + kHalf + j));
      const __m512i low = _mm512_cvtepu16_epi32(even), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
      _mm512_storeu_si512(turned + 2 * j, _mm512_or_si512(low, high));
    }
}

inline void drop_pairs(Pair* tile, const Dropout& dropout, uint64_t first, int64_t pitch, int64_t rows, int64_t columns) {
  KeepTile keep;
  for (int64_t t = 0; t < rows; ++t, tile += kHalf, first += static_cast<uint64_t>(pitch)) {
    const uint32_t* words = keep.words(dropout, first, columns);
    for (int64_t j = 0; j < kHalf; j += 8) {
      const __m256i mask = _mm512_cvtepi32_epi16(_mm512_loadu_si512(words + 2 * j));
      __m256i* const at = reinterpret_cast<__m256i*>(tile + j);
      _mm256_storeu_si256(at, _mm256_and_si256(_mm256_loadu_si256(at), mask));
    }
  }
}

// sums[j] += sum over the tile's rows of x, or of x²
inline void add_columns(float* sums, const Pair* turned, int64_t rows, bool square) {
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  for (int64_t j = 0; j < kTile; j += 64) {
    vec<float> s[4] = {};
    for (int64_t t = 0; t < rows; t += 2)
      for (int v = 0; v < 4; ++v) {
        const __m512i x = pairs_at(turned + t / 2 * kTile + j + 16 * v);
        s[v] = (vec<float>)_mm512_dpbf16_ps((__m512)s[v], (__m512bh)x, (__m512bh)(square ? x : ones));
      }
    for (int v = 0; v < 4; ++v) store(sums + j + 16 * v, load(sums + j + 16 * v) + s[v]);
  }
}

inline void add_squares(float* squares, const Pair* tile, int64_t rows) {
  for (int64_t t = 0; t < rows; ++t, squares += kSquareLanes, tile += kHalf) {
    __m512 s = _mm512_loadu_ps(squares);
    for (int64_t j = 0; j < kHalf; j += 16) {
      const __m512i x = pairs_at(tile + j);
      s = _mm512_dpbf16_ps(s, (__m512bh)x, (__m512bh)x);
    }
    _mm512_storeu_ps(squares, s);
  }
}

void run_pairs(const Pass& a, int64_t number) {
  const Task<float> task(a, number);
  const Dropout dropout(a.seed ? *a.seed : 0, a.p);
  const bool turn = a.columns_part || a.sums_part;
  alignas(64) Pair tile[kTile * kHalf], turned[kTile * kHalf];
  for (int64_t t = task.t_begin; t < task.t_end; t += kTile)
    for (int64_t j = task.j_begin; j < task.j_end; j += kTile) {
      const int64_t rows = smaller(kTile, task.t_end - t), columns = smaller(kTile, task.j_end - j);
      load_pairs(tile, a.x, t, rows, j, columns);
      if (a.seed) drop_pairs(tile, dropout, element(a, t, j), a.columns, rows, columns);
      if (turn) turn_pairs(turned, tile, rows);
      if (a.sums_part) add_columns(task.sums + j, turned, rows, a.square);
      if (a.squares_part) add_squares(task.squares + t * kSquareLanes, tile, rows);
      const Ahead ahead = task.after<bfloat16>(a, t, j);
      if (a.rows_part)
        product<kHalf, 1>(task.row_products + t * a.width, a.width, tile, at<Pair>(a.packed_m, j / 2 * a.width), a.width,
                          rows, factors<Pair>(columns), ahead);
      if (a.columns_part)
        product<1, kTile>(task.column_products + j * a.width, a.width, turned, at<Pair>(a.packed_h, t / 2 * a.width),
                          a.width, columns, factors<Pair>(rows), a.rows_part ? Ahead{} : ahead);
    }
}

#else

void run_pairs(const Pass&, int64_t) {}

#endif

// part [count] += the other chunks' parts, `pitch` apart
template <class A> inline void add_parts(A* part, int64_t count, int64_t chunks, int64_t pitch) {
  constexpr int L = kLanes<A>;
  for (int64_t c = 1; c < chunks; ++c) {
    const A* other = part + c * pitch;
    int64_t i = 0;
    for (; i + L <= count; i += L) store(part + i, load(part + i) + load(other + i));
    for (; i < count; ++i) part[i] += other[i];
  }
}

template <class U, class A>
inline void put_rows(U* out, int64_t stride, const A* sums, int64_t width, int64_t rows, int64_t r, A scale) {
  for (int64_t t = 0; t < rows; ++t, out += stride, sums += width) {
    int64_t p = 0;
    if constexpr (std::is_same_v<acc_t<U>, A>)
      for (; p + kLanes<A> <= r; p += kLanes<A>) store(out + p, load(sums + p) * scale);
    for (; p < r; ++p) out[p] = rounded<U>(static_cast<acc_t<U>>(sums[p] * scale));
    for (; p < stride; ++p) out[p] = rounded<U>(acc_t<U>(0));
  }
}

template <class A> void finish_rows(const Pass& a, int64_t block) {
  const int64_t t = block * kTile, rows = smaller(kTile, a.rows - t);
  A* const sums = at<A>(a.rows_part, t * a.width);
  add_parts(sums, rows * a.width, a.split.columns, a.rows * a.width);
  for_dtype(a.row_product_dtype, [&](auto* type) {
    using U = std::remove_pointer_t<decltype(type)>;
    U* const out = at<U>(a.row_product, t * a.row_product_stride);
    put_rows(out, a.row_product_stride, sums, a.width, rows, a.r, static_cast<A>(a.scale));
  });
}

template <class A> void finish_columns(const Pass& a, int64_t block) {
  const int64_t j = block * kTile, columns = smaller(kTile, a.columns - j);
  if (a.column_product) {
    const A scale = static_cast<A>(a.scale);
    A* const sums = at<A>(a.columns_part, j * a.width);
    add_parts(sums, columns * a.width, a.split.rows, a.padded_columns * a.width);
    A* const out = at<A>(a.column_product, j * a.column_product_row);
    if (a.column_product_column == 1)
      put_rows(out, a.column_product_row, sums, a.width, columns, a.r, scale);
    else
      for (int64_t p = 0; p < a.r; ++p)
        for (int64_t i = 0; i < columns; ++i)
          out[i * a.column_product_row + p * a.column_product_column] = sums[i * a.width + p] * scale;
  }
  if (a.sums) {
    add_parts(at<A>(a.sums_part, j), kTile, a.split.rows, a.padded_columns);
    std::memcpy(at<A>(a.sums, j), at<A>(a.sums_part, j), columns * sizeof(A));
  }
  if (a.y_sums) {
    add_parts(at<A>(a.y_sums_part, j), kTile, a.split.rows, a.padded_columns);
    std::memcpy(at<A>(a.y_sums, j), at<A>(a.y_sums_part, j), columns * sizeof(A));
  }
}

template <class X> void pack(const Pass& a, int64_t task) {
  using A = typename FactorAccumulator<X>::type;
  if (task >= tiles(a.columns)) {
    const int64_t t = (task - tiles(a.columns)) * kTile;
    if (a.h.data && a.packed_h != a.h.data)
      pack_rows(at<X>(a.packed_h, factors<X>(t) * a.width), a.width, a.h, t, smaller(kTile, a.rows - t), a.r);
    return;
  }
  const int64_t j = task * kTile, columns = smaller(kTile, a.columns - j);
  if (a.m.data && a.packed_m != a.m.data)
    pack_rows(at<X>(a.packed_m, factors<X>(j) * a.width), a.width, a.m, j, columns, a.r);
  if (a.packed_g) pack_rows(at<A>(a.packed_g, j), kTile, from_column(a.g, j), 0, 1, columns);
  if (a.packed_bias) pack_rows(at<A>(a.packed_bias, j), kTile, from_column(a.bias, j), 0, 1, columns);
}

// --- all in one go ---

// Element i of a vector in any dtype.
template <class A> inline A number(const void* data, DType dtype, int64_t i) {
  A result = 0;
  for_dtype(dtype, [&](auto* type) {
    using V = std::remove_pointer_t<decltype(type)>;
    result = static_cast<A>(value(static_cast<const V*>(data)[i]));
  });
  return result;
}

template <class T> inline void small_rows(const LowRankBackward& a) {
  using A = acc_t<T>;
  const int64_t d = a.columns, r = a.r;
  const A scale = static_cast<A>(a.scale);
  A *const dB = static_cast<A*>(a.dB), *const db = static_cast<A*>(a.db), *const dyz = static_cast<A*>(a.dyz);
  if (dB) std::memset(a.dB, 0, sizeof(A) * static_cast<size_t>(d * r));
  if (db) std::memset(a.db, 0, sizeof(A) * static_cast<size_t>(d));
  if (dyz) std::memset(a.dyz, 0, sizeof(A) * static_cast<size_t>(d));
  for (int64_t t = 0; t < a.rows; ++t) {
    const T *const dy = row<T>(a.dy, t, a.dy_stride), *const y = a.y ? row<T>(a.y, t, a.y_stride) : nullptr;
    A u[SmallBackward::kRank] = {}, h[SmallBackward::kRank] = {};
    if (dB)
      for (int64_t p = 0; p < r; ++p) h[p] = value(row<T>(a.h, t, a.h_stride)[p]);
    for (int64_t o = 0; o < d; ++o) {
      const A plain = value(dy[o]), v = a.g ? plain * number<A>(a.g, a.g_dtype, o) : plain;
      if (a.u) {
        const T* const b = row<T>(a.B, o, a.B_stride);
        for (int64_t p = 0; p < r; ++p) u[p] += v * value(b[p]);
      }
      if (dB)
        for (int64_t p = 0; p < r; ++p) dB[o * r + p] += v * h[p];
      if (a.gdy) static_cast<T*>(a.gdy)[t * d + o] = rounded<T>(v);
      if (db) db[o] += plain;
      if (dyz) dyz[o] += plain * (value(y[o]) - (a.bias ? number<A>(a.bias, a.bias_dtype, o) : A{0}));
    }
    if (a.u)
      for (int64_t p = 0; p < r; ++p) static_cast<T*>(a.u)[t * r + p] = rounded<T>(scale * u[p]);
  }
  if (dB)
    for (int64_t i = 0; i < d * r; ++i) dB[i] *= scale;
}

}  // namespace

void pass_pack(const PassPack& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    if (in_pairs(a.pass)) pack<Pair>(a.pass, i);
    else if (a.pass.x.dtype == DType::float64) pack<double>(a.pass, i);
    else pack<float>(a.pass, i);
}

void pass_tiles(const PassTiles& a, int64_t begin, int64_t end) {
  for_dtype(a.pass.x.dtype, [&](auto* type) {
    for (int64_t i = begin; i < end; ++i)
      if (in_pairs(a.pass)) run_pairs(a.pass, i);
      else run_tiles<std::remove_pointer_t<decltype(type)>>(a.pass, i);
  });
}

void pass_finish(const PassFinish& a, int64_t begin, int64_t end) {
  const bool wide = a.pass.x.dtype == DType::float64;
  const int64_t row_blocks = tiles(a.pass.rows);
  for (int64_t i = begin; i < end; ++i)
    if (i >= row_blocks)
      wide ? finish_columns<double>(a.pass, i - row_blocks) : finish_columns<float>(a.pass, i - row_blocks);
    else if (a.pass.row_product)
      wide ? finish_rows<double>(a.pass, i) : finish_rows<float>(a.pass, i);
}

void small_backward(const SmallBackward& a, int64_t, int64_t) {
  for_dtype(a.backward.dtype, [&](auto* type) { small_rows<std::remove_pointer_t<decltype(type)>>(a.backward); });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
