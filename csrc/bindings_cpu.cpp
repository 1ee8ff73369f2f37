// spectral_ops._C: the CPU kernels.
#include "module.h"

#include "cpu/kernels.h"
#include "cpu/tiling.h"
#include "ops/blocksum.h"

namespace spectral_ops {

namespace {

struct Cpu {
  // Runs the kernel of these arguments over its rows, split among torch's threads.
  template <class Arguments> static void launch(const Arguments& a, const Tensor&) {
    const auto kernel = cpu::kernel_for(a);
    torch::stable::parallel_for(0, a.rows, cpu::grain_rows(a.columns, a.seed != nullptr),
                                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }
};

const Binding kBindings[] = {
    {"block_sum", TORCH_BOX(&block_sum<Cpu>)},
    {"block_tile_", TORCH_BOX(&block_tile_<Cpu>)},
};

PyObject* do_register(PyObject*, PyObject*) {
  return none_or_error([] { register_bindings(kBindings, "CPU"); });
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(cpu::isa_name(cpu::active_isa())); }

PyMethodDef kMethods[] = {
    {"register", do_register, METH_NOARGS, "Enter the kernels into torch's dispatcher; once."},
    {"isa", isa, METH_NOARGS, "The instruction set the kernels run on: 'avx512', 'avx2' or 'default'."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels of spectral_ops.", -1, kMethods,
                       nullptr,               nullptr, nullptr,                     nullptr};

}  // namespace

}  // namespace spectral_ops

PyMODINIT_FUNC PyInit__C() {
  using namespace spectral_ops;
  if (const char* error = cpu::isa_error()) {
    PyErr_SetString(PyExc_ImportError, error);
    return nullptr;
  }
  PyObject* module = PyModule_Create(&kModule);
  if (module && !add_attributes(module, kBindings, SPECTRAL_OPS_BUILD_INFO)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
