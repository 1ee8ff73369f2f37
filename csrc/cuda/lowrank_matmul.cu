// lowrank_matmul (METHODS 1.1) on Hopper: y = g * (x Wᵀ + scale h Bᵀ) + bias as one product over two segments. docs/HOPPER.md
// derives its layouts and draws its barriers.
#include "lowrank_matmul.h"

#include "tma.cuh"

namespace spectral_ops::cuda {

namespace {

constexpr int kStages = 4, kBlock = 384;  // a warpgroup that loads, two that multiply: 64 rows each
constexpr int kABytes = kMatmulRows * 128, kBBytes = kMatmulColumns * 128, kStageBytes = kABytes + kBBytes;
constexpr int kOutAt = kStages * kStageBytes;       // two buffers of 64 x 64 elements for each multiplying warpgroup
constexpr int kBarriersAt = kOutAt + 4 * kTileBytes;  // full[kStages], then empty[kStages]
constexpr int kShared = 1024 + kBarriersAt + 16 * kStages;
static_assert(kShared <= 227 * 1024);

struct Matmul {
  const float* g;
  const void *bias, *tile;
  float scale;
  int columns, rows, ranks, steps;   // steps: blocks of 64 of the inner dimension
  int clusters_m, tiles_n;
  int period, period8;               // of tile; 8 % period
  int64_t tile_stride;
  bool paired;                       // two elements of tile can be read at once
};

// An operand [n, 16]: by rows of 64, or by columns in boxes of 64 columns that lie 8 KB apart.
template <int kColumns> SPECTRAL_OPS_HD uint64_t operand_of(uint32_t address) {
  return kColumns ? operand(address) + (uint64_t{(kTileBytes >> 4) - 1} << 16) : operand(address);
}

#ifdef SPECTRAL_OPS_WGMMA

constexpr int kRaster = 8;  // rows of clusters that share the columns of W: 2048 rows of x, which stay in L2

// Which rows and columns of y a cluster's tile has: columns of tiles within kRaster rows of them.
struct Tile { int row, column; };
__device__ __forceinline__ Tile tile_at(const Matmul& a, int tile, int rank) {
  const int per = kRaster * a.tiles_n, group = tile / per, in = tile - group * per;
  const int height = min_of(kRaster, a.clusters_m - group * kRaster);
  return {((group * kRaster + in % height) * kMatmulCluster + rank) * kMatmulRows, in / height * kMatmulColumns};
}

#endif

// Two elements at a multiple of 4 bytes.
template <class T> __device__ __forceinline__ float2 two_of(const T* p) {
  const uint32_t raw = *reinterpret_cast<const uint32_t*>(p);
  T v[2];
  memcpy(v, &raw, sizeof v);
  return make_float2(value(v[0]), value(v[1]));
}

// kColumnsW, kColumnsB: W and B lie by columns.
template <class T, int kColumnsW, int kColumnsB>
__global__ void __launch_bounds__(kBlock, 1)
two_segment(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap W, const __grid_constant__ TensorMap h,
            const __grid_constant__ TensorMap B, const __grid_constant__ TensorMap y, const Matmul a) {
#ifdef SPECTRAL_OPS_WGMMA
  unsigned char* shared = dynamic_shared();
  shared += (1024 - shared_address(shared) % 1024) % 1024;
  uint64_t *full = reinterpret_cast<uint64_t*>(shared + kBarriersAt), *empty = full + kStages;
  const int rank = static_cast<int>(blockIdx.x % kMatmulCluster), thread = static_cast<int>(threadIdx.x);
  const int tiles = a.clusters_m * a.tiles_n, first = static_cast<int>(blockIdx.x / kMatmulCluster);
  const int stride = static_cast<int>(gridDim.x / kMatmulCluster);
  const int extra = (a.ranks + kMatmulDepth - 1) / kMatmulDepth;  // steps of the second segment, which comes first
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(full + i, 1), barrier_init(empty + i, 2 * kMatmulCluster);
    barriers_visible();
  }
  __syncwarp();
  cluster_arrive<true>();
  cluster_wait();

