// The plans of the Cayley transform's CPU kernels: each matrix is one thread's.
#pragma once

#include "../ops/cayley.h"
#include "matrix.h"
#ifdef SPECTRAL_OPS_HOST
#include "run.h"
#endif

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

SPECTRAL_OPS_CPU_KERNEL(cayley_forward, CayleyForwardPass)
SPECTRAL_OPS_CPU_KERNEL(cayley_backward, CayleyBackwardPass)

#ifdef SPECTRAL_OPS_HOST

// Runs a pass over n matrices, each one thread's, in that thread's room.
template <class Pass> void run_matrices(Pass pass, const Tensor& like) {
  const int64_t n = pass.cayley.n, r = pass.cayley.r, bytes = (pass.room + 63) / 64 * 64;
  if (n == 0 || r == 0) return;
  const Tensor memory = workspace(like, bytes * torch::stable::get_num_threads());
  torch::stable::parallel_for(0, n, grain_of(n, 2 * n * r * r * r), [&](int64_t begin, int64_t end) {
    uint32_t thread = 0;
    TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
    Pass mine = pass;
    mine.memory = static_cast<char*>(memory.data_ptr()) + thread * bytes;
    kernel_for(mine)(mine, begin, end);
  });
}

inline void run(const CayleyForward& a, const Tensor& like) { run_matrices(CayleyForwardPass(a), like); }

inline void run(const CayleyBackward& a, const Tensor& like) { run_matrices(CayleyBackwardPass(a), like); }

#endif

}  // namespace spectral_ops::cpu
