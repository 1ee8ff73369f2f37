// bat_contract_ (METHODS 1.4). d = k = 4096, r = 64, bf16, at 3.0 TB/s: dB moves 101 MB, 38 us, with G in float32, for 6 GFLOP.
// Predicted, not measured.
#include "bat.cuh"

namespace spectral_ops::cuda {

namespace {

template <class T, class S> struct Contract {
  const T* weight;
  const S* G;
  acc_t<T>*partial, *dB;  // [splits, tiles, tile, tile], [n, r, r]
  int64_t weight_row, weight_column, G_row, tiles, steps, share;
  int r, others, side;  // side: tiles along a side of a block
};

// Where a tile lies: of which block, from which row and column on.
struct Tile {
  int64_t block;
  int c0, e0;
  template <class C, class N> __device__ __forceinline__ Tile(const C& a, N tile, int size) {
    const N side = a.side, rest = tile / side;
    block = rest / side, c0 = static_cast<int>(rest % side) * size, e0 = static_cast<int>(tile % side) * size;
  }
};

// Where this thread block's partial sum of a tile goes: after those of the thread blocks before it that met the tile.
template <class C> __device__ __forceinline__ auto partial_of(const C& a, int64_t tile, int size) {
  return a.partial + ((blockIdx.x - tile * a.steps / a.share) * a.tiles + tile) * size * size;
}

// A warp sums 16 rows of W(o,j) and G(o,j) at a time into a tile of 16 K x 16 K: row m = i * others + j of a block-row is row i
// of W(o,j). Each piece of W and G gives way to the next step's as soon as it is a fragment. The warps of a tile add up last.
template <class T, class S, int K> __global__ void __launch_bounds__(kThreads, K == 4 ? 1 : 2) contract_mma(Contract<T, S> a) {
  constexpr int kTile = 16 * K, kFragments = 2 * K * K, kAtOnce = K == 1 ? 2 : 8;
  constexpr bool kLate = kParts<T> + kParts<S> == 5 && K == 4;  // registers leave no room for W's next piece beside its parts
  __shared__ float4 sums[kWarps][kAtOnce][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = lane / 4, q = lane % 4;
  const unsigned steps = static_cast<unsigned>(a.steps), others = a.others;
  const int first = static_cast<int>(blockIdx.x * a.share), last = static_cast<int>(min_of(first + a.share, a.tiles * a.steps));
  uint32_t one[1][4];  // the unit matrix, rows in the order of a fragment's columns: adds G itself
#pragma unroll
  for (int n = 0; n < 4; ++n) one[0][n] = unit_at(4 * (i / 2) + 2 * (n % 2) + i % 2, 2 * q + 8 * (n / 2));

  Four<T> W[2][K];
  Four<S> G[2][K];
  const T* W_from;  // of the next loads
  const S* G_from;
  const auto seek = [&](unsigned step) {
    const Tile at(a, step / steps, kTile);
    const int64_t row = at.block * a.r + step % steps / others * 16 + i;
    const int column = static_cast<int>(step % steps % others) * a.r + 4 * q;
    W_from = a.weight + row * a.weight_row + column + at.c0, G_from = a.G + row * a.G_row + column + at.e0;
  };
  const auto load_W = [&](int g) { W[0][g].load(W_from + 16 * g), W[1][g].load(W_from + 8 * a.weight_row + 16 * g); };
  const auto load_G = [&](int g) { G[0][g].load(G_from + 16 * g), G[1][g].load(G_from + 8 * a.G_row + 16 * g); };
  int step = first + warp;
  if (step < last) {
    seek(step);
#pragma unroll
    for (int g = 0; g < K; ++g) load_W(g), load_G(g);
  }
  for (unsigned tile = first / steps; int64_t{tile} * steps < last; ++tile) {
    const int end = static_cast<int>(min_of(int64_t{tile + 1} * steps, int64_t{last})), c0 = Tile(a, tile, kTile).c0 / 16;
    float c[K][2 * K][4] = {};
    for (; step < end; step += kWarps) {
      const int sixteen = static_cast<int>(step % steps / others) - c0;
      const bool more = step + kWarps < last;
      if (more) seek(step + kWarps);
      uint32_t left[K][kParts<T>][4];  // [16 columns of W, 16 rows]
#pragma unroll
      for (int g = 0; g < K; ++g) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t w[2][kParts<T>];
          W[h][g].words(w);
#pragma unroll
          for (int p = 0; p < kParts<T>; ++p)
#pragma unroll
            for (int n = 0; n < 2; ++n) left[g][p][2 * h + n] = transposed(w[n][p]);
        }
        if (more && !kLate) load_W(g);
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
        if (more) load_G(g);
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int m = 0; m < K; ++m) {
            multiply(c[m][2 * g + t], left[m], right[t]);
            if (m == sixteen) multiply(c[m][2 * g + t], one, right[t]);
          }
      }
#pragma unroll
      for (int g = 0; g < K; ++g)
        if (more && kLate) load_W(g);
    }
    const int t = warp % (2 * K);  // a warp adds up a fragment at a time
    float* to = partial_of(a, tile, kTile) + (16 * (warp / (2 * K)) + 4 * (i / 2) + i % 2) * kTile +
                16 * (t / 2) + 4 * q + 2 * (t % 2);
#pragma unroll
    for (int f0 = 0; f0 < kFragments; f0 += kAtOnce, to += kAtOnce / (2 * K) * 16 * kTile) {
      __syncthreads();  // the previous fragments have been added
#pragma unroll
      for (int f = 0; f < kAtOnce; ++f) {
        const float(&v)[4] = c[(f0 + f) / (2 * K)][(f0 + f) % (2 * K)];
        sums[warp][f][lane] = make_float4(v[0], v[1], v[2], v[3]);
      }
      __syncthreads();
      if (warp < kAtOnce) {
        float4 sum = sums[0][warp][lane];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) {
          const float4 v = sums[w][warp][lane];
          sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        *reinterpret_cast<float2*>(to) = make_float2(sum.x, sum.y);
        *reinterpret_cast<float2*>(to + 2 * kTile) = make_float2(sum.z, sum.w);
      }
    }
  }
}

