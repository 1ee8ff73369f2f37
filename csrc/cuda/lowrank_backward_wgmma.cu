// lowrank_backward for 33 to 64 ranks on Hopper (METHODS 1.1): u and dB from one read of dy, by matrix products that read the
// same tile of shared memory by rows and by columns.
#include "wgmma.cuh"

#include "lowrank_wgmma.h"

namespace spectral_ops::cuda {

namespace {

template <class T> struct WgmmaBackward {
  const T *dy, *h, *B;
  const void* g;
  float *u, *dB;  // partial sums [groups, rows, pitch], [splits, columns, pitch]
  int64_t rows, split_rows, dy_stride, h_stride, B_stride;
  int columns, tile_columns, groups, ranks, pitch;
  DType g_dtype;
  bool wide_B;
};

constexpr int kSums = 128;                      // threads of the warpgroup that computes u
constexpr int kWgmmaThreads = kSums + 4 * 128;  // the others copy, and compute dB for 128 columns each
constexpr int kStageBytes = 9 * kTileBytes;     // 64 rows: 8 tiles of dy, one of h
constexpr int kReceivedAt = 8 * kTileBytes + 2 * kStageBytes;
constexpr int kWgmmaShared = kReceivedAt + 4 * kWgmmaCluster * 16 * 64 + 1008;  // it starts at a multiple of 16, tiles of 1024

__device__ __forceinline__ float4 sum_of(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <class T> __global__ void __launch_bounds__(kWgmmaThreads, 1) backward_wgmma(WgmmaBackward<T> a) {
#ifdef SPECTRAL_OPS_WGMMA
  unsigned char* shared = dynamic_shared();
  shared += (1024 - shared_address(shared) % 1024) % 1024;
  unsigned char* stages = shared + 8 * kTileBytes;                      // after g * B
  float* received = reinterpret_cast<float*>(shared + kReceivedAt);     // u: [block of the cluster, 16 rows, 64 ranks]
  const uint32_t gB = shared_address(shared), stage0 = shared_address(stages);
  const int thread = threadIdx.x, warp = thread % 128 / 32, lane = thread % 32, i = lane / 4, q = lane % 4;
  const int rank = static_cast<int>(blockIdx.x) % kWgmmaCluster;
  const unsigned cluster = blockIdx.x / kWgmmaCluster, groups = static_cast<unsigned>(a.groups);
  const int group = static_cast<int>(cluster % groups);
  const int64_t split = cluster / groups;
  const int64_t column0 = (int64_t{group} * kWgmmaCluster + rank) * a.tile_columns;
  const int64_t begin = split * a.split_rows, end = min_of(begin + a.split_rows, a.rows);
  const int steps = static_cast<int>(ceil_div(end - begin, 64)), tiles = a.tile_columns / 64;

  auto fill = [&] {  // g * B
    for (int n = thread; n < a.tile_columns * 8; n += kWgmmaThreads) {
      const int64_t column = column0 + n / 8;
      const int rank0 = n % 8 * 8, left = column < a.columns ? a.ranks - rank0 : 0;
      const float g = a.g && left > 0 ? load_any<float>(a.g, column, a.g_dtype) : 1.f;
      float v[8];
      unpack<T>(load_row(a.B + column * a.B_stride + rank0, left, a.wide_B), v);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] *= g;
      stage16(shared + n / 512 * kTileBytes + in_tile(n / 8 % 64, n % 8), pack<T>(v));
    }
    proxy_fence();
  };

  if (thread < kSums) {
    // A thread's values of u go to the block whose number is the warp's, which adds those 16 rows.
    const int row = thread / 8, chunk = thread % 8;
    const uint32_t remote = in_cluster(received + (rank * 16 + i) * 64 + 2 * q, warp);
    fill();
    cluster_arrive<true>();
    for (int step = 0; step < steps; ++step) {
      __syncthreads();  // these rows have arrived
      const uint32_t dy = stage0 + step % 2 * kStageBytes;
      float u[32];
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          product_async<T, 0>(u, operand(dy + tile * kTileBytes + 32 * k), operand(gB + tile * kTileBytes + 2048 * k), tile + k);
        products_commit();
        products_wait<1>();
      }
      products_wait<0>();
      products_done(u);
      __syncthreads();  // and have been used
      cluster_wait();   // u of the previous rows has been read
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t to = remote + 32 * (j ^ i % 4);  // ranks trade places by 8, against bank conflicts
        store_in_cluster(to, u[4 * j], u[4 * j + 1]);
        store_in_cluster(to + 8 * 256, u[4 * j + 2], u[4 * j + 3]);
      }
      cluster_arrive<true>();
      cluster_wait();
      const float4* p = reinterpret_cast<const float4*>(received + row * 64 + 8 * (chunk ^ row % 4));
      float4 sums[2] = {p[0], p[1]};
#pragma unroll
      for (int block = 1; block < kWgmmaCluster; ++block)
#pragma unroll
        for (int half = 0; half < 2; ++half) sums[half] = sum_of(sums[half], p[block * 256 + half]);
      cluster_arrive<true>();
      const int64_t at = begin + 64 * int64_t{step} + 16 * rank + row;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = 8 * chunk + 4 * half;
        if (at < end && first < a.pitch) *reinterpret_cast<float4*>(a.u + (group * a.rows + at) * a.pitch + first) = sums[half];
      }
    }
    cluster_wait();
  } else {
    const int tile0 = thread / 128 * 2 - 2, row = (thread - kSums) / 8, chunk = thread % 8;
    const int64_t left = a.columns - column0;
    const bool whole = left >= a.tile_columns;
    const int h_bytes = 2 * min_of(max_of(a.ranks - 8 * chunk, 0), 8);
    auto fetch = [&](int step) {
      if (step < steps) {
        unsigned char* to = stages + step % 2 * kStageBytes + in_tile(row, chunk);
        const int64_t at = begin + 64 * int64_t{step} + row;
        const bool inside = at < end;
        const T* from = a.dy + at * a.dy_stride + column0 + 8 * chunk;
        if (whole && inside) {
#pragma unroll 1
          for (int tile = 0; tile < tiles; ++tile) stream16_async(to + tile * kTileBytes, from + 64 * tile, 16);
        } else {
#pragma unroll 1
          for (int tile = 0; tile < tiles; ++tile) {
            const int64_t n = inside ? min_of(max_of(left - 8 * chunk - 64 * tile, int64_t{0}), int64_t{8}) : 0;
            stream16_async(to + tile * kTileBytes, n > 0 ? from + 64 * tile : a.dy, static_cast<int>(2 * n));
          }
        }
        const int bytes = inside ? h_bytes : 0;
        copy16_async(to + 8 * kTileBytes, bytes > 0 ? a.h + at * a.h_stride + 8 * chunk : a.h, bytes);
      }
      copy_commit();
    };
    fetch(0);
    fetch(1);
    fill();
    float dB[2][32] = {};
    cluster_arrive<false>();
    for (int step = 0; step < steps; ++step) {
      copy_wait<1>();
      proxy_fence();
      __syncthreads();
      const uint32_t dy = stage0 + step % 2 * kStageBytes, h = dy + 8 * kTileBytes;
      products_begin();
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          product_async<T, 1>(dB[m], operand(dy + (tile0 + m) * kTileBytes + 2048 * k), operand(h + 2048 * k), 1);
      products_commit();
      products_wait<0>();
      products_done(dB[0]);
      products_done(dB[1]);
      __syncthreads();
      fetch(step + 2);
      cluster_wait();
      cluster_arrive<false>();
      cluster_wait();
      cluster_arrive<false>();
    }
    cluster_wait();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t column = column0 + 64 * (tile0 + m) + 16 * warp + i + 8 * half;
        if (tile0 + m >= tiles || column >= a.columns) continue;
        float* to = a.dB + (split * a.columns + column) * a.pitch;
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (8 * j + 2 * q < a.pitch)
            *reinterpret_cast<float2*>(to + 8 * j + 2 * q) = make_float2(dB[m][4 * j + 2 * half], dB[m][4 * j + 2 * half + 1]);
      }
  }
