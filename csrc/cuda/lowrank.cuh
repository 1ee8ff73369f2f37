// What lowrank_update_ and lowrank_backward share (METHODS 1.1). Both are bound by the bytes of y and dy. In bf16 and fp16
// their skinny products run on the tensor cores, straight from registers. The order of the columns inside a product is free.
// It is chosen such that the 16 bytes that a lane reads from a row (8 columns) are the fragments that the instruction wants.
#pragma once

#include "common.cuh"
#include "lowrank.h"

namespace spectral_ops::cuda {

// Elements p[0] and p[1] as a pair, zero from n on. `paired`: p is aligned to 4 bytes.
template <class T> __device__ __forceinline__ uint32_t load_pair(const T* p, int n, bool paired) {
  if (paired && n >= 2) return *reinterpret_cast<const uint32_t*>(p);
  return pair_of<T>(n > 0 ? value(p[0]) : 0.f, n > 1 ? value(p[1]) : 0.f);
}

template <int V> struct alignas(4 * V) Floats { float v[V]; };

// The first n of two elements. `paired`: p is aligned to 8 bytes.
__device__ __forceinline__ void store_pair(float* p, int n, bool paired, float low, float high) {
  if (paired && n >= 2) {
    *reinterpret_cast<float2*>(p) = make_float2(low, high);
    return;
  }
  if (n > 0) p[0] = low;
  if (n > 1) p[1] = high;
}

#ifndef SPECTRAL_OPS_EMULATE
// threadIdx.x and blockIdx.x, read anew at every call.
__device__ __forceinline__ int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ unsigned block_index() {
  unsigned x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}

// Four 8x8 matrices of 16-bit values in shared memory, transposed: lane 8 m + j names row j of matrix m by its address, and
// lane 4i + q gets of each matrix column i at rows 2q and 2q+1.
__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
}
#endif

// Whether the pairs of every row of a 16-bit matrix are aligned to 4 bytes.
inline bool aligned_pairs(const void* p, int64_t stride) { return reinterpret_cast<uintptr_t>(p) % 4 == 0 && stride % 2 == 0; }

}  // namespace spectral_ops::cuda
