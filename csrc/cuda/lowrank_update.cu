// lowrank_update_ (METHODS 1.1): out becomes g * (out + scale h Bᵀ) + shift.
#include "lowrank.cuh"

namespace spectral_ops::cuda {

namespace {

template <class T> struct Update {
  T* out;
  const T *h, *B;
  const acc_t<T>*g, *shift;
  acc_t<T> scale;
  int64_t rows, out_stride, h_stride, B_stride;
  int columns, r, column_tiles, tile_rows;
  bool wide, paired;
};

constexpr int kUpdateColumns = 32 * kWarps;  // of a block: as many as threads

// 8 ranks of a row of h or B from p on, zero from n on. kRanks: how many of them one load takes, all there or none; 0: one
// load may have to leave some out.
template <int kRanks, class T> __device__ __forceinline__ uint4 load_ranks(const T* p, int n, bool paired) {
  if constexpr (kRanks == 8) {
    return n > 0 ? load16(p) : make_uint4(0, 0, 0, 0);
  } else {
    uint32_t pairs[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if constexpr (kRanks == 2) pairs[e] = n > 2 * e ? *reinterpret_cast<const uint32_t*>(p + 2 * e) : 0;
      else pairs[e] = load_pair(p + 2 * e, n - 2 * e, paired);
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

// A warp owns 32 columns, and works on 32 rows at a time. Column n of product j is column 8 (n / 2) + 2 j + n % 2 of the 32.
// So lane 4i + q has columns 8q .. 8q+7 of rows i and i+8. Of every 32 ranks it has 8q .. 8q+7: the first four are its share
// of one product, the others of a second. kChunks: how many times 32 ranks of B stay in registers. It is 0 where r is large:
// none stays. kRanks: see load_ranks. Where it is not 0, 16 bytes of out are aligned and within a row too: then the next 32
// rows are under way all the time.
template <class T, int kChunks, int kRanks>
__global__ void __launch_bounds__(kThreads, 2) update_mma(Update<T> a) {
  constexpr bool kWhole = kRanks > 0;
  const int lane = threadIdx.x % 32, i = lane / 4, q = lane % 4;
  const int tile = static_cast<int>(blockIdx.x) % a.column_tiles;
  const int column0 = tile * kUpdateColumns + threadIdx.x / 32 * 32;
  const int64_t begin = int64_t{blockIdx.x / static_cast<unsigned>(a.column_tiles)} * a.tile_rows;
  const int64_t end = min_of(begin + a.tile_rows, a.rows);
  if (column0 >= a.columns) return;  // a whole warp; there is no block barrier
  const int mine = column0 + 8 * q, n = a.columns - mine;

  auto load_out = [&](int64_t row) {
    const T* p = a.out + row * a.out_stride + mine;
    if constexpr (kWhole) return row < end && n > 0 ? load16(p) : make_uint4(0, 0, 0, 0);
    else return load_row(p, row < end ? n : 0, a.wide);
  };
  uint4 old[4];
  if constexpr (kWhole)
#pragma unroll
    for (int m = 0; m < 4; ++m) old[m] = load_out(begin + 8 * m + i);

  __shared__ __align__(16) float g_of[kUpdateColumns], shift_of[kUpdateColumns];  // each warp's own 32
  g_of[threadIdx.x] = a.g && column0 + lane < a.columns ? a.g[column0 + lane] : 1.f;
  shift_of[threadIdx.x] = a.shift && column0 + lane < a.columns ? a.shift[column0 + lane] : 0.f;
  __syncwarp();
  const float *g = g_of + threadIdx.x / 32 * 32 + 8 * q, *shift = shift_of + threadIdx.x / 32 * 32 + 8 * q;
  auto load_B = [&](uint4 (&b)[4], int chunk) {
    const int rank = 32 * chunk + 8 * q;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = column0 + 8 * (i / 2) + 2 * j + i % 2;
      b[j] = load_ranks<kRanks>(a.B + column * a.B_stride + rank, column < a.columns ? a.r - rank : 0, a.paired);
    }
  };
  uint4 kept[kChunks > 0 ? kChunks : 1][4];
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) load_B(kept[chunk], chunk);

  for (int64_t row0 = begin; row0 < end; row0 += 32) {
    if constexpr (!kWhole)
#pragma unroll
      for (int m = 0; m < 4; ++m) old[m] = load_out(row0 + 8 * m + i);
    float c[2][4][4] = {};
    auto multiply = [&](int chunk, const uint4 (&b)[4]) {
      const int rank = 32 * chunk + 8 * q;
      uint4 rows[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int64_t row = row0 + 8 * m + i;
        rows[m] = load_ranks<kRanks>(a.h + row * a.h_stride + rank, row < end ? a.r - rank : 0, a.paired);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint4 &high = rows[2 * m], &low = rows[2 * m + 1];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          mma<T>(c[m][j], {high.x, low.x, high.y, low.y}, {b[j].x, b[j].y});
          mma<T>(c[m][j], {high.z, low.z, high.w, low.w}, {b[j].z, b[j].w});
        }
      }
    };
    if constexpr (kChunks > 0) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) multiply(chunk, kept[chunk]);
    } else {
      for (int chunk = 0; 32 * chunk < a.r; ++chunk) {
        load_B(kept[0], chunk);
        multiply(chunk, kept[0]);
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int64_t row = row0 + 8 * m + i;
      float v[8];
      unpack<T>(old[m], v);
      if constexpr (kWhole) old[m] = load_out(row + 32);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = g[e] * (v[e] + a.scale * c[m / 2][e / 2][2 * (m % 2) + e % 2]) + shift[e];
      T* p = a.out + row * a.out_stride + mine;
      if constexpr (kWhole) {
        if (row < end && n > 0) store16(p, pack<T>(v));
      } else {
        if (row < end) store_row(p, n, a.wide, v);
      }
    }
  }
}

// float32 (no TF32) and float64: 64 x 64 of out in a block, 4 x 4 in a thread, 16 ranks of h and B in shared memory.
template <class T> __global__ void __launch_bounds__(kThreads) update_fma(Update<T> a) {
  constexpr int kTile = 64, kRanks = 16, kPitch = kTile + 4;
  __shared__ __align__(16) T h[kRanks][kPitch];  // [rank, row]
  __shared__ __align__(16) T B[kRanks][kPitch];  // [rank, column]
  const int column0 = static_cast<int>(blockIdx.x) % a.column_tiles * kTile;
  const int64_t row0 = int64_t{blockIdx.x / static_cast<unsigned>(a.column_tiles)} * kTile;
  const int my_row = threadIdx.x / 16 * 4, my_column = threadIdx.x % 16 * 4;
  T c[4][4] = {};
  for (int rank0 = 0; rank0 < a.r; rank0 += kRanks) {
    __syncthreads();  // the previous ranks have been used
    for (int n = threadIdx.x; n < kTile * kRanks; n += kThreads) {
      const int line = n / kRanks, p = n % kRanks;
      const bool ranked = rank0 + p < a.r;
      h[p][line] = ranked && row0 + line < a.rows ? a.h[(row0 + line) * a.h_stride + rank0 + p] : T(0);
      B[p][line] = ranked && column0 + line < a.columns ? a.B[(column0 + line) * a.B_stride + rank0 + p] : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < kRanks; ++p)
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][e] += h[p][my_row + m] * B[p][my_column + e];
  }
  constexpr int L = kLanes<T>;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int64_t row = row0 + my_row + m;
    if (row >= a.rows) break;
#pragma unroll
    for (int e0 = 0; e0 < 4; e0 += L) {
      const int column = column0 + my_column + e0, n = a.columns - column;
      T* p = a.out + row * a.out_stride + column;
      T v[L];
      unpack<T>(load_row(p, n, a.wide), v);
#pragma unroll
      for (int e = 0; e < L; ++e) {
        v[e] += a.scale * c[m][e0 + e];
        if (e < n && a.g) v[e] *= a.g[column + e];
        if (e < n && a.shift) v[e] += a.shift[column + e];
      }
      store_row(p, n, a.wide, v);
    }
  }
}