#endif
}

// The second stage: adds the partial sums of four ranks, always in the same order.
template <class T> struct WgmmaReduction {
  const float *u, *dB;
  T* u_out;
  float* dB_out;
  const void* g;
  float scale;
  int64_t rows, columns;
  int groups, splits, ranks, pitch;
  DType g_dtype;
};

template <class T> __global__ void __launch_bounds__(kThreads) reduce_wgmma(WgmmaReduction<T> a) {
  const int quads = a.pitch / 4;
  int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool of_u = n < a.rows * quads;
  if (!of_u) n -= a.rows * quads;
  const int64_t count = of_u ? a.rows : a.columns;
  if (n >= count * quads) return;
  const float4* p = reinterpret_cast<const float4*>(of_u ? a.u : a.dB) + n;
  const int parts = of_u ? a.groups : a.splits;
  float4 sum = *p;
#pragma unroll 4
  for (int j = 1; j < parts; ++j) sum = sum_of(sum, p[j * count * quads]);
  const int64_t line = n / quads;
  const int rank = static_cast<int>(n - line * quads) * 4;
  const float g = !of_u && a.g ? load_any<float>(a.g, line, a.g_dtype) : 1.f;
  const float v[4] = {a.scale * (g * sum.x), a.scale * (g * sum.y), a.scale * (g * sum.z), a.scale * (g * sum.w)};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (rank + e >= a.ranks) break;
    if (of_u) a.u_out[line * a.ranks + rank + e] = rounded<T>(v[e]);
    else a.dB_out[line * a.ranks + rank + e] = v[e];
  }
}

