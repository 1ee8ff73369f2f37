// How the CPU kernels split work, as plain functions that the tests call too.
#pragma once

#include <cstdint>

namespace spectral_ops::cpu {

constexpr int64_t kMaxTile = 1024;  // columns of partial sums that a kernel keeps on its stack

// A row is added into r * copies sums, folded into r at the end: a short or odd r then still fills vectors. The copies do
// not depend on the instruction set, so the order of additions does not either.
inline int64_t period_copies(int64_t columns, int64_t r, int64_t wanted) {
  int64_t copies = r % 16 == 0 ? 1 : r % 8 == 0 ? 2 : r % 4 == 0 ? 4 : r % 2 == 0 ? 8 : 16;
  while (r * copies < wanted) copies *= 2;
  if (r * copies > kMaxTile) return 1;
  while (copies > 1 && r * copies > columns) copies /= 2;
  return copies;
}

// Rows a thread takes at least: enough work to pay for waking it.
inline int64_t grain_rows(int64_t columns, bool dropout) {
  const int64_t elements = dropout ? 8192 : 32768;
  return columns >= elements ? 1 : elements / (columns > 0 ? columns : 1);
}

}  // namespace spectral_ops::cpu
