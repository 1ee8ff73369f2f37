// csr_scatter_, csr_gather_, csr_spmm_ and csr_sddmm (METHODS 1.5). Both products hold a slab of tokens in shared memory,
// 128 bytes of tokens for each feature, so that the eight lanes that share an entry read whole rows without bank conflicts.
//
// csr_sddmm, T = 8192, d = k = 4096, 0.6 % (nnz = 10^5), bf16: through L2 (k / 512) T d 2 B + T k 2 B + slabs nnz 12 B =
// 0.76 GB, 140 us at 5.5 TB/s; from shared memory at most nnz T 4 B = 3.3 GB, 115 us at 132 SMs of 128 B a cycle; the dense
// product is 275 GFLOP, 400 us. Predicted, not measured.
#include "common.cuh"
#include "launch.h"
#include "plan.h"

namespace spectral_ops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kGroups = kThreads / 8;  // of eight lanes, each with 16 bytes of the tokens of a slab
constexpr int kRows = static_cast<int>(kSampledRows), kColumns = static_cast<int>(kSampledColumns);
template <class T> constexpr int kTokens = static_cast<int>(kSlabBytes / sizeof(T));  // of a slab

// --- scatter and gather: a thread for each entry ---

struct Pattern {
  const int32_t *row_offsets, *columns;
  int64_t rows, nnz;
};

// The row of entry p; -1 before the first of these rows, `rows` after the last.
__device__ __forceinline__ int64_t row_of(const Pattern& a, int64_t p) {
  int64_t low = 0, high = a.rows + 1;  // how many offsets are <= p
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.row_offsets[middle] <= p) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

template <class T>
__global__ void __launch_bounds__(kThreads) scatter(Pattern a, T* __restrict__ out, const void* __restrict__ values, DType values_dtype,
                                                    int64_t row_stride, int64_t column_stride, bool accumulate) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= a.nnz) return;
  const int64_t row = row_of(a, p);
  if (row < 0 || row >= a.rows) return;
  T* to = out + row * row_stride + a.columns[p] * column_stride;
  const acc_t<T> v = load_any<acc_t<T>>(values, p, values_dtype);
  *to = rounded<T>(accumulate ? value(*to) + v : v);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gather(Pattern a, T* __restrict__ out, const void* __restrict__ dense, DType dense_dtype,
                                                   int64_t row_stride, int64_t column_stride) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= a.nnz) return;
  const int64_t row = row_of(a, p);
  if (row < 0 || row >= a.rows) return;
  out[p] = rounded<T>(load_any<acc_t<T>>(dense, row * row_stride + a.columns[p] * column_stride, dense_dtype));
}

// --- slabs ---

// Tokens [0, tokens) x features [0, features) of a matrix, from p on, into shared[feature][8] x 16 bytes of tokens, zeros up
// to kFeatures. Chunk j of a feature stands at j ^ (feature / L) % 8, which spreads the writes of neighbours over the banks.
template <class T, int kFeatures> struct Slab {
  static constexpr int L = kLanes<T>, kUnits = kFeatures * 8 / L / kThreads;  // L tokens x L features each
  static_assert(kUnits * L == 8 * kFeatures / kThreads && kFeatures % (8 * L) == 0);
  uint4 raw[kUnits][L];

  __device__ __forceinline__ void load(const T* p, int64_t stride, int tokens, int features, bool wide) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = threadIdx.x + u * kThreads, feature = unit % (kFeatures / L) * L, token = unit / (kFeatures / L) * L;
#pragma unroll
      for (int e = 0; e < L; ++e)
        raw[u][e] = load_row(p + (token + e) * stride + feature, token + e < tokens ? features - feature : 0, wide);
    }
  }
  __device__ __forceinline__ void store(uint4* shared) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = threadIdx.x + u * kThreads, group = unit % (kFeatures / L), chunk = unit / (kFeatures / L);
#pragma unroll
      for (int f = 0; f < L; ++f) {
        uint4 column;
        T* to = reinterpret_cast<T*>(&column);
#pragma unroll
        for (int e = 0; e < L; ++e) to[e] = reinterpret_cast<const T*>(&raw[u][e])[f];
        shared[(group * L + f) * 8 + (chunk ^ group % 8)] = column;
      }
    }
  }
};

template <class T> __device__ __forceinline__ uint4 chunk_of(const uint4* shared, int feature, int j) {
  return shared[feature * 8 + (j ^ feature / kLanes<T> % 8)];
}

