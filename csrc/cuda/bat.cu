// bat_weight_ and bat_contract_ (METHODS 1.4). Over bf16 and fp16 weights with r a multiple of 16 the blocks meet on the
// tensor cores, in bf16 products of parts that add up to their factor: an fp16 one is two parts (without fp16's range), a
// float32 one three; two leave 2^-16 of it, enough where the result is rounded to 16 bits. The order inside a product is such that four neighbouring elements of a row, read at
// once, are a lane's fragment: 16 columns in the order 4q, 4q+1 (q = 0..3), then 4q+2, 4q+3.
//
// d = k = 4096, r = 64, bf16, at 3.3 TB/s: W' moves 67 MB, 20 us, for 4 GFLOP; dB moves 100 MB, 30 us, with G in float32, for
// 6 GFLOP. Predicted, not measured.
#include "common.cuh"
#include "launch.h"
#include "plan.h"

namespace spectral_ops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlock = 46340;  // r * r is counted in 32 bits

template <class T> constexpr int kParts = std::is_same_v<T, bfloat16> ? 1 : sizeof(T) == 2 ? 2 : 3;

// Two values as pairs of bf16 that add up to them.
template <int P> __device__ __forceinline__ void split(float low, float high, uint32_t (&parts)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    parts[p] = pair_of<bfloat16>(low, high);
    low -= value(rounded<bfloat16>(low)), high -= value(rounded<bfloat16>(high));
  }
}

// Four neighbours of a row as two words of pairs, in parts.
template <class T> struct Four {
  std::conditional_t<sizeof(T) == 2, uint2, float4> raw;

  __device__ __forceinline__ void load(const T* p) { raw = *reinterpret_cast<const decltype(raw)*>(p); }
  __device__ __forceinline__ void values(float (&v)[4]) const {
    const T* from = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = value(from[e]);
  }
  __device__ __forceinline__ void words(uint32_t (&w)[2][kParts<T>]) const {
    if constexpr (std::is_same_v<T, bfloat16>) {
      w[0][0] = raw.x, w[1][0] = raw.y;
    } else {
      float v[4];
      values(v);
      split(v[0], v[1], w[0]);
      split(v[2], v[3], w[1]);
    }
  }
};

// c += a b of parts, without products below what float32 holds.
template <int P, int Q> __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[P][4], const uint32_t (&b)[Q][2]) {
#pragma unroll
  for (int p = 0; p < P; ++p)
#pragma unroll
    for (int q = 0; q < Q; ++q)
      if (p + q < 3) mma<bfloat16>(c, a[p], b[q]);
}

template <class O> __device__ __forceinline__ void store_four(O* p, const float (&v)[4]) {
  if constexpr (sizeof(O) == 2) *reinterpret_cast<uint2*>(p) = make_uint2(pair_of<O>(v[0], v[1]), pair_of<O>(v[2], v[3]));
  else *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}

// --- W' ---

template <class O> constexpr int kWeightParts = sizeof(O) == 2 ? 2 : 3;  // of bat

template <class T, class O> struct Weight {
  const T* weight;
  const void* bat;
  O* out;
  int64_t weight_row, weight_column, out_stride;
  int r, others, share;  // blocks of W that meet one block of bat; of their rows, what a thread block takes
  int parts;
  DType bat_dtype;
  bool by_column, delta;

  // Row i of the block of W that is the `other`-th to meet block `block` of bat: its row of W and its first column.
  __device__ __forceinline__ int64_t row(int block, int other, int i) const { return int64_t{by_column ? other : block} * r + i; }
  __device__ __forceinline__ int64_t column(int block, int other) const { return int64_t{by_column ? block : other} * r; }
};

