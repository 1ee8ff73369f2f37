// block_sum and block_tile_ (METHODS 1.3). Both move each byte once and compute next to nothing.
//
// Cyclic sum: a team of threads reads a row 16 bytes at a time, and walks it in steps that are a multiple of r, so that
// a thread always meets the same residues and sums them in registers; the team then folds its copies of the period
// through shared memory. The team is a warp, or the block where r is long.
//
// All of them wait for memory and little else, so each thread has several accesses under way.
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
  constexpr int kAhead = kDropout ? 2 : 8;  // loads that a thread has under way
  const int whole = V > 1 ? columns / V * V : 0;  // columns that 16-byte loads cover
  const int rest = whole + (lane * V - whole % step + step) % step;  // this thread's first beyond them
  const uint64_t key = kDropout ? static_cast<uint64_t>(*seed) : 0;
  // a team is a whole block or a whole warp, so its loop and its barriers are uniform
  for (int64_t row = int64_t{blockIdx.x} * teams + threadIdx.x / team; row < rows; row += int64_t{gridDim.x} * teams) {
    A sum[V] = {};
    const T* in = x + row * x_stride;
    auto add = [&](int i, const A (&v)[V]) {
      const uint32_t keep = kDropout ? keep_bits<V>(static_cast<uint64_t>(row) * columns + i, key, threshold) : ~0u;
#pragma unroll
      for (int e = 0; e < V; ++e)
        if (keep >> e & 1) sum[e] += v[e];
    };
    for (int i = lane * V; lane < active && i < whole; i += kAhead * step) {
      uint4 raw[kAhead];
      const T* from = in + i;
#pragma unroll
      for (int j = 0; j < kAhead; ++j, from += step) raw[j] = i + j * step < whole ? load16(from) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (kDropout && i + j * step >= whole) break;
        A v[V];
        if constexpr (V > 1) unpack<T>(raw[j], v);
        add(i + j * step, v);
      }
    }
    for (int i = rest; lane < active && i < columns; i += step) {
      A v[V];
      load_part<T, V>(in + i, columns - i, v);
      add(i, v);
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

// Sums over the runs of `offsets`: `team` lanes (a power of two <= 32) for each h[t, p], of several rows at once. 16-byte
// reads reach over both ends of a run, and what lies outside is not added.
constexpr int run_rows(bool dropout) { return dropout ? 2 : 4; }

template <class T, int V, bool kDropout>
__global__ void __launch_bounds__(kThreads, 4)
run_sum(const T* __restrict__ x, T* __restrict__ h, const int32_t* __restrict__ offsets, const int64_t* __restrict__ seed,
        uint32_t threshold, acc_t<T> scale, int64_t rows, int columns, int r, int64_t x_stride, int64_t h_stride, int team) {
  using A = acc_t<T>;
  constexpr int kRows = run_rows(kDropout);
  const int lane = threadIdx.x % team, teams = kThreads / team;
  const int64_t total = ceil_div(rows, kRows) * r;
  const uint64_t key = kDropout ? static_cast<uint64_t>(*seed) : 0;
  for (int64_t first = int64_t{blockIdx.x} * teams; first < total; first += int64_t{gridDim.x} * teams) {
    const int64_t n = first + threadIdx.x / team;
    A sum[kRows] = {};
    int64_t row0 = rows;
    int p = 0;
    if (n < total) {
      row0 = n / r;
      p = static_cast<int>(n - row0 * r);
      row0 *= kRows;
      const int begin = max_of(offsets[p], 0), end = min_of(offsets[p + 1], columns);
      for (int i = begin / V * V + lane * V; i < end; i += team * V) {
        uint4 raw[kRows];
        A one[kRows];
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          const T* from = x + (row0 + k) * x_stride + i;
          if constexpr (V > 1) raw[k] = load_row(from, row0 + k < rows ? columns - i : 0, true);
          else one[k] = row0 + k < rows ? value(*from) : A(0);
        }
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          A v[V];
          if constexpr (V > 1) unpack<T>(raw[k], v);
          else v[0] = one[k];
          const uint32_t keep = kDropout ? keep_bits<V>(static_cast<uint64_t>(row0 + k) * columns + i, key, threshold) : ~0u;
#pragma unroll
          for (int e = 0; e < V; ++e)
            if (i + e >= begin && i + e < end && (keep >> e & 1)) sum[k] += v[e];
        }
      }
    }
    for (int lanes = team / 2; lanes > 0; lanes /= 2)
#pragma unroll
      for (int k = 0; k < kRows; ++k) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], lanes);
#pragma unroll
    for (int k = 0; k < kRows; ++k)
      if (lane == 0 && row0 + k < rows) h[(row0 + k) * h_stride + p] = rounded<T>(sum[k] * scale);
  }
}

// V of s from p on, aligned to 16 bytes.
template <class S, int V, class A> __device__ __forceinline__ void load_whole(const S* p, A (&v)[V]) {
  constexpr int L = kLanes<S>;
#pragma unroll
  for (int e0 = 0; e0 < V; e0 += L) {
    acc_t<S> part[L];
    unpack<S>(load16(p + e0), part);
#pragma unroll
    for (int e = 0; e < L; ++e) v[e0 + e] = static_cast<A>(part[e]);
  }
}

