// Bat by rows: bat_mix and bat_mix_backward_.
#include "bat.h"

#include "bat_blocks.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

template <class T> void mix_unit(const BatMixPass& a, int64_t owner, int64_t part, acc_t<T>* memory) {
  using A = acc_t<T>;
  const BatMix& w = a.bat;
  const BlockGroups& groups = a.groups;
  const int64_t first = owner * kTile, rows = smaller(kTile, w.rows - first);
  A* const sums = memory;  // [rows, padded]
  zero(sums, rows * groups.padded);
  alignas(64) A tile[kTile * kTile], u[kTile * kTile];
  const Matrix x{w.x, w.x_stride, 1, w.dtype, nullptr};
  for (int64_t g = part_begin(groups.count, part, a.parts); g < part_begin(groups.count, part + 1, a.parts); ++g) {
    const int64_t size = groups.size_of(g), column = g * groups.size;
    const A* const factor = at<A>(a.factors, g * groups.panels());
    for (int64_t e = 0; e < size; e += kTile) {
      const int64_t width = smaller(kTile, groups.padded - e);
      zero(u, rows * width);
      for (int64_t k = 0; k < size; k += kTile) {
        load_tile<T>(tile, x, first, rows, column + k, smaller(kTile, size - k));
        product<kTile, 1>(u, width, tile, factor + e * groups.size + k * kTile, kTile, rows, smaller(kTile, size - k), Ahead{});
      }
      for (int64_t t = 0; t < rows; ++t) {
        add_to(sums + t * groups.padded + e, u + t * width, width);
        put(at<T>(w.z, (first + t) * w.columns + column + e), u + t * width,
            at<T>(w.x, (first + t) * w.x_stride + column + e), 1, smaller(width, size - e));
      }
    }
  }
  A* const s = at<A>(a.partial, (part * w.rows + first) * w.r);
  zero(s, rows * w.r);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t b = 0; b < groups.size; b += w.r) add_to(s + t * w.r, sums + t * groups.padded + b, w.r);
}

template <class T> void mix_backward_unit(const BatMixBackwardPass& a, int64_t owner, int64_t part, acc_t<T>* memory) {
  using A = acc_t<T>;
  const BatMixBackward& w = a.bat;
  const BlockGroups& groups = a.groups;
  const int64_t size = groups.size_of(owner), column = owner * groups.size, together = groups.size / w.r;
  A *const factor = memory, *const dC = factor + groups.panels(), *const v = dC + groups.size * groups.padded;
  if (w.need_g) pack_panels(factor, groups, size, w.bat, w.bat_dtype, owner * together, 1, false);
  if (w.dC) zero(dC, groups.size * groups.padded);
  alignas(64) A tile[kTile * kTile];
  const Matrix g{w.g, w.g_stride, 1, w.dtype, nullptr}, x{w.x, w.x_stride, 1, w.dtype, nullptr};
  const int64_t row_tiles = tiles(w.rows);
  for (int64_t b = part_begin(row_tiles, part, a.parts); b < part_begin(row_tiles, part + 1, a.parts); ++b) {
    const int64_t first = b * kTile, rows = smaller(kTile, w.rows - first);
    for (int64_t k = 0; k < size; k += kTile) {  // v [size in panels of kTile, kTile, kTile]
      const int64_t n = smaller(kTile, size - k);
      load_tile<T>(v + k * kTile, g, first, rows, column + k, n);
      for (int64_t t = 0; t < rows; ++t) {
        const T* const q = at<T>(w.q, (first + t) * w.q_stride);
        A* const row = v + (k + t) * kTile;
        if (size == w.r)  // one block: q is not repeated
          for (int64_t i = 0; i < n; ++i) row[i] += value(q[k + i]);
        else
          for (int64_t i = 0, p = k % w.r; i < n; ++i, p = p + 1 == w.r ? 0 : p + 1) row[i] += value(q[p]);
      }
    }
    for (int64_t e = 0; e < size; e += kTile) {
      const int64_t width = smaller(kTile, groups.padded - e), n = smaller(kTile, size - e);
      if (w.dC) {
        load_tile<T>(tile, x, first, rows, column + e, n);
        for (int64_t k = 0; k < size; k += kTile)
          product<1, kTile>(dC + e * groups.size + k * width, width, v + k * kTile, tile, kTile, smaller(kTile, size - k),
                            rows, Ahead{});
      }
      if (!w.need_g) continue;
      zero(tile, rows * width);
      for (int64_t k = 0; k < size; k += kTile)
        product<kTile, 1>(tile, width, v + k * kTile, factor + e * groups.size + k * kTile, kTile, rows,
                          smaller(kTile, size - k), Ahead{});
      for (int64_t t = 0; t < rows; ++t) {
        T* const out = at<T>(w.g, (first + t) * w.g_stride + column + e);
        put(out, tile + t * width, static_cast<const T*>(out), 1, n);
      }
    }
  }
  if (w.dC) put_blocks(at<A>(a.partial, (part * w.columns + column) * w.r), groups, size, dC, w.r * w.r);
}

}  // namespace

void bat_mix_pack(const BatMixPack& a, int64_t begin, int64_t end) {
  const BlockGroups& groups = a.pass.groups;
  const BatMix& w = a.pass.bat;
  const auto pack = [&](auto* factors) {
    for (int64_t g = begin; g < end; ++g)
      pack_panels(factors + g * groups.panels(), groups, groups.size_of(g), w.bat, w.bat_dtype, g * (groups.size / w.r), 1, true);
  };
  if (w.dtype == DType::float64) pack(static_cast<double*>(a.pass.factors));
  else pack(static_cast<float*>(a.pass.factors));
}

void bat_mix(const BatMixPass& a, int64_t begin, int64_t end) {
  for_dtype(a.bat.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_units<acc_t<T>>(a, begin, end, [&](int64_t owner, int64_t part, acc_t<T>* memory) {
      mix_unit<T>(a, owner, part, memory);
    });
  });
}

void bat_mix_backward(const BatMixBackwardPass& a, int64_t begin, int64_t end) {
  for_dtype(a.bat.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_units<acc_t<T>>(a, begin, end, [&](int64_t owner, int64_t part, acc_t<T>* memory) {
      mix_backward_unit<T>(a, owner, part, memory);
    });
  });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