// A block keeps r x 16 G of a block of bat as fragments; a warp takes 16 rows of two blocks of W at a time, and its own
// columns of W last, to add them. G: how many times 16 columns.
template <class T, class O, int G> __global__ void __launch_bounds__(kThreads, G * kParts<T> >= 2 ? 1 : 2) weight_mma(Weight<T, O> a) {
  constexpr int Q = kWeightParts<O>;
  const int fragments = a.r / 16 * 2 * G * 32;
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());   // [r / 16, 2 G, 32]: two parts of a lane's fragment
  uint2* third = reinterpret_cast<uint2*>(shared + fragments);  // the third, where there is one
  const int lane = threadIdx.x % 32, i = lane / 4, q = lane % 4, panels = a.r / (16 * G);
  const int panel = static_cast<int>(blockIdx.x) % panels, part = static_cast<int>(blockIdx.x) / panels % a.parts;
  const int block = static_cast<int>(blockIdx.x) / panels / a.parts, column0 = panel * 16 * G;
  const int64_t bat0 = int64_t{block} * a.r * a.r;
  for (int n = threadIdx.x; n < fragments; n += kThreads) {
    const int l = n % 32, t = n / 32 % (2 * G), s = n / (64 * G);
    const int c = 16 * s + 4 * (l % 4), e = column0 + 16 * (t / 2) + 4 * (l / 8) + 2 * (t % 2) + l / 4 % 2;
    float v[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) v[m] = load_any<float>(a.bat, bat0 + int64_t{c + m} * a.r + e, a.bat_dtype);
    uint32_t first[Q], second[Q];
    split(v[0], v[1], first);
    split(v[2], v[3], second);
    shared[n] = make_uint4(first[0], second[0], first[1], second[1]);
    if constexpr (Q == 3) third[n] = make_uint2(first[2], second[2]);
  }
  __syncthreads();  // the only barrier: from here on each warp is on its own
  const int pairs = (a.others + 1) / 2, items = a.r / 16 * pairs, last = min_of((part + 1) * a.share, items);
  for (int item = part * a.share + threadIdx.x / 32; item < last; item += kWarps) {
    const int row0 = item / pairs * 16, other0 = item % pairs * 2;
    const bool two = other0 + 1 < a.others;
    float c[2][2 * G][4];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t at = bat0 + int64_t{row0 + 8 * h + i} * a.r + column0 + 16 * g + 4 * q + e;
          c[0][2 * g + e / 2][2 * h + e % 2] = c[1][2 * g + e / 2][2 * h + e % 2] = load_any<float>(a.bat, at, a.bat_dtype);
        }
    Four<T> W[2][2][G];
    for (int turn = 1; turn <= panels; ++turn) {
      const int from = (panel + turn) % panels;
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int other = other0 + (two ? m : 0);
          const T* p = a.weight + a.row(block, other, row0 + 8 * h + i) * a.weight_row + a.column(block, other) + from * 16 * G + 4 * q;
#pragma unroll
          for (int g = 0; g < G; ++g) W[m][h][g].load(p + 16 * g);
        }
#pragma unroll
      for (int g = 0; g < G; ++g) {
        uint32_t rows16[2][kParts<T>][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t w[2][kParts<T>];
            W[m][h][g].words(w);
#pragma unroll
            for (int p = 0; p < kParts<T>; ++p) rows16[m][p][h] = w[0][p], rows16[m][p][2 + h] = w[1][p];
          }
#pragma unroll
        for (int t = 0; t < 2 * G; ++t) {
          const int at = ((from * G + g) * 2 * G + t) * 32 + lane;
          const uint4 raw = shared[at];
          uint32_t b[Q][2] = {{raw.x, raw.y}, {raw.z, raw.w}};
          if constexpr (Q == 3) b[2][0] = third[at].x, b[2][1] = third[at].y;
          multiply(c[0][t], rows16[0], b);
          multiply(c[1][t], rows16[1], b);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m == 1 && !two) break;
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int g = 0; g < G; ++g) {
          float v[4], w[4];
          W[m][h][g].values(w);
#pragma unroll
          for (int e = 0; e < 4; ++e) v[e] = c[m][2 * g + e / 2][2 * h + e % 2] + (a.delta ? 0.f : w[e]);
          const int64_t row = a.row(block, other0 + m, row0 + 8 * h + i);
          store_four(a.out + row * a.out_stride + a.column(block, other0 + m) + column0 + 16 * g + 4 * q, v);
        }
    }
  }
}

