// column_norm and column_norm_cached_ (METHODS 1.2).
//
// W is read once. A first kernel copies A as the second reads it and leaves partial sums of A Aᵀ. The second leaves partial sums
// of P = W Aᵀ and ‖W_o‖² for tiles of rows and ranges of columns; its first blocks add up A Aᵀ. The third adds up the rest and
// recomputes the rows that cancel.
//
// bf16 and fp16 weights are multiplied on the tensor cores. A enters as the sum of two 16-bit values (high + low), which keeps
// 16 bits of it or more. The arithmetic costs far less than reading W.
#include "common.cuh"
#include "dora.h"

namespace spectral_ops::cuda {

namespace {

constexpr int kNormThreads = 128;
constexpr double kCancellation = 1.0 / 64;  // as in spectral_ops/functional/dora.py

struct Factor {  // A or B: any dtype, any strides
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  DType dtype;

  template <class T> __device__ __forceinline__ T at(int64_t i, int64_t j) const {
    return load_any<T>(data, i * row_stride + j * column_stride, dtype);
  }
  // Calls f with the data as what it is: once around a loop, so that the loop's loads need not wait for one another.
  template <class F> __device__ __forceinline__ void typed(const F& f) const {
    switch (dtype) {
      case DType::float64: return f(static_cast<const double*>(data));
      case DType::float32: return f(static_cast<const float*>(data));
      case DType::bfloat16: return f(static_cast<const bfloat16*>(data));
      default: return f(static_cast<const float16*>(data));
    }
  }
};

struct Stamp {
  // [2, kStampBlocks] partial sums, then a flag: whether the norm is to be recomputed. Null where there is no stamp.
  uint64_t* parts;
  int64_t* previous;  // [2]
  Factor A, B;        // in as few rows as their memory allows
  int A_units, B_units;  // elements read at once
  Factor W;
  WeightSample sample;  // of W
  bool force;
};

template <class T> struct Norm {
  const T* weight;
  Factor A, B;
  void* factor;  // A's copy [r, pitch]; for the tensor cores high [r, pitch], then low
  // products [splits, rows, rank_pitch]; squares [splits, rows]; gram [64 rank_tiles, 64 rank_tiles]
  acc_t<T>*norm, *products, *squares, *gram, *gram_parts;
  acc_t<T> scale;
  int64_t rows, row_stride, column_stride, split_columns, pitch, gram_columns;
  int columns, r, rank_pitch, splits, rank_tiles, gram_side, gram_splits, gram_blocks;
  bool matrix_units, has_low;  // has_low: A is not exact in 16 bits
  Stamp stamp;
};

// --- first kernel: fingerprint of A, B and W's sample, A's copy, A Aᵀ ---

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// Adds an element to the sums: well-mixed functions of its bits and kGolden times its position.
__device__ __forceinline__ void mix(uint64_t bits, uint64_t place, uint64_t& low, uint64_t& high) {
  uint64_t z = bits + place;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  low += z ^ (z >> 31);
  high += (z >> 32) * (z & 0xffffffffu);
}

// Adds the fingerprint of a factor whose first element has position `first` (counted from 1) to the sums. They are sums of
// integers, so their order does not matter. Bits [V] are read at once.
template <class Bits, int V>
__device__ __forceinline__ void fingerprint(const Factor& f, uint64_t first, uint64_t& low, uint64_t& high) {
  constexpr int kBatch = 4, kStep = static_cast<int>(kStampBlocks) * kNormThreads;
  struct alignas(sizeof(Bits) * V) Unit { Bits bits[V]; };
  const int64_t units = f.columns / V, total = f.rows * units;
  if (total == 0) return;
  // The only divisions are of 32 bits, and outside the loop.
  const int start = static_cast<int>(blockIdx.x) * kNormThreads + threadIdx.x, divisor = units <= kStep ? units : kStep + 1;
  const int step_i = kStep / divisor;
  const int64_t step_j = kStep - step_i * units;
  int64_t n = start, i = start / divisor, j = start - i * units;
  while (n < total) {
    Unit unit[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (n + u * kStep < total)
        unit[u] = *reinterpret_cast<const Unit*>(static_cast<const Bits*>(f.data) + i * f.row_stride + j * V * f.column_stride);
      i += step_i, j += step_j;
      if (j >= units) j -= units, ++i;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u, n += kStep) {
      if (n >= total) continue;
      const uint64_t base = (first + static_cast<uint64_t>(n) * V) * kGolden;
#pragma unroll
      for (int e = 0; e < V; ++e) mix(unit[u].bits[e], base + e * kGolden, low, high);
    }
  }
}

template <class Bits>
__device__ __forceinline__ void fingerprint(const Factor& f, int units, uint64_t first, uint64_t& low, uint64_t& high) {
  constexpr int kWide = 16 / sizeof(Bits);
  if (units == kWide) fingerprint<Bits, kWide>(f, first, low, high);
  else fingerprint<Bits, 1>(f, first, low, high);
}

// The same for the sample of W: rarely more than one element per thread, so nothing here is batched or unrolled.
template <class Bits>
__device__ __forceinline__ void fingerprint(const Factor& W, const WeightSample& s, uint64_t first, uint64_t& low, uint64_t& high) {
  const int64_t total = W.rows * s.per_row;
#pragma unroll 1
  for (int64_t n = int64_t{blockIdx.x} * kNormThreads + threadIdx.x; n < total; n += kStampBlocks * kNormThreads) {
    const int64_t i = n / s.per_row, j = (i * s.skew & (s.spacing - 1)) + (n - i * s.per_row) * s.spacing;
    if (j < W.columns)
      mix(static_cast<const Bits*>(W.data)[i * W.row_stride + j * W.column_stride], (first + static_cast<uint64_t>(n)) * kGolden,
          low, high);
  }
}

__device__ __forceinline__ void leave_fingerprint(const Stamp& stamp) {
  __shared__ uint64_t parts[2][kNormThreads / 32];
  uint64_t low = 0, high = 0;
  for (int which = 0; which < 2; ++which) {
    const Factor f = which ? stamp.B : stamp.A;  // a copy: the parameters have no address
    const int units = which ? stamp.B_units : stamp.A_units;
    const uint64_t first = 1 + (which ? stamp.A.rows * stamp.A.columns : 0);
    switch (f.dtype) {
      case DType::float64: fingerprint<uint64_t>(f, units, first, low, high); break;
      case DType::float32: fingerprint<uint32_t>(f, units, first, low, high); break;
      default: fingerprint<uint16_t>(f, units, first, low, high);
    }
  }
  const uint64_t first = 1 + stamp.A.rows * stamp.A.columns + stamp.B.rows * stamp.B.columns;
  switch (stamp.W.dtype) {
    case DType::float64: fingerprint<uint64_t>(stamp.W, stamp.sample, first, low, high); break;
    case DType::float32: fingerprint<uint32_t>(stamp.W, stamp.sample, first, low, high); break;
    default: fingerprint<uint16_t>(stamp.W, stamp.sample, first, low, high);
  }
  low = warp_sum(low), high = warp_sum(high);
  if (threadIdx.x % 32 == 0) parts[0][threadIdx.x / 32] = low, parts[1][threadIdx.x / 32] = high;
  __syncthreads();
  if (threadIdx.x < 2) {
    uint64_t sum = 0;
    for (int w = 0; w < kNormThreads / 32; ++w) sum += parts[threadIdx.x][w];
    stamp.parts[threadIdx.x * kStampBlocks + blockIdx.x] = sum;
  }
}

// The fingerprint that the blocks left, in every lane of the calling warp.
__device__ __forceinline__ uint64_t fingerprint_sum(const Stamp& stamp, int which) {
  const uint64_t* p = stamp.parts + which * kStampBlocks + threadIdx.x % 32;
  uint64_t sum = 0;
#pragma unroll
  for (int n = 0; n < kStampBlocks; n += 32) sum += p[n];
  return warp_sum(sum);
}

constexpr int kPiece = static_cast<int>(kGramPiece);

template <class A> constexpr int kGramPitch = 16 + kLanes<A>;  // such that 16-byte accesses meet no bank conflicts

template <int N, class A> __device__ __forceinline__ void load_aligned(const A* p, A (&v)[N]) {
  constexpr int kPart = N * sizeof(A) <= 16 ? N : 16 / sizeof(A);
  struct alignas(sizeof(A) * kPart) Part { A v[kPart]; };
#pragma unroll
  for (int n = 0; n < N; n += kPart) {
    const Part part = *reinterpret_cast<const Part*>(p + n);
#pragma unroll
    for (int e = 0; e < kPart; ++e) v[n + e] = part.v[e];
  }
}

// 16 rows of A by kPiece columns in shared memory, [kPiece, kGramPitch], zero beyond A.
template <class T> __device__ __forceinline__ void load_rows(const Norm<T>& a, int row0, int column0, acc_t<T>* to) {
  using A = acc_t<T>;
  static_assert(kNormThreads == kPiece, "a thread for each column");
  const int column = column0 + threadIdx.x;
  a.A.typed([&](auto* data) {
    const auto* p = data + row0 * a.A.row_stride + column * a.A.column_stride;
    const int n = column < a.columns ? a.r - row0 : 0;
    A v[16 / kLanes<A>][kLanes<A>];
#pragma unroll
    for (int m = 0; m < 16; ++m, p += a.A.row_stride) v[m / kLanes<A>][m % kLanes<A>] = m < n ? static_cast<A>(value(*p)) : A(0);
#pragma unroll
    for (int m = 0; m < 16; m += kLanes<A>) store16(to + threadIdx.x * kGramPitch<A> + m, pack<A>(v[m / kLanes<A>]));
  });
}

// Those rows into A's copy.
template <class T> __device__ __forceinline__ void copy_rows(const Norm<T>& a, int row0, int column0, const acc_t<T>* from) {
  using A = acc_t<T>;
  if constexpr (kMatrixUnits<T>) {
    if (a.matrix_units) {
      T* high = static_cast<T*>(a.factor) + row0 * a.pitch + column0;
      for (int n = threadIdx.x; n < 16 * (kPiece / 8); n += kNormThreads) {
        const int line = n / (kPiece / 8), c = n % (kPiece / 8) * 8;
        if (row0 + line >= a.r) break;
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = from[(c + e) * kGramPitch<A> + line];
        const uint4 rounded_v = pack<T>(v);
        store16(high + line * a.pitch + c, rounded_v);
        if (!a.has_low) continue;
        float w[8];
        unpack<T>(rounded_v, w);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] -= w[e];
        store16(high + (a.r + line) * a.pitch + c, pack<T>(v));
      }
      return;
    }
  }
  A* to = static_cast<A*>(a.factor) + row0 * a.pitch + column0;
#pragma unroll
  for (int m = 0; m < 16; ++m)
    if (row0 + m < a.r) to[m * a.pitch + threadIdx.x] = from[threadIdx.x * kGramPitch<A> + m];
}

// A block has a 16 x 16 tile of A Aᵀ on or above the diagonal, and a range of columns: 8 groups of 16 threads share the columns,
// a thread sums 4 x 4. The tile on the diagonal copies its rows.
template <class T> __global__ void __launch_bounds__(kNormThreads) prepare(Norm<T> a) {
  using A = acc_t<T>;
  constexpr int kPitch = kGramPitch<A>, kGroups = kNormThreads / 16;
  static_assert(kGroups * 256 <= 2 * kPiece * kPitch, "the sums of the groups use the same memory");
  int block = blockIdx.x;
  if (a.stamp.parts) {
    if (block < kStampBlocks) return leave_fingerprint(a.stamp);
    block -= static_cast<int>(kStampBlocks);
  }
  A* left = reinterpret_cast<A*>(dynamic_shared());
  int tile = block / a.gram_splits, side = a.gram_side;
  const int split = block % a.gram_splits;
  while (tile >= side) tile -= side--;
  A* right = tile ? left + kPiece * kPitch : left;
  const int p0 = (a.gram_side - side) * 16, q0 = p0 + tile * 16;
  const int group = threadIdx.x / 16, p = threadIdx.x % 16 / 4 * 4, q = threadIdx.x % 4 * 4;
  const int64_t begin = split * a.gram_columns, end = min_of(begin + a.gram_columns, a.pitch);
  A sum[4][4] = {};
  for (int c0 = static_cast<int>(begin); c0 < end; c0 += kPiece) {
    __syncthreads();  // the previous piece has been used
    load_rows(a, p0, c0, left);
    if (tile) load_rows(a, q0, c0, right);
    __syncthreads();
    if (tile == 0) copy_rows(a, p0, c0, left);
#pragma unroll 4
    for (int c = group; c < kPiece; c += kGroups) {
      A v[4], w[4];
      load_aligned(left + c * kPitch + p, v);
      load_aligned(right + c * kPitch + q, w);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][e] += v[m] * w[e];
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int e = 0; e < 4; ++e) left[group * 256 + (p + m) * 16 + q + e] = sum[m][e];  // [kGroups, 16, 16]
  __syncthreads();
  A* to = a.gram_parts + int64_t{split} * a.r * a.r;
  for (int n = threadIdx.x; n < 256; n += kNormThreads) {
    A total = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) total += left[g * 256 + n];
    const int64_t row = p0 + n / 16, column = q0 + n % 16;
    if (row < a.r && column < a.r) to[row * a.r + column] = to[column * a.r + row] = total;
  }
}