  if (thread < 128) {
    fewer_registers<40>();
    if (thread == 0) {
      int stage = 0;
      uint32_t phase = 0;
      for (int tile = first; tile < tiles; tile += stride) {
        const Tile at = tile_at(a, tile, rank);
        for (int step = 0; step < extra + a.steps; ++step) {
          const bool second = step < extra;
          const int k = (second ? step : step - extra) * kMatmulDepth;
          unsigned char *to_a = shared + stage * kStageBytes, *to_b = to_a + kABytes;
          barrier_wait(empty + stage, phase ^ 1);
          barrier_expect(full + stage, kStageBytes);
          tile_load(to_a, second ? h : x, full + stage, k, at.row);
          // Each block loads half of W's tile for both.
          if (second ? kColumnsB : kColumnsW) {
#pragma unroll
            for (int box = 0; box < 2; ++box)
              tile_multicast(to_b + (2 * rank + box) * kTileBytes, second ? B : W, full + stage, at.column + (2 * rank + box) * 64, k, 3);
          } else {
            tile_multicast(to_b + rank * (kBBytes / 2), second ? B : W, full + stage, k, at.column + rank * (kMatmulColumns / 2), 3);
          }
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
      }
    }
    __syncwarp();
  } else {
    more_registers<232>();
    const int group = thread / 128 - 1, t = thread % 128, warp = t / 32, lane = t % 32, i = lane / 4, q = lane % 4;
    const uint32_t mine = shared_address(shared) + group * kTileBytes, columns = shared_address(shared) + kABytes;
    int stage = 0, buffer = 0;
    uint32_t phase = 0;
    const auto next = [&] {
      if (++stage == kStages) stage = 0, phase ^= 1;
    };
    const auto release = [&](int used) {  // in both blocks: each fills half of the other's tile of W
      if (t < kMatmulCluster) barrier_arrive(empty + used, t);
    };
    for (int tile = first; tile < tiles; tile += stride) {
      const Tile at = tile_at(a, tile, rank);
      float d[128];
#pragma unroll 1
      for (int step = 0; step < extra; ++step) {
        barrier_wait(full + stage, phase);
        const int parts = min_of((a.ranks - step * kMatmulDepth + 15) / 16, 4);
        const uint32_t from = stage * kStageBytes;
#pragma unroll 1
        for (int k = 0; k < parts; ++k) {
          products_begin();
          product256_async<T, kColumnsB>(d, operand(mine + from + 32 * k),
                                         operand_of<kColumnsB>(columns + from + (kColumnsB ? 2048 : 32) * k), step + k);
          products_commit();
          products_wait<0>();
        }
        release(stage);
        next();
      }
      products_done(d);
      if (extra && a.scale != 1.f) {  // here, in float32: nothing is rounded on the way
#pragma unroll
        for (int e = 0; e < 128; ++e) d[e] *= a.scale;
      }
      int previous = stage;
      const auto multiply = [&](int accumulate) {
        barrier_wait(full + stage, phase);
        const uint32_t from = stage * kStageBytes;
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          product256_async<T, kColumnsW>(d, operand(mine + from + 32 * k),
                                         operand_of<kColumnsW>(columns + from + (kColumnsW ? 2048 : 32) * k), accumulate + k);
        products_commit();
        next();
      };
      multiply(extra);  // before the loop, in which a group is always under way
#pragma unroll 1
      for (int step = 1; step < a.steps; ++step) {
        const int current = stage;
        multiply(1);
        products_wait<1>();
        release(previous);
        previous = current;
      }
      products_wait<0>();
      products_done(d);
      release(previous);

#pragma unroll
      for (int c = 0; c < 4; ++c, buffer ^= 1) {  // 64 columns
        // Lane 4 i + q has rows i and i + 8 of its warp's 16, and columns 8 n + 2 q and the next. What lies outside y takes some
        // value of the last columns or of the last row, and is not stored.
        float* sums = d + 32 * c;
        const int column0 = at.column + 64 * c + 2 * q, last = a.columns - 2;
        if (a.g) {
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const float2 g = *reinterpret_cast<const float2*>(a.g + min_of(column0 + 8 * n, last));
            sums[4 * n] *= g.x, sums[4 * n + 1] *= g.y, sums[4 * n + 2] *= g.x, sums[4 * n + 3] *= g.y;
          }
        }
        if (a.bias) {
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const float2 b = two_of(static_cast<const T*>(a.bias) + min_of(column0 + 8 * n, last));
            sums[4 * n] += b.x, sums[4 * n + 1] += b.y, sums[4 * n + 2] += b.x, sums[4 * n + 3] += b.y;
          }
        }
        if (a.tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = min_of(at.row + group * 64 + warp * 16 + i + 8 * half, a.rows - 1);
            const T* from = static_cast<const T*>(a.tile) + row * a.tile_stride;
            int column = column0 % a.period;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
              const float2 s = a.paired ? two_of(from + column)
                                        : make_float2(value(from[column]), value(from[column + 1 < a.period ? column + 1 : 0]));
              sums[4 * n + 2 * half] += s.x, sums[4 * n + 2 * half + 1] += s.y;
              column += a.period8;
              if (column >= a.period) column -= a.period;
            }
          }
        }
        unsigned char* out = shared + kOutAt + (2 * group + buffer) * kTileBytes;
        if (t == 0) tile_stores_read<1>();
        if (group == 0) named_barrier(1, 128);
        else named_barrier(2, 128);
#pragma unroll
        for (int p = 0; p < 4; ++p) {  // 16 columns
          const float* from = sums + 8 * p;
          const uint32_t v[4] = {pair_of<T>(from[0], from[1]), pair_of<T>(from[2], from[3]), pair_of<T>(from[4], from[5]),
                                 pair_of<T>(from[6], from[7])};
          store_matrices(out + in_tile(warp * 16 + lane % 16, 2 * p + lane / 16), v);
        }
        proxy_fence();
        if (group == 0) named_barrier(1, 128);
        else named_barrier(2, 128);
        if (t == 0) {
          tile_store(y, out, at.column + 64 * c, at.row + group * 64);
          tile_stores_commit();
        }
      }
    }
    if (t == 0) tile_stores_done<0>();
    __syncwarp();
  }
  // No block ends while the other still writes to its memory or arrives at its barriers.
  cluster_arrive<true>();
  cluster_wait();
