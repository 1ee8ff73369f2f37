// csr_spmm_ (METHODS 1.5): out += x Sᵀ.
//
// What many tokens cost at T = 8192, d = k = 4096, 0.6 % (nnz = 10^5), bf16, on an H100. Predicted, not measured:
// * instructions, 1408 blocks x 16 warps x 8580: 215 us at one a cycle of a scheduler. Most are 43 for a pair of entries. Four
//   rows share a warp, which takes as many turns as the longest: 5.4 entries for 3.1.
// * through L2, (d / 384) T k 2 B + 2 T d 2 B + slabs nnz 8 B = 1.0 GB: 190 us at 5.5 TB/s;
// * from shared memory, 180 us at 132 SMs of 128 B a cycle; DRAM, 0.2 GB: 70 us.
#include "csr.cuh"

namespace spectral_ops::cuda {

namespace {

// An entry of S in the list: its value, and the place of its feature in shared memory.
template <class A> struct alignas(2 * sizeof(A)) Entry {
  A value;
  int at;
};

template <class T> struct Product {
  T* out;
  const T* x;
  const void* values;
  const int32_t *row_offsets, *columns, *permutation;
  Entry<acc_t<T>>* list;    // [nnz], sorted by chunk, block, row, column
  int2 *sections, *beyond;  // [tiles, blocks, chunks of a tile, kRows]: of a row, where in list its entries start, and how
                            // many | most of any of four rows << 16. Then two chunks beyond, which are read ahead.
  int64_t T_, out_stride, x_stride;
  int d, k, row_tiles, rows, blocks;  // rows: chunks of a tile
  DType values_dtype;

  __device__ __forceinline__ acc_t<T> entry(int64_t p) const {
    return load_any<acc_t<T>>(values, permutation ? permutation[p] : p, values_dtype);
  }
};

constexpr int kRows = static_cast<int>(kProductRows);
constexpr int kProductThreads = 8 * kRows;  // eight lanes share a row of S, and each has its own tokens

template <class T> __global__ void __launch_bounds__(kThreads) spmm_arrange(Product<T> a) {
  const int chunk = static_cast<int>(blockIdx.x) / a.blocks, block = static_cast<int>(blockIdx.x) % a.blocks;
  const auto row = [&](int r, int first, int count) {
    int most = max_of(count, __shfl_xor_sync(0xffffffffu, count, 1));
    most = max_of(most, __shfl_xor_sync(0xffffffffu, most, 2));
    const int64_t turn = (int64_t{chunk / a.rows} * a.blocks + block) * a.rows + chunk % a.rows;
    a.sections[turn * kRows + r] = make_int2(first, count | most << 16);
    if (blockIdx.x == 0) a.beyond[r] = a.beyond[kRows + r] = int2{};
  };
  arrange<kRows>(a.row_offsets, a.columns, a.d, chunk, block, row, [&](int i, int, int p) {
    a.list[i] = {a.entry(p), place_of<T>(a.columns[p] - block * kColumns)};
  });
}

// Many tokens: a block holds kColumns columns of a slab of x at a time. It sums all entries of R chunks of rows of S. A warp
// has four rows of a chunk, which take turns as many as the longest of them; nothing is added across threads.
template <class T, int R, bool kWhole> __global__ void __launch_bounds__(kProductThreads, 1) spmm_slab(Product<T> a) {
  using A = acc_t<T>;
  constexpr int L = kLanes<T>, Q = 16 / sizeof(A), kZero = kColumns * 128;  // the place of a feature of zeros
  unsigned char* x = dynamic_shared();  // [kColumns, 8] of 16 bytes
  const int j = threadIdx.x % 8, group = threadIdx.x / 8;
  const int tile = static_cast<int>(blockIdx.x) % a.row_tiles;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) / a.row_tiles * kTokens<T>;
  const int tokens = static_cast<int>(min_of<int64_t>(a.T_ - token0, kTokens<T>));
  const int2* sections = a.sections + int64_t{tile} * a.blocks * R * kRows + group;
  const auto entry = [&](const int2& of, int e) {
    return e + j < (of.y & 0xffff) ? a.list[of.x + e + j] : Entry<A>{0, kZero};
  };
  Slab<T, kColumns, kProductThreads, kWhole ? Ends::padded : Ends::part> slab;
  const auto fetch = [&](int block) {
    const int column = block * kColumns;
    slab.load(a.x + token0 * a.x_stride + column, a.x_stride, tokens, a.k - column, false);
  };
  A sum[R][L] = {};
  if constexpr (kWhole) fetch(0);
  if (threadIdx.x < 8) reinterpret_cast<uint4*>(x + kZero)[threadIdx.x] = uint4{};
  // what is needed next is under way: the section after the next, and the first entries of the next
  int2 now = sections[0], next = sections[kRows];
  Entry<A> first = entry(now, 0);
  for (int block = 0; block < a.blocks; ++block) {
    if constexpr (!kWhole) fetch(block);
    __syncthreads();  // the previous columns have been used
    slab.store(x);
    __syncthreads();
    if (kWhole && block + 1 < a.blocks) fetch(block + 1);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int2 later = sections[(i + 2) * kRows];
      const Entry<A> next_first = entry(next, 0);
      const int most = __shfl_sync(0xffffffffu, now.y >> 16, 0);  // the same in a warp, which the compiler cannot see
      for (int e0 = 0; e0 < most; e0 += 8) {
        const Entry<A> mine = first;
        if (e0 + 8 < most) first = entry(now, e0 + 8);
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          if (e0 + e >= most) break;
#pragma unroll
          for (int h = 0; h < 2; ++h) {  // where a row has no more entries: zero times zeros
            const int at = __shfl_sync(0xffffffffu, mine.at, e + h, 8);
            const A s = __shfl_sync(0xffffffffu, mine.value, e + h, 8);
            const uint4 raw = chunk_at(x, at, j);
            A v[L];
            widen<T>(raw, v);
#pragma unroll
            for (int t = 0; t < L; ++t) sum[i][t] += s * v[t];
          }
        }
      }
      now = next, next = later, first = next_first;
    }
    sections += R * kRows;
  }
  // Turned through shared memory, a chunk at a time and in two buffers, so that a thread adds to 16 bytes of out.
  const int token = threadIdx.x / (kRows / L), row = threadIdx.x % (kRows / L) * L;
  const int64_t row0 = int64_t{tile} * (R * kRows) + row;
  T* out = a.out + (token0 + token) * a.out_stride + row0;
  const auto left = [&](int i) {
    return token < tokens ? static_cast<int>(max_of<int64_t>(min_of<int64_t>(a.d - row0 - i * kRows, L), 0)) : 0;
  };
  uint4 old[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if constexpr (kWhole) old[i] = left(i) > 0 ? load16(out + i * kRows) : uint4{};
    else old[i] = load_row(out + i * kRows, left(i), false);
  }
  __syncthreads();  // the last columns have been used