// --- second kernel: P = W Aᵀ ---

// Whether A, B and W's sample are unchanged, the same in every thread. The first block tells the third kernel, which moves the stamp.
template <class T> __device__ __forceinline__ bool unchanged(const Norm<T>& a) {
  if (!a.stamp.parts) return false;
  const bool same = !a.stamp.force & (fingerprint_sum(a.stamp, 0) == static_cast<uint64_t>(a.stamp.previous[0])) &
                    (fingerprint_sum(a.stamp, 1) == static_cast<uint64_t>(a.stamp.previous[1]));
  if (blockIdx.x == 0 && threadIdx.x == 0) a.stamp.parts[2 * kStampBlocks] = !same;
  return same;
}

// A Aᵀ in whole tiles of 64, zero beyond it.
template <class T> __device__ void add_gram(const Norm<T>& a) {
  const int pitch = 64 * a.rank_tiles;
  for (int n = threadIdx.x; n < kGramSums; n += blockDim.x) {
    const int at = static_cast<int>(blockIdx.x * kGramSums) + n, p = at / pitch, q = at % pitch;
    acc_t<T> sum = 0;
    if (p < a.r && q < a.r) {
#pragma unroll 8
      for (int s = 0; s < a.gram_splits; ++s) sum += a.gram_parts[(int64_t{s} * a.r + p) * a.r + q];
    }
    a.gram[at] = sum;
  }
}

