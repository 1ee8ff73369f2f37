// cayley_forward and cayley_backward: their kernels' arguments, free of torch, and their host side for any device. Matrices
// [n, r, r] are contiguous.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include "../ops.h"
#endif

namespace spectral_ops {

// Q = 2 (I + K)⁻¹ - I, K = (X - Xᵀ) / 2, in float32 (float64 for float64).
struct CayleyForward {
  const void* X;
  void* Q;
  int64_t n, r;
  DType dtype;  // of X
};

// dX = (V - Vᵀ) / 4, V = M Gᵀ M, M = I + Q; all float32 or float64.
struct CayleyBackward {
  const void *Q, *G;
  void* dX;
  int64_t n, r;
  DType dtype;
};

#ifdef SPECTRAL_OPS_HOST

inline void check_square(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == t.size(2), name, ": got ", t.dim(),
                  " dimensions, or rows of another length than columns, wanted square matrices [n, r, r]");
}

template <class Device> Tensor cayley_forward(Tensor X) {
  if constexpr (!has_kernel<Device, CayleyForward>) {
    return call("spectral_ops::cayley_forward", "", X);
  } else {
    check_square("X", X);
    CayleyForward a{};
    a.n = X.size(0), a.r = X.size(1);
    a.dtype = dtype_of("X", X);
    X = torch::stable::contiguous(X);
    Tensor Q = empty(X, {a.n, a.r, a.r}, accumulate_type(X));
    a.X = X.data_ptr(), a.Q = Q.data_ptr();
    Device::launch(a, X);
    return Q;
  }
}

template <class Device> Tensor cayley_backward(Tensor Q, Tensor G) {
  if constexpr (!has_kernel<Device, CayleyBackward>) {
    return call("spectral_ops::cayley_backward", "", Q, G);
  } else {
    check_square("Q", Q);
    check_square("G", G);
    for (int64_t d = 0; d < 2; ++d) check_size("G", G, d, Q.size(d), "that of Q");
    check_same_device("G", G, Q);
    CayleyBackward a{};
    a.n = Q.size(0), a.r = Q.size(1);
    a.dtype = dtype_of("Q", Q);
    check_dtype("G", G, a.dtype, "Q");
    STD_TORCH_CHECK(Q.scalar_type() == accumulate_type(Q), "Q: wanted float32 or float64");
    Q = torch::stable::contiguous(Q), G = torch::stable::contiguous(G);
    Tensor dX = empty(Q, {a.n, a.r, a.r});
    a.Q = Q.data_ptr(), a.G = G.data_ptr(), a.dX = dX.data_ptr();
    Device::launch(a, Q);
    return dX;
  }
}

template <class Device> void bind_cayley(Bindings& rows) {
  if constexpr (has_kernel<Device, CayleyForward>) rows.add<&cayley_forward<Device>>("cayley_forward");
  if constexpr (has_kernel<Device, CayleyBackward>) rows.add<&cayley_backward<Device>>("cayley_backward");
}

#endif

}  // namespace spectral_ops
