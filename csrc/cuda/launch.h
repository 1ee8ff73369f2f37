// What csrc/cuda/*.cu define and bindings_cuda.cpp calls: raw pointers in, an error code out, no torch header.
// Pointers are device pointers (offsets and seed included); a launch only enqueues on the stream.
#pragma once

#include <cuda_runtime_api.h>

#include "../arguments.h"

namespace spectral_ops::cuda {

cudaError_t block_sum(const BlockSum& arguments, cudaStream_t stream);
cudaError_t block_tile(const BlockTile& arguments, cudaStream_t stream);

}  // namespace spectral_ops::cuda