// Which part of P a block makes. The rank tiles of one part of W run side by side, so that only the first reads W from memory.
struct Part {
  int64_t row0;
  int split, rank0, begin, end;  // columns [begin, end)

  template <class T> __device__ Part(const Norm<T>& a, int tile_rows, int tile_ranks) {
    const int block = static_cast<int>(blockIdx.x) - a.gram_blocks;
    rank0 = block % a.rank_tiles * tile_ranks;
    split = block / a.rank_tiles % a.splits;
    row0 = int64_t{block / a.rank_tiles / a.splits} * tile_rows;
    begin = static_cast<int>(split * a.split_columns);
    end = static_cast<int>(min_of<int64_t>(begin + a.split_columns, a.columns));
  }
};

// Tensor cores: a warp owns 32 rows. As in lowrank.cuh, the order of the columns inside a product is chosen: 16 bytes of a row
// of W, and of A, are a lane's fragments for two products. W runs kAhead steps of 32 columns ahead in registers, A a piece of
// kAhead steps in shared memory. The more ranks, the more rows share A.
template <int kTiles> struct MmaShape {
  static constexpr int kWarps = kTiles == 8 ? 8 : 4, kRows = 32 * kWarps, kRanks = 8 * kTiles;
  static constexpr int kAhead = 2, kColumns = 32 * kAhead;
  static constexpr int kLines = 4 * kWarps;  // of A that the block copies at once, a thread 16 bytes
  static constexpr int kPitch = kColumns + 32;  // such that 16-byte reads meet no bank conflicts
  static constexpr int kHalf = kRanks * kPitch, kShared = 2 * 2 * 2 * kHalf;  // two pieces of high and low
};