// Any r, strides and alignment: N columns of bat, as many rows as give a thread 4 x 4, 16 columns of W at a time.
template <class T, class O, int N> __global__ void __launch_bounds__(kThreads, 2) weight_fma(Weight<T, O> a) {
  using A = acc_t<T>;
  constexpr int kDeep = 16, kAcross = N / 4, kRows = kThreads / kAcross * 4;
  __shared__ __align__(16) A W[kDeep][kRows + 4];  // [column, row]
  __shared__ __align__(16) A B[kDeep][N + 4];      // [row, column]
  const int panels = (a.r + N - 1) / N, panel = static_cast<int>(blockIdx.x) % panels;
  const int part = static_cast<int>(blockIdx.x) / panels % a.parts, block = static_cast<int>(blockIdx.x) / panels / a.parts;
  const int column0 = panel * N, my_row = threadIdx.x / kAcross * 4, my_column = threadIdx.x % kAcross * 4;
  const int64_t rows = int64_t{a.r} * a.others, row0 = int64_t{part} * kRows, bat0 = int64_t{block} * a.r * a.r;
  const auto element = [&](int64_t n, int column) {  // of row n = i * others + other
    const int row = static_cast<int>(n / a.others), other = static_cast<int>(n % a.others);
    return value(a.weight[a.row(block, other, row) * a.weight_row + (a.column(block, other) + column) * a.weight_column]);
  };
  A c[4][4] = {};
  for (int c0 = 0; c0 < a.r; c0 += kDeep) {
    __syncthreads();  // the previous columns have been used
    for (int n = threadIdx.x; n < kRows * kDeep; n += kThreads) {
      const int line = n / kDeep, p = n % kDeep;
      W[p][line] = row0 + line < rows && c0 + p < a.r ? element(row0 + line, c0 + p) : A(0);
    }
    for (int n = threadIdx.x; n < N * kDeep; n += kThreads) {
      const int line = n / N, e = n % N;
      const bool inside = c0 + line < a.r && column0 + e < a.r;
      B[line][e] = inside ? load_any<A>(a.bat, bat0 + int64_t{c0 + line} * a.r + column0 + e, a.bat_dtype) : A(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int p = 0; p < kDeep; ++p)
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][e] += W[p][my_row + m] * B[p][my_column + e];
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int64_t n = row0 + my_row + m;
    if (n >= rows) break;
    const int row = static_cast<int>(n / a.others), other = static_cast<int>(n % a.others);
    O* to = a.out + a.row(block, other, row) * a.out_stride + a.column(block, other);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = column0 + my_column + e;
      if (column >= a.r) break;
      const A v = c[m][e] + load_any<A>(a.bat, bat0 + int64_t{row} * a.r + column, a.bat_dtype);
      to[column] = rounded<O>(a.delta ? v : v + element(n, column));
    }
  }
}

template <class T, class O> cudaError_t launch_weight(const BatWeight& from, cudaStream_t stream) {
  Weight<T, O> a{};
  a.weight = static_cast<const T*>(from.weight), a.bat = from.bat, a.out = static_cast<O*>(from.out);
  a.weight_row = from.weight_strides[0], a.weight_column = from.weight_strides[1], a.out_stride = from.out_stride;
  a.r = static_cast<int>(from.r), a.bat_dtype = from.bat_dtype, a.by_column = from.by_column, a.delta = from.delta;
  a.others = static_cast<int>((from.by_column ? from.rows : from.columns) / from.r);
  const int64_t blocks = (from.by_column ? from.columns : from.rows) / from.r;
  if constexpr (kMatrixUnits<T>) {
    const bool aligned_out = reinterpret_cast<uintptr_t>(from.out) % (4 * sizeof(O)) == 0 && from.out_stride % 4 == 0;
    const int64_t tile = block_tile_of(from.r), shared = from.r * tile * 2 * kWeightParts<O>;
    if (from.r % 16 == 0 && shared <= 96 * 1024 && aligned_fours(from.weight, from.weight_strides, sizeof(T)) && aligned_out) {
      const int64_t panels = from.r / tile, items = from.r / 16 * ceil_div(a.others, 2);
      const int64_t most = ceil_div(items, 2 * kWarps);  // two turns of each warp at least, for what it costs to keep bat
      a.parts = static_cast<int>(min_of(ceil_div(264, blocks * panels), most));
      a.share = static_cast<int>(ceil_div(items, a.parts));
      const auto kernel = tile == 64 ? weight_mma<T, O, 4> : tile == 32 ? weight_mma<T, O, 2> : weight_mma<T, O, 1>;
      return enqueue(kernel, blocks * panels * a.parts, kThreads, shared, stream, a);
    }
  }
  const bool narrow = from.r <= 16;
  a.parts = static_cast<int>(ceil_div(from.r * a.others, narrow ? 256 : 64));
  const auto kernel = narrow ? weight_fma<T, O, 16> : weight_fma<T, O, 64>;
  return enqueue(kernel, blocks * a.parts * (narrow ? 1 : ceil_div(from.r, 64)), kThreads, 0, stream, a);
}

// --- dB ---

template <class T, class S> struct Contract {
  const T* weight;
  const S* G;
  acc_t<T>*partial, *dB;  // [splits, n, r, r], [n, r, r]
  int64_t weight_row, weight_column, G_stride, blocks, split_rows, splits;
  int r, others;
};