template <class T> cudaError_t launch_wgmma(const LowRankBackward& from, cudaStream_t stream) {
  const WgmmaPlan plan = wgmma_plan(from.rows, from.columns, from.r);
  float* workspace = static_cast<float*>(from.workspace);
  WgmmaBackward<T> a{};
  a.dy = static_cast<const T*>(from.dy), a.h = static_cast<const T*>(from.h), a.B = static_cast<const T*>(from.B);
  a.g = from.g, a.g_dtype = from.g_dtype;
  a.u = workspace, a.dB = workspace + plan.dB_at;
  a.rows = from.rows, a.split_rows = plan.split_rows;
  a.dy_stride = from.dy_stride, a.h_stride = from.h_stride, a.B_stride = from.B_stride;
  a.wide_B = aligned_rows(from.B, from.B_stride, sizeof(T));
  a.columns = static_cast<int>(from.columns), a.tile_columns = static_cast<int>(plan.tile_columns);
  a.groups = static_cast<int>(plan.groups), a.ranks = static_cast<int>(from.r), a.pitch = static_cast<int>(plan.pitch);
  const int64_t grid = plan.groups * plan.splits * kWgmmaCluster;
  const cudaError_t error = enqueue_clusters(backward_wgmma<T>, grid, kWgmmaCluster, kWgmmaThreads, kWgmmaShared, stream, a);
  if (error != cudaSuccess) return error;
  const WgmmaReduction<T> sums{a.u, a.dB, static_cast<T*>(from.u), static_cast<float*>(from.dB), from.g,
                               static_cast<float>(from.scale), from.rows, from.columns, a.groups,
                               static_cast<int>(plan.splits), a.ranks, a.pitch, from.g_dtype};
  return enqueue(reduce_wgmma<T>, ceil_div((from.rows + from.columns) * (plan.pitch / 4), kThreads), kThreads, 0, stream, sums);
}

}  // namespace

bool wgmma_runs(DType dtype) {
  return dtype == DType::bfloat16 ? has_body<backward_wgmma<bfloat16>>() : has_body<backward_wgmma<float16>>();
}

cudaError_t lowrank_backward_wgmma(const LowRankBackward& a, cudaStream_t stream) {
  if (!wgmma_takes(a) || a.columns > kMaxColumns) return cudaErrorInvalidValue;
  return a.dtype == DType::bfloat16 ? launch_wgmma<bfloat16>(a, stream) : launch_wgmma<float16>(a, stream);
}

}  // namespace spectral_ops::cuda