template <class T, int kTiles>
__global__ void __launch_bounds__(32 * MmaShape<kTiles>::kWarps, kTiles == 2 ? 3 : kTiles == 4 ? 2 : 1) norm_mma(Norm<T> a) {
  using S = MmaShape<kTiles>;
  if (unchanged(a)) return;
  if (static_cast<int>(blockIdx.x) < a.gram_blocks) return add_gram(a);
  T* shared = reinterpret_cast<T*>(dynamic_shared());  // [2 pieces, high and low, kRanks, kPitch]
  const Part part(a, S::kRows, 64);
  const int lane = threadIdx.x % 32, i = lane / 4, q = lane % 4;
  const int64_t row0 = part.row0 + threadIdx.x / 32 * 32;
  const bool squares = part.rank0 == 0;

  const int line = threadIdx.x / (S::kColumns / 8), place = threadIdx.x % (S::kColumns / 8) * 8;
  const T* source = static_cast<const T*>(a.factor) + (part.rank0 + line) * a.pitch + place;
  auto stage = [&](int piece, int column0) {
    T* to = shared + piece * 2 * S::kHalf + line * S::kPitch + place;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half && !a.has_low) break;
#pragma unroll
      for (int p = 0; p < S::kRanks; p += S::kLines)
        copy16_async(to + half * S::kHalf + p * S::kPitch, source + (half * a.r + p) * a.pitch + column0,
                     part.rank0 + line + p < a.r ? 16 : 0);
    }
    copy_commit();
  };
  const T* rows[4];  // row0 + 8 m + i, or the last of W, whose products go nowhere
