// lowrank_backward (METHODS 1.1): one pass over dy for u, dB, db, dyz and gdy.
#include "lowrank.cuh"
#include "lowrank_wgmma.h"

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
  bool paired_B;
};

// The shape of a block of backward_mma for 8 kTiles kHalves ranks: kColumnWarps warps own 32 kGroups columns and 8 kTiles ranks
// each, and as many again the other half of the ranks. kAll: y is read, gdy is written, or db is summed beside more than 32 ranks.
template <int kTiles, int kHalves, bool kAll> struct Shape {
  static constexpr int kRanks = 8 * kTiles * kHalves;
  static constexpr int kGroups = kAll && kHalves == 1 ? 1 : 2;
  static constexpr int kOwn = kGroups / kHalves;  // groups of columns that a warp copies, sums and scales
  static constexpr int kColumnWarps = kHalves == 1 ? 8 : kAll ? 4 : 6;
  static constexpr int kColumns = 32 * kGroups * kColumnWarps;
  static constexpr int kSlots = 32 * kColumnWarps, kBlock = kSlots * kHalves;  // threads of one half, and of a block
  static constexpr int kReads = 2 * kGroups * (kAll ? 2 : 1);                  // 16-byte pieces that a slot has in a stage
  static constexpr int kPitch = kRanks + 8;  // of a row of h or of u in shared memory: no bank conflicts
  static constexpr int kStage = 16 * kReads * kSlots + 2 * 16 * kPitch;  // bytes: 16 rows of dy, y and h
  static constexpr int kSharedU = 4 * kColumnWarps * 16 * kPitch;        // bytes of one of two buffers
  static constexpr int kVectors = (kAll ? 2 : 1) * 4 * kColumns;         // bytes of g and bias
  static constexpr int kFit = (99 * 1024 - 2 * kSharedU - kVectors) / kStage, kStages = kFit < 4 ? kFit : 4;
  static constexpr int kShared = kStages * kStage + 2 * kSharedU + kVectors;
  static constexpr bool kBias = kAll || kHalves == 1;  // db can be summed: elsewhere it would take registers that are not there
  static constexpr int kSum = kRanks == 64 ? 4 : 2;    // ranks of u that a thread adds up
  static_assert(kStages >= 3, "two steps are under way while one is worked on");
  static_assert(16 * kRanks / kSum <= kBlock && 2 * kRanks <= kBlock, "one turn for u and for h");
};

// Where a thread is, worked out before a loop and again after it: in the loop it would take registers.
template <class S> struct Place {
  const int thread, lane, i, q, half, slot, warp;
  const int chunk, local0, column0;  // the first of the warp's columns, in the block and in all
  const int64_t split;

  __device__ __forceinline__ Place(int thread, unsigned block, unsigned chunks)
      : thread(thread), lane(thread % 32), i(lane / 4), q(lane % 4), half(S::kBlock == S::kSlots ? 0 : thread / S::kSlots),
        slot(thread - half * S::kSlots), warp(slot / 32), chunk(static_cast<int>(block % chunks)),
        local0(warp * 32 * S::kGroups), column0(chunk * S::kColumns + local0), split(block / chunks) {}
};

// Eight floats of shared memory, aligned to 16 bytes.
__device__ __forceinline__ void load_floats(const float* p, float (&out)[8]) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}

