// What the CUDA kernels share: element types, 16-byte accesses, dropout words, warp matrix products, launching.
// Everything a CPU lacks stands behind SPECTRAL_OPS_EMULATE, where tests/kernels/cuda_emulator supplies it; see there.
#pragma once

#ifdef SPECTRAL_OPS_EMULATE
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"

#define SPECTRAL_OPS_HD __host__ __device__ __forceinline__

namespace spectral_ops::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// The type that values of T are summed in.
template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <class T> using acc_t = typename Accumulator<T>::type;

template <class T> constexpr int kLanes = 16 / sizeof(T);                // elements of one 16-byte access
template <class T> constexpr bool kMatrixUnits = sizeof(T) == 2;         // bf16 and fp16 run on the tensor cores
constexpr int kThreads = 256, kWarps = kThreads / 32;                    // of a block, unless a kernel has its own
constexpr int64_t kMaxColumns = INT32_MAX - (1 << 20);                   // columns are counted in 32 bits, elements in 64

SPECTRAL_OPS_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class A> SPECTRAL_OPS_HD A min_of(A a, A b) { return a < b ? a : b; }
template <class A> SPECTRAL_OPS_HD A max_of(A a, A b) { return a > b ? a : b; }
template <class A> SPECTRAL_OPS_HD A magnitude(A x) { return x < 0 ? -x : x; }

// --- one value ---

SPECTRAL_OPS_HD float value(float x) { return x; }
SPECTRAL_OPS_HD double value(double x) { return x; }
SPECTRAL_OPS_HD float value(bfloat16 x) { return __bfloat162float(x); }
SPECTRAL_OPS_HD float value(float16 x) { return __half2float(x); }

template <class T> SPECTRAL_OPS_HD T rounded(acc_t<T> x) { return x; }
template <> SPECTRAL_OPS_HD bfloat16 rounded<bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> SPECTRAL_OPS_HD float16 rounded<float16>(float x) { return __float2half_rn(x); }

// Element i of an array whose type is known only at run time.
template <class A> __device__ __forceinline__ A load_any(const void* p, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::float64: return static_cast<A>(static_cast<const double*>(p)[i]);
    case DType::float32: return static_cast<A>(static_cast<const float*>(p)[i]);
    case DType::bfloat16: return static_cast<A>(value(static_cast<const bfloat16*>(p)[i]));
    default: return static_cast<A>(value(static_cast<const float16*>(p)[i]));
  }
}

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Calls f with a null pointer of the C++ type of dtype.
template <class F> inline cudaError_t for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64: return f(static_cast<double*>(nullptr));
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::bfloat16: return f(static_cast<bfloat16*>(nullptr));
    case DType::float16: return f(static_cast<float16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

// --- 16 bytes ---

template <class T> SPECTRAL_OPS_HD void unpack(const uint4& raw, acc_t<T> (&out)[kLanes<T>]) {
  const T* v = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int e = 0; e < kLanes<T>; ++e) out[e] = value(v[e]);
}

template <class T> SPECTRAL_OPS_HD uint4 pack(const acc_t<T> (&in)[kLanes<T>]) {
  uint4 raw;
  T* v = reinterpret_cast<T*>(&raw);
#pragma unroll
  for (int e = 0; e < kLanes<T>; ++e) v[e] = rounded<T>(in[e]);
  return raw;
}

template <class T> __device__ __forceinline__ uint4 load16(const T* p) { return *reinterpret_cast<const uint4*>(p); }
template <class T> __device__ __forceinline__ void store16(T* p, const uint4& raw) { *reinterpret_cast<uint4*>(p) = raw; }

// The first n of V elements from p on, the others zero; all of them in one access where V is kLanes and n >= V.
template <class T, int V> __device__ __forceinline__ void load_part(const T* p, int n, acc_t<T> (&out)[V]) {
  if constexpr (V == kLanes<T> && V > 1) {
    if (n >= V) return unpack<T>(load16(p), out);
  }
#pragma unroll
  for (int e = 0; e < V; ++e) out[e] = e < n ? value(p[e]) : acc_t<T>(0);
}

template <class T, int V> __device__ __forceinline__ void store_part(T* p, int n, const acc_t<T> (&in)[V]) {
  if constexpr (V == kLanes<T> && V > 1) {
    if (n >= V) return store16(p, pack<T>(in));
  }
#pragma unroll
  for (int e = 0; e < V; ++e)
    if (e < n) p[e] = rounded<T>(in[e]);
}

// The first n of 16 bytes' worth of elements from p on, the others zero. `wide`: p is aligned to 16 bytes.
template <class T> __device__ __forceinline__ uint4 load_row(const T* p, int n, bool wide) {
  if (wide && n >= kLanes<T>) return load16(p);
  acc_t<T> v[kLanes<T>];
#pragma unroll
  for (int e = 0; e < kLanes<T>; ++e) v[e] = e < n ? value(p[e]) : acc_t<T>(0);
  return pack<T>(v);
}