#pragma unroll
  for (int m = 0; m < 4; ++m) rows[m] = a.weight + min_of(row0 + 8 * m + i, a.rows - 1) * a.row_stride + 8 * q;
  uint4 next[S::kAhead][4];  // columns 8q .. 8q+7 of each of the next steps
  auto fetch = [&](uint4 (&to)[4], int column) {
    const bool inside = column + 8 * q < part.end;
#pragma unroll
    for (int m = 0; m < 4; ++m) to[m] = inside ? load16(rows[m] + column) : make_uint4(0, 0, 0, 0);
  };
  float P[2][kTiles][4] = {}, square[4] = {};
  stage(0, part.begin);
#pragma unroll
  for (int s = 0; s < S::kAhead; ++s) fetch(next[s], part.begin + 32 * s);
  int piece = 0;
  for (int column0 = part.begin; column0 < part.end; column0 += S::kColumns, piece ^= 1) {
    copy_wait<0>();
    __syncthreads();  // this piece has arrived, and the one before has been used
    if (column0 + S::kColumns < part.end) stage(piece ^ 1, column0 + S::kColumns);
#pragma unroll
    for (int s = 0; s < S::kAhead; ++s) {
      const int column = column0 + 32 * s;
      if (column >= part.end) break;
      uint4 raw[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) raw[m] = next[s][m];
      fetch(next[s], column + S::kColumns);
      if (squares) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          float v[8];
          unpack<T>(raw[m], v);
#pragma unroll
          for (int e = 0; e < 8; ++e) square[m] += v[e] * v[e];
        }
      }
      const uint32_t W[2][2][4] = {{{raw[0].x, raw[1].x, raw[0].y, raw[1].y}, {raw[0].z, raw[1].z, raw[0].w, raw[1].w}},
                                   {{raw[2].x, raw[3].x, raw[2].y, raw[3].y}, {raw[2].z, raw[3].z, raw[2].w, raw[3].w}}};
      const T* A = shared + piece * 2 * S::kHalf + i * S::kPitch + 32 * s + 8 * q;
      for (int half = 0; half <= a.has_low; ++half, A += S::kHalf)
#pragma unroll
        for (int t = 0; t < kTiles; t += 2) {  // two tiles, so that four products stand between one and the next on its sums
          const uint4 f[2] = {load16(A + 8 * t * S::kPitch), load16(A + 8 * (t + 1) * S::kPitch)};
          const uint32_t fragment[2][2][2] = {{{f[0].x, f[0].y}, {f[1].x, f[1].y}}, {{f[0].z, f[0].w}, {f[1].z, f[1].w}}};
#pragma unroll
          for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int u = 0; u < 2; ++u)
#pragma unroll
              for (int m = 0; m < 2; ++m) mma<T>(P[m][t + u], W[m][e], fragment[e][u]);
        }
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int64_t row = row0 + 8 * m + i;
    acc_t<T>* to = a.products + (part.split * a.rows + row) * a.rank_pitch + part.rank0 + 2 * q;
    square[m] += __shfl_xor_sync(0xffffffffu, square[m], 1);
    square[m] += __shfl_xor_sync(0xffffffffu, square[m], 2);
    if (row >= a.rows) continue;
    if (squares && q == 0) a.squares[part.split * a.rows + row] = square[m];
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      if (part.rank0 + 8 * t + 2 * q < a.rank_pitch)
        *reinterpret_cast<float2*>(to + 8 * t) = make_float2(P[m / 2][t][2 * (m % 2)], P[m / 2][t][2 * (m % 2) + 1]);
  }
}

// Any dtype and strides, products without tensor cores: 64 rows by 8 kRanks ranks, 32 columns in shared memory at a time.
template <class T, int kRanks> struct PlainShape {
  static constexpr int kRows = 64, kColumns = 32, kPitchW = kRows + 4, kPitchA = 8 * kRanks + 4;
  static constexpr int kShared = static_cast<int>(sizeof(acc_t<T>)) * kColumns * (kPitchW + kPitchA);
};

