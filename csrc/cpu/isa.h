// Which instruction set the CPU kernels run on: every kernel source is compiled once for each, and one is chosen at load.
#pragma once

#if defined(__x86_64__)
#define SPECTRAL_OPS_X86 1
#endif

namespace spectral_ops::cpu {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

Isa active_isa();               // decided once: the best the CPU has, capped by SPECTRAL_OPS_CPU_ISA
const char* isa_name(Isa isa);  // "default", "avx2", "avx512" or "avx512_bf16", the values of that variable
const char* isa_error();        // what is wrong with SPECTRAL_OPS_CPU_ISA, or null

}  // namespace spectral_ops::cpu
