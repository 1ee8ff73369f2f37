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

__device__ __forceinline__ float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// Two values as pairs of bf16 that add up to them. A bf16 is the upper half of a float32.
template <int P> __device__ __forceinline__ void split(float low, float high, uint32_t (&parts)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    parts[p] = pair_of<bfloat16>(low, high);
    low -= float_of(parts[p] << 16), high -= float_of(parts[p] & 0xffff0000u);
  }
}

// Four neighbours of a row as two words of pairs, in parts.
template <class T> struct Four {
  std::conditional_t<sizeof(T) == 2, uint2, float4> raw;

  __device__ __forceinline__ void load(const T* p) { raw = *reinterpret_cast<const decltype(raw)*>(p); }
  __device__ __forceinline__ void words(uint32_t (&w)[2][kParts<T>]) const {
    if constexpr (std::is_same_v<T, bfloat16>) {
      w[0][0] = raw.x, w[1][0] = raw.y;
    } else {
      const T* v = reinterpret_cast<const T*>(&raw);
      split(value(v[0]), value(v[1]), w[0]);
      split(value(v[2]), value(v[3]), w[1]);
    }
  }
};

// A lane's pair of the unit matrix, in bf16: at a row, from a column on.
__device__ __forceinline__ uint32_t unit_at(int row, int column) {
  return (row == column ? 0x3f80u : 0u) | (row == column + 1 ? 0x3f800000u : 0u);
}

// c += a b of parts, without the products of parts that are below what float32 holds.
template <int P, int Q> __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[P][4], const uint32_t (&b)[Q][2]) {
#pragma unroll
  for (int p = 0; p < P; ++p)
#pragma unroll
    for (int q = 0; q < Q; ++q)
      if (p + q < 3) mma<bfloat16>(c, a[p], b[q]);
}

}  // namespace spectral_ops::cuda
