// lowrank_matmul by itself, free of torch: test_cuda_matmul.py compiles it for the emulator, and deliberately broken copies
// of it; test_gpu.py compiles it for a chip.
#include "cuda/lowrank_matmul.cu"

extern "C" {

int64_t emulator_launches = 0, emulator_dry = 0, emulator_logged = 0, emulator_log[256];

}

namespace {

// As matmul_case.py orders them.
spectral_ops::LowRankMatmul arguments(void* const* pointers, double scale, const int64_t* n) {
  spectral_ops::LowRankMatmul a{};
  a.y = pointers[0], a.x = pointers[1], a.W = pointers[2], a.h = pointers[3], a.B = pointers[4];
  a.g = pointers[5], a.bias = pointers[6], a.tile = pointers[7], a.scale = scale;
  a.rows = n[0], a.columns = n[1], a.inner = n[2], a.r = n[3], a.period = n[4];
  a.y_stride = n[5], a.x_stride = n[6], a.W_strides[0] = n[7], a.W_strides[1] = n[8], a.h_stride = n[9];
  a.B_strides[0] = n[10], a.B_strides[1] = n[11], a.tile_stride = n[12];
  a.dtype = static_cast<spectral_ops::DType>(n[13]), a.g_dtype = static_cast<spectral_ops::DType>(n[14]);
  a.bias_dtype = static_cast<spectral_ops::DType>(n[15]);
  return a;
}

}  // namespace

extern "C" {

int matmul_takes(void* const* pointers, double scale, const int64_t* numbers) {
  return spectral_ops::cuda::matmul_takes(arguments(pointers, scale, numbers));
}

int lowrank_matmul(void* const* pointers, double scale, const int64_t* numbers, void* stream) {
  return static_cast<int>(
      spectral_ops::cuda::lowrank_matmul(arguments(pointers, scale, numbers), static_cast<cudaStream_t>(stream)));
}

}
