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
  bool wide_dy, wide_h, wide_y, wide_gdy, paired_B;
};

// The shape of a block of backward_mma for 8 kTiles kHalves ranks: kColumnWarps warps own 32 kGroups columns and 8 kTiles ranks
// each, and as many again the other half of the ranks. kSums: 0 for neither db nor dyz, 1 for db, 2 for both (y is read).
template <int kTiles, int kHalves, int kSums> struct Shape {
  static constexpr int kRanks = 8 * kTiles * kHalves;
  static constexpr int kGroups = kSums == 2 && kHalves == 1 ? 1 : 2;
  static constexpr int kOwn = kGroups / kHalves;  // groups of columns that a warp copies, sums and scales
  static constexpr int kColumnWarps = kHalves == 1 ? 8 : kSums == 2 ? 4 : 6;
  static constexpr int kColumns = 32 * kGroups * kColumnWarps;
  static constexpr int kSlots = 32 * kColumnWarps, kBlock = kSlots * kHalves;  // threads of one half, and of a block
  static constexpr int kReads = 2 * kGroups * (kSums == 2 ? 2 : 1);            // 16-byte pieces that a slot has in a stage
  static constexpr int kPitch = kRanks + 8;  // of a row of h or of u in shared memory: no bank conflicts
  static constexpr int kStage = 16 * kReads * kSlots + 2 * 16 * kPitch;  // bytes: 16 rows of dy, y and h
  static constexpr int kSharedU = 4 * kColumnWarps * 16 * kPitch;        // bytes of one of two buffers
  static constexpr int kVectors = (kSums == 2 ? 2 : 1) * 4 * kColumns;   // bytes of g and bias
  static constexpr int kFit = (99 * 1024 - 2 * kSharedU - kVectors) / kStage, kStages = kFit < 4 ? kFit : 4;
  static constexpr int kShared = kStages * kStage + 2 * kSharedU + kVectors;
  static_assert(kStages >= 3, "a fetch is under way while another is waited for");
};