// kColumns features in turns of as many as the registers take.
template <class T>
__device__ __forceinline__ void stage_columns(uint4* shared, const T* p, int64_t stride, int tokens, int features, bool wide) {
#pragma unroll 1
  for (int f = 0; f < kColumns; f += 32 * kLanes<T>) {
    Slab<T, 32 * kLanes<T>> slab;
    slab.load(p + f, stride, tokens, features - f, wide);
    slab.store(shared + f * 8);
  }
}

// --- sampled product ---

template <class T> struct Sampled {
  const T *dy, *x;
  const int32_t *row_offsets, *columns;
  acc_t<T>*partial, *out;  // [splits, nnz] in the order of list, [nnz]
  uint32_t* list;          // [nnz]: row in its chunk << 16 | column in its block; by chunk, block, row, column
  int32_t *source, *sections;  // [nnz] the entry; [chunks, blocks, 2] begin and end in list
  int64_t T_, nnz, dy_stride, x_stride, slabs, split_slabs;
  int d, k, chunks, blocks, parts, part_chunks, splits;
  bool wide_dy, wide_x;
};

__device__ __forceinline__ int first_from(const int32_t* columns, int begin, int end, int64_t column) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (columns[middle] < column) begin = middle + 1;
    else end = middle;
  }
  return begin;
}

// Lists the entries of kRows rows x kColumns columns: a thread counts those of a row, then every thread copies as many.
template <class T> __global__ void __launch_bounds__(kThreads) arrange(Sampled<T> a) {
  static_assert(kRows == kThreads);
  __shared__ int counts[2][kThreads], skipped[2][kThreads], first[kThreads];
  const int chunk = static_cast<int>(blockIdx.x) / a.blocks, block = static_cast<int>(blockIdx.x) % a.blocks;
  const int64_t row = int64_t{chunk} * kRows + threadIdx.x;
  int begin = 0, end = 0;
  int low = 0, high = 0;
  if (row < a.d) {
    begin = a.row_offsets[row], end = a.row_offsets[row + 1];
    low = first_from(a.columns, begin, end, int64_t{block} * kColumns);
    high = first_from(a.columns, low, end, int64_t{block + 1} * kColumns);
  }
  first[threadIdx.x] = low;
  counts[0][threadIdx.x] = high - low;
  skipped[0][threadIdx.x] = low - begin;
  int now = 0;
  for (int step = 1; step < kThreads; step *= 2, now ^= 1) {  // inclusive sums; each step reads one buffer, writes the other
    __syncthreads();
    const bool add = static_cast<int>(threadIdx.x) >= step;
    counts[now ^ 1][threadIdx.x] = counts[now][threadIdx.x] + (add ? counts[now][threadIdx.x - step] : 0);
    skipped[now ^ 1][threadIdx.x] = skipped[now][threadIdx.x] + (add ? skipped[now][threadIdx.x - step] : 0);
  }
  __syncthreads();
  const int* upto = counts[now];
  const int total = upto[kThreads - 1], base = a.row_offsets[int64_t{chunk} * kRows] + skipped[now][kThreads - 1];
  if (threadIdx.x == 0) a.sections[2 * blockIdx.x] = base, a.sections[2 * blockIdx.x + 1] = base + total;
  for (int n = threadIdx.x; n < total; n += kThreads) {
    int r = 0, last = kThreads - 1;  // the first row with upto > n
    while (r < last) {
      const int middle = (r + last) / 2;
      if (upto[middle] <= n) r = middle + 1;
      else last = middle;
    }
    const int p = first[r] + n - (r > 0 ? upto[r - 1] : 0);
    a.list[base + n] = static_cast<uint32_t>(r) << 16 | static_cast<uint32_t>(a.columns[p] - block * kColumns);
    a.source[base + n] = p;
  }
}

// v[e] of eight lanes, summed over the lanes: lane e of the eight gets Σ v[e].
template <class A> __device__ __forceinline__ A sum_of_eight(A (&v)[8], int j) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2)
#pragma unroll
    for (int e = 0; e < half; ++e) {
      const bool upper = j & half;
      const A mine = upper ? v[e + half] : v[e], other = upper ? v[e] : v[e + half];
      v[e] = mine + __shfl_xor_sync(0xffffffffu, other, half);
    }
  return v[0];
}

