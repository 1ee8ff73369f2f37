// Every CPU kernel, one line each: it works on rows [begin, end) of its arguments, in one thread.
#pragma once

#include <cstdint>

#include "../arguments.h"
#include "bat.h"
#include "cayley.h"
#include "csr.h"
#include "isa.h"
#include "skinny.h"

namespace spectral_ops::cpu {

template <class Arguments>
using Kernel = void (*)(const Arguments&, int64_t begin, int64_t end);

#ifdef SPECTRAL_OPS_X86
#define SPECTRAL_OPS_CPU_KERNEL(name, Arguments)                                      \
  namespace baseline { void name(const Arguments&, int64_t, int64_t); }               \
  namespace avx2 { void name(const Arguments&, int64_t, int64_t); }                   \
  namespace avx512 { void name(const Arguments&, int64_t, int64_t); }                 \
  namespace avx512_bf16 { void name(const Arguments&, int64_t, int64_t); }            \
  inline Kernel<Arguments> kernel_for(const Arguments&) {                             \
    const Kernel<Arguments> compiled[] = {baseline::name, avx2::name, avx512::name,   \
                                          avx512_bf16::name};                         \
    return compiled[static_cast<int>(active_isa())];                                  \
  }
#else
#define SPECTRAL_OPS_CPU_KERNEL(name, Arguments)                                      \
  namespace baseline { void name(const Arguments&, int64_t, int64_t); }               \
  inline Kernel<Arguments> kernel_for(const Arguments&) { return baseline::name; }
#endif

// The tests' view of the dropout generator: rows of its mask, all ones where an element is kept, else zero; and its words.
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

SPECTRAL_OPS_CPU_KERNEL(block_sum, BlockSum)
SPECTRAL_OPS_CPU_KERNEL(block_tile, BlockTile)
SPECTRAL_OPS_CPU_KERNEL(bat_weight, BatWeightPass)
SPECTRAL_OPS_CPU_KERNEL(bat_contract, BatContractPass)
SPECTRAL_OPS_CPU_KERNEL(bat_matmul_pack, BatMatmulPack)
SPECTRAL_OPS_CPU_KERNEL(bat_matmul, BatMatmulPass)
SPECTRAL_OPS_CPU_KERNEL(bat_matmul_finish, BatMatmulFinish)
SPECTRAL_OPS_CPU_KERNEL(bat_mix_pack, BatMixPack)
SPECTRAL_OPS_CPU_KERNEL(bat_mix, BatMixPass)
SPECTRAL_OPS_CPU_KERNEL(bat_mix_backward, BatMixBackwardPass)
SPECTRAL_OPS_CPU_KERNEL(part_sum, PartSum)
SPECTRAL_OPS_CPU_KERNEL(cayley_forward, CayleyForwardPass)
SPECTRAL_OPS_CPU_KERNEL(cayley_backward, CayleyBackwardPass)
SPECTRAL_OPS_CPU_KERNEL(csr_scatter, CsrScatter)
SPECTRAL_OPS_CPU_KERNEL(csr_gather, CsrGather)
SPECTRAL_OPS_CPU_KERNEL(csr_widen, CsrWiden)
SPECTRAL_OPS_CPU_KERNEL(slab_pack, SlabPack)
SPECTRAL_OPS_CPU_KERNEL(spmm_sweep, SpmmSweep)
SPECTRAL_OPS_CPU_KERNEL(sddmm_sweep, SddmmSweep)
SPECTRAL_OPS_CPU_KERNEL(sddmm_finish, SddmmFinish)
SPECTRAL_OPS_CPU_KERNEL(importance_update, ImportanceUpdate)
SPECTRAL_OPS_CPU_KERNEL(keep_mask, KeepMask)
SPECTRAL_OPS_CPU_KERNEL(philox_words, PhiloxWords)
SPECTRAL_OPS_CPU_KERNEL(pass_pack, PassPack)
SPECTRAL_OPS_CPU_KERNEL(pass_tiles, PassTiles)
SPECTRAL_OPS_CPU_KERNEL(pass_finish, PassFinish)
SPECTRAL_OPS_CPU_KERNEL(lift_pack, LiftPack)
SPECTRAL_OPS_CPU_KERNEL(lift_tiles, LiftTiles)
SPECTRAL_OPS_CPU_KERNEL(small_backward, SmallBackward)
SPECTRAL_OPS_CPU_KERNEL(norm_finish, NormFinish)
SPECTRAL_OPS_CPU_KERNEL(fingerprint, Fingerprint)
SPECTRAL_OPS_CPU_KERNEL(magnitude_divide, MagnitudeDivide)
SPECTRAL_OPS_CPU_KERNEL(magnitude_exact, MagnitudeExact)
SPECTRAL_OPS_CPU_KERNEL(row_copy, RowCopy)
SPECTRAL_OPS_CPU_KERNEL(seeded_dropout, SeededDropout)
SPECTRAL_OPS_CPU_KERNEL(target_logprob, TargetLogprob)
SPECTRAL_OPS_CPU_KERNEL(softmax_gradient, SoftmaxGradient)
SPECTRAL_OPS_CPU_KERNEL(transpose, Transpose)

}  // namespace spectral_ops::cpu