// A block sweeps over rows, 16 in a step, which pass through a queue in shared memory. In a step's only barrier the copies of
// its rows and the shares of u of the step before become visible. u is summed over the warps one step late.
// Column k of the 16 in product s of a group is column 8 (k % 8 / 2) + 4 s + 2 (k / 8) + k % 2 of its 32: so the 16 bytes that
// a lane copied are its fragments.
template <class T, int kTiles, int kHalves, int kSums>
__global__ void __launch_bounds__(Shape<kTiles, kHalves, kSums>::kBlock, 1) backward_mma(Backward<T> a) {
  using S = Shape<kTiles, kHalves, kSums>;
  constexpr int G = S::kGroups;
  unsigned char* queue = dynamic_shared();  // [stage]: pieces [kReads, kSlots] and h [16, kPitch]
  float* shared_u = reinterpret_cast<float*>(queue + S::kStages * S::kStage);  // [buffer, column warp, 16, kPitch]
  float* g_of = shared_u + 2 * S::kSharedU / 4;                                // [kColumns]
  float* bias_of = g_of + S::kColumns;
  const int thread = threadIdx.x, lane = thread % 32, i = lane / 4, q = lane % 4;
  const int half = kHalves == 1 ? 0 : thread / S::kSlots, slot = thread - half * S::kSlots, warp = slot / 32;
  const int chunk = static_cast<int>(blockIdx.x) % a.chunks;
  const int64_t split = blockIdx.x / static_cast<unsigned>(a.chunks);
  const int block0 = chunk * S::kColumns, local0 = warp * 32 * G, column0 = block0 + local0, half_rank0 = 8 * kTiles * half;
  const int64_t begin = split * a.split_rows, end = min_of(begin + a.split_rows, a.rows);
  const int steps = static_cast<int>(ceil_div(end - begin, 16));
  const auto stage_of = [&](int step) { return queue + step % S::kStages * S::kStage; };

  auto fetch_rows = [&](const T* p, int64_t stride, bool wide, int step, uint4* to) {
#pragma unroll
    for (int m = 0; m < 2 * S::kOwn; ++m) {  // row 8 (m % 2) + i, group half + m / 2
      const int64_t row = begin + 16 * int64_t{step} + 8 * (m % 2) + i;
      const int column = column0 + 32 * (half + m / 2) + 8 * q;
      const int n = row < end ? min_of(max_of(a.columns - column, 0), 8) : 0;
      const T* source = p + row * stride + column;
      uint4* piece = to + (2 * half + m) * S::kSlots;
      if (wide) copy16_async(piece, n > 0 ? source : p, 2 * n);
      else *piece = load_row(source, n, false);
    }
  };
  auto fetch = [&](int step) {
    if (step < steps) {
      uint4* to = reinterpret_cast<uint4*>(stage_of(step));
      fetch_rows(a.dy, a.dy_stride, a.wide_dy, step, to + slot);
      if (kSums == 2 && a.dyz) fetch_rows(a.y, a.y_stride, a.wide_y, step, to + 2 * G * S::kSlots + slot);
      if (a.dB && thread < 2 * S::kRanks) {  // 8 ranks of one row each
        const int r = thread / (S::kRanks / 8), rank = thread % (S::kRanks / 8) * 8;
        const int64_t row = begin + 16 * int64_t{step} + r;
        const int n = row < end ? min_of(max_of(a.ranks - rank, 0), 8) : 0;
        const T* source = a.h + row * a.h_stride + a.rank0 + rank;
        T* piece = reinterpret_cast<T*>(to + S::kReads * S::kSlots) + r * S::kPitch + rank;
        if (a.wide_h) copy16_async(piece, n > 0 ? source : a.h, 2 * n);
        else *reinterpret_cast<uint4*>(piece) = load_row(source, n, false);
      }
    }
    copy_commit();
  };
#pragma unroll 1
  for (int step = 0; step < S::kStages - 1; ++step) fetch(step);

  for (int c = thread; c < S::kColumns; c += S::kBlock) {
    const bool inside = block0 + c < a.columns;
    g_of[c] = a.g && inside ? load_any<float>(a.g, block0 + c, a.g_dtype) : 1.f;
    if (kSums == 2) bias_of[c] = a.bias && inside ? load_any<float>(a.bias, block0 + c, a.bias_dtype) : 0.f;
  }
  __syncthreads();

  uint32_t gB[G][2][kTiles][2];  // fragments of g * B, [16 columns, 8 ranks] each, loaded along the ranks
#pragma unroll
  for (int group = 0; group < G; ++group)
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const int c = 32 * group + 8 * (i / 2) + 4 * s + 2 * w + i % 2;
        const T* p = a.B + int64_t{column0 + c} * a.B_stride + a.rank0 + half_rank0 + 2 * q;
        const int left = a.u && column0 + c < a.columns ? a.ranks - half_rank0 - 2 * q : 0;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint32_t pair = load_pair(p + 8 * t, left - 8 * t, a.paired_B);
          T v[2];
          memcpy(v, &pair, sizeof v);
          const float g = g_of[local0 + c];
          gB[group][s][t][w] = transposed(pair_of<T>(g * value(v[0]), g * value(v[1])));
        }
      }
  float dB[G][2][kTiles][4] = {};  // [16 columns, 8 ranks] each
  float db[S::kOwn][2][4] = {};                // [16 columns, 8 equal sums] each: dyᵀ times ones
  const uint32_t ones[2] = {pair_of<T>(1.f, 1.f), pair_of<T>(1.f, 1.f)};
  float dyz[S::kOwn][8] = {};

  auto add_up = [&](int step) {  // the sum of u over the column warps
    const float* buffer = shared_u + step % 2 * (S::kSharedU / 4);
    for (int n = thread; n < 8 * S::kRanks; n += S::kBlock) {
      const int r = n / (S::kRanks / 2), rank = n % (S::kRanks / 2) * 2;
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (int w = 0; w < S::kColumnWarps; ++w) {
        const float2 part = *reinterpret_cast<const float2*>(buffer + (w * 16 + r) * S::kPitch + rank);
        sum.x += part.x, sum.y += part.y;
      }
      const int64_t row = begin + 16 * int64_t{step} + r;
      if (row < end) store_pair(a.u + (chunk * a.rows + row) * a.ranks + rank, a.ranks - rank, a.ranks % 2 == 0, sum.x, sum.y);
    }
  };

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_wait<S::kStages - 2>();
    __syncthreads();
    fetch(step + S::kStages - 1);  // into the stage that the previous step has used up
    if (a.u && step > 0) add_up(step - 1);
    const uint4* from = reinterpret_cast<const uint4*>(stage_of(step)) + slot;
    uint4 raw[G][2];
