// column_norm and column_norm_cached_ (METHODS 1.2).
//
// W is read once. A first kernel leaves partial sums of P = W Aᵀ and ‖W_o‖² for tiles of rows and ranges of columns. Further
// blocks of the same launch form A Aᵀ. A second kernel adds them up, a warp for each row, and recomputes the rows that cancel.
//
// bf16 and fp16 weights are multiplied on the tensor cores. A enters as the sum of two 16-bit values (high + low), which keeps
// 16 bits of it or more. The arithmetic costs far less than reading W.
#include "common.cuh"
#include "dora.h"

namespace spectral_ops::cuda {

namespace {

constexpr int kNormThreads = 128;
constexpr double kCancellation = 1.0 / 64;  // as in spectral_ops/functional/dora.py

// --- fingerprint of A and B ---

struct Stamp {
  // [2, kStampBlocks] partial sums, then a flag: whether the norm is to be recomputed. Null where there is no stamp.
  uint64_t* parts;
  int64_t* previous;  // [2]
  bool force;
};

// Adds a well-mixed function of (bits, position) to each sum. They are sums of integers, so the order does not matter.
__device__ __forceinline__ void mix(uint64_t bits, uint64_t position, uint64_t& low, uint64_t& high) {
  uint64_t z = bits + position * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  low += z ^ (z >> 31);
  high += (z >> 32) * (z & 0xffffffffu);
}

struct Factor {  // A or B: any dtype, any strides
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  DType dtype;

  template <class T> __device__ __forceinline__ T at(int64_t i, int64_t j) const {
    return load_any<T>(data, i * row_stride + j * column_stride, dtype);
  }
  __device__ __forceinline__ uint64_t bits(int64_t n) const {
    const int64_t i = n / columns, at = i * row_stride + (n - i * columns) * column_stride;
    switch (dtype) {
      case DType::float64: return static_cast<const uint64_t*>(data)[at];
      case DType::float32: return static_cast<const uint32_t*>(data)[at];
      default: return static_cast<const uint16_t*>(data)[at];
    }
  }
};

__global__ void __launch_bounds__(kThreads) fingerprint(Factor A, Factor B, Stamp stamp) {
  __shared__ uint64_t parts[2][kThreads / 32];
  const int64_t in_A = A.rows * A.columns, total = in_A + B.rows * B.columns;
  uint64_t low = 0, high = 0;
  for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < total; n += kStampBlocks * kThreads)
    mix(n < in_A ? A.bits(n) : B.bits(n - in_A), static_cast<uint64_t>(n) + 1, low, high);
  low = warp_sum(low), high = warp_sum(high);
  if (threadIdx.x % 32 == 0) parts[0][threadIdx.x / 32] = low, parts[1][threadIdx.x / 32] = high;
  __syncthreads();
  if (threadIdx.x < 2) {
    uint64_t sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += parts[threadIdx.x][w];
    stamp.parts[threadIdx.x * kStampBlocks + blockIdx.x] = sum;
  }
}

// The fingerprint that the blocks left, in every lane of the calling warp.
__device__ __forceinline__ uint64_t fingerprint_sum(const Stamp& stamp, int which) {
  static_assert(kStampBlocks == 64, "two for each lane");
  const uint64_t* p = stamp.parts + which * kStampBlocks + threadIdx.x % 32;
  return warp_sum(p[0] + p[32]);
}

// --- P = W Aᵀ ---

template <class T> struct Norm {
  const T* weight;
  Factor A, B;
  acc_t<T>*norm, *products, *squares, *gram;  // products [splits, rows, r]; squares [splits, rows]; gram [r, r]
  acc_t<T> scale;
  int64_t rows, row_stride, column_stride, split_columns;
  int columns, r, splits, rank_tiles, gram_side;
  bool wide;
  Stamp stamp;
};

// Whether A and B are unchanged, the same in every thread. The first block tells the second kernel, which moves the stamp.
template <class T> __device__ __forceinline__ bool unchanged(const Norm<T>& a) {
  if (!a.stamp.parts) return false;
  const bool same = !a.stamp.force & (fingerprint_sum(a.stamp, 0) == static_cast<uint64_t>(a.stamp.previous[0])) &
                    (fingerprint_sum(a.stamp, 1) == static_cast<uint64_t>(a.stamp.previous[1]));
  if (blockIdx.x == 0 && threadIdx.x == 0) a.stamp.parts[2 * kStampBlocks] = !same;
  return same;
}

// One 16 x 16 tile of A Aᵀ: 8 groups of 16 threads share the columns, a thread sums 4 x 4.
constexpr int kGramPiece = 128;
template <class A> constexpr int kGramShared = static_cast<int>(sizeof(A)) * 2 * 16 * (kGramPiece + 1);

template <class T> __device__ void gram_tile(const Norm<T>& a, int tile) {
  using A = acc_t<T>;
  constexpr int kPitch = kGramPiece + 1, kGroups = kNormThreads / 16;
  static_assert(kGroups * 256 <= 2 * 16 * kPitch, "the sums of the groups use the same memory");
  A* left = reinterpret_cast<A*>(dynamic_shared());  // [16, kPitch]
  A* right = left + 16 * kPitch;
  const int p0 = tile / a.gram_side * 16, q0 = tile % a.gram_side * 16;
  const int group = threadIdx.x / 16, p = threadIdx.x % 16 / 4 * 4, q = threadIdx.x % 4 * 4;
  A sum[4][4] = {};
  for (int c0 = 0; c0 < a.columns; c0 += kGramPiece) {
    __syncthreads();
    for (int n = threadIdx.x; n < 16 * kGramPiece; n += kNormThreads) {
      const int line = n / kGramPiece, c = n % kGramPiece;
      const bool inside = c0 + c < a.columns;
      left[line * kPitch + c] = inside && p0 + line < a.r ? a.A.template at<A>(p0 + line, c0 + c) : A(0);
      right[line * kPitch + c] = inside && q0 + line < a.r ? a.A.template at<A>(q0 + line, c0 + c) : A(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int c = group; c < kGramPiece; c += kGroups)
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][e] += left[(p + m) * kPitch + c] * right[(q + e) * kPitch + c];
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int e = 0; e < 4; ++e) left[group * 256 + (p + m) * 16 + q + e] = sum[m][e];  // [kGroups, 16, 16]
  __syncthreads();
  for (int n = threadIdx.x; n < 256; n += kNormThreads) {
    A total = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) total += left[g * 256 + n];
    if (p0 + n / 16 < a.r && q0 + n % 16 < a.r) a.gram[int64_t{p0 + n / 16} * a.r + q0 + n % 16] = total;
  }
}

