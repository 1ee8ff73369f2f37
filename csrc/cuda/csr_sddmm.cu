// csr_sddmm (METHODS 1.5): dyᵀ x at the entries of S.
//
// What it costs at T = 8192, d = k = 4096, 0.6 % (nnz = 10^5), bf16. Predicted, not measured:
// * through L2, (k / 512) T d 2 B + T k 2 B + slabs nnz 12 B = 0.76 GB: 140 us at 5.5 TB/s;
// * from shared memory, at most nnz T 4 B = 3.3 GB: 115 us at 132 SMs of 128 B a cycle;
// * the dense product, for comparison, 275 GFLOP: 400 us.
#include "csr.cuh"

namespace spectral_ops::cuda {

namespace {

constexpr int kRows = static_cast<int>(kSampledRows);

template <class T> struct Sampled {
  const T *dy, *x;
  const int32_t *row_offsets, *columns;
  acc_t<T>*partial, *out;      // [splits, nnz] in the order of list; [nnz] in that of S
  uint32_t* list;              // [nnz], sorted by chunk, block, row, column: row in its chunk << 16 | column in its block
  int32_t *source, *sections;  // [nnz]: where in S; [chunks, blocks, 2]: begin and end in list
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

// Lists the entries of kRows rows x kColumns columns. First each thread counts the entries of one row. Then every thread
// copies as many entries as any other.
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

// A block keeps kColumns columns of a slab of x. It passes over its part of the rows of dy. It adds to its own partial sums.
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

}  // namespace

// T may be 0: out is then zeros, written by the last stage.
cudaError_t csr_sddmm(const CsrSddmm& a, cudaStream_t stream) {
  if (a.nnz == 0) return cudaSuccess;
  if (a.d > kMaxColumns || a.k > kMaxColumns) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) { return launch_sddmm<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
