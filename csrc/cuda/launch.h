// What csrc/cuda/*.cu define and bindings_cuda.cpp calls, one line a kernel: raw pointers in, an error code out, no torch
// header. Pointers are device pointers (offsets and seed included); a launch only enqueues on the stream.
#pragma once

#include <cuda_runtime_api.h>

#include "../arguments.h"

namespace spectral_ops::cuda {

// Declares cudaError_t name(const Arguments&, cudaStream_t), and launch(...) for these arguments.
#define SPECTRAL_OPS_CUDA_KERNEL(name, Arguments)           \
  cudaError_t name(const Arguments&, cudaStream_t stream);  \
  inline cudaError_t launch(const Arguments& arguments, cudaStream_t stream) { return name(arguments, stream); }

SPECTRAL_OPS_CUDA_KERNEL(block_sum, BlockSum)
SPECTRAL_OPS_CUDA_KERNEL(block_tile, BlockTile)
SPECTRAL_OPS_CUDA_KERNEL(lowrank_update, LowRankUpdate)
SPECTRAL_OPS_CUDA_KERNEL(lowrank_backward, LowRankBackward)
SPECTRAL_OPS_CUDA_KERNEL(column_norm, ColumnNorm)
SPECTRAL_OPS_CUDA_KERNEL(magnitude_grad, MagnitudeGrad)
SPECTRAL_OPS_CUDA_KERNEL(bat_weight, BatWeight)
SPECTRAL_OPS_CUDA_KERNEL(bat_contract, BatContract)
SPECTRAL_OPS_CUDA_KERNEL(csr_scatter, CsrScatter)
SPECTRAL_OPS_CUDA_KERNEL(csr_gather, CsrGather)
SPECTRAL_OPS_CUDA_KERNEL(csr_spmm, CsrSpmm)
SPECTRAL_OPS_CUDA_KERNEL(csr_sddmm, CsrSddmm)

}  // namespace spectral_ops::cuda