template <class T> __device__ __forceinline__ void store_row(T* p, int n, bool wide, const acc_t<T> (&v)[kLanes<T>]) {
  if (wide && n >= kLanes<T>) return store16(p, pack<T>(v));
#pragma unroll
  for (int e = 0; e < kLanes<T>; ++e)
    if (e < n) p[e] = rounded<T>(v[e]);
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
// Whether every row of a matrix can be read 16 bytes at a time.
inline bool aligned_rows(const void* p, int64_t stride, int64_t element_size) {
  return aligned16(p) && stride * element_size % 16 == 0;
}

// --- dropout: the mask of spectral_ops/core/philox.py, bit for bit ---

// The four words of Philox4x32-10 at a 64-bit counter under a 64-bit key.
SPECTRAL_OPS_HD uint4 philox(uint64_t counter, uint64_t key) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{c0} * 0xD2511F53u, odd = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(odd >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(odd);
    c2 = static_cast<uint32_t>(even >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(even);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

struct Dropout {
  const int64_t* seed;  // null: no dropout
  uint32_t threshold;   // an element is kept where the upper 24 bits of its word are at least this
  double scale;

  Dropout(const int64_t* seed, double p) : seed(seed), threshold(0), scale(1) {
    if (!seed) return;
    const double t = p * 16777216.0;
    threshold = static_cast<uint32_t>(t);
    threshold += threshold < t;  // ceil
    scale = p < 1 ? 1 / (1 - p) : 0;
  }
};

// Bit e: whether element first + e is kept, e < N.
template <int N> SPECTRAL_OPS_HD uint32_t keep_bits(uint64_t first, uint64_t key, uint32_t threshold) {
  const int offset = static_cast<int>(first & 3);
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < (N + 6) / 4; ++j) {
    if (4 * j >= offset + N) break;
    const uint4 w = philox((first >> 2) + j, key);
    const uint32_t kept = ((w.x >> 8) >= threshold) | ((w.y >> 8) >= threshold) << 1 | ((w.z >> 8) >= threshold) << 2 |
                          ((w.w >> 8) >= threshold) << 3;
    bits |= 4 * j >= offset ? kept << (4 * j - offset) : kept >> (offset - 4 * j);
  }
  return bits & ((1u << N) - 1);
}

// --- what only a GPU has ---

#ifndef SPECTRAL_OPS_EMULATE

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char spectral_ops_shared[];
  return spectral_ops_shared;
}

// c [16, 8] += a [16, 16] b [16, 8] in a warp. Lane 4i + q holds, as pairs of T: of a, rows i and i+8 at columns 2q (a[0],
// a[1]) and at 2q+8 (a[2], a[3]); of b, column i at rows 2q (b[0]) and 2q+8 (b[1]); of c, row i and then row i+8 at 2q, 2q+1.
template <class T> __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Transposes an 8x8 matrix of 16-bit values in a warp: lane 4i + q holds row i, columns 2q and 2q+1, before and after.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Starts copying 16 bytes to shared memory, of which the first `bytes` come from memory and the others are zero.
__device__ __forceinline__ void copy16_async(void* shared, const void* global, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are under way.
template <int N> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#endif

// The sum over a warp, in every lane.
template <class A> __device__ __forceinline__ A warp_sum(A v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// Two values as the pair of T that a matrix fragment holds, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t pair_of(float low, float high) {
  const T v[2] = {rounded<T>(low), rounded<T>(high)};
  uint32_t bits;
  memcpy(&bits, v, sizeof bits);
  return bits;
}

// --- launching ---

constexpr int kMostShared = 99 * 1024;  // bytes that a block can have on every GPU of sm_80 or later

// Lets the current device's kernel have kMost bytes of dynamic shared memory, where it wants more than the 48 KB of all kernels;
// it then has no static ones. Always the same number: the device keeps one per kernel, which another thread may set meanwhile.
template <int kMost> inline cudaError_t allow_shared(const void* kernel, int64_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  if (bytes > kMost) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost);
  if (error != cudaSuccess) cudaGetLastError();  // else the next launch would report it
  return error;
}

// Enqueues grid blocks of `block` threads. kMost: bytes of dynamic shared memory, the same in every call for one kernel.
template <int kMost = kMostShared, class... P, class... A>
cudaError_t enqueue(void (*kernel)(P...), int64_t grid, int block, int64_t shared, cudaStream_t stream, const A&... arguments) {
  if (grid <= 0) return cudaSuccess;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = allow_shared<kMost>(reinterpret_cast<const void*>(kernel), shared);
  if (error != cudaSuccess) return error;
#ifdef SPECTRAL_OPS_EMULATE
  return emulator::launch(kernel, grid, 1, block, shared, arguments...);
#else
  kernel<<<static_cast<unsigned>(grid), block, shared, stream>>>(arguments...);
  return cudaGetLastError();
#endif
}

}  // namespace spectral_ops::cuda