// A block keeps kColumns columns of a slab of x, passes over its part of the rows of dy, and adds to its own partial sums.
template <class T> __global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) sampled_product(Sampled<T> a) {
  using A = acc_t<T>;
  constexpr int L = kLanes<T>;
  uint4* x = reinterpret_cast<uint4*>(dynamic_shared());  // [kColumns, 8]
  uint4* dy = x + kColumns * 8;                           // [kRows, 8]
  const int lane = threadIdx.x % 32, j = lane % 8, group = threadIdx.x / 8;
  const int block = static_cast<int>(blockIdx.x) % a.blocks;
  const int part = static_cast<int>(blockIdx.x) / a.blocks % a.parts, split = static_cast<int>(blockIdx.x) / a.blocks / a.parts;
  const int chunk0 = part * a.part_chunks, chunk1 = min_of(chunk0 + a.part_chunks, a.chunks);
  const int64_t slab0 = split * a.split_slabs, slab1 = min_of(slab0 + a.split_slabs, a.slabs);
  A* partial = a.partial + split * a.nnz;
  const int column0 = block * kColumns;
  for (int64_t slab = slab0; slab < slab1; ++slab) {
    const int64_t token0 = slab * kTokens<T>;
    const int tokens = static_cast<int>(min_of<int64_t>(a.T_ - token0, kTokens<T>));
    Slab<T, kRows> next;
    const auto fetch = [&](int chunk) {
      next.load(a.dy + token0 * a.dy_stride + int64_t{chunk} * kRows, a.dy_stride, tokens, a.d - chunk * kRows, a.wide_dy);
    };
    __syncthreads();  // x of the previous slab has been used
    stage_columns(x, a.x + token0 * a.x_stride + column0, a.x_stride, tokens, a.k - column0, a.wide_x);
    fetch(chunk0);
    for (int chunk = chunk0; chunk < chunk1; ++chunk) {
      __syncthreads();  // dy of the previous chunk has been used
      next.store(dy);
      __syncthreads();
      if (chunk + 1 < chunk1) fetch(chunk + 1);
      const int32_t* section = a.sections + 2 * (int64_t{chunk} * a.blocks + block);
      const int begin = section[0], end = section[1], share = (end - begin + kGroups - 1) / kGroups;
      const int64_t first = int64_t{begin} + int64_t{group} * share, last = min_of<int64_t>(first + share, end);
      for (int i = 0; i < share; i += 8) {  // eight entries at a time, as many turns in every group
        const int64_t p = first + i + j;
        const uint32_t mine = p < last ? a.list[p] : 0;
        const A before = p < last && slab > slab0 ? partial[p] : A(0);
        A v[8] = {};
        uint4 of_dy = {};
        int held = -1;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (i + e >= share) break;
          const uint32_t entry = __shfl_sync(0xffffffffu, mine, (lane & 24) + e);
          const int row = static_cast<int>(entry >> 16);
          if (row != held) of_dy = chunk_of<T>(dy, row, j);  // neighbours in the list often share a row
          held = row;
          A left[L], right[L];
          unpack<T>(of_dy, left);
          unpack<T>(chunk_of<T>(x, static_cast<int>(entry & 0xffff), j), right);
#pragma unroll
          for (int t = 0; t < L; ++t) v[e] += left[t] * right[t];
        }
        const A sum = sum_of_eight(v, j);
        if (p < last) partial[p] = before + sum;
      }
    }
  }
}

// Adds the partial sums in the order of the splits, and puts entries back where they belong.
template <class T> __global__ void __launch_bounds__(kThreads) sampled_finish(Sampled<T> a) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= a.nnz) return;
  acc_t<T> sum = 0;
#pragma unroll 4
  for (int s = 0; s < a.splits; ++s) sum += a.partial[s * a.nnz + p];
  a.out[a.source[p]] = sum;
}