constexpr int kTileAhead = 4;  // accesses of out that a thread has under way

// out gets, or is increased by, mask * s[:, shard(i)]: `team` threads a row, V elements each at a time. out's old values
// come through shared memory, where each thread reads but what it copied itself. kWhole: the map is cyclic, columns and
// r are multiples of V, and s is aligned. kDropout: there may be dropout.
template <class T, class S, int V, bool kWhole, bool kDropout>
__global__ void __launch_bounds__(kThreads, kDropout ? 3 : 4)
tile(T* __restrict__ out, const S* __restrict__ s, const int32_t* __restrict__ offsets, const int64_t* __restrict__ seed,
     uint32_t threshold, acc_t<T> scale, int64_t rows, int columns, int r, int64_t out_stride, int64_t s_stride,
     bool accumulate, int team) {
  using A = acc_t<T>;
  constexpr bool kCopies = V > 1;
  __shared__ uint4 under_way[kCopies ? kTileAhead : 1][kThreads];
  const int lane = threadIdx.x % team, teams = kThreads / team, step = team * V;
  const int p0 = lane * V % r, step_p = step % r;
  const uint64_t key = kDropout && seed ? static_cast<uint64_t>(*seed) : 0;
  for (int64_t row = int64_t{blockIdx.x} * teams + threadIdx.x / team; row < rows; row += int64_t{gridDim.x} * teams) {
    const S* from = s + row * s_stride;
    T* to = out + row * out_stride;
    auto start = [&](int i, int slot) {
      if (!kCopies || !accumulate) return;
      const int n = kWhole ? V : min_of(columns - i, V);
      if (i < columns) copy16_async(&under_way[slot][threadIdx.x], to + i, n * static_cast<int>(sizeof(T)));
      copy_commit();
    };
#pragma unroll
    for (int j = 0; j < kTileAhead; ++j) start(lane * V + j * step, j);
    int slot = 0, shard = p0;
#pragma unroll 1
    for (int i = lane * V; i < columns; i += step) {
      const int n = columns - i;
      A v[V], old[V] = {};
      if (accumulate) {
        if constexpr (kCopies) {
          copy_wait<kTileAhead - 1>();
          const uint4 raw = under_way[slot][threadIdx.x];
          unpack<T>(raw, old);
        } else {
          load_part<T, V>(to + i, n, old);
        }
      }
      if constexpr (kWhole) {
        load_whole<S, V>(from + shard, v);
      } else if (offsets) {
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
        int p = shard;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          v[e] = static_cast<A>(value(from[p]));
          if (++p == r) p = 0;
        }
      }
      const uint32_t keep = kDropout && seed ? keep_bits<V>(static_cast<uint64_t>(row) * columns + i, key, threshold) : ~0u;
#pragma unroll
      for (int e = 0; e < V; ++e) v[e] = (keep >> e & 1 ? v[e] * scale : A(0)) + old[e];
      const bool all = kCopies && (kWhole || n >= V);
      if constexpr (kCopies) {
        if (all) reinterpret_cast<uint4*>(to)[i / V] = pack<T>(v);  // the compiler would split store16(to + i, ...)
      }
      if (!all) store_part<T, V>(to + i, n, v);
      start(i + kTileAhead * step, slot);  // what the slot held has been used
      slot = (slot + 1) % kTileAhead;
      shard += step_p;
      if (shard >= r) shard -= r;
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
    const int team = power_of_two_below(ceil_div(ceil_div(a.columns, a.r), lanes), 32);
    const int64_t grid = min_of(ceil_div(ceil_div(a.rows, run_rows(a.seed)) * a.r, kThreads / team), kMaxGrid);
    const auto kernel = wide ? (a.seed ? run_sum<T, kLanes<T>, true> : run_sum<T, kLanes<T>, false>)
                             : (a.seed ? run_sum<T, 1, true> : run_sum<T, 1, false>);
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
  const bool whole = wide && !a.offsets && a.columns % lanes == 0 && a.r % lanes == 0 &&
                     aligned_rows(a.s, a.s_stride, sizeof(S));
  const int64_t accesses = ceil_div(a.columns, lanes);  // of a row; a thread has two or more
  const int team = power_of_two_below(wide ? max_of(accesses / 2, min_of<int64_t>(accesses, 8)) : accesses, kThreads);
  const int64_t grid = min_of(ceil_div(a.rows, kThreads / team), kMaxGrid);
  constexpr int V = kLanes<T>;
  const auto kernel = whole  ? (a.seed ? tile<T, S, V, true, true> : tile<T, S, V, true, false>)
                      : wide ? tile<T, S, V, false, true>
                             : tile<T, S, 1, false, true>;
  return enqueue(kernel, grid, kThreads, 0, stream, static_cast<T*>(a.out), static_cast<const S*>(a.s), a.offsets, a.seed,
                 dropout.threshold, static_cast<acc_t<T>>(dropout.scale), a.rows, static_cast<int>(a.columns),
                 static_cast<int>(a.r), a.out_stride, a.s_stride, a.accumulate, team);
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
