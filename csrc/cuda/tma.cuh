// What else Hopper (sm_90a) has: the copy engine (TMA), barriers that count its bytes, named barriers, stores of matrices, and
// registers that warpgroups trade. tests/kernels/cuda_emulator/hopper.h supplies the same names without a GPU.
#pragma once

#include "wgmma.cuh"

#ifndef SPECTRAL_OPS_EMULATE
#include <cuda.h>

namespace spectral_ops::cuda {

using TensorMap = CUtensorMap;

// Describes a matrix [rows, columns] of 16-bit elements, row_stride elements from row to row, for copies of boxes of box_rows
// rows by 64 columns in the 128-byte swizzle. A copy fills with zeros what lies outside, and its coordinates are (column, row).
inline cudaError_t tile_map(TensorMap& map, DType dtype, const void* data, int64_t rows, int64_t columns, int64_t row_stride,
                            int box_rows, bool stored = false) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {  // from the driver, without linking to it: machines that build have none
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result = encode(
      &map, dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      stored ? CU_TENSOR_MAP_L2_PROMOTION_NONE : CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#ifdef SPECTRAL_OPS_WGMMA

// --- barriers in shared memory: a phase ends when all arrivals and all bytes that it expects are there ---

__device__ __forceinline__ void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// After barrier_init, before the cluster's barrier: the copy engine and the other blocks see them.
__device__ __forceinline__ void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// One arrival, with `bytes` more to come.
__device__ __forceinline__ void barrier_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint64_t* b, uint32_t parity) {
  asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}"
               ::"r"(shared_address(b)), "r"(parity) : "memory");
}
// One arrival at b's counterpart in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive(uint64_t* b, int rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(in_cluster(b, rank)) : "memory");
}
// Of `threads` threads, by a number of 1 to 15: a constant where it is called, else the kernel takes all sixteen.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- the copy engine ---

// A box into shared memory, whose bytes arrive at b; the second, at the same place in every block of the mask.
__device__ __forceinline__ void tile_load(void* to, const TensorMap& map, uint64_t* b, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(b)), "r"(column), "r"(row) : "memory");
}
__device__ __forceinline__ void tile_multicast(void* to, const TensorMap& map, uint64_t* b, int column, int row, uint16_t mask) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%3, %4}], [%2], %5;"
               ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(b)), "r"(column), "r"(row), "h"(mask) : "memory");
}
// A box to global memory, clipped at the matrix. Stores are committed in groups, of which a thread waits for its own.
__device__ __forceinline__ void tile_store(const TensorMap& map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(&map), "r"(shared_address(from)), "r"(column), "r"(row) : "memory");
}
__device__ __forceinline__ void tile_stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but N groups have read shared memory; until they are done.
template <int N> __device__ __forceinline__ void tile_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N> __device__ __forceinline__ void tile_stores_done() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }

// Four matrices of 8 x 8: lane 8 m + j says where row j of matrix m goes, lane 4 i + q holds its elements [i, 2 q] and [i, 2 q + 1].
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(shared_address(row)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// The registers that each thread of a warpgroup has from here on.
template <int N> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// --- a product of 64 x 256 x 16 ---

#define SPECTRAL_OPS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SPECTRAL_OPS_16(d, i) SPECTRAL_OPS_4(d, i), SPECTRAL_OPS_4(d, i + 4), SPECTRAL_OPS_4(d, i + 8), SPECTRAL_OPS_4(d, i + 12)
#define SPECTRAL_OPS_64(d, i) SPECTRAL_OPS_16(d, i), SPECTRAL_OPS_16(d, i + 16), SPECTRAL_OPS_16(d, i + 32), SPECTRAL_OPS_16(d, i + 48)
#define SPECTRAL_OPS_128(d) SPECTRAL_OPS_64(d, 0), SPECTRAL_OPS_64(d, 64)
#define SPECTRAL_OPS_PRODUCT(types)                                                                                        \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." types " {"                      \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,"   \
  "%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,"   \
  "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,"    \
  "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p, 1, 1, 0, %131;\n}"

// d [64, 256] += a [64, 16] b [16, 256], begun and not awaited; accumulators as in product_async. A stored row of a holds its
// 16 columns. kRowsOfB = 0: a stored row of b has one column of it; 1: one of its 16 rows, in boxes of 64.
template <class T, int kRowsOfB>
__device__ __forceinline__ void product256_async(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(SPECTRAL_OPS_PRODUCT("bf16.bf16") : SPECTRAL_OPS_128(d) : "l"(a), "l"(b), "r"(accumulate), "n"(kRowsOfB));
  else
    asm volatile(SPECTRAL_OPS_PRODUCT("f16.f16") : SPECTRAL_OPS_128(d) : "l"(a), "l"(b), "r"(accumulate), "n"(kRowsOfB));
}
__device__ __forceinline__ void products_done(float (&d)[128]) { asm volatile("" : SPECTRAL_OPS_128(d)::"memory"); }

#undef SPECTRAL_OPS_4
#undef SPECTRAL_OPS_16
#undef SPECTRAL_OPS_64
#undef SPECTRAL_OPS_128
#undef SPECTRAL_OPS_PRODUCT

#endif

// Multiprocessors of the current device, asked for once.
inline int processors() {
  static std::atomic<int> known[64];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return 0;
  int count = known[device].load(std::memory_order_relaxed);
  if (count == 0) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
    known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

}  // namespace spectral_ops::cuda

#else

namespace spectral_ops::cuda {

// EMULATOR_PROCESSORS says how many the emulated GPU has: few, so that a block gets several tiles of a small matrix.
inline int processors() {
  const char* text = std::getenv("EMULATOR_PROCESSORS");
  return text ? std::atoi(text) : 4;
}

}  // namespace spectral_ops::cuda

#endif