#pragma unroll
    for (int m = 0; m < 2 * G; ++m) raw[m / 2][m % 2] = from[m * S::kSlots];
    const auto rows16_of = [&](int group, int s, uint32_t (&rows16)[4]) {
      const uint4 &high = raw[group][0], &low = raw[group][1];
      rows16[0] = word(high, 2 * s), rows16[1] = word(low, 2 * s), rows16[2] = word(high, 2 * s + 1), rows16[3] = word(low, 2 * s + 1);
    };

    if (a.u) {
      float u[kTiles][4] = {};
      uint32_t rows16[4];
#pragma unroll
      for (int k = 0; k < 2 * G; ++k) {
        rows16_of(k / 2, k % 2, rows16);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) mma<T>(u[t], rows16, gB[k / 2][k % 2][t]);
      }
      float* mine = shared_u + step % 2 * (S::kSharedU / 4) + (warp * 16 + i) * S::kPitch + half_rank0 + 2 * q;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        *reinterpret_cast<float2*>(mine + 8 * t) = make_float2(u[t][0], u[t][1]);
        *reinterpret_cast<float2*>(mine + 8 * S::kPitch + 8 * t) = make_float2(u[t][2], u[t][3]);
      }
    }
    if (a.dB || kSums > 0) {
      uint32_t h[kTiles][2];  // fragments of h, [16 rows, 8 ranks] each
      const T* shared_h = reinterpret_cast<const T*>(stage_of(step) + 16 * S::kReads * S::kSlots);
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        uint32_t four[4];
        if (a.dB) load_transposed(four, shared_h + lane % 16 * S::kPitch + half_rank0 + 8 * (t + lane / 16));
        h[t][0] = four[0], h[t][1] = four[1], h[t + 1][0] = four[2], h[t + 1][1] = four[3];
      }
#pragma unroll
      for (int group = 0; group < G; ++group)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          uint32_t rows16[4];
          rows16_of(group, s, rows16);
          const uint32_t columns16[4] = {transposed(rows16[0]), transposed(rows16[2]), transposed(rows16[1]), transposed(rows16[3])};
          if (a.dB) {
#pragma unroll
            for (int t = 0; t < kTiles; ++t) mma<T>(dB[group][s][t], columns16, h[t]);
          }
          if (kSums > 0 && (kHalves == 1 || group == half)) mma<T>(db[group % S::kOwn][s], columns16, ones);
        }
    }
