// lowrank_backward (METHODS 1.1): one pass over dy for u, dB, db, dyz and gdy.
#include "lowrank.cuh"

namespace spectral_ops::cuda {

namespace {

__device__ __forceinline__ uint32_t word(const uint4& raw, int j) { return j == 0 ? raw.x : j == 1 ? raw.y : j == 2 ? raw.z : raw.w; }

template <class T> struct Backward {
  const T *dy, *h, *B, *y;
  const void *g, *bias;
  T* gdy;
  acc_t<T>*u, *dB, *db, *dyz;  // partial sums [chunks, rows, ranks], [splits, columns, ranks], [splits, columns] twice
  int64_t rows, split_rows, dy_stride, h_stride, B_stride, y_stride;
  int columns, chunks, rank0, ranks;  // the ranks [rank0, rank0 + ranks) of h and B
  DType g_dtype, bias_dtype;
  bool wide_dy, wide_y, wide_gdy, paired_h;
};

// The shape of a block of backward_mma for 8 kTiles ranks. kSums: 0 for neither db nor dyz, 1 for db, 2 for both (y is read).
template <int kTiles, int kSums> struct Shape {
  static constexpr int kGroups = kTiles <= 4 ? 2 : 1;  // of 32 columns, in a warp
  static constexpr int kColumns = 32 * kGroups * kWarps;
  static constexpr int kReads = 2 * kGroups * (kSums == 2 ? 2 : 1);  // 16-byte reads of a thread in a step
  static constexpr int kStages = kSums == 2 ? (kGroups == 2 ? 2 : 3) : (kTiles == 2 ? 3 : 4);
  static constexpr int kPitch = 8 * kTiles + 8;               // of a row of u in shared memory: no bank conflicts
  static constexpr int kBuffers = kTiles == 2 ? 2 : 1;
  static constexpr int kQueue = 16 * kStages * kReads * kThreads;  // bytes
  static constexpr int kSharedU = 4 * kWarps * 16 * kPitch;        // bytes of one buffer
  static constexpr int kShared = kQueue + kBuffers * kSharedU + 2 * 4 * kColumns;
};

// A warp owns 32 kGroups columns and sweeps over rows, 16 at a time. dy passes through a queue in shared memory. A thread reads
// back only what it copied itself, so only the sum of u over the warps needs a barrier.
// Column k of the 16 in product s of a group is column 8 (k % 8 / 2) + 4 s + 2 (k / 8) + k % 2 of its 32.
template <class T, int kTiles, int kSums>
__global__ void __launch_bounds__(kThreads, kTiles == 2 && kSums == 0 ? 2 : 1) backward_mma(Backward<T> a) {
  using S = Shape<kTiles, kSums>;
  constexpr int G = S::kGroups;
  uint4* queue = reinterpret_cast<uint4*>(dynamic_shared());               // [stage, read, thread]
  float* shared_u = reinterpret_cast<float*>(dynamic_shared() + S::kQueue);  // [buffer, warp, 16, kPitch]
  float* g_of = shared_u + S::kBuffers * S::kSharedU / 4;                     // [kColumns]
  float* bias_of = g_of + S::kColumns;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, i = lane / 4, q = lane % 4;
  const int chunk = static_cast<int>(blockIdx.x) % a.chunks;
  const int64_t split = blockIdx.x / static_cast<unsigned>(a.chunks);
  const int block0 = chunk * S::kColumns, local0 = warp * 32 * G, column0 = block0 + local0;
  const int64_t begin = split * a.split_rows, end = min_of(begin + a.split_rows, a.rows);
  const int steps = static_cast<int>(ceil_div(end - begin, 16));

  for (int c = thread; c < S::kColumns; c += kThreads) {
    const bool inside = block0 + c < a.columns;
    g_of[c] = a.g && inside ? load_any<float>(a.g, block0 + c, a.g_dtype) : 1.f;
    if (kSums == 2) bias_of[c] = a.bias && inside ? load_any<float>(a.bias, block0 + c, a.bias_dtype) : 0.f;
  }
  __syncthreads();

  uint32_t gB[G][2][kTiles][2];  // fragments of g * B, [16 columns, 8 ranks] each
#pragma unroll
  for (int group = 0; group < G; ++group)
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int c = 32 * group + 8 * q + 4 * s + e, rank = 8 * t + i;
          const bool inside = a.u && column0 + c < a.columns && rank < a.ranks;
          v[e] = inside ? g_of[local0 + c] * value(a.B[(column0 + c) * a.B_stride + a.rank0 + rank]) : 0.f;
        }
        gB[group][s][t][0] = pair_of<T>(v[0], v[1]);
        gB[group][s][t][1] = pair_of<T>(v[2], v[3]);
      }
  float dB[G][2][kTiles][4] = {};  // [16 columns, 8 ranks] each
  float db[G][8] = {}, dyz[G][8] = {};

