// block_sum and block_tile_ (METHODS 1.3). Both move each byte once and compute next to nothing.
//
// Cyclic sum: a team of threads reads a row 16 bytes at a time, and walks it in steps that are a multiple of r, so that
// a thread always meets the same residues and sums them in registers; the team then folds its copies of the period
// through shared memory. The team is a warp, or the block where r is long.
#include "../ops/blocksum.h"
#include "common.cuh"

namespace spectral_ops::cuda {

namespace {

constexpr int64_t kMaxGrid = int64_t{1} << 30;

// Threads of a team that have work: the largest count <= team that reads whole periods; 0 where r is too long for it.
int active_threads(int64_t r, int lanes, int team) {
  int64_t common = lanes;  // gcd(r, lanes), lanes a power of two
  while (r % common) common /= 2;
  const int64_t period = r / common;
  return period > team ? 0 : static_cast<int>(team / period * period);
}

template <class T, int V, bool kDropout>
__global__ void __launch_bounds__(kThreads, 4)
cyclic_sum(const T* __restrict__ x, T* __restrict__ h, const int64_t* __restrict__ seed, uint32_t threshold, acc_t<T> scale,
           int64_t rows, int columns, int r, int64_t x_stride, int64_t h_stride, int team, int active) {
  using A = acc_t<T>;
  __shared__ A partial[kThreads * V];
  const int lane = threadIdx.x % team, teams = kThreads / team;
  A* mine = partial + (threadIdx.x - lane) * V;  // [active * V] of this team
  const int step = active * V;
  const uint64_t key = kDropout ? static_cast<uint64_t>(*seed) : 0;
  // a team is a whole block or a whole warp, so its loop and its barriers are uniform
  for (int64_t row = int64_t{blockIdx.x} * teams + threadIdx.x / team; row < rows; row += int64_t{gridDim.x} * teams) {
    A sum[V] = {};
    const T* in = x + row * x_stride;
    int i = lane < active ? lane * V : columns;
    if constexpr (!kDropout && V > 1) {
      for (; i + 3 * step + V <= columns; i += 4 * step) {  // four loads under way before the first is used
        uint4 raw[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) raw[j] = load16(in + i + j * step);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          A v[V];
          unpack<T>(raw[j], v);
#pragma unroll
          for (int e = 0; e < V; ++e) sum[e] += v[e];
        }
      }
    }
    for (; i < columns; i += step) {
      A v[V];
      load_part<T, V>(in + i, columns - i, v);
      const uint32_t keep = kDropout ? keep_bits<V>(static_cast<uint64_t>(row) * columns + i, key, threshold) : ~0u;
#pragma unroll
      for (int e = 0; e < V; ++e)
        if (keep >> e & 1) sum[e] += v[e];
    }
    if (lane < active)
#pragma unroll
      for (int e = 0; e < V; ++e) mine[lane * V + e] = sum[e];
    team == 32 ? __syncwarp() : __syncthreads();
    for (int p = lane; p < r; p += team) {
      A total = 0;
      for (int j = p; j < step; j += r) total += mine[j];
      h[row * h_stride + p] = rounded<T>(total * scale);
    }
    team == 32 ? __syncwarp() : __syncthreads();  // before the next row overwrites `mine`
  }
}

// Cyclic sum for r beyond a block's team: one thread for each h[t, p], neighbours in p read neighbours in x.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
long_cyclic_sum(const T* __restrict__ x, T* __restrict__ h, const int64_t* __restrict__ seed, uint32_t threshold,
                acc_t<T> scale, int64_t rows, int columns, int r, int64_t x_stride, int64_t h_stride) {
  const int64_t total = rows * r;
  const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;
  for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < total; n += int64_t{gridDim.x} * kThreads) {
    const int64_t row = n / r;
    const int p = static_cast<int>(n - row * r);
    const T* in = x + row * x_stride;
    acc_t<T> sum = 0;
    for (int64_t i = p; i < columns; i += r)
      if (!seed || keep_bits<1>(static_cast<uint64_t>(row) * columns + i, key, threshold)) sum += value(in[i]);
    h[row * h_stride + p] = rounded<T>(sum * scale);
  }
}

