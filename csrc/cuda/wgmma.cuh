// What only Hopper (sm_90a) has: matrix products of a warpgroup (128 threads) from shared memory, and clusters of blocks.
// Operands lie in tiles of 64 rows of 64 16-bit elements: 8 KB, at a multiple of 1024 bytes, in the 128-byte swizzle.
#pragma once

#include <atomic>

#include "common.cuh"

namespace spectral_ops::cuda {

constexpr int kTileBytes = 64 * 128;

// Where 16 bytes of a row lie in a tile: `chunk` of 8.
SPECTRAL_OPS_HD int in_tile(int row, int chunk) { return row * 128 + (chunk ^ row % 8) * 16; }

// A matrix in such tiles, for the product that starts at `address`. Groups of 8 rows lie 1024 bytes apart. The other stride
// of a descriptor is not used: no operand here is wider than a tile.
SPECTRAL_OPS_HD uint64_t operand(uint32_t address) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#if defined(SPECTRAL_OPS_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SPECTRAL_OPS_WGMMA  // else a kernel's body is empty
#endif

#ifndef SPECTRAL_OPS_EMULATE

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Writes that a product reads go through this (or copy16_async), and are made visible to it by proxy_fence().
__device__ __forceinline__ void stage16(void* shared, const uint4& raw) { *static_cast<uint4*>(shared) = raw; }
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// copy16_async of what is read once: L2 gives it up before anything else.
__device__ __forceinline__ void stream16_async(void* shared, const void* global, int bytes) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
               ::"r"(shared_address(shared)), "l"(global), "r"(bytes), "l"(policy) : "memory");
}

#ifdef SPECTRAL_OPS_WGMMA

#define SPECTRAL_OPS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SPECTRAL_OPS_16(d, i) SPECTRAL_OPS_4(d, i), SPECTRAL_OPS_4(d, i + 4), SPECTRAL_OPS_4(d, i + 8), SPECTRAL_OPS_4(d, i + 12)
#define SPECTRAL_OPS_32(d) SPECTRAL_OPS_16(d, 0), SPECTRAL_OPS_16(d, 16)

// d [64, 64] += a [64, 16] b [16, 64], begun and not awaited. b is stored by rows of 64; a by rows too, where a row holds the
// 16 columns (kColumnMajor = 0), or transposed: 16 rows of 64. Lane 4i + q of warp w holds row 16 w + i in d[4 j + e] and row
// 16 w + i + 8 in d[4 j + 2 + e], at column 8 j + 2 q + e.
template <class T, int kColumnMajor>
__device__ __forceinline__ void product_async(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
               "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
               "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
               "%32, %33, p, 1, 1, %35, 1;\n}"
               : SPECTRAL_OPS_32(d) : "l"(a), "l"(b), "r"(accumulate), "n"(kColumnMajor));
  else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
               "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
               "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
               "%32, %33, p, 1, 1, %35, 1;\n}"
               : SPECTRAL_OPS_32(d) : "l"(a), "l"(b), "r"(accumulate), "n"(kColumnMajor));
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N committed groups are under way.
template <int N> __device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Before d is read, after the wait: the compiler does not know that the wait writes it.
__device__ __forceinline__ void products_done(float (&d)[32]) { asm volatile("" : SPECTRAL_OPS_32(d)::"memory"); }

#undef SPECTRAL_OPS_4
#undef SPECTRAL_OPS_16
#undef SPECTRAL_OPS_32

// All threads of the cluster arrive, then wait. What those wrote before that arrived with kRelease, to any of its shared
// memories, is seen after. It costs them the wait for their stores.
template <bool kRelease> __device__ __forceinline__ void cluster_arrive() {
  if constexpr (kRelease) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  else asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The address of p's counterpart in block `rank` of the cluster.
__device__ __forceinline__ uint32_t in_cluster(const void* p, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
__device__ __forceinline__ void store_in_cluster(uint32_t address, float a, float b) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

#endif

// Whether the image of a kernel that the current device would run has a body. One compiled for another architecture needs
// next to no registers. The driver is asked once for each device.
template <auto kernel> bool has_body() {
  static std::atomic<signed char> known[64];  // 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
  signed char answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaFuncAttributes attributes{};
    const bool found = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess;
    if (!found) cudaGetLastError();  // else the next launch would report it
    known[device].store(answer = found && attributes.numRegs >= 64 ? 1 : -1, std::memory_order_relaxed);
  }
  return answer > 0;
}

// Enqueues clusters of `cluster` blocks; grid is a multiple.
template <class... P, class... A>
cudaError_t enqueue_clusters(void (*kernel)(P...), int64_t grid, int cluster, int block, int64_t shared, cudaStream_t stream,
                             const A&... arguments) {
  if (grid <= 0) return cudaSuccess;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = allow_shared<227 * 1024>(reinterpret_cast<const void*>(kernel), shared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid)), config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = static_cast<size_t>(shared), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (launched != cudaSuccess) cudaGetLastError();  // else the next launch would report it
  return launched;
}

#endif

}  // namespace spectral_ops::cuda