  auto fetch_rows = [&](const T* p, int64_t stride, bool wide, int step, uint4* to) {
#pragma unroll
    for (int m = 0; m < 2 * G; ++m) {  // row 8 (m % 2) + i, group m / 2
      const int64_t row = begin + 16 * int64_t{step} + 8 * (m % 2) + i;
      const int column = column0 + 32 * (m / 2) + 8 * q;
      const int n = row < end ? min_of(max_of(a.columns - column, 0), 8) : 0;
      const T* source = p + row * stride + column;
      if (wide) copy16_async(to + m * kThreads, n > 0 ? source : p, 2 * n);
      else to[m * kThreads] = load_row(source, n, false);
    }
  };
  auto fetch = [&](int step) {
    if (step < steps) {
      uint4* to = queue + step % S::kStages * S::kReads * kThreads + thread;
      fetch_rows(a.dy, a.dy_stride, a.wide_dy, step, to);
      if constexpr (kSums == 2) fetch_rows(a.y, a.y_stride, a.wide_y, step, to + 2 * G * kThreads);
    }
    copy_commit();
  };
  uint32_t h_next[kTiles][2];  // h [16, 8] each, rows i and i + 8
  auto fetch_h = [&](int step) {
    const int64_t row = begin + 16 * int64_t{step} + i;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int rank = 8 * t + 2 * q;
      const T* p = a.h + row * a.h_stride + a.rank0 + rank;
      h_next[t][0] = load_pair(p, row < end ? a.ranks - rank : 0, a.paired_h);
      h_next[t][1] = load_pair(p + 8 * a.h_stride, row + 8 < end ? a.ranks - rank : 0, a.paired_h);
    }
  };

#pragma unroll 1
  for (int step = 0; step < S::kStages - 1; ++step) fetch(step);
  if (a.dB) fetch_h(0);
  for (int step = 0; step < steps; ++step) {
    const int64_t row0 = begin + 16 * int64_t{step};
    copy_wait<S::kStages - 2>();
    const uint4* from = queue + step % S::kStages * S::kReads * kThreads + thread;
    uint4 raw[G][2];
#pragma unroll
    for (int m = 0; m < 2 * G; ++m) raw[m / 2][m % 2] = from[m * kThreads];
    uint32_t h[kTiles][2];
    if (a.dB) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) h[t][0] = transposed(h_next[t][0]), h[t][1] = transposed(h_next[t][1]);
      if (step + 1 < steps) fetch_h(step + 1);
    }
    fetch(step + S::kStages - 1);  // into the stage that the previous step has used up

    float u[kTiles][4] = {};
#pragma unroll
    for (int group = 0; group < G; ++group)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint4 &high = raw[group][0], &low = raw[group][1];
        const uint32_t rows16[4] = {word(high, 2 * s), word(low, 2 * s), word(high, 2 * s + 1), word(low, 2 * s + 1)};
        if (a.u) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) mma<T>(u[t], rows16, gB[group][s][t]);
        }
        if (a.dB) {
          const uint32_t columns16[4] = {transposed(rows16[0]), transposed(rows16[2]), transposed(rows16[1]), transposed(rows16[3])};
#pragma unroll
          for (int t = 0; t < kTiles; ++t) mma<T>(dB[group][s][t], columns16, h[t]);
        }
      }
    if (kSums > 0 || a.gdy) {
#pragma unroll
      for (int m = 0; m < 2 * G; ++m) {
        const int group = m / 2, c = 32 * group + 8 * q;
        float v[8];
        unpack<T>(raw[group][m % 2], v);
        if constexpr (kSums > 0) {
#pragma unroll
          for (int e = 0; e < 8; ++e) db[group][e] += v[e];
        }
        if constexpr (kSums == 2) {
          float z[8];
          unpack<T>(from[(2 * G + m) * kThreads], z);
#pragma unroll
          for (int e = 0; e < 8; ++e) dyz[group][e] += v[e] * (z[e] - bias_of[local0 + c + e]);
        }
        const int64_t row = row0 + 8 * (m % 2) + i;
        if (a.gdy && row < end) {
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] *= g_of[local0 + c + e];
          store_row(a.gdy + row * a.columns + column0 + c, a.columns - column0 - c, a.wide_gdy, v);
        }
      }
    }
    if (a.u) {
      float* buffer = shared_u + step % S::kBuffers * (S::kSharedU / 4);
      float* mine = buffer + (warp * 16 + i) * S::kPitch + 2 * q;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        *reinterpret_cast<float2*>(mine + 8 * t) = make_float2(u[t][0], u[t][1]);
        *reinterpret_cast<float2*>(mine + 8 * S::kPitch + 8 * t) = make_float2(u[t][2], u[t][3]);
      }
      __syncthreads();
      for (int n = thread; n < 16 * 8 * kTiles; n += kThreads) {
        const int r = n / (8 * kTiles), rank = n % (8 * kTiles);
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += buffer[(w * 16 + r) * S::kPitch + rank];
        if (row0 + r < end && rank < a.ranks) a.u[(chunk * a.rows + row0 + r) * a.ranks + rank] = sum;
      }
      if constexpr (S::kBuffers == 1) __syncthreads();
    }
  }

