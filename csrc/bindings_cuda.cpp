// spectral_ops._C_cuda: the CUDA kernels.
#include <cuda_runtime_api.h>

#include "module.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "cuda/workspace.h"
#include "cuda_plans.h"  // generated
#include "stems.h"       // generated

namespace spectral_ops {

struct Cuda {
  static constexpr bool on_host = false;
  static constexpr auto mm_out = aoti_torch_cuda_mm_out;
  static constexpr auto addmm_out = aoti_torch_cuda_addmm_out;

  // a b in float32, of 16-bit factors.
  static Tensor wide_mm(const Tensor& a, const Tensor& b) {
    Tensor out = empty(a, {a.size(0), b.size(1)}, ScalarType::Float);
    call("aten::mm", "dtype_out", a, b, ScalarType::Float, out);
    return out;
  }

  // Enqueues the kernel of these arguments on the current stream of the device that `like` is on, with its workspace.
  template <class Arguments> static auto launch(Arguments a, const Tensor& like) -> std::void_t<decltype(cuda::launch(a, {}))> {
    const int32_t device = like.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    std::optional<Tensor> workspace;  // the allocator reuses it in stream order, so it may go once the kernel is enqueued
    if (const int64_t bytes = cuda::workspace_bytes(a)) {
      workspace = empty(like, {bytes}, ScalarType::Byte);
      cuda::set_workspace(a, workspace->data_ptr());
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const cudaError_t error = cuda::launch(a, static_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
  }
};

namespace {

PyObject* do_register(PyObject*, PyObject*) {
  return none_or_error([] { register_bindings(every_binding<Cuda>(), "CUDA"); });
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
  if (module && !add_attributes(module, every_binding<Cuda>(), SPECTRAL_OPS_BUILD_INFO)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
