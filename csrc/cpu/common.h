// What CPU kernels share. A kernel source is compiled once per instruction set, in the namespace SPECTRAL_OPS_ISA that
// the build defines. Include no torch header and no standard header with inline functions of weight here: the linker
// keeps one copy of an inline function, which may be the AVX-512 one.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"
#include "tiling.h"

#ifndef SPECTRAL_OPS_ISA
#error "SPECTRAL_OPS_ISA: wanted baseline, avx2, avx512 or avx512_bf16"
#endif

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

#if defined(__aarch64__)
typedef __fp16 half;  // g++ before 13 has _Float16 on x86 alone
#else
typedef _Float16 half;
#endif

// The type that values of T are summed in.
template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <class T> using acc_t = typename Accumulator<T>::type;

// One native vector of A and its number of lanes.
template <class A> struct Vector { typedef A type __attribute__((vector_size(kVectorBytes))); };
template <class A> using vec = typename Vector<A>::type;
template <class A> constexpr int kLanes = kVectorBytes / sizeof(A);

constexpr int kF = kLanes<float>;
typedef uint16_t u16_half __attribute__((vector_size(kVectorBytes / 2)));  // kF 16-bit values
typedef uint32_t u32_vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t i32_vec __attribute__((vector_size(kVectorBytes)));
typedef uint64_t u64_vec __attribute__((vector_size(kVectorBytes)));

template <class To, class From> inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as: sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// --- one value ---

inline float value(float x) { return x; }
inline double value(double x) { return x; }
inline float value(bfloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
inline float value(float16 x) { return static_cast<float>(bits_as<half>(x.bits)); }

template <class T> inline T rounded(acc_t<T> x) { return x; }
template <> inline bfloat16 rounded<bfloat16>(float x) {
  const uint32_t b = bits_as<uint32_t>(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16)};  // to nearest, ties to even
}
template <> inline float16 rounded<float16>(float x) { return {bits_as<uint16_t>(static_cast<half>(x))}; }

// --- one vector of kLanes<acc_t<T>> values ---

inline vec<float> load(const float* p) { vec<float> v; std::memcpy(&v, p, sizeof v); return v; }
inline vec<double> load(const double* p) { vec<double> v; std::memcpy(&v, p, sizeof v); return v; }
inline vec<float> load(const bfloat16* p) {
  u16_half h;
  std::memcpy(&h, p, sizeof h);
  return bits_as<vec<float>>(__builtin_convertvector(h, u32_vec) << 16);
}
inline vec<float> load(const float16* p) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vec<float> v;
  for (int l = 0; l < kF; ++l) v[l] = value(p[l]);
  return v;
#endif
}

inline void store(float* p, vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, vec<double> v) { std::memcpy(p, &v, sizeof v); }
inline void store(bfloat16* p, vec<float> v) {
  const u32_vec b = bits_as<u32_vec>(v);
  const u32_vec up = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const u32_vec nan = bits_as<u32_vec>(v != v);
  const u16_half h = __builtin_convertvector((up & ~nan) | (0x7fc0 & nan), u16_half);
  std::memcpy(p, &h, sizeof h);
}
inline void store(float16* p, vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int l = 0; l < kF; ++l) p[l] = rounded<float16>(v[l]);
#endif
}

// v where keep (all ones or zero for each lane), else +0.
inline vec<float> masked(vec<float> v, const uint32_t* keep) {
  u32_vec m;
  std::memcpy(&m, keep, sizeof m);
  return bits_as<vec<float>>(bits_as<u32_vec>(v) & m);
}
inline vec<double> masked(vec<double> v, const uint32_t* keep) {
  typedef int32_t i32_half __attribute__((vector_size(kVectorBytes / 2)));
  typedef int64_t i64_vec __attribute__((vector_size(kVectorBytes)));
  i32_half m;
  std::memcpy(&m, keep, sizeof m);
  return bits_as<vec<double>>(bits_as<i64_vec>(v) & __builtin_convertvector(m, i64_vec));  // sign-extended
}

// Row t of a matrix whose rows are stride elements apart; a stride of 0 repeats one row.
template <class T> inline T* row(void* base, int64_t t, int64_t stride) { return static_cast<T*>(base) + t * stride; }
template <class T> inline const T* row(const void* base, int64_t t, int64_t stride) {
  return static_cast<const T*>(base) + t * stride;
}

// --- dropout (random.cpp): the mask of spectral_ops/core/philox.py, bit for bit ---

struct Dropout {
  uint64_t keys[10][2];  // of the rounds
  uint32_t threshold;    // an element is kept where the upper 24 bits of its word are at least this
  double scale;

  Dropout(int64_t seed, double p) : scale(p < 1 ? 1 / (1 - p) : 0) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (auto& key : keys) {
      key[0] = low, key[1] = high;
      low += 0x9E3779B9, high += 0xBB67AE85;
    }
    const double t = p * 16777216.0;
    threshold = static_cast<uint32_t>(t);
    threshold += threshold < t;  // ceil
  }
};

constexpr int64_t kKeepSlack = 4 * kLanes<uint64_t> + 4;  // elements keep_words may write past what was asked for

// Fills buffer [count + kKeepSlack] and returns where in it the words of elements [first, first + count) start.
const uint32_t* keep_words(uint32_t* buffer, const Dropout& dropout, uint64_t first, int64_t count);

// Calls f with a null pointer of the C++ type of dtype.
template <class F> inline void for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64: return f(static_cast<double*>(nullptr));
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::bfloat16: return f(static_cast<bfloat16*>(nullptr));
    case DType::float16: return f(static_cast<float16*>(nullptr));
  }
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