#pragma unroll
    for (int group = 0; group < G; ++group) {
      if (((kSums == 2 && a.dyz) || a.gdy) && (kHalves == 1 || group == half)) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int c = 32 * group + 8 * q;
          float v[8];
          unpack<T>(raw[group][m], v);
          if (kSums == 2 && a.dyz) {
            float z[8];
            unpack<T>(from[(2 * (G + group) + m) * S::kSlots], z);
#pragma unroll
            for (int e = 0; e < 8; ++e) dyz[group % S::kOwn][e] += v[e] * (z[e] - bias_of[local0 + c + e]);
          }
          const int64_t row = begin + 16 * int64_t{step} + 8 * m + i;
          if (a.gdy && row < end) {
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e] *= g_of[local0 + c + e];
            store_row(a.gdy + row * a.columns + column0 + c, a.columns - column0 - c, a.wide_gdy, v);
          }
        }
      }
    }
  }
  __syncthreads();
  if (a.u && steps > 0) add_up(steps - 1);

  if (a.dB) {
#pragma unroll
    for (int group = 0; group < G; ++group)
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const int column = column0 + 32 * group + 8 * (i / 2) + 4 * s + 2 * w + i % 2, rank = half_rank0 + 2 * q;
          float* to = a.dB + (split * a.columns + column) * a.ranks + rank;
#pragma unroll
          for (int t = 0; t < kTiles; ++t)
            if (column < a.columns)
              store_pair(to + 8 * t, a.ranks - rank - 8 * t, a.ranks % 2 == 0, dB[group][s][t][2 * w], dB[group][s][t][2 * w + 1]);
        }
  }
  if (kSums > 0 && a.db && q == 0) {
#pragma unroll
    for (int n = 0; n < 4 * S::kOwn; ++n) {
      const int column = column0 + 32 * (half + n / 4) + 8 * (i / 2) + 4 * (n / 2 % 2) + 2 * (n % 2) + i % 2;
      if (column < a.columns) a.db[split * a.columns + column] = db[n / 4][n / 2 % 2][2 * (n % 2)];
    }
  }
  if (kSums == 2 && a.dyz) {
#pragma unroll
    for (int n = 0; n < 8 * S::kOwn; ++n) {
      float sum = dyz[n / 8][n % 8];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      const int column = column0 + 32 * (half + n / 8) + 8 * q + n % 8;
      if (i == 0 && column < a.columns) a.dyz[split * a.columns + column] = sum;
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
#pragma unroll 8
  for (int64_t j = 0; j < count; ++j) sum += p[j * stride];
  return sum;
}

template <class T> __global__ void __launch_bounds__(kThreads) reduce(Reduction<T> a) {
  using A = acc_t<T>;
  const int64_t in_u = a.u ? a.rows * a.ranks : 0, in_dB = a.dB ? a.columns * a.ranks : 0;
  const int64_t in_db = a.db ? a.columns : 0, in_dyz = a.dyz ? a.columns : 0;
  int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n < in_u) {
    const int64_t at = a.ranks == a.r ? n : n / a.ranks * (a.r - a.ranks) + a.rank0 + n;  // a division takes longer than the sum
    a.u_out[at] = rounded<T>(a.scale * sum_of(a.u + n, a.chunks, in_u));
    return;
  }
  n -= in_u;
  if (n < in_dB) {
    const int64_t column = a.g || a.ranks != a.r ? n / a.ranks : 0;
    const A g = a.g ? load_any<A>(a.g, column, a.g_dtype) : A(1);
    a.dB_out[column * (a.r - a.ranks) + a.rank0 + n] = a.scale * (g * sum_of(a.dB + n, a.splits, in_dB));
    return;
  }
  n -= in_dB;
  if (n < in_db) a.db_out[n] = sum_of(a.db + n, a.splits, a.columns);
  else if (n - in_db < in_dyz) a.dyz_out[n - in_db] = sum_of(a.dyz + (n - in_db), a.splits, a.columns);
}

template <class T, int kTiles, int kHalves>
cudaError_t enqueue_mma(const Backward<T>& a, const BackwardPlan& plan, cudaStream_t stream) {
  const auto run = [&](auto kernel, auto shape) {
    using S = decltype(shape);
    if (plan.tile_columns != S::kColumns) return cudaErrorInvalidValue;
    return enqueue(kernel, plan.chunks * plan.splits, S::kBlock, S::kShared, stream, a);
  };
  if (plan.sums == 2) return run(backward_mma<T, kTiles, kHalves, 2>, Shape<kTiles, kHalves, 2>{});
  if (plan.sums == 1) return run(backward_mma<T, kTiles, kHalves, 1>, Shape<kTiles, kHalves, 1>{});
  return run(backward_mma<T, kTiles, kHalves, 0>, Shape<kTiles, kHalves, 0>{});
}

template <class T> cudaError_t enqueue_backward(const Backward<T>& a, const BackwardPlan& plan, cudaStream_t stream) {
  const int64_t grid = plan.chunks * plan.splits;
  if constexpr (kMatrixUnits<T>) {
    if (plan.ranks <= 16) return enqueue_mma<T, 2, 1>(a, plan, stream);
    if (plan.ranks <= 32) return enqueue_mma<T, 4, 1>(a, plan, stream);
    return enqueue_mma<T, 4, 2>(a, plan, stream);
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
  a.wide_h = aligned_rows(from.h, from.h_stride, sizeof(T));
  a.paired_B = aligned_pairs(from.B, from.B_stride);
  for (int64_t rank0 = 0; rank0 == 0 || rank0 < from.r; rank0 += plan.ranks) {
    const bool first = rank0 == 0;  // the sums and gdy need one pass
    a.rank0 = static_cast<int>(rank0);
    a.ranks = static_cast<int>(min_of(plan.ranks, from.r - rank0));
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