#pragma unroll
  for (int group = 0; group < G; ++group) {
    if (a.dB) {
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int column = column0 + 32 * group + 8 * (i / 2) + 4 * s + 2 * (e / 2) + i % 2, rank = 8 * t + 2 * q + e % 2;
            if (column < a.columns && rank < a.ranks) a.dB[(split * a.columns + column) * a.ranks + rank] = dB[group][s][t][e];
          }
    }
    if constexpr (kSums > 0) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          db[group][e] += __shfl_xor_sync(0xffffffffu, db[group][e], lanes);
          if constexpr (kSums == 2) dyz[group][e] += __shfl_xor_sync(0xffffffffu, dyz[group][e], lanes);
        }
        const int column = column0 + 32 * group + 8 * q + e;
        if (i == 0 && column < a.columns) {
          if (a.db) a.db[split * a.columns + column] = db[group][e];
          if (kSums == 2 && a.dyz) a.dyz[split * a.columns + column] = dyz[group][e];
        }
      }
    }
  }
}

// float32 (no TF32) and float64: 32 rows x 128 columns of dy in shared memory at a time, kRanks ranks.
template <class T, int kRanks> struct PlainShape {
  static constexpr int kRows = 32, kColumns = 128, kPitch = kColumns + 4, kRankPitch = kRanks + 4;
  static constexpr int kShared = static_cast<int>(sizeof(T)) * (kRows * kPitch + kRows * kRankPitch + kColumns * kRankPitch);
};

