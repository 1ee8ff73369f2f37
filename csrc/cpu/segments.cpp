#include "segments.h"

#include "common.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

void row_copy(const RowCopy& a, int64_t begin, int64_t end) {
  if (a.bytes == 0) return;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t from = a.x_rows ? a.x_rows[t] : t, to = a.out_rows ? a.out_rows[t] : t;
    std::memcpy(row<char>(a.out, to, a.out_stride), row<char>(a.x, from, a.x_stride), static_cast<size_t>(a.bytes));
  }
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