template <class T, int kRanks>
__global__ void __launch_bounds__(kNormThreads, 3) norm_fma(Norm<T> a) {
  using A = acc_t<T>;
  using S = PlainShape<T, kRanks>;
  if (unchanged(a)) return;
  if (static_cast<int>(blockIdx.x) < a.gram_blocks) return add_gram(a);
  A* W = reinterpret_cast<A*>(dynamic_shared());  // [kColumns, kPitchW]
  A* factor = W + S::kColumns * S::kPitchW;       // [kColumns, kPitchA]
  const Part part(a, S::kRows, 64);
  const int my_rows = threadIdx.x / 8 * 4, my_ranks = threadIdx.x % 8 * kRanks;
  const bool along_rows = a.column_stride != 1 && a.columns > 1;  // how W is read: neighbouring threads, neighbouring memory
  A P[4][kRanks] = {}, square[4] = {};
  for (int c0 = part.begin; c0 < part.end; c0 += S::kColumns) {
    __syncthreads();  // the previous columns have been used
    for (int n = threadIdx.x; n < S::kRows * S::kColumns; n += kNormThreads) {
      const int line = along_rows ? n % S::kRows : n / S::kColumns, c = along_rows ? n / S::kRows : n % S::kColumns;
      const bool inside = part.row0 + line < a.rows && c0 + c < part.end;
      W[c * S::kPitchW + line] =
          inside ? value(a.weight[(part.row0 + line) * a.row_stride + (c0 + c) * a.column_stride]) : A(0);
    }
    for (int n = threadIdx.x; n < 8 * kRanks * S::kColumns; n += kNormThreads) {
      const int p = n / S::kColumns, c = n % S::kColumns;
      const bool inside = part.rank0 + p < a.r && c0 + c < part.end;
      factor[c * S::kPitchA + p] = inside ? static_cast<const A*>(a.factor)[(part.rank0 + p) * a.pitch + c0 + c] : A(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < S::kColumns; ++c)
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const A w = W[c * S::kPitchW + my_rows + m];
        square[m] += w * w;
#pragma unroll
        for (int p = 0; p < kRanks; ++p) P[m][p] += w * factor[c * S::kPitchA + my_ranks + p];
      }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int64_t row = part.row0 + my_rows + m;
    if (row >= a.rows) break;
    if (part.rank0 == 0 && my_ranks == 0) a.squares[part.split * a.rows + row] = square[m];
#pragma unroll
    for (int p = 0; p < kRanks; ++p) {
      const int rank = part.rank0 + my_ranks + p;
      if (rank < a.rank_pitch) a.products[(part.split * a.rows + row) * a.rank_pitch + rank] = P[m][p];
    }
  }
}

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// --- third kernel: c_o from the partial sums ---

// A half warp has kOwnRows rows, a lane four ranks of 64.
constexpr int kFinishRows = 32, kOwnRows = kFinishRows / (kThreads / 16), kFinishPitch = kFinishRows + 4;
template <class A> constexpr int kFinishShared = static_cast<int>(sizeof(A)) * 64 * (64 + kFinishPitch);

