// bat_contract_ (METHODS 1.4). d = k = 4096, r = 64, bf16, at 3.3 TB/s: dB moves 100 MB, 30 us, with G in float32, for 6 GFLOP.
// Predicted, not measured.
#include "bat.cuh"

namespace spectral_ops::cuda {

namespace {

template <class T, class S> struct Contract {
  const T* weight;
  const S* G;
  acc_t<T>*partial, *dB;  // [splits, n, r, r], [n, r, r]
  int64_t weight_row, weight_column, G_stride, blocks, split_rows, splits;
  int r, others;
};

// Which tile of which block a thread block sums, and over which rows. Row m = i * others + j of a block-row is row i of W(o,j).
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

// A warp sums its own 16 rows of W(o,j) and G(o,j) at a time into a tile of 16 K x 16 K. Then the warps add up in turn.
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

// Any r, strides and alignment: tiles of N x N, 16 rows at a time. W + I is multiplied in place of W, which adds G itself.
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
