// csr_sddmm (METHODS 1.5): dyᵀ x at the entries of S.
//
// What it costs at T = 8192, d = k = 4096, 0.6 % (nnz = 10^5), bf16. Predicted, not measured:
// * through L2, (k / 512) T d 2 B + T k 2 B + slabs nnz 12 B = 0.76 GB: 140 us at 5.5 TB/s;
// * from shared memory, nnz T 4 B = 3.3 GB: 115 us at 132 SMs of 128 B a cycle;
// * instructions, 340 for 32 entries of a slab, and the slabs: 200 us at one a cycle;
// * the dense product, for comparison, 275 GFLOP: 400 us.
#include "csr.cuh"

namespace spectral_ops::cuda {

namespace {

constexpr int kRows = static_cast<int>(kSampledRows);
constexpr int kGroups = kThreads / 8;  // of eight lanes, each with 16 bytes of the tokens of a slab

template <class T> struct Sampled {
  const T *dy, *x;
  const int32_t *row_offsets, *columns;
  acc_t<T>*partial, *out;      // [splits, nnz] in the order of list; [nnz] in that of S
  uint32_t* list;              // [nnz], sorted by chunk, block, row, column: where in shared memory dy is << 16 | where x is
  int32_t *source, *sections;  // [nnz]: where in S; [chunks, blocks, 2]: begin and end in list
  int64_t T_, nnz, dy_stride, x_stride, slabs, split_slabs;
  int d, k, chunks, blocks, parts, part_chunks, splits;
  bool wide_dy, wide_x;
};

// Lists the entries of kRows rows x kColumns columns.
template <class T> __global__ void __launch_bounds__(kThreads) sampled_arrange(Sampled<T> a) {
  const int chunk = static_cast<int>(blockIdx.x) / a.blocks, block = static_cast<int>(blockIdx.x) % a.blocks;
  const auto row = [&](int r, int first, int count) {
    if (r == 0) a.sections[2 * blockIdx.x] = first;
    if (r == kRows - 1) a.sections[2 * blockIdx.x + 1] = first + count;
  };
  arrange<kRows>(a.row_offsets, a.columns, a.d, chunk, block, row, [&](int i, int r, int p) {
    a.list[i] = static_cast<uint32_t>(place_of<T>(r)) << 16 | static_cast<uint32_t>(place_of<T>(a.columns[p] - block * kColumns));
    a.source[i] = p;
  });
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

// Stages kColumns features, in turns of as many as the registers take.
template <class T, Ends kEnds>
__device__ __forceinline__ void stage_columns(unsigned char* shared, const T* p, int64_t stride, int tokens, int features, bool wide) {
#pragma unroll 1
  for (int f = 0; f < kColumns; f += 32 * kLanes<T>) {
    Slab<T, 32 * kLanes<T>, kThreads, kEnds> slab;
    slab.load(p + f, stride, tokens, features - f, wide);
    slab.store(shared + f * kSlabBytes);
  }
}

// A block keeps kColumns columns of a slab of x. It passes over its part of the rows of dy. It adds to its own partial sums.
template <class T, Ends kEnds> __global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) sampled_product(Sampled<T> a) {
  using A = acc_t<T>;
  constexpr int L = kLanes<T>;
  unsigned char* x = dynamic_shared();           // [kColumns, 8] of 16 bytes
  unsigned char* dy = x + kColumns * kSlabBytes;  // [kRows, 8]
  const int j = threadIdx.x % 8, group = threadIdx.x / 8;
  const int block = static_cast<int>(blockIdx.x) % a.blocks;
  const int part = static_cast<int>(blockIdx.x) / a.blocks % a.parts, split = static_cast<int>(blockIdx.x) / a.blocks / a.parts;
  const int chunk0 = part * a.part_chunks, chunk1 = min_of(chunk0 + a.part_chunks, a.chunks);
  const int64_t slab0 = split * a.split_slabs, slab1 = min_of(slab0 + a.split_slabs, a.slabs);
  A* partial = a.partial + split * a.nnz;
  const int column0 = block * kColumns;
  for (int64_t slab = slab0; slab < slab1; ++slab) {
    const int64_t token0 = slab * kTokens<T>;
    const int tokens = static_cast<int>(min_of<int64_t>(a.T_ - token0, kTokens<T>));
    Slab<T, kRows, kThreads, kEnds> next;
    const auto fetch = [&](int chunk) {
      next.load(a.dy + token0 * a.dy_stride + int64_t{chunk} * kRows, a.dy_stride, tokens, a.d - chunk * kRows, a.wide_dy);
    };
    __syncthreads();  // x of the previous slab has been used
    stage_columns<T, kEnds>(x, a.x + token0 * a.x_stride + column0, a.x_stride, tokens, a.k - column0, a.wide_x);
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
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          if (i + e >= share) break;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int both = __shfl_sync(0xffffffffu, static_cast<int>(mine), e + h, 8);
            const uint4 of_dy = chunk_at(dy, both >> 16 & 0xffff, j), of_x = chunk_at(x, both & 0xffff, j);
            A left[L], right[L];
            widen<T>(of_dy, left);
            widen<T>(of_x, right);
#pragma unroll
            for (int t = 0; t < L; ++t) v[e + h] += left[t] * right[t];
          }
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
  cudaError_t error = enqueue(sampled_arrange<T>, plan.chunks * plan.blocks, kThreads, 0, stream, a);
  if (error != cudaSuccess) return error;
  const bool whole = a.wide_dy && a.wide_x && a.d % kLanes<T> == 0 && a.k % kLanes<T> == 0;
  error = enqueue(whole ? sampled_product<T, Ends::whole> : sampled_product<T, Ends::part>, plan.blocks * plan.parts * plan.splits, kThreads,
                  kSlabBytes * (kColumns + kRows), stream, a);
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