// Which part of P a block makes. The rank tiles of one part of W run side by side, so that only the first reads W from memory.
struct Part {
  int64_t row0;
  int split, rank0, begin, end;  // columns [begin, end)

  template <class T> __device__ Part(const Norm<T>& a, int tile_rows, int tile_ranks) {
    const int block = static_cast<int>(blockIdx.x) - a.gram_side * a.gram_side;
    rank0 = block % a.rank_tiles * tile_ranks;
    split = block / a.rank_tiles % a.splits;
    row0 = int64_t{block / a.rank_tiles / a.splits} * tile_rows;
    begin = static_cast<int>(split * a.split_columns);
    end = static_cast<int>(min_of<int64_t>(begin + a.split_columns, a.columns));
  }
};

constexpr int kPiece = static_cast<int>(kNormPiece);
constexpr int kPitchA = kPiece + 32;  // of A in shared memory, such that 16-byte reads meet no bank conflicts

// Tensor cores: a warp owns 32 rows. As in lowrank.cuh, the order of the columns inside a product is chosen: 16 bytes of a row
// of W, and of A, are a lane's fragments for two products.
template <class T, int kTiles>
__global__ void __launch_bounds__(kNormThreads) norm_mma(Norm<T> a) {
  if (unchanged(a)) return;
  if (static_cast<int>(blockIdx.x) < a.gram_side * a.gram_side) return gram_tile(a, blockIdx.x);
  T* high = reinterpret_cast<T*>(dynamic_shared());  // [8 kTiles, kPitchA]
  T* low = high + 8 * kTiles * kPitchA;
  const Part part(a, 128, 64);
  const int lane = threadIdx.x % 32, i = lane / 4, q = lane % 4;
  const int64_t row0 = part.row0 + threadIdx.x / 32 * 32;
  const bool squares = part.rank0 == 0;

  uint4 next[4];  // rows row0 + 8 m + i, columns 8q .. 8q+7 of the next 32
  auto fetch = [&](int column0) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int64_t row = row0 + 8 * m + i;
      const int column = column0 + 8 * q, n = row < a.rows ? part.end - column : 0;
      const T* p = a.weight + row * a.row_stride + column;
      if (a.wide && n >= 8) {
        next[m] = load16(p);
      } else {
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = e < n ? value(p[e]) : 0.f;
        next[m] = pack<T>(v);
      }
    }
  };
  float P[2][kTiles][4] = {}, square[4] = {};
  fetch(part.begin);
  for (int piece = part.begin; piece < part.end; piece += kPiece) {
    __syncthreads();  // the previous piece has been used
    for (int n = threadIdx.x; n < 8 * kTiles * kPiece; n += kNormThreads) {
      const int p = n / kPiece, c = n % kPiece;
      float v = 0;
      if (part.rank0 + p < a.r && piece + c < part.end) v = a.A.template at<float>(part.rank0 + p, piece + c);
      const T rounded_v = rounded<T>(v);
      high[p * kPitchA + c] = rounded_v;
      low[p * kPitchA + c] = rounded<T>(v - value(rounded_v));
    }
    __syncthreads();
    for (int c = 0; c < kPiece && piece + c < part.end; c += 32) {
      uint4 raw[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) raw[m] = next[m];
      fetch(piece + c + 32);
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
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 A = load16((half ? low : high) + (8 * t + i) * kPitchA + c + 8 * q);
          const uint32_t first[2] = {A.x, A.y}, second[2] = {A.z, A.w};
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma<T>(P[m][t], W[m][0], first);
            mma<T>(P[m][t], W[m][1], second);
          }
        }
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int64_t row = row0 + 8 * m + i;
    square[m] += __shfl_xor_sync(0xffffffffu, square[m], 1);
    square[m] += __shfl_xor_sync(0xffffffffu, square[m], 2);
    if (row >= a.rows) continue;
    if (squares && q == 0) a.squares[part.split * a.rows + row] = square[m];
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int rank = part.rank0 + 8 * t + 2 * q + e;
        if (rank < a.r) a.products[(part.split * a.rows + row) * a.r + rank] = P[m / 2][t][2 * (m % 2) + e];
      }
  }
}