#pragma unroll
  for (int i = 0; i < R; ++i) {
    A* turned = reinterpret_cast<A*>(x) + i % 2 * kTokens<T> * kRows;  // [kTokens, kRows], 16 bytes swizzled by token / L
#pragma unroll
    for (int t = 0; t < L; ++t) turned[(j * L + t) * kRows + (group / Q ^ j) * Q + group % Q] = sum[i][t];
    __syncthreads();
    A v[L];
    unpack<T>(old[i], v);
#pragma unroll
    for (int q = 0; q < L / Q; ++q) {
      const uint4 raw = reinterpret_cast<const uint4*>(turned + token * kRows)[(row / Q + q) ^ token / L];
      A part[Q];
      unpack<A>(raw, part);
#pragma unroll
      for (int e = 0; e < Q; ++e) v[q * Q + e] += part[e];
    }
    if constexpr (!kWhole) store_row(out + i * kRows, left(i), false, v);
    else if (left(i) > 0) store16(out + i * kRows, pack<T>(v));
  }
}

// Few tokens: a warp for each row of S, 32 entries at a time, eight tokens of x straight from the caches.
template <class T> __global__ void __launch_bounds__(kThreads) spmm_few(Product<T> a) {
  using A = acc_t<T>;
  constexpr int kFew = 8, kTile = kThreads / kFew;
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
  const ProductPlan plan = product_plan(from);
  Product<T> a{};
  a.out = static_cast<T*>(from.out), a.x = static_cast<const T*>(from.x), a.values = from.values;
  a.row_offsets = from.row_offsets, a.columns = from.columns, a.permutation = from.permutation;
  a.T_ = from.T, a.out_stride = from.out_stride, a.x_stride = from.x_stride;
  a.d = static_cast<int>(from.d), a.k = static_cast<int>(from.k), a.values_dtype = from.values_dtype;
  if (plan.few) {
    a.row_tiles = static_cast<int>(ceil_div(from.d, kThreads / 8));
    return enqueue(spmm_few<T>, a.row_tiles * ceil_div(from.T, 8), kThreads, 0, stream, a);
  }
  a.list = static_cast<Entry<acc_t<T>>*>(from.workspace);
  a.sections = reinterpret_cast<int2*>(static_cast<unsigned char*>(from.workspace) + plan.sections_at);
  a.beyond = a.sections + plan.chunks * plan.blocks * kProductRows;
  a.row_tiles = static_cast<int>(plan.tiles), a.rows = static_cast<int>(plan.rows), a.blocks = static_cast<int>(plan.blocks);
  const cudaError_t error = enqueue(spmm_arrange<T>, plan.chunks * plan.blocks, kThreads, 0, stream, a);
  if (error != cudaSuccess) return error;
  const auto run = [&](auto kernel) {
    return enqueue(kernel, plan.tiles * plan.slabs, kProductThreads, kSlabBytes * (kColumns + 1), stream, a);
  };
  if (!plan.whole) return run(spmm_slab<T, kFewRows, false>);
  return plan.rows == kFewRows ? run(spmm_slab<T, kFewRows, true>) : run(spmm_slab<T, kManyRows, true>);
}

}  // namespace

cudaError_t csr_spmm(const CsrSpmm& a, cudaStream_t stream) {
  if (a.T == 0 || a.d == 0 || a.nnz == 0) return cudaSuccess;
  if (a.d > kMaxColumns || a.k > kMaxColumns) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) { return launch_spmm<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
