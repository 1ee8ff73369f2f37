// What Bat's CPU kernels share: units of work, and blocks packed on the diagonal of a matrix.
#pragma once

#include "bat.h"
#include "product.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

// Calls f(owner, part, memory) for every unit of tasks [begin, end): one after the other in one workspace.
template <class A, class F> inline void for_units(const BlockPlan& plan, int64_t begin, int64_t end, const F& f) {
  if (begin == end) return;
  alignas(64) char small[BlockPlan::kSmallRoom];
  A* const memory = reinterpret_cast<A*>(plan.memory ? plan.memory + begin * plan.room : small);
  for (int64_t unit = plan.first_unit(begin); unit < plan.first_unit(end); ++unit) f(unit / plan.parts, unit % plan.parts, memory);
}

// Calls f(j, panel, column of the panel, n) for the pieces [j, j + n) of r columns from `begin` on that lie in one panel.
template <class F> inline void for_panels(int64_t begin, int64_t r, const F& f) {
  for (int64_t j = 0; j < r;) {
    const int64_t column = begin + j, n = smaller(r - j, kTile - column % kTile);
    f(j, column / kTile, column % kTile, n);
    j += n;
  }
}

// Blocks first, first + step, ... of bat (or their transposes) on the diagonal of a matrix [size, size], zero elsewhere, in
// panels of kTile columns: [tiles(padded), groups.size, kTile].
template <class A>
void pack_panels(A* panels, const BlockGroups& groups, int64_t size, const void* bat, DType dtype, int64_t first, int64_t step,
                 bool transpose) {
  const int64_t r = groups.r;
  zero(panels, groups.panels());
  for_dtype(dtype, [&](auto* type) {
    const auto* block = static_cast<decltype(type)>(const_cast<void*>(bat)) + first * r * r;
    for (int64_t b = 0; b < size; b += r, block += step * r * r)
      for (int64_t i = 0; i < r; ++i)
        for_panels(b, r, [&](int64_t j, int64_t panel, int64_t at, int64_t n) {
          A* const to = panels + (panel * groups.size + b + i) * kTile + at;
          const auto* const from = block + (transpose ? j * r + i : i * r + j);
          if (transpose)
            for (int64_t c = 0; c < n; ++c) to[c] = static_cast<A>(value(from[c * r]));
          else
            for (int64_t c = 0; c < n; ++c) to[c] = static_cast<A>(value(from[c]));
        });
  });
}

// out [n] = c, plus w where given (elements w_step apart).
template <class U, class T, class A> inline void put(U* out, const A* c, const T* w, int64_t w_step, int64_t n) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  if (!w)
    for (; i + L <= n; i += L) store(out + i, load(c + i));
  else if (w_step == 1)
    for (; i + L <= n; i += L) store(out + i, load(w + i) + load(c + i));
  for (; i < n; ++i) out[i] = rounded<U>(w ? value(w[i * w_step]) + c[i] : c[i]);
}

template <class A> inline void add_to(A* sums, const A* x, int64_t n) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(sums + i, load(sums + i) + load(x + i));
  for (; i < n; ++i) sums[i] += x[i];
}

// out [size / r, r, r] = the diagonal blocks of c, which is in panels [panel, groups.size, its width]. The results of
// neighbouring blocks are `step` elements apart; with 0 they are added up.
template <class A> void put_blocks(A* out, const BlockGroups& groups, int64_t size, const A* c, int64_t step) {
  const int64_t r = groups.r;
  for (int64_t b = 0; b < size; b += r)
    for (int64_t i = 0; i < r; ++i)
      for_panels(b, r, [&](int64_t j, int64_t panel, int64_t column, int64_t n) {
        const int64_t e = panel * kTile, width = smaller(kTile, groups.padded - e);
        const A* const from = c + e * groups.size + (b + i) * width + column;
        A* const to = out + b / r * step + i * r + j;
        if (step == 0 && b > 0) add_to(to, from, n);
        else std::memcpy(to, from, n * sizeof(A));
      });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