#endif
}

template <class T> using Kernel = void (*)(TensorMap, TensorMap, TensorMap, TensorMap, TensorMap, Matmul);

template <class T> cudaError_t launch_matmul(const LowRankMatmul& from, cudaStream_t stream) {
  const MatmulPlan plan = matmul_plan(from.rows, from.columns, processors());
  if (plan.clusters_m * plan.tiles_n > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool columns_W = layout_of(from.W, from.W_strides, from.columns, from.inner) == Layout::columns;
  const bool columns_B = from.r ? layout_of(from.B, from.B_strides, from.columns, from.r) == Layout::columns : columns_W;
  const auto factor = [&](TensorMap& map, const void* p, const int64_t (&strides)[2], int64_t k, bool by_columns) {
    return by_columns ? tile_map(map, from.dtype, p, k, from.columns, strides[1], kMatmulDepth)
                      : tile_map(map, from.dtype, p, from.columns, k, strides[0], kMatmulColumns / 2);
  };
  TensorMap x, W, h, B, y;
  cudaError_t error = tile_map(x, from.dtype, from.x, from.rows, from.inner, from.x_stride, kMatmulRows);
  if (error == cudaSuccess) error = factor(W, from.W, from.W_strides, from.inner, columns_W);
  if (error == cudaSuccess) error = tile_map(y, from.dtype, from.y, from.rows, from.columns, from.y_stride, 64, true);
  h = x, B = W;  // nothing reads them where there is no second segment
  if (error == cudaSuccess && from.r) error = tile_map(h, from.dtype, from.h, from.rows, from.r, from.h_stride, kMatmulRows);
  if (error == cudaSuccess && from.r) error = factor(B, from.B, from.B_strides, from.r, columns_B);
  if (error != cudaSuccess) return error;
  Matmul a{};
  a.g = static_cast<const float*>(from.g), a.bias = from.bias, a.tile = from.tile;
  a.scale = static_cast<float>(from.scale);
  a.rows = static_cast<int>(from.rows), a.columns = static_cast<int>(from.columns), a.ranks = static_cast<int>(from.r);
  a.steps = static_cast<int>(ceil_div(from.inner, kMatmulDepth));
  a.clusters_m = static_cast<int>(plan.clusters_m), a.tiles_n = static_cast<int>(plan.tiles_n);
  if (from.tile) {
    a.period = static_cast<int>(from.period), a.period8 = static_cast<int>(8 % from.period), a.tile_stride = from.tile_stride;
    a.paired = from.period % 2 == 0 && from.tile_stride % 2 == 0 && reinterpret_cast<uintptr_t>(from.tile) % 4 == 0;
  }
  const auto kernel = columns_W ? (columns_B ? two_segment<T, 1, 1> : two_segment<T, 1, 0>)
                                : (columns_B ? two_segment<T, 0, 1> : two_segment<T, 0, 0>);
  return enqueue_clusters(kernel, plan.clusters * kMatmulCluster, kMatmulCluster, kBlock, kShared, stream, x, W, h, B, y, a);
}

}  // namespace

bool matmul_runs(DType dtype) {
  return dtype == DType::bfloat16 ? has_body<two_segment<bfloat16, 0, 0>>() : has_body<two_segment<float16, 0, 0>>();
}

cudaError_t lowrank_matmul(const LowRankMatmul& a, cudaStream_t stream) {
  if (!matmul_takes(a)) return cudaErrorInvalidValue;
  return a.dtype == DType::bfloat16 ? launch_matmul<bfloat16>(a, stream) : launch_matmul<float16>(a, stream);
}

}  // namespace spectral_ops::cuda
