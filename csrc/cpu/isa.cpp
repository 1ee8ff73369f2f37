#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace spectral_ops::cpu {

namespace {

constexpr Isa kAll[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

Isa best_isa() {
#ifdef SPECTRAL_OPS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

const Isa* cap() {
  const char* wanted = std::getenv("SPECTRAL_OPS_CPU_ISA");
  for (const Isa& isa : kAll)
    if (wanted && std::strcmp(wanted, isa_name(isa)) == 0) return &isa;
  return nullptr;
}

}  // namespace

const char* isa_name(Isa isa) {
  return isa == Isa::avx512_bf16 ? "avx512_bf16" : isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "default";
}

const char* isa_error() {
  const char* wanted = std::getenv("SPECTRAL_OPS_CPU_ISA");
  return wanted && *wanted && !cap() ? "SPECTRAL_OPS_CPU_ISA: wanted avx512_bf16, avx512, avx2 or default" : nullptr;
}

Isa active_isa() {
  static const Isa active = [] {
    const Isa best = best_isa();
    const Isa* capped = cap();
    return capped && *capped < best ? *capped : best;
  }();
  return active;
}

}  // namespace spectral_ops::cpu