// Any r, strides and alignment: tiles of N x N, 16 rows at a time. W + I is multiplied in place of W, which adds G itself.
template <class T, class S, int N> __global__ void __launch_bounds__(kThreads) contract_fma(Contract<T, S> a) {
  using A = acc_t<T>;
  constexpr int kDeep = 16, R = N / 16;
  __shared__ __align__(16) A W[kDeep][N + 4];
  __shared__ __align__(16) A G[kDeep][N + 4];
  const int my_c = threadIdx.x / 16 * R, my_e = threadIdx.x % 16 * R;
  const int64_t rows = int64_t{a.r} * a.others, last = min_of((blockIdx.x + 1) * a.share, a.tiles * a.steps);
  int64_t step = blockIdx.x * a.share;
  for (int64_t tile = step / a.steps; tile * a.steps < last; ++tile) {
    const Tile at(a, tile, N);
    A sum[R][R] = {};
    for (; step < min_of((tile + 1) * a.steps, last); ++step) {
      __syncthreads();  // the previous rows have been used
      for (int n = threadIdx.x; n < kDeep * N; n += kThreads) {
        const int64_t m = (step - tile * a.steps) * kDeep + n / N;
        const int line = static_cast<int>(m / a.others), c = at.c0 + n % N, e = at.e0 + n % N;
        const int64_t row = at.block * a.r + line, column = m % a.others * a.r;
        const bool c_inside = m < rows && c < a.r, e_inside = m < rows && e < a.r;
        const A unit = c == line ? A(1) : A(0);
        W[n / N][n % N] = c_inside ? unit + value(a.weight[row * a.weight_row + (column + c) * a.weight_column]) : A(0);
        G[n / N][n % N] = e_inside ? static_cast<A>(value(a.G[row * a.G_row + column + e])) : A(0);
      }
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kDeep; ++m)
#pragma unroll
        for (int c = 0; c < R; ++c)
#pragma unroll
          for (int e = 0; e < R; ++e) sum[c][e] += W[m][my_c + c] * G[m][my_e + e];
    }
    A* to = partial_of(a, tile, N);
#pragma unroll
    for (int c = 0; c < R; ++c)
#pragma unroll
      for (int e = 0; e < R; ++e) to[(my_c + c) * N + my_e + e] = sum[c][e];
  }
}

// A thread adds four neighbours of a tile. size: of tiles, a power of two.
template <class T, class S> __global__ void __launch_bounds__(kThreads) contract_finish(Contract<T, S> a, int size) {
  using A = acc_t<T>;
  const int pieces = max_of(size * size / (4 * kThreads), 1);
  const int n = 4 * (static_cast<int>(blockIdx.x) % pieces * kThreads + threadIdx.x);
  const int64_t tile = blockIdx.x / pieces;
  const int met = a.steps > 0 ? static_cast<int>(((tile + 1) * a.steps - 1) / a.share - tile * a.steps / a.share) + 1 : 0;
  const A* from = a.partial + tile * size * size + n;
  A sum[4] = {};
#pragma unroll 4
  for (int s = 0; s < met; ++s, from += a.tiles * size * size)
#pragma unroll
    for (int v = 0; v < 4; v += kLanes<A>) {
      A part[kLanes<A>];
      unpack<A>(load16(from + v), part);
#pragma unroll
      for (int e = 0; e < kLanes<A>; ++e) sum[v + e] += part[e];
    }
  const Tile at(a, tile, size);
  const int row = at.c0 + n / size, column = at.e0 + n % size;
  if (row >= a.r) return;
  A* to = a.dB + (at.block * a.r + row) * a.r + column;
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (column + e < a.r) to[e] = sum[e];
}

template <class T, class S> cudaError_t launch_contract(const BatContract& from, cudaStream_t stream) {
  using A = acc_t<T>;
  const ContractPlan plan = contract_plan(from);
  const Contract<T, S> a{static_cast<const T*>(from.weight), static_cast<const S*>(from.G), static_cast<A*>(from.workspace),
                         static_cast<A*>(from.dB), from.weight_strides[0], from.weight_strides[1], from.G_stride,
                         plan.tiles, plan.steps, plan.share, static_cast<int>(from.r), static_cast<int>(from.columns / from.r),
                         static_cast<int>(ceil_div(from.r, plan.tile))};
  cudaError_t error = cudaErrorInvalidValue;
  if (plan.matrix_units) {
    if constexpr (kMatrixUnits<T>)
      error = enqueue(plan.tile == 64 ? contract_mma<T, S, 4> : plan.tile == 32 ? contract_mma<T, S, 2> : contract_mma<T, S, 1>,
                      plan.grid, kThreads, 0, stream, a);
  } else {
    error = enqueue(plan.tile == 16 ? contract_fma<T, S, 16> : contract_fma<T, S, 64>, plan.grid, kThreads, 0, stream, a);
  }
  if (error != cudaSuccess) return error;
  const int64_t fours = plan.tile * plan.tile / 4, threads = min_of(fours, int64_t{kThreads});
  return enqueue(contract_finish<T, S>, plan.tiles * (fours / threads), static_cast<int>(threads), 0, stream, a,
                 static_cast<int>(plan.tile));
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