// Sums over the runs of `offsets`: `team` lanes (a power of two <= 32) for each h[t, p]; 16-byte reads reach over both
// ends of a run, and what lies outside is not added.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
run_sum(const T* __restrict__ x, T* __restrict__ h, const int32_t* __restrict__ offsets, const int64_t* __restrict__ seed,
        uint32_t threshold, acc_t<T> scale, int64_t rows, int columns, int r, int64_t x_stride, int64_t h_stride, int team) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % team, teams = kThreads / team;
  const int64_t total = rows * r;
  const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;
  for (int64_t first = int64_t{blockIdx.x} * teams; first < total; first += int64_t{gridDim.x} * teams) {
    const int64_t n = first + threadIdx.x / team;
    A sum = 0;
    int64_t row = 0;
    int p = 0;
    if (n < total) {
      row = n / r;
      p = static_cast<int>(n - row * r);
      const int begin = max_of(offsets[p], 0), end = min_of(offsets[p + 1], columns);
      for (int i = begin / V * V + lane * V; i < end; i += team * V) {
        A v[V];
        load_part<T, V>(x + row * x_stride + i, columns - i, v);
        const uint32_t keep = seed ? keep_bits<V>(static_cast<uint64_t>(row) * columns + i, key, threshold) : ~0u;
#pragma unroll
        for (int e = 0; e < V; ++e)
          if (i + e >= begin && i + e < end && (keep >> e & 1)) sum += v[e];
      }
    }
    for (int lanes = team / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (n < total && lane == 0) h[row * h_stride + p] = rounded<T>(sum * scale);
  }
}

// out gets, or is increased by, mask * s[:, shard(i)]: `team` threads a row, V elements each at a time.
template <class T, class S, int V>
__global__ void __launch_bounds__(kThreads, 4)
tile(T* __restrict__ out, const S* __restrict__ s, const int32_t* __restrict__ offsets, const int64_t* __restrict__ seed,
     uint32_t threshold, acc_t<T> scale, int64_t rows, int columns, int r, int64_t out_stride, int64_t s_stride,
     bool accumulate, bool whole, int team) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % team, teams = kThreads / team;
  const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;
  for (int64_t row = int64_t{blockIdx.x} * teams + threadIdx.x / team; row < rows; row += int64_t{gridDim.x} * teams) {
    const S* from = s + row * s_stride;
    T* to = out + row * out_stride;
    for (int i = lane * V; i < columns; i += team * V) {
      const int n = columns - i;
      A v[V], old[V] = {};
      if (accumulate) load_part<T, V>(to + i, n, old);
      if (offsets) {
        int low = 0, high = r - 1;  // the number of runs that end at or before i
        while (low < high) {
          const int middle = (low + high) / 2;
          if (offsets[middle + 1] <= i) low = middle + 1;
          else high = middle;
        }
#pragma unroll
        for (int e = 0; e < V; ++e) {
          while (low < r - 1 && offsets[low + 1] <= i + e) ++low;
          v[e] = static_cast<A>(value(from[low]));
        }
      } else {
        int p = i % r;
        if constexpr (std::is_same_v<T, S>) {
          if (whole) load_part<T, V>(from + p, V, v);  // r is a multiple of V and s is aligned
        }
        if (!whole || !std::is_same_v<T, S>)
#pragma unroll
          for (int e = 0; e < V; ++e) {
            v[e] = static_cast<A>(value(from[p]));
            if (++p == r) p = 0;
          }
      }
      const uint32_t keep = seed ? keep_bits<V>(static_cast<uint64_t>(row) * columns + i, key, threshold) : ~0u;
#pragma unroll
      for (int e = 0; e < V; ++e) v[e] = (keep >> e & 1 ? v[e] * scale : A(0)) + old[e];
      store_part<T, V>(to + i, n, v);
    }
  }
}

int power_of_two_below(int64_t n, int limit) {
  int team = 1;
  while (team * 2 <= limit && team < n) team *= 2;
  return team;
}