template <class T> cudaError_t launch_sddmm(const CsrSddmm& from, cudaStream_t stream) {
  const SampledPlan plan = sampled_plan(from.T, from.d, from.k, from.nnz, from.dtype);
  unsigned char* workspace = static_cast<unsigned char*>(from.workspace);
  Sampled<T> a{};
  a.dy = static_cast<const T*>(from.dy), a.x = static_cast<const T*>(from.x);
  a.row_offsets = from.row_offsets, a.columns = from.columns;
  a.partial = reinterpret_cast<acc_t<T>*>(workspace), a.out = static_cast<acc_t<T>*>(from.out);
  a.list = reinterpret_cast<uint32_t*>(workspace + plan.list_at);
  a.source = reinterpret_cast<int32_t*>(workspace + plan.source_at);
  a.sections = reinterpret_cast<int32_t*>(workspace + plan.sections_at);
  a.T_ = from.T, a.nnz = from.nnz, a.dy_stride = from.dy_stride, a.x_stride = from.x_stride;
  a.slabs = plan.slabs, a.split_slabs = plan.split_slabs;
  a.d = static_cast<int>(from.d), a.k = static_cast<int>(from.k);
  a.chunks = static_cast<int>(plan.chunks), a.blocks = static_cast<int>(plan.blocks);
  a.parts = static_cast<int>(plan.parts), a.part_chunks = static_cast<int>(plan.part_chunks);
  a.splits = static_cast<int>(plan.splits);
  a.wide_dy = aligned_rows(from.dy, from.dy_stride, sizeof(T)), a.wide_x = aligned_rows(from.x, from.x_stride, sizeof(T));
  cudaError_t error = enqueue(arrange<T>, plan.chunks * plan.blocks, kThreads, 0, stream, a);
  if (error != cudaSuccess) return error;
  error = enqueue(sampled_product<T>, plan.blocks * plan.parts * plan.splits, kThreads, kSlabBytes * (kColumns + kRows), stream, a);
  if (error != cudaSuccess) return error;
  return enqueue(sampled_finish<T>, ceil_div(from.nnz, kThreads), kThreads, 0, stream, a);
}

// --- product with x ---

template <class T> struct Product {
  T* out;
  const T* x;
  const void* values;
  const int32_t *row_offsets, *columns, *permutation;
  int64_t T_, out_stride, x_stride;
  int d, k, row_tiles;
  DType values_dtype;
  bool wide;

  __device__ __forceinline__ acc_t<T> entry(int64_t p) const {
    return load_any<acc_t<T>>(values, permutation ? permutation[p] : p, values_dtype);
  }
};

constexpr int kMany = 12;  // rows of S that eight lanes sum in their registers: x is staged once for kMany * kGroups rows

