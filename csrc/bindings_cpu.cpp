// spectral_ops._C: the CPU kernels.
#include "module.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cpu/run.h"
#include "cpu_plans.h"  // generated
#include "layers/scratch.h"
#include "stems.h"      // generated

namespace spectral_ops {

namespace {

struct Cpu {
  template <class Arguments> static auto launch(const Arguments& a, const Tensor& like) -> decltype(cpu::run(a, like)) {
    cpu::run(a, like);
  }
  static constexpr bool on_host = true;  // its tensors are in memory that the host may read
  static constexpr auto mm_out = aoti_torch_cpu_mm_out;
  static constexpr auto addmm_out = aoti_torch_cpu_addmm_out;
  static Tensor sum_of(const Tensor& a, const Tensor& b) {
    AtenTensorHandle made = nullptr;
    check_call(aoti_torch_cpu_add_Tensor(a.get(), b.get(), 1, &made), "torch.add");
    return Tensor(made);
  }
};

PyObject* do_register(PyObject*, PyObject*) {
  return none_or_error([] { register_bindings(every_binding<Cpu>(), "CPU"); });
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(cpu::isa_name(cpu::active_isa())); }

PyObject* scratch_bytes(PyObject*, PyObject*) { return PyLong_FromLongLong(Scratch::instance().bytes()); }

PyObject* release_scratch(PyObject*, PyObject*) {
  return none_or_error([] { Scratch::instance().release(); });
}

PyMethodDef kMethods[] = {
    {"scratch_bytes", scratch_bytes, METH_NOARGS, "Bytes that the layers' operators keep from call to call."},
    {"release_scratch", release_scratch, METH_NOARGS, "Give back those that no call uses at this moment."},
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
  if (module && !add_attributes(module, every_binding<Cpu>(), SPECTRAL_OPS_BUILD_INFO)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
