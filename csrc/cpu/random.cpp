#include "random.h"

#include "common.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

constexpr int kCounters = kLanes<uint64_t>;  // counters per vector: each 64-bit lane carries one 32-bit word

// Per lane: the 64-bit product of a's lower half and m. a's upper half is ignored.
inline u64_vec multiply(u64_vec a, uint32_t m) {
#if defined(__AVX512F__)
  return (u64_vec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (u64_vec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__x86_64__)
  return (u64_vec)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * m;
#endif
}

// Philox4x32-10 at the counters of the lanes: words [4 * kCounters], four to a counter, in order.
inline void philox(u64_vec counters, const uint64_t (&keys)[10][2], u32_vec words[2]) {
  u64_vec c0 = counters, c1 = counters >> 32, c2 = {}, c3 = {};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const u64_vec even = multiply(c0, 0xD2511F53), odd = multiply(c2, 0xCD9E8D57);
    c0 = (odd >> 32) ^ c1 ^ keys[round][0];
    c2 = (even >> 32) ^ c3 ^ keys[round][1];
    c1 = odd;  // its lower half; the upper one is dropped by the next product or below
    c3 = even;
  }
  const u64_vec w01 = (c0 & 0xffffffffu) | (c1 << 32), w23 = (c2 & 0xffffffffu) | (c3 << 32);
#if defined(__AVX512F__)
  words[0] = bits_as<u32_vec>(__builtin_shufflevector(w01, w23, 0, 8, 1, 9, 2, 10, 3, 11));
  words[1] = bits_as<u32_vec>(__builtin_shufflevector(w01, w23, 4, 12, 5, 13, 6, 14, 7, 15));
#elif defined(__AVX2__)
  words[0] = bits_as<u32_vec>(__builtin_shufflevector(w01, w23, 0, 4, 1, 5));
  words[1] = bits_as<u32_vec>(__builtin_shufflevector(w01, w23, 2, 6, 3, 7));
#else
  words[0] = bits_as<u32_vec>(__builtin_shufflevector(w01, w23, 0, 2));
  words[1] = bits_as<u32_vec>(__builtin_shufflevector(w01, w23, 1, 3));
#endif
}

// Calls put(n, words) for the words of elements 4 * (first / 4) + n, a vector of them at a time, up to first + count.
template <class F>
inline void for_words(const Dropout& dropout, uint64_t first, int64_t count, const F& put) {
  u64_vec counters;
  for (int l = 0; l < kCounters; ++l) counters[l] = first / 4 + l;
  const int64_t end = static_cast<int64_t>(first % 4) + count;
  for (int64_t n = 0; n < end; n += 4 * kCounters, counters += kCounters) {
    u32_vec words[2];
    philox(counters, dropout.keys, words);
    put(n, words[0]);
    put(n + kF, words[1]);
  }
}

}  // namespace

const uint32_t* keep_words(uint32_t* buffer, const Dropout& dropout, uint64_t first, int64_t count) {
  for_words(dropout, first, count, [&](int64_t n, u32_vec words) {
    const i32_vec fraction = bits_as<i32_vec>(words >> 8);  // 24 bits: a signed comparison is exact
    const i32_vec keep = fraction >= static_cast<int32_t>(dropout.threshold);
    std::memcpy(buffer + n, &keep, sizeof keep);
  });
  return buffer + first % 4;
}

void keep_mask(const KeepMask& a, int64_t begin, int64_t end) {
  const Dropout dropout(a.seed, a.p);
  uint32_t buffer[kMaxTile + kKeepSlack];
  for (int64_t e = begin * a.columns; e < end * a.columns; e += kMaxTile) {
    const int64_t left = end * a.columns - e, count = left < kMaxTile ? left : kMaxTile;
    std::memcpy(a.keep + e, keep_words(buffer, dropout, static_cast<uint64_t>(e), count), count * sizeof *a.keep);
  }
}

void philox_words(const PhiloxWords& a, int64_t, int64_t) {
  const int64_t skip = a.first % 4;
  for_words(Dropout(a.seed, 0), static_cast<uint64_t>(a.first), a.count, [&](int64_t n, u32_vec words) {
    for (int l = 0; l < kF; ++l)
      if (n + l >= skip && n + l < skip + a.count) a.words[n + l - skip] = words[l];
  });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
