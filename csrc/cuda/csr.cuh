// What csr_spmm_ and csr_sddmm share (METHODS 1.5): slabs of tokens in shared memory. A slab has 128 bytes of tokens for each
// feature, so that the eight lanes that share an entry read whole rows without bank conflicts.
#pragma once

#include "common.cuh"
#include "csr.h"

namespace spectral_ops::cuda {

constexpr int kGroups = kThreads / 8;  // of eight lanes, each with 16 bytes of the tokens of a slab
constexpr int kColumns = static_cast<int>(kSampledColumns);
template <class T> constexpr int kTokens = static_cast<int>(kSlabBytes / sizeof(T));  // of a slab

// Copies tokens [0, tokens) x features [0, features) from p to shared memory; the rest is zero. There a feature is eight
// chunks of 16 bytes of tokens. Chunk j stands at j ^ (feature / L) % 8, which spreads neighbours' writes over the banks.
template <class T, int kFeatures> struct Slab {
  static constexpr int L = kLanes<T>, kUnits = kFeatures * 8 / L / kThreads;  // L tokens x L features each
  static_assert(kUnits * L == 8 * kFeatures / kThreads && kFeatures % (8 * L) == 0);
  uint4 raw[kUnits][L];

  __device__ __forceinline__ void load(const T* p, int64_t stride, int tokens, int features, bool wide) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = threadIdx.x + u * kThreads, feature = unit % (kFeatures / L) * L, token = unit / (kFeatures / L) * L;
#pragma unroll
      for (int e = 0; e < L; ++e)
        raw[u][e] = load_row(p + (token + e) * stride + feature, token + e < tokens ? features - feature : 0, wide);
    }
  }
  __device__ __forceinline__ void store(uint4* shared) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = threadIdx.x + u * kThreads, group = unit % (kFeatures / L), chunk = unit / (kFeatures / L);
#pragma unroll
      for (int f = 0; f < L; ++f) {
        uint4 column;
        T* to = reinterpret_cast<T*>(&column);
#pragma unroll
        for (int e = 0; e < L; ++e) to[e] = reinterpret_cast<const T*>(&raw[u][e])[f];
        shared[(group * L + f) * 8 + (chunk ^ group % 8)] = column;
      }
    }
  }
};

template <class T> __device__ __forceinline__ uint4 chunk_of(const uint4* shared, int feature, int j) {
  return shared[feature * 8 + (j ^ feature / kLanes<T> % 8)];
}

// Stages kColumns features, in turns of as many as the registers take.
template <class T>
__device__ __forceinline__ void stage_columns(uint4* shared, const T* p, int64_t stride, int tokens, int features, bool wide) {
#pragma unroll 1
  for (int f = 0; f < kColumns; f += 32 * kLanes<T>) {
    Slab<T, 32 * kLanes<T>> slab;
    slab.load(p + f, stride, tokens, features - f, wide);
    slab.store(shared + f * 8);
  }
}

}  // namespace spectral_ops::cuda