// Which tile of which block, for which rows of its K: row m = i * others + j of a block-row is row i of W(o,j).
struct Place {
  int64_t block, split;
  int c0, e0;
  template <class C> __device__ __forceinline__ Place(const C& a, int tile) {
    const int side = (a.r + tile - 1) / tile;
    const int64_t rest = blockIdx.x / static_cast<unsigned>(side);
    e0 = static_cast<int>(blockIdx.x % static_cast<unsigned>(side)) * tile, c0 = static_cast<int>(rest % side) * tile;
    block = rest / side % a.blocks, split = rest / side / a.blocks;
  }
};

// A warp sums its own 16 rows of W(o,j) and G(o,j) at a time into a tile of 16 K x 16 K; then the warps add up in turn.
template <class T, class S, int K> __global__ void __launch_bounds__(kThreads, K == 4 ? 1 : 2) contract_mma(Contract<T, S> a) {
  constexpr int kTile = 16 * K;
  __shared__ float sums[kTile][kTile + 2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = lane / 4, q = lane % 4;
  const Place at(a, kTile);
  float c[K][2 * K][4] = {};
  uint32_t one[1][4];  // the unit matrix, rows in the order of a fragment's columns: adds G itself
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int row = 4 * (i / 2) + 2 * (n % 2) + i % 2, column = 2 * q + 8 * (n / 2);
    one[0][n] = (row == column ? 0x3f80u : 0u) | (row == column + 1 ? 0x3f800000u : 0u);
  }
  const int64_t steps = int64_t{a.r / 16} * a.others, last = min_of((at.split + 1) * (a.split_rows / 16), steps);
  for (int64_t step = at.split * (a.split_rows / 16) + warp; step < last; step += kWarps) {
    const int sixteen = static_cast<int>(step / a.others);
    const int64_t row = at.block * a.r + sixteen * 16 + i, column = step % a.others * a.r + 4 * q;
    Four<T> W[2][K];
    Four<S> G[2][K];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int g = 0; g < K; ++g) {
        W[h][g].load(a.weight + (row + 8 * h) * a.weight_row + column + at.c0 + 16 * g);
        G[h][g].load(a.G + (row + 8 * h) * a.G_stride + column + at.e0 + 16 * g);
      }
    uint32_t left[K][kParts<T>][4];  // [16 columns of W, 16 rows]
#pragma unroll
    for (int g = 0; g < K; ++g)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t w[2][kParts<T>];
        W[h][g].words(w);
#pragma unroll
        for (int p = 0; p < kParts<T>; ++p) left[g][p][2 * h] = transposed(w[0][p]), left[g][p][2 * h + 1] = transposed(w[1][p]);
      }
#pragma unroll
    for (int g = 0; g < K; ++g) {
      uint32_t right[2][kParts<S>][2];  // [16 rows, 8 columns of G] twice
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t w[2][kParts<S>];
        G[h][g].words(w);
#pragma unroll
        for (int p = 0; p < kParts<S>; ++p) right[0][p][h] = transposed(w[0][p]), right[1][p][h] = transposed(w[1][p]);
      }
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int m = 0; m < K; ++m) {
          multiply(c[m][2 * g + t], left[m], right[t]);
          if (at.c0 / 16 + m == sixteen) multiply(c[m][2 * g + t], one, right[t]);
        }
    }
  }
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn)
#pragma unroll
      for (int m = 0; m < K; ++m)
#pragma unroll
        for (int t = 0; t < 2 * K; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& sum = sums[16 * m + 4 * (i / 2) + 2 * (e / 2) + i % 2][16 * (t / 2) + 4 * q + 2 * (t % 2) + e % 2];
            sum = turn == 0 ? c[m][t][e] : sum + c[m][t][e];
          }
    __syncthreads();  // each warp adds to what the one before it left
  }
  float* to = a.partial + (at.split * a.blocks + at.block) * a.r * a.r;
  for (int n = threadIdx.x; n < kTile * kTile; n += kThreads)
    to[int64_t{at.c0 + n / kTile} * a.r + at.e0 + n % kTile] = sums[n / kTile][n % kTile];
}

