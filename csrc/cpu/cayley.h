// What the Cayley transform's CPU kernels work in, free of torch.
#pragma once

#include "skinny.h"

namespace spectral_ops::cpu {

constexpr int64_t kExchanged = 8;  // rows exchanged before the others hear of them

// Matrices are kept in rows of `width` elements: r, rounded up to whole vectors of any instruction set.
struct CayleyForwardPass {
  const CayleyForward& cayley;
  int64_t width, room;     // room: bytes of workspace for a thread
  char* memory = nullptr;  // a thread's: matrix [r, width], factors [r, kExchanged], open, sizes [width], column [r]

  explicit CayleyForwardPass(const CayleyForward& a) : cayley(a), width((a.r + 15) / 16 * 16) {
    room = accumulator_size(a.dtype) * (a.r * (width + kExchanged) + 2 * width) + 8 * a.r;
  }
};

struct CayleyBackwardPass {
  const CayleyBackward& cayley;
  int64_t width, room;
  char* memory = nullptr;  // a thread's: M, Gᵀ M and M Gᵀ M [r, width], and a tile

  explicit CayleyBackwardPass(const CayleyBackward& a) : cayley(a), width((a.r + 15) / 16 * 16) {
    room = accumulator_size(a.dtype) * (3 * a.r * width + kTile * kTile);
  }
};

}  // namespace spectral_ops::cpu
