// spectral_ops._C: the CPU kernels.
#include "module.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cpu/kernels.h"
#include "cpu/run.h"
#include "cpu/tiling.h"
#include "layers/bindings.h"
#include "layers/scratch.h"
#include "ops/bat.h"
#include "ops/blocksum.h"
#include "ops/cayley.h"
#include "ops/csr.h"
#include "ops/dora.h"
#include "ops/dropout.h"
#include "ops/importance.h"
#include "ops/lowrank.h"
#include "ops/policy.h"
#include "ops/segments.h"

namespace spectral_ops {

namespace {

struct Cpu {
  template <class Arguments> static void launch(const Arguments& a, const Tensor& like) { cpu::run(a, like); }
  static constexpr auto mm_out = aoti_torch_cpu_mm_out;
  static constexpr auto addmm_out = aoti_torch_cpu_addmm_out;
};

const Binding kKernels[] = {
    {"block_sum", TORCH_BOX(&block_sum<Cpu>)},
    {"block_tile_", TORCH_BOX(&Mutating<&block_tile_<Cpu>>::run)},
    {"bat_weight_", TORCH_BOX(&Mutating<&bat_weight_<Cpu>>::run)},
    {"bat_matmul", TORCH_BOX(&bat_matmul<Cpu>)},
    {"bat_contract_", TORCH_BOX(&Mutating<&bat_contract_<Cpu>>::run)},
    {"bat_mix", TORCH_BOX(&bat_mix<Cpu>)},
    {"bat_mix_backward_", TORCH_BOX(&Mutating<&bat_mix_backward_<Cpu>>::run)},
    {"cayley_forward", TORCH_BOX(&cayley_forward<Cpu>)},
    {"cayley_backward", TORCH_BOX(&cayley_backward<Cpu>)},
    {"csr_scatter_", TORCH_BOX(&Mutating<&csr_scatter_<Cpu>>::run)},
    {"csr_gather_", TORCH_BOX(&Mutating<&csr_gather_<Cpu>>::run)},
    {"csr_spmm_", TORCH_BOX(&Mutating<&csr_spmm_<Cpu>>::run)},
    {"csr_sddmm", TORCH_BOX(&csr_sddmm<Cpu>)},
    {"importance_update_", TORCH_BOX(&importance_update_<Cpu>)},
    {"importance_prune_", TORCH_BOX(&importance_prune_)},
    {"lowrank_update_", TORCH_BOX(&Mutating<&lowrank_update_<Cpu>>::run)},
    {"lowrank_backward", TORCH_BOX(&lowrank_backward<Cpu>)},
    {"column_norm", TORCH_BOX(&column_norm<Cpu>)},
    {"column_norm_cached_", TORCH_BOX(&column_norm_cached_<Cpu>)},
    {"magnitude_grad", TORCH_BOX(&magnitude_grad<Cpu>)},
    {"dropout_project", TORCH_BOX(&dropout_project<Cpu>)},
    {"dropout_outer", TORCH_BOX(&dropout_outer<Cpu>)},
    {"dropout_lift_", TORCH_BOX(&Mutating<&dropout_lift_<Cpu>>::run)},
    {"seeded_dropout", TORCH_BOX(&seeded_dropout<Cpu>)},
    {"segment_project", TORCH_BOX(&segment_project<Cpu>)},
    {"segment_lift_", TORCH_BOX(&Mutating<&segment_lift_<Cpu>>::run)},
    {"segment_outer", TORCH_BOX(&segment_outer<Cpu>)},
    {"target_logprob", TORCH_BOX(&target_logprob<Cpu>)},
    {"softmax_gradient_", TORCH_BOX(&Mutating<&softmax_gradient_<Cpu>>::run)},
};

PyObject* do_register(PyObject*, PyObject*) {
  return none_or_error([] { register_bindings(all_bindings(kKernels, kLayers<Cpu>), "CPU"); });
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
  if (module && !add_attributes(module, all_bindings(kKernels, kLayers<Cpu>), SPECTRAL_OPS_BUILD_INFO)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
