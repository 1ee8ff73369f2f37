// lowrank_backward_wgmma by itself, free of torch: test_cuda_wgmma.py compiles it, and deliberately broken copies of it.
#include "cuda/lowrank_backward_wgmma.cu"

extern "C" {

int64_t emulator_launches = 0, emulator_dry = 0, emulator_logged = 0, emulator_log[256];

void wgmma_plan_of(int64_t rows, int64_t columns, int64_t r, int64_t* out) {
  const auto p = spectral_ops::cuda::wgmma_plan(rows, columns, r);
  const int64_t values[] = {p.tile_columns, p.groups, p.split_rows, p.splits, p.pitch, p.dB_at, p.bytes};
  std::memcpy(out, values, sizeof values);
}

int wgmma_takes(int64_t r, int64_t dy_stride, int64_t h_offset, int64_t h_stride, int64_t db, int64_t dtype) {
  spectral_ops::LowRankBackward a{};
  a.rows = a.columns = 100, a.r = r, a.dy_stride = dy_stride, a.h_stride = h_stride;
  a.dtype = static_cast<spectral_ops::DType>(dtype);
  unsigned char* some = reinterpret_cast<unsigned char*>(uintptr_t{1024});
  a.dy = some, a.h = some + h_offset, a.u = a.dB = some, a.db = db ? some : nullptr;
  return spectral_ops::cuda::wgmma_takes(a);
}

int backward_wgmma(const void* dy, const void* h, const void* B, const void* g, void* u, void* dB, void* workspace, double scale,
                   int64_t rows, int64_t columns, int64_t r, int64_t dy_stride, int64_t h_stride, int64_t B_stride, int64_t dtype,
                   int64_t g_dtype) {
  spectral_ops::LowRankBackward a{};
  a.dy = dy, a.h = h, a.B = B, a.g = g, a.u = u, a.dB = dB, a.workspace = workspace, a.scale = scale;
  a.rows = rows, a.columns = columns, a.r = r, a.dy_stride = dy_stride, a.h_stride = h_stride, a.B_stride = B_stride;
  a.dtype = static_cast<spectral_ops::DType>(dtype), a.g_dtype = static_cast<spectral_ops::DType>(g_dtype);
  return static_cast<int>(spectral_ops::cuda::lowrank_backward_wgmma(a, nullptr));
}

}