template <class T> cudaError_t launch_update(const LowRankUpdate& from, cudaStream_t stream) {
  using A = acc_t<T>;
  Update<T> a{static_cast<T*>(from.out), static_cast<const T*>(from.h), static_cast<const T*>(from.B),
              static_cast<const A*>(from.g), static_cast<const A*>(from.shift), static_cast<A>(from.scale),
              from.rows, from.out_stride, from.h_stride, from.B_stride,
              static_cast<int>(from.columns), static_cast<int>(from.r), 0, 0,
              aligned_rows(from.out, from.out_stride, sizeof(T)),
              aligned_pairs(from.h, from.h_stride) && aligned_pairs(from.B, from.B_stride)};
  if constexpr (kMatrixUnits<T>) {
    a.column_tiles = static_cast<int>(ceil_div(from.columns, kUpdateColumns));
    a.tile_rows = 128;  // fewer where rows are few: an H100 has 132 multiprocessors
    while (a.tile_rows > 32 && a.column_tiles * ceil_div(from.rows, a.tile_rows) < 132) a.tile_rows /= 2;
    const bool whole = a.wide && from.columns % 8 == 0, pairs = whole && a.paired && from.r % 2 == 0;
    const bool eights = whole && from.r % 8 == 0 && aligned_rows(from.h, from.h_stride, sizeof(T)) &&
                        aligned_rows(from.B, from.B_stride, sizeof(T));
    const auto kernel = eights  ? (a.r <= 32 ? update_mma<T, 1, 8> : a.r <= 64 ? update_mma<T, 2, 8> : update_mma<T, 0, 8>)
                        : a.r > 32 ? update_mma<T, 0, 0>
                        : pairs    ? update_mma<T, 1, 2>
                                   : update_mma<T, 1, 0>;
    return enqueue(kernel, a.column_tiles * ceil_div(from.rows, a.tile_rows), kThreads, 0, stream, a);
  } else {
    a.column_tiles = static_cast<int>(ceil_div(from.columns, 64));
    return enqueue(update_fma<T>, a.column_tiles * ceil_div(from.rows, 64), kThreads, 0, stream, a);
  }
}

}  // namespace

cudaError_t lowrank_update(const LowRankUpdate& a, cudaStream_t stream) {
  if (a.rows == 0 || a.columns == 0) return cudaSuccess;
  if (a.columns > kMaxColumns || a.r > kMaxColumns) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) { return launch_update<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
