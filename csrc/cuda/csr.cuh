// What csr_spmm_ and csr_sddmm share (METHODS 1.5): slabs of tokens in shared memory. A slab has 128 bytes of tokens for each
// feature, so that the eight lanes that share an entry read whole rows without bank conflicts.
#pragma once

#include "common.cuh"
#include "csr.h"

namespace spectral_ops::cuda {

constexpr int kColumns = static_cast<int>(kBlockColumns);
template <class T> constexpr int kTokens = static_cast<int>(kSlabBytes / sizeof(T));  // of a slab

// Where chunk 0 of a feature is in shared memory, in bytes; chunk j is at place ^ j * 16. A place takes 16 bits.
template <class T> SPECTRAL_OPS_HD int place_of(int feature) {
  return feature * static_cast<int>(kSlabBytes) + feature / kLanes<T> % 8 * 16;
}
__device__ __forceinline__ uint4 chunk_at(const unsigned char* shared, int place, int j) {
  return *reinterpret_cast<const uint4*>(shared + (place ^ j * 16));
}

// What a Slab may find. part: any alignment, and ends within 16 bytes. The others: rows are aligned, and features a multiple of
// L. Past the ends part and whole leave zeros; padded, of at least one token and feature, repeats what is before.
enum class Ends { part, whole, padded };

// Copies tokens [0, tokens) x features [0, features) from p to shared memory. There a feature is eight chunks of 16 bytes of
// tokens. Chunk j stands at j ^ (feature / L) % 8, which spreads neighbours' writes over the banks.
template <class T, int kFeatures, int kBlock, Ends kEnds> struct Slab {
  static constexpr int L = kLanes<T>, kUnits = kFeatures * 8 / L / kBlock;  // L tokens x L features each
  static_assert(kUnits * L == 8 * kFeatures / kBlock && kFeatures % (8 * L) == 0);
  uint4 raw[kUnits][L];

  __device__ __forceinline__ void load(const T* p, int64_t stride, int tokens, int features, bool wide) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = threadIdx.x + u * kBlock, feature = unit % (kFeatures / L) * L, token = unit / (kFeatures / L) * L;
      constexpr bool padded = kEnds == Ends::padded;
      const T* from = p + (padded ? min_of(token, tokens - 1) : token) * stride;
      from += padded ? min_of(feature, features - L) : feature;
#pragma unroll
      for (int e = 0; e < L; ++e) {
        const int n = token + e < tokens ? features - feature : 0;
        if constexpr (kEnds == Ends::part) raw[u][e] = load_row(from, n, wide);
        else raw[u][e] = padded || n > 0 ? load16(from) : uint4{};
        if (!padded || token + e + 1 < tokens) from += stride;
      }
    }
  }
  __device__ __forceinline__ void store(unsigned char* shared) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = threadIdx.x + u * kBlock, group = unit % (kFeatures / L), chunk = unit / (kFeatures / L);
#pragma unroll
      for (int f = 0; f < L; ++f) {
        uint4 column;
        T* to = reinterpret_cast<T*>(&column);
#pragma unroll
        for (int e = 0; e < L; ++e) to[e] = reinterpret_cast<const T*>(&raw[u][e])[f];
        *reinterpret_cast<uint4*>(shared + (place_of<T>(group * L + f) ^ chunk * 16)) = column;
      }
    }
  }
};

// unpack, with one instruction for each of a pair of bfloat16.
template <class T> __device__ __forceinline__ void widen(const uint4& raw, acc_t<T> (&out)[kLanes<T>]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t low = words[e] << 16, high = words[e] & 0xffff0000u;
      memcpy(&out[2 * e], &low, 4), memcpy(&out[2 * e + 1], &high, 4);
    }
  } else {
    unpack<T>(raw, out);
  }
}

__device__ __forceinline__ int first_from(const int32_t* columns, int begin, int end, int64_t column) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (columns[middle] < column) begin = middle + 1;
    else end = middle;
  }
  return begin;
}

// Sorts entries by chunk of kRows rows, block of kColumns columns, row, column: those of one chunk and block. First each
// thread counts the entries of one row: row(r, first, count) says where in the list those of row r of the chunk go. Then
// every thread moves as many as any other: entry(i, r, p) says that entry p of S is number i of the list.
template <int kRows, class Row, class Entry>
__device__ __forceinline__ void arrange(const int32_t* row_offsets, const int32_t* columns, int d, int chunk, int block,
                                        const Row& row, const Entry& entry) {
  static_assert(kRows % 32 == 0 && kRows <= kThreads);
  __shared__ int counts[2][kRows], skipped[2][kRows], firsts[kRows];
  const int r = threadIdx.x;
  const int64_t row0 = min_of<int64_t>(int64_t{chunk} * kRows, d);
  int begin = 0, low = 0, high = 0;
  if (r < kRows && row0 + r < d) {
    const int end = row_offsets[row0 + r + 1];
    begin = row_offsets[row0 + r];
    low = first_from(columns, begin, end, int64_t{block} * kColumns);
    high = first_from(columns, low, end, int64_t{block + 1} * kColumns);
  }
  if (r < kRows) firsts[r] = low, counts[0][r] = high - low, skipped[0][r] = low - begin;
  int now = 0;
  for (int step = 1; step < kRows; step *= 2, now ^= 1) {  // inclusive sums; each step reads one buffer, writes the other
    __syncthreads();
    if (r >= kRows) continue;
    counts[now ^ 1][r] = counts[now][r] + (r >= step ? counts[now][r - step] : 0);
    skipped[now ^ 1][r] = skipped[now][r] + (r >= step ? skipped[now][r - step] : 0);
  }
  __syncthreads();
  const int* upto = counts[now];
  const int base = row_offsets[row0] + skipped[now][kRows - 1];
  if (r < kRows) row(r, base + upto[r] - (high - low), high - low);
  for (int n = threadIdx.x; n < upto[kRows - 1]; n += kThreads) {
    int of = 0, last = kRows - 1;  // the first row with upto > n
    while (of < last) {
      const int middle = (of + last) / 2;
      if (upto[middle] <= n) of = middle + 1;
      else last = middle;
    }
    entry(base + n, of, firsts[of] + n - (of > 0 ? upto[of - 1] : 0));
  }
}

}  // namespace spectral_ops::cuda
