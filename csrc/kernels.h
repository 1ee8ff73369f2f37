// What a stem's header (csrc/ops/) declares its kernels with, free of torch: csrc/cpu and csrc/cuda define them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

// In the namespace spectral_ops::cpu: declares a kernel of csrc/cpu, for every instruction set.
#ifdef SPECTRAL_OPS_X86
#define SPECTRAL_OPS_CPU_KERNEL(name, Arguments)                                                                    \
  namespace baseline { void name(const Arguments&, int64_t, int64_t); }                                             \
  namespace avx2 { void name(const Arguments&, int64_t, int64_t); }                                                 \
  namespace avx512 { void name(const Arguments&, int64_t, int64_t); }                                               \
  namespace avx512_bf16 { void name(const Arguments&, int64_t, int64_t); }                                          \
  template <> struct Kernels<Arguments> {                                                                           \
    static constexpr Kernel<Arguments> compiled[] = {baseline::name, avx2::name, avx512::name, avx512_bf16::name};  \
  };
#else
#define SPECTRAL_OPS_CPU_KERNEL(name, Arguments)                         \
  namespace baseline { void name(const Arguments&, int64_t, int64_t); }  \
  template <> struct Kernels<Arguments> {                                \
    static constexpr Kernel<Arguments> compiled[] = {baseline::name};    \
  };
#endif

// In the namespace spectral_ops::cuda: declares a launch function of csrc/cuda, and launch(...) for its arguments. Pointers
// are device pointers, and it only enqueues on the stream. It takes CUDA's types: in a build for CPUs nothing is declared.
#if defined(__CUDACC__) || defined(USE_CUDA) || defined(SPECTRAL_OPS_EMULATE)
#include <cuda_runtime_api.h>
#define SPECTRAL_OPS_CUDA_KERNEL(name, Arguments)           \
  cudaError_t name(const Arguments&, cudaStream_t stream);  \
  inline cudaError_t launch(const Arguments& arguments, cudaStream_t stream) { return name(arguments, stream); }
#else
#define SPECTRAL_OPS_CUDA_KERNEL(name, Arguments)
#endif

namespace spectral_ops {

enum class DType : int32_t { float64, float32, bfloat16, float16 };

inline int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

namespace cpu {

// Works on tasks [begin, end) of its arguments, in one thread.
template <class Arguments> using Kernel = void (*)(const Arguments&, int64_t begin, int64_t end);

// The kernel of these arguments, `compiled` for each instruction set in the order of Isa.
template <class Arguments> struct Kernels;

}  // namespace cpu

}  // namespace spectral_ops