// A block sweeps over rows, 16 in a step, which pass through a queue in shared memory. In a step's only barrier the copies of
// its rows and the shares of u of the step before become visible: u is summed over the warps one step late.
// Column k of the 16 in product s of a group is column 8 (k % 8 / 2) + 4 s + 2 (k / 8) + k % 2 of its 32: so the 16 bytes that
// a lane copied are its fragments. kWide: all rows are aligned to 16 bytes and ranks are a multiple of 4.
template <class T, int kTiles, int kHalves, bool kAll, bool kWide>
__global__ void __launch_bounds__(Shape<kTiles, kHalves, kAll>::kBlock, 1) backward_mma(Backward<T> a) {
  using S = Shape<kTiles, kHalves, kAll>;
  constexpr int G = S::kGroups, kOwn = S::kOwn;
  unsigned char* queue = dynamic_shared();  // [stage]: pieces [kReads, kSlots] and h [16, kPitch]
  float* shared_u = reinterpret_cast<float*>(queue + S::kStages * S::kStage);  // [buffer, column warp, 16, kPitch]
  float* g_of = shared_u + 2 * S::kSharedU / 4;                                // [kColumns]
  float* bias_of = g_of + S::kColumns;
  const Place<S> at(thread_index(), block_index(), a.chunks);
  const int thread = at.thread, lane = at.lane, i = at.i, q = at.q, half = at.half, slot = at.slot, warp = at.warp;
  const int local0 = at.local0, column0 = at.column0, block0 = column0 - local0, half_rank0 = 8 * kTiles * half;
  const int64_t begin = at.split * a.split_rows;
  const int rows = static_cast<int>(min_of(a.split_rows, a.rows - begin));

  const int own0 = column0 + 32 * half + 8 * q;  // the columns that this thread copies: 8 of each of its groups
  int inside[kOwn];                              // how many of them exist
#pragma unroll
  for (int own = 0; own < kOwn; ++own) inside[own] = min_of(max_of(a.columns - own0 - 32 * own, 0), 8);
  const int h_row = thread / (S::kRanks / 8), h_rank = thread % (S::kRanks / 8) * 8;  // and 8 ranks of one row of h
  const T* next_dy = a.dy + (begin + i) * a.dy_stride + own0;
  const T* next_y = kAll && a.dyz ? a.y + (begin + i) * a.y_stride + own0 : nullptr;
  const T* next_h = a.h + (begin + h_row) * a.h_stride + a.rank0 + h_rank;

  const auto copy = [](void* to, const T* from, int n) {
    if (kWide) copy16_async(to, from, 2 * n);
    else *static_cast<uint4*>(to) = load_row(from, n, false);
  };
  const auto fetch_rows = [&](const T* p, int64_t stride, int row0, uint4* to) {
#pragma unroll
    for (int m = 0; m < 2 * kOwn; ++m) {
      const bool valid = row0 + 8 * (m % 2) + i < rows;
      copy(to + (2 * half + m) * S::kSlots, p + m % 2 * 8 * stride + 32 * (m / 2), valid ? inside[m / 2] : 0);
    }
  };
  const auto fetch = [&](int step, int put) {  // the next step, into stage `put`
    if (16 * step < rows) {
      uint4* to = reinterpret_cast<uint4*>(queue + put * S::kStage);
      fetch_rows(next_dy, a.dy_stride, 16 * step, to + slot);
      next_dy += 16 * a.dy_stride;
      if (kAll && a.dyz) {
        fetch_rows(next_y, a.y_stride, 16 * step, to + 2 * G * S::kSlots + slot);
        next_y += 16 * a.y_stride;
      }
      if (a.dB && thread < 2 * S::kRanks) {
        T* piece = reinterpret_cast<T*>(to + S::kReads * S::kSlots) + h_row * S::kPitch + h_rank;
        copy(piece, next_h, 16 * step + h_row < rows ? min_of(max_of(a.ranks - h_rank, 0), 8) : 0);
        next_h += 16 * a.h_stride;
      }
    }
    copy_commit();
  };
#pragma unroll 1
  for (int n = 0; n < S::kStages - 1; ++n) fetch(n, n);

  for (int c = thread; c < S::kColumns; c += S::kBlock) {
    const bool valid = block0 + c < a.columns;
    g_of[c] = a.g && valid ? load_any<float>(a.g, block0 + c, a.g_dtype) : 1.f;
    if (kAll) bias_of[c] = a.bias && valid ? load_any<float>(a.bias, block0 + c, a.bias_dtype) : 0.f;
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
  float db[4] = {};                // [16 columns, 8]: column k for the 16 columns of product k
  float dyz[kOwn][8] = {};
  T* next_gdy = kAll && a.gdy ? a.gdy + (begin + i) * a.columns + own0 : nullptr;

  constexpr int V = S::kSum;
  const int u_row = thread / (S::kRanks / V), u_rank = thread % (S::kRanks / V) * V;
  const int u_inside = a.u && u_row < 16 ? a.ranks - u_rank : 0;
  float* next_u = a.u + (at.chunk * a.rows + begin + u_row) * a.ranks + u_rank;
  const auto add_up = [&](int step) {  // the sum of u over the column warps
    if (u_inside <= 0) return;
    const float* from = shared_u + (step & 1) * (S::kSharedU / 4) + u_row * S::kPitch + u_rank;
    float sum[V] = {};
#pragma unroll
    for (int w = 0; w < S::kColumnWarps; ++w) {
      Floats<V> part = *reinterpret_cast<const Floats<V>*>(from + w * 16 * S::kPitch);
#pragma unroll
      for (int e = 0; e < V; ++e) sum[e] += part.v[e];
    }
    if (16 * step + u_row < rows) {
      if (kWide) {
        Floats<V> whole;
#pragma unroll
        for (int e = 0; e < V; ++e) whole.v[e] = sum[e];
        *reinterpret_cast<Floats<V>*>(next_u) = whole;
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e)
          if (e < u_inside) next_u[e] = sum[e];
      }
    }
    next_u += 16 * a.ranks;
  };

  int get = 0;  // the stage of this step
#pragma unroll 1
  for (int step = 0; 16 * step < rows; ++step) {
    copy_wait<S::kStages - 2>();
    __syncthreads();
    fetch(step + S::kStages - 1, get > 0 ? get - 1 : S::kStages - 1);  // where the previous step was
    if (step > 0) add_up(step - 1);
    const uint4* from = reinterpret_cast<const uint4*>(queue + get * S::kStage) + slot;
    const T* shared_h = reinterpret_cast<const T*>(queue + get * S::kStage + 16 * S::kReads * S::kSlots);
    get = get + 1 < S::kStages ? get + 1 : 0;
    uint4 raw[G][2];
#pragma unroll
    for (int m = 0; m < 2 * G; ++m) raw[m / 2][m % 2] = from[m * S::kSlots];
    const auto rows16_of = [&](int group, int s, uint32_t (&rows16)[4]) {
      const uint4 &high = raw[group][0], &low = raw[group][1];
      rows16[0] = word(high, 2 * s), rows16[1] = word(low, 2 * s), rows16[2] = word(high, 2 * s + 1), rows16[3] = word(low, 2 * s + 1);
    };

    if (a.u) {
      float* mine = shared_u + (step & 1) * (S::kSharedU / 4) + (warp * 16 + i) * S::kPitch + half_rank0 + 2 * q;
#pragma unroll
      for (int t0 = 0; t0 < kTiles; t0 += 2) {  // two at a time: registers
        float u[2][4] = {};
#pragma unroll
        for (int k = 0; k < 2 * G; ++k) {
          uint32_t rows16[4];
          rows16_of(k / 2, k % 2, rows16);
#pragma unroll
          for (int t = 0; t < 2; ++t) mma<T>(u[t], rows16, gB[k / 2][k % 2][t0 + t]);
        }
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          *reinterpret_cast<float2*>(mine + 8 * (t0 + t)) = make_float2(u[t][0], u[t][1]);
          *reinterpret_cast<float2*>(mine + 8 * S::kPitch + 8 * (t0 + t)) = make_float2(u[t][2], u[t][3]);
        }
      }
    }
    if (a.dB || (S::kBias && a.db)) {
      uint32_t h[kTiles][2] = {};  // fragments of h, [16 rows, 8 ranks] each
      if (a.dB) {
#pragma unroll
        for (int t = 0; t < kTiles; t += 2) {
          uint32_t four[4];
          load_transposed(four, shared_h + lane % 16 * S::kPitch + half_rank0 + 8 * (t + lane / 16));
          h[t][0] = four[0], h[t][1] = four[1], h[t + 1][0] = four[2], h[t + 1][1] = four[3];
        }
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
          if (S::kBias && a.db) {
            const uint32_t one = i == 2 * group + s ? pair_of<T>(1.f, 1.f) : 0, ones[2] = {one, one};
            mma<T>(db, columns16, ones);
          }
        }
    }
    if constexpr (kAll) {
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        const int group = half + own;
        float shift[8], g[8];
        load_floats(bias_of + local0 + 32 * group + 8 * q, shift);
        load_floats(g_of + local0 + 32 * group + 8 * q, g);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float v[8];
          unpack<T>(kHalves == 1 ? raw[own][m] : from[(2 * half + m) * S::kSlots], v);
          if (a.dyz) {
            float z[8];
            unpack<T>(from[(2 * (G + group) + m) * S::kSlots], z);
#pragma unroll
            for (int e = 0; e < 8; ++e) dyz[own][e] += v[e] * (z[e] - shift[e]);
          }
          if (a.gdy && 16 * step + 8 * m + i < rows) {
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e] *= g[e];
            T* to = next_gdy + m * 8 * int64_t{a.columns} + 32 * own;
            if (!kWide) store_row(to, inside[own], false, v);
            else if (inside[own] > 0) store16(to, pack<T>(v));
          }
        }
      }
      next_gdy += 16 * int64_t{a.columns};
    }
  }
  __syncthreads();
  if (rows > 0) add_up((rows - 1) / 16);

  const Place<S> end(thread_index(), block_index(), a.chunks);
  const int64_t first = end.split * a.columns;  // of the split's sums
  if (a.dB) {
#pragma unroll
    for (int group = 0; group < G; ++group)
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const int column = end.column0 + 32 * group + 8 * (end.i / 2) + 4 * s + 2 * w + end.i % 2;
          const int rank = 8 * kTiles * end.half + 2 * end.q;
          float* to = a.dB + (first + column) * a.ranks + rank;
#pragma unroll
          for (int t = 0; t < kTiles; ++t)
            if (column < a.columns)
              store_pair(to + 8 * t, a.ranks - rank - 8 * t, a.ranks % 2 == 0, dB[group][s][t][2 * w], dB[group][s][t][2 * w + 1]);
        }
  }
  if (S::kBias && a.db && end.half == 0 && end.q < G) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = end.column0 + 32 * end.q + 8 * (end.i / 2) + 4 * (e % 2) + 2 * (e / 2) + end.i % 2;
      if (column < a.columns) a.db[first + column] = db[e];
    }
  }
  if (kAll && a.dyz) {
#pragma unroll
    for (int n = 0; n < 8 * kOwn; ++n) {
      float sum = dyz[n / 8][n % 8];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      const int column = end.column0 + 32 * (end.half + n / 8) + 8 * end.q + n % 8;
      if (end.i == 0 && column < a.columns) a.dyz[first + column] = sum;
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

template <class T, int kTiles, int kHalves, bool kAll>
cudaError_t enqueue_mma(const Backward<T>& a, const BackwardPlan& plan, bool wide, cudaStream_t stream) {
  using S = Shape<kTiles, kHalves, kAll>;
  if (plan.tile_columns != S::kColumns) return cudaErrorInvalidValue;
  const auto kernel = wide ? backward_mma<T, kTiles, kHalves, kAll, true> : backward_mma<T, kTiles, kHalves, kAll, false>;
  return enqueue(kernel, plan.chunks * plan.splits, S::kBlock, S::kShared, stream, a);
}

template <class T> cudaError_t enqueue_backward(const Backward<T>& a, const BackwardPlan& plan, bool wide, cudaStream_t stream) {
  if constexpr (kMatrixUnits<T>) {
    const auto run = [&](auto narrow, auto all) { return plan.all ? all(a, plan, wide, stream) : narrow(a, plan, wide, stream); };
    if (plan.ranks <= 16) return run(enqueue_mma<T, 2, 1, false>, enqueue_mma<T, 2, 1, true>);
    if (plan.ranks <= 32) return run(enqueue_mma<T, 4, 1, false>, enqueue_mma<T, 4, 1, true>);
    return run(enqueue_mma<T, 4, 2, false>, enqueue_mma<T, 4, 2, true>);
  } else {
    const int64_t grid = plan.chunks * plan.splits;
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
  const auto aligned = [](const void* p, int64_t stride) { return aligned_rows(p, stride, sizeof(T)); };
  const bool wide = aligned(from.dy, from.dy_stride) && aligned(from.y, from.y_stride) && (!from.gdy || aligned(from.gdy, from.columns)) &&
                    (!from.u || from.r % 4 == 0) && (!from.dB || aligned(from.h, from.h_stride));
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
    cudaError_t error = enqueue_backward(a, plan, wide, stream);
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
  if (wgmma_takes(a) && wgmma_runs(a.dtype)) return lowrank_backward_wgmma(a, stream);
  return for_dtype(a.dtype, [&](auto* t) { return launch_backward<std::remove_pointer_t<decltype(t)>>(a, stream); });
}

}  // namespace spectral_ops::cuda
