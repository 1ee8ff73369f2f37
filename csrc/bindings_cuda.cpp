// spectral_ops._C_cuda: the CUDA kernels.
#include <cuda_runtime_api.h>

#include "module.h"

#include "cuda/launch.h"
#include "cuda/plan.h"
#include "ops/bat.h"
#include "ops/blocksum.h"
#include "ops/csr.h"
#include "ops/dora.h"
#include "ops/lowrank.h"

namespace spectral_ops {

namespace {

struct Cuda {
  // Enqueues the kernel of these arguments on the current stream of the device that `like` is on, with its workspace.
  template <class Arguments> static void launch(Arguments a, const Tensor& like) {
    const int32_t device = like.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    std::optional<Tensor> workspace;  // the allocator reuses it in stream order, so it may go once the kernel is enqueued
    if (const int64_t bytes = cuda::workspace_bytes(a)) {
      workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
      cuda::set_workspace(a, workspace->data_ptr());
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const cudaError_t error = cuda::launch(a, static_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
  }
};

const Binding kBindings[] = {
    {"block_sum", TORCH_BOX(&block_sum<Cuda>)},
    {"block_tile_", TORCH_BOX(&block_tile_<Cuda>)},
    {"lowrank_update_", TORCH_BOX(&lowrank_update_<Cuda>)},
    {"lowrank_backward", TORCH_BOX(&lowrank_backward<Cuda>)},
    {"row_square", TORCH_BOX(&row_square<Cuda>)},
    {"column_norm", TORCH_BOX(&column_norm<Cuda>)},
    {"column_norm_cached_", TORCH_BOX(&column_norm_cached_<Cuda>)},
    {"magnitude_grad", TORCH_BOX(&magnitude_grad<Cuda>)},
    {"bat_weight_", TORCH_BOX(&bat_weight_<Cuda>)},
    {"bat_contract_", TORCH_BOX(&bat_contract_<Cuda>)},
    {"csr_scatter_", TORCH_BOX(&csr_scatter_<Cuda>)},
    {"csr_gather_", TORCH_BOX(&csr_gather_<Cuda>)},
    {"csr_spmm_", TORCH_BOX(&csr_spmm_<Cuda>)},
    {"csr_sddmm", TORCH_BOX(&csr_sddmm<Cuda>)},
};

PyObject* do_register(PyObject*, PyObject*) {
  return none_or_error([] { register_bindings(kBindings, "CUDA"); });
}

PyMethodDef kMethods[] = {
    {"register", do_register, METH_NOARGS, "Enter the kernels into torch's dispatcher; once."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of spectral_ops.", -1, kMethods,
                       nullptr,               nullptr,   nullptr,                          nullptr};

}  // namespace

}  // namespace spectral_ops

PyMODINIT_FUNC PyInit__C_cuda() {
  using namespace spectral_ops;
  PyObject* module = PyModule_Create(&kModule);
  if (module && !add_attributes(module, kBindings, SPECTRAL_OPS_BUILD_INFO)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
