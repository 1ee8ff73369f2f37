// The tests' view of the dropout generator (random.cpp).
#pragma once

#include "../kernels.h"

namespace spectral_ops::cpu {

// Rows of the mask, all ones where an element is kept, else zero; and words.
struct KeepMask {
  uint32_t* keep;  // [rows, columns]
  int64_t rows, columns;
  int64_t seed;
  double p;
};
struct PhiloxWords {
  uint32_t* words;  // [count]: of elements [first, first + count)
  int64_t count, first;
  int64_t seed;
};

SPECTRAL_OPS_CPU_KERNEL(keep_mask, KeepMask)
SPECTRAL_OPS_CPU_KERNEL(philox_words, PhiloxWords)

}  // namespace spectral_ops::cpu