// Many tokens: a block holds kColumns columns of a slab of x at a time, for all entries of kGroups * R rows of S. Eight lanes
// sum a row of S, each over its own tokens, so that nothing is added across threads.
template <class T, int R> __global__ void __launch_bounds__(kThreads, R == kMany ? 1 : 2) spmm_slab(Product<T> a) {
  using A = acc_t<T>;
  constexpr int L = kLanes<T>, kPitch = kGroups + 1;
  uint4* x = reinterpret_cast<uint4*>(dynamic_shared());  // [kColumns, 8]
  A* turned = reinterpret_cast<A*>(x);                    // [kTokens, kPitch], once x has been used
  static_assert(sizeof(A) * kTokens<T> * kPitch <= kSlabBytes * kColumns);
  const int j = threadIdx.x % 8, group = threadIdx.x / 8;
  const int64_t row0 = int64_t{blockIdx.x % static_cast<unsigned>(a.row_tiles)} * (kGroups * R) + group;
  const int64_t token0 = int64_t{blockIdx.x / static_cast<unsigned>(a.row_tiles)} * kTokens<T>;
  const int tokens = static_cast<int>(min_of<int64_t>(a.T_ - token0, kTokens<T>));
  A sum[R][L] = {};
  int next[R];  // the entry that each row has come to
#pragma unroll
  for (int i = 0; i < R; ++i) next[i] = a.row_offsets[min_of<int64_t>(row0 + i * kGroups, a.d)];
  for (int column0 = 0; column0 < a.k; column0 += kColumns) {
    __syncthreads();  // the previous columns have been used
    stage_columns(x, a.x + token0 * a.x_stride + column0, a.x_stride, tokens, a.k - column0, a.wide);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int end = a.row_offsets[min_of<int64_t>(row0 + i * kGroups + 1, a.d)];
      for (; next[i] < end; ++next[i]) {
        const int column = a.columns[next[i]] - column0;
        if (column >= kColumns) break;
        const A s = a.entry(next[i]);
        A v[L];
        unpack<T>(chunk_of<T>(x, column, j), v);
#pragma unroll
        for (int t = 0; t < L; ++t) sum[i][t] += s * v[t];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {  // kGroups rows at a time, turned so that neighbours write neighbours
    __syncthreads();
#pragma unroll
    for (int t = 0; t < L; ++t) turned[(j * L + t) * kPitch + group] = sum[i][t];
    __syncthreads();
    const int64_t row = row0 - group + i * kGroups + threadIdx.x % kGroups;
    for (int t = threadIdx.x / kGroups; t < tokens && row < a.d; t += kThreads / kGroups) {
      T* to = a.out + (token0 + t) * a.out_stride + row;
      *to = rounded<T>(value(*to) + turned[t * kPitch + threadIdx.x % kGroups]);
    }
  }
}

// Few tokens: a warp for each row of S, 32 entries at a time, eight tokens of x straight from the caches.
template <class T> __global__ void __launch_bounds__(kThreads) spmm_few(Product<T> a) {
  using A = acc_t<T>;
  constexpr int kFew = 8, kTile = kThreads / kFew, kWarps = kThreads / 32;
  __shared__ A sums[kFew][kTile];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = int64_t{blockIdx.x % static_cast<unsigned>(a.row_tiles)} * kTile;
  const int64_t token0 = int64_t{blockIdx.x / static_cast<unsigned>(a.row_tiles)} * kFew;
  for (int i = warp; i < kTile && row0 + i < a.d; i += kWarps) {
    const int end = a.row_offsets[row0 + i + 1];
    A sum[kFew] = {};
    for (int64_t p = int64_t{a.row_offsets[row0 + i]} + lane; p < end; p += 32) {
      const T* x = a.x + token0 * a.x_stride + a.columns[p];
      const A s = a.entry(p);
#pragma unroll
      for (int t = 0; t < kFew; ++t)
        if (token0 + t < a.T_) sum[t] += s * value(x[t * a.x_stride]);
    }
#pragma unroll
    for (int t = 0; t < kFew; ++t) {
      const A total = warp_sum(sum[t]);
      if (lane == 0) sums[t][i] = total;
    }
  }
  __syncthreads();
  const int64_t row = row0 + threadIdx.x % kTile, token = token0 + threadIdx.x / kTile;
  if (row >= a.d || token >= a.T_) return;
  T* to = a.out + token * a.out_stride + row;
  *to = rounded<T>(value(*to) + sums[threadIdx.x / kTile][threadIdx.x % kTile]);
}

template <class T> cudaError_t launch_spmm(const CsrSpmm& from, cudaStream_t stream) {
  Product<T> a{static_cast<T*>(from.out), static_cast<const T*>(from.x), from.values,
               from.row_offsets, from.columns, from.permutation,
               from.T, from.out_stride, from.x_stride,
               static_cast<int>(from.d), static_cast<int>(from.k), 0,
               from.values_dtype, aligned_rows(from.x, from.x_stride, sizeof(T))};
  const auto run = [&](auto kernel, int64_t rows, int64_t tokens, int64_t shared) {
    a.row_tiles = static_cast<int>(ceil_div(from.d, rows));
    return enqueue(kernel, a.row_tiles * ceil_div(from.T, tokens), kThreads, shared, stream, a);
  };
  if (from.T <= 16) return run(spmm_few<T>, kThreads / 8, 8, 0);
  const int64_t slabs = ceil_div(from.T, kTokens<T>);
  if (slabs * ceil_div(from.d, kMany * kGroups) < 64)  // fewer rows in a block, so that there are blocks enough
    return run(spmm_slab<T, 2>, 2 * kGroups, kTokens<T>, kSlabBytes * kColumns);
  return run(spmm_slab<T, kMany>, kMany * kGroups, kTokens<T>, kSlabBytes * kColumns);
}

}  // namespace

cudaError_t csr_scatter(const CsrScatter& a, cudaStream_t stream) {
  return for_dtype(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Pattern pattern{a.row_offsets, a.columns, a.d, a.nnz};
    return enqueue(scatter<T>, ceil_div(a.nnz, kThreads), kThreads, 0, stream, pattern, static_cast<T*>(a.out), a.values,
                   a.values_dtype, a.out_strides[0], a.out_strides[1], a.accumulate);
  });
}

cudaError_t csr_gather(const CsrGather& a, cudaStream_t stream) {
  return for_dtype(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Pattern pattern{a.row_offsets, a.columns, a.n, a.nnz};
    return enqueue(gather<T>, ceil_div(a.nnz, kThreads), kThreads, 0, stream, pattern, static_cast<T*>(a.out), a.dense,
                   a.dense_dtype, a.dense_strides[0], a.dense_strides[1]);
  });
}

cudaError_t csr_spmm(const CsrSpmm& a, cudaStream_t stream) {
  if (a.T == 0 || a.d == 0 || a.nnz == 0) return cudaSuccess;
  if (a.d > kMaxColumns || a.k > kMaxColumns) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) { return launch_spmm<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

// T may be 0: out is then zeros, written by the last stage.
cudaError_t csr_sddmm(const CsrSddmm& a, cudaStream_t stream) {
  if (a.nnz == 0) return cudaSuccess;
  if (a.d > kMaxColumns || a.k > kMaxColumns) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) { return launch_sddmm<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