template <class T, int kRanks>
__global__ void __launch_bounds__(kThreads) backward_fma(Backward<T> a) {
  using S = PlainShape<T, kRanks>;
  constexpr int R = kRanks / 8;  // ranks of a thread
  T* dy = reinterpret_cast<T*>(dynamic_shared());  // [kRows, kPitch]
  T* h = dy + S::kRows * S::kPitch;                // [kRows, kRankPitch]
  T* gB = h + S::kRows * S::kRankPitch;            // [kColumns, kRankPitch]
  const int thread = threadIdx.x, rank0 = thread % 8 * R, my_row = thread / 8, my_columns = thread / 8 * 4;
  const int chunk = static_cast<int>(blockIdx.x) % a.chunks, column0 = chunk * S::kColumns;
  const int64_t split = blockIdx.x / static_cast<unsigned>(a.chunks);
  const int64_t begin = split * a.split_rows, end = min_of(begin + a.split_rows, a.rows);
  const int lane_column = column0 + thread % S::kColumns;  // the column this thread loads and sums, in half of the rows
  const bool inside = lane_column < a.columns;
  const T g = a.g && inside ? load_any<T>(a.g, lane_column, a.g_dtype) : T(1);
  const T bias = a.bias && inside ? load_any<T>(a.bias, lane_column, a.bias_dtype) : T(0);
  T dB[4][R] = {}, db = 0, dyz = 0;

  for (int n = thread; n < S::kColumns * kRanks; n += kThreads) {
    const int c = n / kRanks, p = n % kRanks, column = column0 + c;
    T v = 0;
    if (a.u && column < a.columns && p < a.ranks)
      v = a.B[column * a.B_stride + a.rank0 + p] * (a.g ? load_any<T>(a.g, column, a.g_dtype) : T(1));
    gB[c * S::kRankPitch + p] = v;
  }
  for (int64_t row0 = begin; row0 < end; row0 += S::kRows) {
    __syncthreads();  // the previous rows have been used
    for (int m = thread / S::kColumns; m < S::kRows; m += kThreads / S::kColumns) {
      const int64_t row = row0 + m;
      const bool valid = inside && row < end;
      const T v = valid ? a.dy[row * a.dy_stride + lane_column] : T(0);
      dy[m * S::kPitch + thread % S::kColumns] = v;
      db += v;
      if (a.y && valid) dyz += v * (a.y[row * a.y_stride + lane_column] - bias);
      if (a.gdy && valid) a.gdy[row * a.columns + lane_column] = g * v;
    }
    for (int n = thread; n < S::kRows * kRanks; n += kThreads) {
      const int m = n / kRanks, p = n % kRanks;
      const bool valid = a.dB && row0 + m < end && p < a.ranks;
      h[m * S::kRankPitch + p] = valid ? a.h[(row0 + m) * a.h_stride + a.rank0 + p] : T(0);
    }
    __syncthreads();
    if (a.u) {
      T u[R] = {};
#pragma unroll 4
      for (int c = 0; c < S::kColumns; ++c)
#pragma unroll
        for (int p = 0; p < R; ++p) u[p] += dy[my_row * S::kPitch + c] * gB[c * S::kRankPitch + rank0 + p];
#pragma unroll
      for (int p = 0; p < R; ++p)
        if (row0 + my_row < end && rank0 + p < a.ranks) a.u[(chunk * a.rows + row0 + my_row) * a.ranks + rank0 + p] = u[p];
    }
    if (a.dB) {
#pragma unroll 4
      for (int m = 0; m < S::kRows; ++m)
#pragma unroll
        for (int c = 0; c < 4; ++c)
#pragma unroll
          for (int p = 0; p < R; ++p) dB[c][p] += dy[m * S::kPitch + my_columns + c] * h[m * S::kRankPitch + rank0 + p];
    }
  }
  if (a.dB) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int p = 0; p < R; ++p)
        if (column0 + my_columns + c < a.columns && rank0 + p < a.ranks)
          a.dB[(split * a.columns + column0 + my_columns + c) * a.ranks + rank0 + p] = dB[c][p];
  }
  __syncthreads();
  T* halves = dy;  // [2, kThreads]: each column was summed by two threads
  halves[thread] = db, halves[kThreads + thread] = dyz;
  __syncthreads();
  if (thread < S::kColumns && inside) {
    if (a.db) a.db[split * a.columns + lane_column] = halves[thread] + halves[thread + S::kColumns];
    if (a.dyz) a.dyz[split * a.columns + lane_column] = halves[kThreads + thread] + halves[kThreads + thread + S::kColumns];
  }
}

// The second stage: adds the partial sums, always in the same order.
template <class T> struct Reduction {
  const acc_t<T>*u, *dB, *db, *dyz;  // partial sums; null where not wanted
  T* u_out;
  acc_t<T>*dB_out, *db_out, *dyz_out;
  const void* g;
  acc_t<T> scale;
  int64_t rows, columns, chunks, splits;
  int r, rank0, ranks;
  DType g_dtype;
};

template <class A> __device__ __forceinline__ A sum_of(const A* p, int64_t count, int64_t stride) {
  A sum = 0;
#pragma unroll 4
  for (int64_t j = 0; j < count; ++j) sum += p[j * stride];
  return sum;
}

template <class T> __global__ void __launch_bounds__(kThreads) reduce(Reduction<T> a) {
  using A = acc_t<T>;
  const int64_t in_u = a.u ? a.rows * a.ranks : 0, in_dB = a.dB ? a.columns * a.ranks : 0;
  const int64_t in_db = a.db ? a.columns : 0, in_dyz = a.dyz ? a.columns : 0;
  int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n < in_u) {
    const int64_t row = n / a.ranks;
    a.u_out[row * a.r + a.rank0 + (n - row * a.ranks)] = rounded<T>(a.scale * sum_of(a.u + n, a.chunks, in_u));
    return;
  }
  n -= in_u;
  if (n < in_dB) {
    const int64_t column = n / a.ranks;
    const A g = a.g ? load_any<A>(a.g, column, a.g_dtype) : A(1);
    a.dB_out[column * a.r + a.rank0 + (n - column * a.ranks)] = a.scale * (g * sum_of(a.dB + n, a.splits, in_dB));
    return;
  }
  n -= in_dB;
  if (n < in_db) a.db_out[n] = sum_of(a.db + n, a.splits, a.columns);
  else if (n - in_db < in_dyz) a.dyz_out[n - in_db] = sum_of(a.dyz + (n - in_db), a.splits, a.columns);
}

