// The Python module of an extension: its schema hash, its operators, and register(), which enters the kernels into
// torch's dispatcher. Python's stable ABI only, so that one binary serves every Python from 3.10 on.
#pragma once

#include <Python.h>

#include <exception>
#include <string>

#include "ops.h"
#include "schema_hash.h"  // generated: SPECTRAL_OPS_SCHEMA_HASH

namespace spectral_ops {

// Registers every binding on a dispatch key; the library is never freed, torch's dispatcher outlives this module.
inline void register_bindings(const Bindings& bindings, const char* key) {
  using torch::stable::detail::StableLibrary;
  static StableLibrary* library = nullptr;
  if (library) return;
  library = new StableLibrary(StableLibrary::Kind::IMPL, "spectral_ops", key, __FILE__, __LINE__);
  for (const Binding& binding : bindings) library->impl(binding.name, binding.function);
}

inline bool add_attributes(PyObject* module, const Bindings& bindings, const char* build_info) {
  if (PyModule_AddStringConstant(module, "schema_hash", SPECTRAL_OPS_SCHEMA_HASH) < 0) return false;
  if (PyModule_AddStringConstant(module, "build_info", build_info) < 0) return false;
  PyObject* operators = PyTuple_New(static_cast<Py_ssize_t>(bindings.size()));
  if (!operators) return false;
  for (size_t i = 0; i < bindings.size(); ++i) {
    PyObject* name = PyUnicode_FromString(bindings[i].name);
    if (!name || PyTuple_SetItem(operators, static_cast<Py_ssize_t>(i), name) < 0) {
      Py_DECREF(operators);
      return false;
    }
  }
  if (PyModule_AddObject(module, "operators", operators) < 0) {  // steals the reference only when it succeeds
    Py_DECREF(operators);
    return false;
  }
  return true;
}

// Runs f, turning a C++ exception into Python's RuntimeError; returns None.
template <class F> PyObject* none_or_error(const F& f) {
  try {
    f();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_INCREF(Py_None);
  return Py_None;
}

}  // namespace spectral_ops