template <class T> cudaError_t launch_sum(const BlockSum& a, cudaStream_t stream) {
  const Dropout dropout(a.seed, a.p);
  const T* x = static_cast<const T*>(a.x);
  T* h = static_cast<T*>(a.h);
  const auto scale = static_cast<acc_t<T>>(dropout.scale);
  const int columns = static_cast<int>(a.columns), r = static_cast<int>(a.r);
  const bool wide = aligned_rows(a.x, a.x_stride, sizeof(T));
  const int lanes = wide ? kLanes<T> : 1;
  if (a.offsets) {
    const int team = power_of_two_below(ceil_div(ceil_div(a.columns, a.r), lanes) + 1, 32);
    const int64_t grid = min_of(ceil_div(a.rows * a.r, kThreads / team), kMaxGrid);
    const auto kernel = wide ? run_sum<T, kLanes<T>> : run_sum<T, 1>;
    return enqueue(kernel, grid, kThreads, 0, stream, x, h, a.offsets, a.seed, dropout.threshold, scale, a.rows, columns, r,
                   a.x_stride, a.h_stride, team);
  }
  for (const int team : {32, kThreads}) {
    const int active = active_threads(a.r, lanes, team);
    if (!active) continue;
    const int64_t grid = min_of(ceil_div(a.rows, kThreads / team), kMaxGrid);
    const auto kernel = wide ? (a.seed ? cyclic_sum<T, kLanes<T>, true> : cyclic_sum<T, kLanes<T>, false>)
                             : (a.seed ? cyclic_sum<T, 1, true> : cyclic_sum<T, 1, false>);
    return enqueue(kernel, grid, kThreads, 0, stream, x, h, a.seed, dropout.threshold, scale, a.rows, columns, r, a.x_stride,
                   a.h_stride, team, active);
  }
  return enqueue(long_cyclic_sum<T>, min_of(ceil_div(a.rows * a.r, kThreads), kMaxGrid), kThreads, 0, stream, x, h, a.seed,
                 dropout.threshold, scale, a.rows, columns, r, a.x_stride, a.h_stride);
}

template <class T, class S> cudaError_t launch_tile(const BlockTile& a, cudaStream_t stream) {
  const Dropout dropout(a.seed, a.p);
  const bool wide = aligned_rows(a.out, a.out_stride, sizeof(T));
  const int lanes = wide ? kLanes<T> : 1;
  const bool whole = wide && a.r % lanes == 0 && std::is_same_v<T, S> && aligned_rows(a.s, a.s_stride, sizeof(S));
  const int team = power_of_two_below(ceil_div(a.columns, lanes), kThreads);
  const int64_t grid = min_of(ceil_div(a.rows, kThreads / team), kMaxGrid);
  const auto kernel = wide ? tile<T, S, kLanes<T>> : tile<T, S, 1>;
  return enqueue(kernel, grid, kThreads, 0, stream, static_cast<T*>(a.out), static_cast<const S*>(a.s), a.offsets, a.seed,
                 dropout.threshold, static_cast<acc_t<T>>(dropout.scale), a.rows, static_cast<int>(a.columns),
                 static_cast<int>(a.r), a.out_stride, a.s_stride, a.accumulate, whole, team);
}

}  // namespace

cudaError_t block_sum(const BlockSum& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  if (a.columns > kMaxColumns || a.r > kMaxColumns || a.r < 1) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) { return launch_sum<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

// s is in out's dtype, or in float32 under a 16-bit out.
cudaError_t block_tile(const BlockTile& a, cudaStream_t stream) {
  if (a.rows == 0 || a.columns == 0) return cudaSuccess;
  if (a.columns > kMaxColumns || a.r > kMaxColumns || a.r < 1) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (a.s_dtype == a.dtype) return launch_tile<T, T>(a, stream);
    if constexpr (sizeof(T) == 2) {
      if (a.s_dtype == DType::float32) return launch_tile<T, float>(a, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace spectral_ops::cuda
