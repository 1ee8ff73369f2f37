// What bat_weight_ and bat_contract_ share (METHODS 1.4). Over bf16 and fp16 weights with r a multiple of 16 the blocks meet on
// the tensor cores. Their products are of bf16. A factor of another type is cut into bf16 parts that add up to it. An fp16 one
// takes two parts, which have none of fp16's narrow range. A float32 one takes three. Two parts of it leave 2^-16 of it, which
// is enough where the result is rounded to 16 bits.
//
// The order of the columns inside a product is free. It is chosen such that four neighbours of a row, read at once, are a
// lane's fragment: 16 columns stand in the order 4q, 4q+1 (q = 0..3), then 4q+2, 4q+3.
#pragma once

#include "bat.h"
#include "common.cuh"

namespace spectral_ops::cuda {

constexpr int64_t kMaxBlock = 46340;  // r * r is counted in 32 bits

template <class T> constexpr int kParts = std::is_same_v<T, bfloat16> ? 1 : sizeof(T) == 2 ? 2 : 3;

// Two values as pairs of bf16 that add up to them.
template <int P> __device__ __forceinline__ void split(float low, float high, uint32_t (&parts)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    parts[p] = pair_of<bfloat16>(low, high);
    low -= value(rounded<bfloat16>(low)), high -= value(rounded<bfloat16>(high));
  }
}

// Four neighbours of a row as two words of pairs, in parts.
template <class T> struct Four {
  std::conditional_t<sizeof(T) == 2, uint2, float4> raw;

  __device__ __forceinline__ void load(const T* p) { raw = *reinterpret_cast<const decltype(raw)*>(p); }
  __device__ __forceinline__ void values(float (&v)[4]) const {
    const T* from = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = value(from[e]);
  }
  __device__ __forceinline__ void words(uint32_t (&w)[2][kParts<T>]) const {
    if constexpr (std::is_same_v<T, bfloat16>) {
      w[0][0] = raw.x, w[1][0] = raw.y;
    } else {
      float v[4];
      values(v);
      split(v[0], v[1], w[0]);
      split(v[2], v[3], w[1]);
    }
  }
};

// c += a b of parts, without the products of parts that are below what float32 holds.
template <int P, int Q> __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[P][4], const uint32_t (&b)[Q][2]) {
#pragma unroll
  for (int p = 0; p < P; ++p)
#pragma unroll
    for (int q = 0; q < Q; ++q)
      if (p + q < 3) mma<bfloat16>(c, a[p], b[q]);
}

}  // namespace spectral_ops::cuda
