// The CUDA operators on the emulator, as CPU operators of the namespace spectral_ops_emulated: the host side and the
// kernels are those of spectral_ops._C_cuda, only the stream, the device guard and the GPU are missing.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include "cuda/common.cuh"
#include "cuda/workspace.h"
#include "cuda_plans.h"  // generated
#include "stems.h"       // generated

#include <cstring>

extern "C" {
__attribute__((visibility("default"))) int64_t emulator_launches = 0, emulator_dry = 0, emulator_logged = 0, emulator_log[256];
}

// For tests: the next attribute is refused with this error.
extern "C" __attribute__((visibility("default"))) int shared_memory_of(int64_t refused, int64_t* out) {
  emulator::shared_memory.refused = refused;
  std::memcpy(out, &emulator::shared_memory, sizeof emulator::shared_memory);
  return sizeof emulator::shared_memory / sizeof *out;
}

namespace spectral_ops {

struct Emulated {
  static constexpr bool on_host = false;  // as on a GPU, although the tensors are a CPU's

  // Each product would be a kernel.
  static bool dry(AtenTensorHandle a, AtenTensorHandle b) {
    ++emulator_launches;
    if (!emulator_dry) return false;
    int64_t sizes[3];
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(a, 0, &sizes[0]));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(b, 1, &sizes[1]));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(b, 0, &sizes[2]));
    const int64_t words[] = {0, sizes[0], sizes[1], sizes[2]};
    if (emulator_logged < 64) std::memcpy(emulator_log + 4 * emulator_logged++, words, sizeof words);
    return true;
  }
  static AOTITorchError mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
    if (dry(a, b)) return AOTI_TORCH_SUCCESS;
    return aoti_torch_cpu_mm_out(out, a, b);
  }
  static AOTITorchError addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle a, AtenTensorHandle b,
                                  double beta, double alpha) {
    if (dry(a, b)) return AOTI_TORCH_SUCCESS;
    return aoti_torch_cpu_addmm_out(out, self, a, b, beta, alpha);
  }

  static Tensor wide_mm(const Tensor& a, const Tensor& b) {  // which the CPU's library has not
    const Tensor left = torch::stable::to(a, ScalarType::Float), right = torch::stable::to(b, ScalarType::Float);
    Tensor out = empty(a, {a.size(0), b.size(1)}, ScalarType::Float);
    TORCH_ERROR_CODE_CHECK(mm_out(out.get(), left.get(), right.get()));
    return out;
  }

  template <class Arguments> static auto launch(Arguments a, const Tensor& like) -> std::void_t<decltype(cuda::launch(a, {}))> {
    constexpr int64_t kGuard = 4096;
    const int64_t bytes = cuda::workspace_bytes(a);
    Tensor workspace = empty(like, {bytes + kGuard}, ScalarType::Byte);
    unsigned char* data = static_cast<unsigned char*>(workspace.data_ptr());
    std::memset(data, 0xff, static_cast<size_t>(bytes + kGuard));  // NaN: partial sums that nobody wrote show
    cuda::set_workspace(a, data);
    const cudaError_t error = cuda::launch(a, nullptr);
    STD_TORCH_CHECK(error == cudaSuccess, "launch failed with error ", static_cast<int>(error));
    for (int64_t i = bytes; i < bytes + kGuard; ++i)
      STD_TORCH_CHECK(data[i] == 0xff, "a kernel wrote ", i - bytes, " bytes beyond its workspace of ", bytes);
  }
};

STABLE_TORCH_LIBRARY_IMPL(spectral_ops_emulated, CPU, m) {
  for (const Binding& row : every_binding<Emulated>()) m.impl(row.name, row.function);
}

}  // namespace spectral_ops

// The plans, for tests: fills out and returns how many numbers.
extern "C" __attribute__((visibility("default"))) int backward_plan_of(int64_t rows, int64_t columns, int64_t r, int64_t dtype,
                                                                        int64_t u, int64_t dB, int64_t db, int64_t dyz, int64_t gdy,
                                                                        int64_t* out) {
  const auto p = spectral_ops::cuda::backward_plan(rows, columns, r, static_cast<spectral_ops::DType>(dtype), u, dB, db, dyz, gdy);
  const int64_t values[] = {p.ranks, p.tile_columns, p.chunks, p.split_rows, p.splits, p.dB_at, p.db_at, p.dyz_at, p.bytes};
  std::memcpy(out, values, sizeof values);
  return sizeof values / sizeof *values;
}

extern "C" __attribute__((visibility("default"))) int norm_plan_of(int64_t rows, int64_t columns, int64_t r, int64_t dtype,
                                                                    int64_t unit_columns, int64_t stamp, int64_t* out) {
  const auto p = spectral_ops::cuda::norm_plan(rows, columns, r, static_cast<spectral_ops::DType>(dtype), unit_columns, stamp);
  const int64_t values[] = {p.matrix_units, p.ranks,     p.tile_rows, p.row_tiles, p.split_columns,
                            p.splits,       p.square_at, p.gram_at,   p.stamp_at,  p.bytes};
  std::memcpy(out, values, sizeof values);
  return sizeof values / sizeof *values;
}

extern "C" __attribute__((visibility("default"))) int contract_plan_of(int64_t rows, int64_t columns, int64_t r, int64_t dtype,
                                                                        int64_t aligned, int64_t* out) {
  const auto p = spectral_ops::cuda::contract_plan(rows, columns, r, static_cast<spectral_ops::DType>(dtype), aligned);
  const int64_t values[] = {p.matrix_units, p.tile, p.tiles, p.steps, p.share, p.grid, p.splits, p.bytes};
  std::memcpy(out, values, sizeof values);
  return sizeof values / sizeof *values;
}

extern "C" __attribute__((visibility("default"))) int weight_plan_of(int64_t blocks, int64_t others, int64_t r, int64_t bat_parts,
                                                                      int64_t* out) {
  const auto p = spectral_ops::cuda::weight_plan(blocks, others, r, bat_parts);
  const int64_t values[] = {p.matrix_units, p.tile, p.panels, p.groups, p.items, p.parts, p.shared};
  std::memcpy(out, values, sizeof values);
  return sizeof values / sizeof *values;
}

extern "C" __attribute__((visibility("default"))) int sampled_plan_of(int64_t T, int64_t d, int64_t k, int64_t nnz, int64_t dtype,
                                                                       int64_t* out) {
  const auto p = spectral_ops::cuda::sampled_plan(T, d, k, nnz, static_cast<spectral_ops::DType>(dtype));
  const int64_t values[] = {p.chunks,      p.blocks, p.slabs,   p.split_slabs, p.splits,
                            p.part_chunks, p.parts,  p.list_at, p.source_at,   p.sections_at, p.bytes};
  std::memcpy(out, values, sizeof values);
  return sizeof values / sizeof *values;
}

extern "C" __attribute__((visibility("default"))) int product_plan_of(int64_t T, int64_t d, int64_t k, int64_t nnz, int64_t dtype,
                                                                       int64_t aligned, int64_t* out) {
  const auto p = spectral_ops::cuda::product_plan(T, d, k, nnz, static_cast<spectral_ops::DType>(dtype), aligned);
  const int64_t values[] = {p.few, p.whole, p.rows, p.tiles, p.slabs, p.chunks, p.blocks, p.sections_at, p.bytes};
  std::memcpy(out, values, sizeof values);
  return sizeof values / sizeof *values;
}