// Any r, strides and alignment: tiles of N x N, 16 rows at a time. G itself is added as the unit matrix beside W.
template <class T, class S, int N> __global__ void __launch_bounds__(kThreads) contract_fma(Contract<T, S> a) {
  using A = acc_t<T>;
  constexpr int kDeep = 16, R = N / 16;
  __shared__ __align__(16) A W[kDeep][N + 4];
  __shared__ __align__(16) A G[kDeep][N + 4];
  const Place at(a, N);
  const int my_c = threadIdx.x / 16 * R, my_e = threadIdx.x % 16 * R;
  const int64_t rows = int64_t{a.r} * a.others, last = min_of((at.split + 1) * a.split_rows, rows);
  A sum[R][R] = {};
  for (int64_t row0 = at.split * a.split_rows; row0 < last; row0 += kDeep) {
    __syncthreads();  // the previous rows have been used
    for (int n = threadIdx.x; n < kDeep * N; n += kThreads) {
      const int64_t m = row0 + n / N;
      const int line = static_cast<int>(m / a.others), c = at.c0 + n % N, e = at.e0 + n % N;
      const int64_t row = at.block * a.r + line, column = m % a.others * a.r;
      const bool c_inside = m < last && c < a.r, e_inside = m < last && e < a.r;
      W[n / N][n % N] = c_inside ? value(a.weight[row * a.weight_row + (column + c) * a.weight_column]) + (c == line ? A(1) : A(0)) : A(0);
      G[n / N][n % N] = e_inside ? static_cast<A>(value(a.G[row * a.G_stride + column + e])) : A(0);
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kDeep; ++m)
#pragma unroll
      for (int c = 0; c < R; ++c)
#pragma unroll
        for (int e = 0; e < R; ++e) sum[c][e] += W[m][my_c + c] * G[m][my_e + e];
  }
  A* to = a.partial + (at.split * a.blocks + at.block) * a.r * a.r;
#pragma unroll
  for (int c = 0; c < R; ++c)
#pragma unroll
    for (int e = 0; e < R; ++e)
      if (at.c0 + my_c + c < a.r && at.e0 + my_e + e < a.r) to[int64_t{at.c0 + my_c + c} * a.r + at.e0 + my_e + e] = sum[c][e];
}

template <class T, class S> __global__ void __launch_bounds__(kThreads) contract_finish(Contract<T, S> a) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x, total = a.blocks * a.r * a.r;
  if (n >= total) return;
  acc_t<T> sum = 0;
#pragma unroll 4
  for (int64_t s = 0; s < a.splits; ++s) sum += a.partial[s * total + n];
  a.dB[n] = sum;
}

template <class T, class S> cudaError_t launch_contract(const BatContract& from, cudaStream_t stream) {
  using A = acc_t<T>;
  const ContractPlan plan = contract_plan(from);
  const Contract<T, S> a{static_cast<const T*>(from.weight), static_cast<const S*>(from.G), static_cast<A*>(from.workspace),
                         static_cast<A*>(from.dB), from.weight_strides[0], from.weight_strides[1], from.G_stride,
                         from.rows / from.r, plan.split_rows, plan.splits,
                         static_cast<int>(from.r), static_cast<int>(from.columns / from.r)};
  const int64_t grid = plan.tiles * a.blocks * plan.splits;
  cudaError_t error = cudaErrorInvalidValue;
  if (plan.matrix_units) {
    if constexpr (kMatrixUnits<T>)
      error = enqueue(plan.tile == 64 ? contract_mma<T, S, 4> : plan.tile == 32 ? contract_mma<T, S, 2> : contract_mma<T, S, 1>,
                      grid, kThreads, 0, stream, a);
  } else {
    error = enqueue(plan.tile == 16 ? contract_fma<T, S, 16> : contract_fma<T, S, 64>, grid, kThreads, 0, stream, a);
  }
  if (error != cudaSuccess) return error;
  return enqueue(contract_finish<T, S>, ceil_div(a.blocks * a.r * a.r, kThreads), kThreads, 0, stream, a);
}

}  // namespace

cudaError_t bat_weight(const BatWeight& a, cudaStream_t stream) {
  if (a.rows == 0 || a.columns == 0) return cudaSuccess;
  if (a.rows > kMaxColumns || a.columns > kMaxColumns || a.r > kMaxBlock) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return a.out_dtype == a.dtype ? launch_weight<T, T>(a, stream) : launch_weight<T, acc_t<T>>(a, stream);
  });
}

// columns may be 0: dB is then zeros, written by the last stage.
cudaError_t bat_contract(const BatContract& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  if (a.rows > kMaxColumns || a.columns > kMaxColumns || a.r > kMaxBlock) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return a.G_dtype == a.dtype ? launch_contract<T, T>(a, stream) : launch_contract<T, acc_t<T>>(a, stream);
  });
}

}  // namespace spectral_ops::cuda