template <class A> __device__ __forceinline__ A half_warp_sum(A v) {
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// Where the terms cancel, c_o comes from V_o itself.
template <class T> __global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) norm_finish(Norm<T> a) {
  using A = acc_t<T>;
  if (a.stamp.parts) {
    if (!a.stamp.parts[2 * kStampBlocks]) return;
    if (blockIdx.x == 0 && threadIdx.x < 32) {  // nobody else looks at it in this kernel
      const uint64_t low = fingerprint_sum(a.stamp, 0), high = fingerprint_sum(a.stamp, 1);
      if (threadIdx.x == 0) a.stamp.previous[0] = static_cast<int64_t>(low), a.stamp.previous[1] = static_cast<int64_t>(high);
    }
  }
  A* gram = reinterpret_cast<A*>(dynamic_shared());  // [64, 64] of A Aᵀ
  A* B = gram + 64 * 64;                             // [64, kFinishPitch]: B, transposed
  const int gram_pitch = 64 * a.rank_tiles, lane = threadIdx.x % 32, own_lane = lane % 16, first = threadIdx.x / 16 * kOwnRows;
  const int64_t row0 = int64_t{blockIdx.x} * kFinishRows;
  int64_t row[kOwnRows];
  A total[kOwnRows] = {}, size[kOwnRows];  // c² and the sum of its terms' magnitudes
#pragma unroll
  for (int m = 0; m < kOwnRows; ++m) row[m] = min_of(row0 + first + m, a.rows - 1);
#pragma unroll
  for (int s = 0; s < kNormSplits; s += 16)
    if (s + own_lane < a.splits) {
#pragma unroll
      for (int m = 0; m < kOwnRows; ++m) total[m] += a.squares[(s + own_lane) * a.rows + row[m]];
    }
#pragma unroll
  for (int m = 0; m < kOwnRows; ++m) size[m] = total[m];
  for (int p0 = 0; p0 < a.r; p0 += 64) {
    const int p = p0 + 4 * own_lane;
    A product[kOwnRows][4] = {}, image[kOwnRows][4] = {};
    if (p < a.r) {
#pragma unroll 4
      for (int s = 0; s < a.splits; ++s)
#pragma unroll
        for (int m = 0; m < kOwnRows; ++m) {
          A v[4];
          load_aligned(a.products + (s * a.rows + row[m]) * a.rank_pitch + p, v);
#pragma unroll
          for (int e = 0; e < 4; ++e) product[m][e] += v[e];
        }
    }
    for (int tile = 1; tile <= a.rank_tiles; ++tile) {  // the last is that of p0
      const int j0 = (p0 / 64 + tile) % a.rank_tiles * 64;
      __syncthreads();  // the previous tile has been used
      constexpr int kLines = kThreads / 64;
      a.B.typed([&](auto* data) {
        const int j = j0 + threadIdx.x % 64, m = threadIdx.x / 64;
        const auto* from = data + j * a.B.column_stride;
        A v[kFinishRows / kLines];
#pragma unroll
        for (int u = 0; u < kFinishRows; u += kLines)
          v[u / kLines] = j < a.r ? static_cast<A>(value(from[min_of(row0 + m + u, a.rows - 1) * a.B.row_stride])) : A(0);
#pragma unroll
        for (int u = 0; u < kFinishRows; u += kLines) B[threadIdx.x % 64 * kFinishPitch + m + u] = v[u / kLines];
      });
      const A* from = a.gram + int64_t{j0} * gram_pitch + p0;
#pragma unroll
      for (int u = 0; u < 64 * 64; u += kThreads * kLanes<A>) {
        const int n = u + threadIdx.x * kLanes<A>;
        if (j0 + u / 64 < a.r) store16(gram + n, load16(from + n / 64 * gram_pitch + n % 64));
      }
      __syncthreads();
#pragma unroll 4
      for (int j = 0; j < min_of(64, a.r - j0); ++j) {
        A g[4], v[kOwnRows];
        load_aligned(gram + j * 64 + 4 * own_lane, g);
        load_aligned(B + j * kFinishPitch + first, v);
#pragma unroll
        for (int m = 0; m < kOwnRows; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) image[m][e] += v[m] * g[e];
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      A b[kOwnRows];
      load_aligned(B + (4 * own_lane + e) * kFinishPitch + first, b);
#pragma unroll
      for (int m = 0; m < kOwnRows; ++m) {
        const A c = 2 * a.scale * (product[m][e] * b[m]), w = a.scale * a.scale * (image[m][e] * b[m]);
        total[m] += c + w, size[m] += magnitude(c) + magnitude(w);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kOwnRows; ++m) {
    A c2 = half_warp_sum(total[m]);
    const bool cancels = c2 < static_cast<A>(kCancellation) * half_warp_sum(size[m]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // the whole warp works on a row that cancels
      if (!__shfl_sync(0xffffffffu, static_cast<int>(cancels), 16 * half)) continue;
      const int64_t o = __shfl_sync(0xffffffffu, row[m], 16 * half);
      A sum = 0;
      for (int c = lane; c < a.columns; c += 32) {
        A delta = 0;
        for (int p = 0; p < a.r; ++p) delta += a.B.template at<A>(o, p) * a.A.template at<A>(p, c);
        const A v = value(a.weight[o * a.row_stride + c * a.column_stride]) + a.scale * delta;
        sum += v * v;
      }
      sum = warp_sum(sum);
      if (lane / 16 == half) c2 = sum;
    }
    if (own_lane == 0 && row0 + first + m < a.rows) a.norm[row[m]] = root(c2);
  }
}

// How many elements of a factor the fingerprint reads at once; a factor without gaps becomes one row.
inline int whole_units(Factor& f) {
  if (f.column_stride != 1 && f.columns != 1) return 1;
  f.column_stride = 1;
  if (f.row_stride == f.columns) f.columns *= f.rows, f.row_stride = f.columns, f.rows = f.rows > 0;
  const int64_t size = size_of(f.dtype);
  const bool wide = aligned16(f.data) && f.columns * size % 16 == 0 && (f.rows <= 1 || f.row_stride * size % 16 == 0);
  return wide ? static_cast<int>(16 / size) : 1;
}

template <class T> cudaError_t launch_norm(const ColumnNorm& from, cudaStream_t stream) {
  using A = acc_t<T>;
  const NormPlan plan = norm_plan(from);
  A* workspace = static_cast<A*>(from.workspace);
  Norm<T> a{};
  a.weight = static_cast<const T*>(from.weight);
  a.A = {from.A, from.r, from.columns, from.A_strides[0], from.A_strides[1], from.A_dtype};
  a.B = {from.B, from.rows, from.r, from.B_strides[0], from.B_strides[1], from.B_dtype};
  a.norm = static_cast<A*>(from.norm);
  a.products = workspace, a.squares = workspace + plan.square_at;
  a.gram = workspace + plan.gram_at, a.gram_parts = workspace + plan.gram_parts_at;
  a.factor = static_cast<char*>(from.workspace) + plan.factor_at;
  a.scale = static_cast<A>(from.scale);
  a.rows = from.rows, a.row_stride = from.weight_strides[0], a.column_stride = from.weight_strides[1];
  a.split_columns = plan.split_columns, a.pitch = plan.pitch, a.gram_columns = plan.gram_columns;
  a.columns = static_cast<int>(from.columns), a.r = static_cast<int>(from.r);
  a.rank_pitch = static_cast<int>(plan.rank_pitch), a.splits = static_cast<int>(plan.splits);
  a.rank_tiles = static_cast<int>(max_of<int64_t>(ceil_div(from.r, 64), 1));
  a.gram_side = static_cast<int>(ceil_div(from.r, 16)), a.gram_splits = static_cast<int>(plan.gram_splits);
  a.gram_blocks = static_cast<int>(plan.gram_blocks);
  a.matrix_units = plan.matrix_units, a.has_low = from.A_dtype != from.dtype;
  int64_t grid = int64_t{a.gram_side} * (a.gram_side + 1) / 2 * plan.gram_splits;
  if (from.stamp) {
    a.stamp.parts = reinterpret_cast<uint64_t*>(static_cast<char*>(from.workspace) + plan.stamp_at);
    a.stamp.previous = from.stamp, a.stamp.force = from.force;
    a.stamp.A = a.A, a.stamp.B = a.B;
    a.stamp.A_units = whole_units(a.stamp.A), a.stamp.B_units = whole_units(a.stamp.B);
    a.stamp.W = {from.weight, from.rows, from.columns, from.weight_strides[0], from.weight_strides[1], from.dtype};
    a.stamp.sample = WeightSample::of(from.rows, from.columns);
    grid += kStampBlocks;
  }
  cudaError_t error = enqueue(prepare<T>, grid, kNormThreads, sizeof(A) * 2 * kPiece * kGramPitch<A>, stream, a);
  if (error != cudaSuccess) return error;
  error = cudaErrorInvalidValue;
  grid = plan.gram_blocks + plan.row_tiles * plan.splits * a.rank_tiles;
  auto run = [&](auto kernel, int threads, int shared) { error = enqueue(kernel, grid, threads, shared, stream, a); };
  if (plan.matrix_units) {
    if constexpr (kMatrixUnits<T>) {
      if (plan.ranks <= 16) run(norm_mma<T, 2>, MmaShape<2>::kRows, MmaShape<2>::kShared);
      else if (plan.ranks <= 32) run(norm_mma<T, 4>, MmaShape<4>::kRows, MmaShape<4>::kShared);
      else run(norm_mma<T, 8>, MmaShape<8>::kRows, MmaShape<8>::kShared);
    }
  } else if (plan.ranks <= 16) {
    run(norm_fma<T, 2>, kNormThreads, PlainShape<T, 2>::kShared);
  } else {
    run(norm_fma<T, 8>, kNormThreads, PlainShape<T, 8>::kShared);
  }
  if (error != cudaSuccess) return error;
  return enqueue(norm_finish<T>, ceil_div(from.rows, kFinishRows), kThreads, kFinishShared<A>, stream, a);
}

}  // namespace

// With a.stamp: recomputes only where a.force, or where A, B and W's sample are not those that the stamp was taken of.
cudaError_t column_norm(const ColumnNorm& a, cudaStream_t stream) {
  if (a.columns > kMaxColumns || a.r > 4096) return cudaErrorInvalidValue;
  if (a.rows == 0) return cudaSuccess;
  return for_dtype(a.dtype, [&](auto* t) { return launch_norm<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