// Any dtype and strides, products without tensor cores: 64 rows by 8 kRanks ranks, 32 columns in shared memory at a time.
template <class T, int kRanks> struct PlainShape {
  static constexpr int kRows = 64, kColumns = 32, kPitchW = kRows + 4, kPitchA = 8 * kRanks + 4;
  static constexpr int kBytes = static_cast<int>(sizeof(acc_t<T>)) * kColumns * (kPitchW + kPitchA);
  static constexpr int kShared = kBytes > kGramShared<acc_t<T>> ? kBytes : kGramShared<acc_t<T>>;
};

template <class T, int kRanks>
__global__ void __launch_bounds__(kNormThreads, 3) norm_fma(Norm<T> a) {
  using A = acc_t<T>;
  using S = PlainShape<T, kRanks>;
  if (unchanged(a)) return;
  if (static_cast<int>(blockIdx.x) < a.gram_side * a.gram_side) return gram_tile(a, blockIdx.x);
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
      factor[c * S::kPitchA + p] = inside ? a.A.template at<A>(part.rank0 + p, c0 + c) : A(0);
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
      if (rank < a.r) a.products[(part.split * a.rows + row) * a.r + rank] = P[m][p];
    }
  }
}

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// c_o from the partial sums, a warp for each row. Where they cancel, c_o comes from V_o itself.
template <class T> __global__ void __launch_bounds__(kThreads, 4) norm_finish(Norm<T> a) {
  using A = acc_t<T>;
  if (a.stamp.parts) {
    if (!a.stamp.parts[2 * kStampBlocks]) return;
    if (blockIdx.x == 0 && threadIdx.x < 32) {  // nobody else looks at it in this kernel
      const uint64_t low = fingerprint_sum(a.stamp, 0), high = fingerprint_sum(a.stamp, 1);
      if (threadIdx.x == 0) a.stamp.previous[0] = static_cast<int64_t>(low), a.stamp.previous[1] = static_cast<int64_t>(high);
    }
  }
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (row >= a.rows) return;  // a whole warp
  A square = 0, cross = 0, own = 0, size = 0;
  for (int s = 0; s < a.splits; ++s) square += a.squares[s * a.rows + row];
  for (int p = lane; p < a.r; p += 32) {
    A product = 0, image = 0;
    for (int s = 0; s < a.splits; ++s) product += a.products[(s * a.rows + row) * a.r + p];
    for (int j = 0; j < a.r; ++j) image += a.B.template at<A>(row, j) * a.gram[int64_t{j} * a.r + p];
    const A b = a.B.template at<A>(row, p);
    const A c = 2 * a.scale * (product * b), w = a.scale * a.scale * (image * b);
    cross += c, own += w, size += magnitude(c) + magnitude(w);
  }
  cross = warp_sum(cross), own = warp_sum(own), size = warp_sum(size);
  A c2 = square + cross + own;
  if (c2 < static_cast<A>(kCancellation) * (square + size)) {
    A sum = 0;
    for (int c = lane; c < a.columns; c += 32) {
      A delta = 0;
      for (int p = 0; p < a.r; ++p) delta += a.B.template at<A>(row, p) * a.A.template at<A>(p, c);
      const A v = value(a.weight[row * a.row_stride + c * a.column_stride]) + a.scale * delta;
      sum += v * v;
    }
    c2 = warp_sum(sum);
  }
  if (lane == 0) a.norm[row] = root(c2);
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
  a.products = workspace;
  a.squares = workspace + plan.square_at;
  a.gram = workspace + plan.gram_at;
  a.scale = static_cast<A>(from.scale);
  a.rows = from.rows, a.row_stride = from.weight_strides[0], a.column_stride = from.weight_strides[1];
  a.split_columns = plan.split_columns;
  a.columns = static_cast<int>(from.columns), a.r = static_cast<int>(from.r), a.splits = static_cast<int>(plan.splits);
  a.rank_tiles = static_cast<int>(max_of<int64_t>(ceil_div(from.r, 64), 1));
  a.gram_side = static_cast<int>(ceil_div(from.r, 16));
  a.wide = aligned_rows(from.weight, a.row_stride, sizeof(T));
  if (from.stamp) {
    a.stamp.parts = reinterpret_cast<uint64_t*>(static_cast<char*>(from.workspace) + plan.stamp_at);
    a.stamp.previous = from.stamp, a.stamp.force = from.force;
    const cudaError_t error = enqueue(fingerprint, kStampBlocks, kThreads, 0, stream, a.A, a.B, a.stamp);
    if (error != cudaSuccess) return error;
  }
  const int64_t grid = int64_t{a.gram_side} * a.gram_side + plan.row_tiles * plan.splits * a.rank_tiles;
  cudaError_t error = cudaErrorInvalidValue;
  auto run = [&](auto kernel, int shared) { error = enqueue(kernel, grid, kNormThreads, shared, stream, a); };
  if (plan.matrix_units) {
    if constexpr (kMatrixUnits<T>) {
      const int tiles = plan.ranks <= 16 ? 2 : plan.ranks <= 32 ? 4 : 8;
      const int shared = max_of(2 * 2 * 8 * tiles * kPitchA, kGramShared<A>);
      if (tiles == 2) run(norm_mma<T, 2>, shared);
      else if (tiles == 4) run(norm_mma<T, 4>, shared);
      else run(norm_mma<T, 8>, shared);
    }
  } else if (plan.ranks <= 16) {
    run(norm_fma<T, 2>, PlainShape<T, 2>::kShared);
  } else {
    run(norm_fma<T, 8>, PlainShape<T, 8>::kShared);
  }
  if (error != cudaSuccess) return error;
  return enqueue(norm_finish<T>, ceil_div(from.rows, kThreads / 32), kThreads, 0, stream, a);
}

}  // namespace

// With a.stamp: recomputes only where a.force, or where A and B are not those that the stamp was taken of.
cudaError_t column_norm(const ColumnNorm& a, cudaStream_t stream) {
  if (a.columns > kMaxColumns || a.r > 4096) return cudaErrorInvalidValue;
  if (a.rows == 0) return cudaSuccess;
  return for_dtype(a.dtype, [&](auto* t) { return launch_norm<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
