// The memory that a CUDA kernel leaves partial sums in. <stem>.h says how many bytes its kernels want; most want none.
#pragma once

#include <cstdint>

namespace spectral_ops::cuda {

template <class Arguments> int64_t workspace_bytes(const Arguments&) { return 0; }

template <class Arguments> auto set_workspace(Arguments& a, void* workspace) -> decltype(void(a.workspace)) {
  a.workspace = workspace;
}
template <class Arguments> void set_workspace(const Arguments&, void*) {}  // of arguments that have none

}  // namespace spectral_ops::cuda
