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

// Whether the pairs of every row of a 16-bit matrix are aligned to 4 bytes.
inline bool aligned_pairs(const void* p, int64_t stride) { return reinterpret_cast<uintptr_t>(p) % 4 == 0 && stride % 2 == 0; }

}  // namespace spectral_ops::cuda