template <class T, int kTiles> cudaError_t enqueue_mma(const Backward<T>& a, int64_t grid, int sums, cudaStream_t stream) {
  if (sums == 2) return enqueue(backward_mma<T, kTiles, 2>, grid, kThreads, Shape<kTiles, 2>::kShared, stream, a);
  if (sums == 1) return enqueue(backward_mma<T, kTiles, 1>, grid, kThreads, Shape<kTiles, 1>::kShared, stream, a);
  return enqueue(backward_mma<T, kTiles, 0>, grid, kThreads, Shape<kTiles, 0>::kShared, stream, a);
}

template <class T> cudaError_t enqueue_backward(const Backward<T>& a, const BackwardPlan& plan, cudaStream_t stream) {
  const int64_t grid = plan.chunks * plan.splits;
  if constexpr (kMatrixUnits<T>) {
    const int sums = a.dyz ? 2 : a.db ? 1 : 0;
    if (plan.ranks <= 16) return enqueue_mma<T, 2>(a, grid, sums, stream);
    if (plan.ranks <= 32) return enqueue_mma<T, 4>(a, grid, sums, stream);
    return enqueue_mma<T, 8>(a, grid, sums, stream);
  } else {
    if (plan.ranks <= 16) return enqueue(backward_fma<T, 16>, grid, kThreads, PlainShape<T, 16>::kShared, stream, a);
    return enqueue(backward_fma<T, 32>, grid, kThreads, PlainShape<T, 32>::kShared, stream, a);
  }
}

template <class T> cudaError_t launch_backward(const LowRankBackward& from, cudaStream_t stream) {
  using A = acc_t<T>;
  const BackwardPlan plan = backward_plan(from);
  A* workspace = static_cast<A*>(from.workspace);
  Backward<T> a{};
  a.dy = static_cast<const T*>(from.dy), a.h = static_cast<const T*>(from.h), a.B = static_cast<const T*>(from.B);
  a.rows = from.rows, a.split_rows = plan.split_rows;
  a.dy_stride = from.dy_stride, a.h_stride = from.h_stride, a.B_stride = from.B_stride, a.y_stride = from.y_stride;
  a.columns = static_cast<int>(from.columns), a.chunks = static_cast<int>(plan.chunks);
  a.g = from.g, a.g_dtype = from.g_dtype, a.bias = from.bias, a.bias_dtype = from.bias_dtype;
  a.wide_dy = aligned_rows(from.dy, from.dy_stride, sizeof(T));
  a.wide_y = aligned_rows(from.y, from.y_stride, sizeof(T));
  a.wide_gdy = aligned_rows(from.gdy, from.columns, sizeof(T));
  for (int64_t rank0 = 0; rank0 == 0 || rank0 < from.r; rank0 += plan.ranks) {
    const bool first = rank0 == 0;  // the sums and gdy need one pass
    a.rank0 = static_cast<int>(rank0);
    a.ranks = static_cast<int>(min_of(plan.ranks, from.r - rank0));
    a.paired_h = aligned_pairs(a.h + rank0, from.h_stride);
    a.u = from.u ? workspace : nullptr;
    a.dB = from.dB ? workspace + plan.dB_at : nullptr;
    a.db = from.db && first ? workspace + plan.db_at : nullptr;
    a.dyz = from.dyz && first ? workspace + plan.dyz_at : nullptr;
    a.y = a.dyz ? static_cast<const T*>(from.y) : nullptr;
    a.gdy = first ? static_cast<T*>(from.gdy) : nullptr;
    cudaError_t error = enqueue_backward(a, plan, stream);
    if (error != cudaSuccess) return error;
    const Reduction<T> sums{a.u, a.dB, a.db, a.dyz, static_cast<T*>(from.u), static_cast<A*>(from.dB),
                            static_cast<A*>(from.db), static_cast<A*>(from.dyz), from.g, static_cast<A>(from.scale),
                            from.rows, from.columns, plan.chunks, plan.splits,
                            static_cast<int>(from.r), a.rank0, a.ranks, from.g_dtype};
    const int64_t work = (a.u ? a.rows * a.ranks : 0) + from.columns * ((a.dB ? a.ranks : 0) + (a.db ? 1 : 0) + (a.dyz ? 1 : 0));
    error = enqueue(reduce<T>, ceil_div(work, kThreads), kThreads, 0, stream, sums);
    if (error != cudaSuccess || plan.ranks == 0) return error;
  }
  return cudaSuccess;
}

}  // namespace

// rows or columns may be 0: the outputs are then sums of nothing, written as zeros by the second stage.
cudaError_t lowrank_backward(const LowRankBackward& a, cudaStream_t stream) {
  if (a.columns > kMaxColumns || a.r > kMaxColumns) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) { return launch_backward<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
