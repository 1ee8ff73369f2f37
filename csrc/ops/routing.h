// routing_combine and routing_combine_backward: their kernels' arguments, free of torch, and their host side for the CPU, which
// reads where the rows end. Pair (t, j) has row places[t, j] of y, sorted by expert; rows from `end` on are nobody's.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include <tuple>

#include "../ops.h"
#endif

namespace spectral_ops {

// out [rows, columns] = Σ_j weights[t, j] y[places[t, j]], y [y_rows, columns]; weights [rows, K] contiguous, null for 1.
struct RoutingCombine {
  const void *y, *weights;
  void* out;
  const int64_t* places;
  int64_t rows, y_rows, columns, K, end, y_stride;
  DType dtype, weights_dtype;
};

// dy [y_rows, columns] and dweights [rows, K] (or null) of dout [rows, columns].
struct RoutingCombineBackward {
  const void *dout, *y, *weights;
  void *dy, *dweights;
  const int64_t* places;
  int64_t rows, y_rows, columns, K, end, dout_stride, y_stride;
  DType dtype, weights_dtype;
};

namespace cpu {
SPECTRAL_OPS_CPU_KERNEL(routing_combine, RoutingCombine)
SPECTRAL_OPS_CPU_KERNEL(routing_combine_backward, RoutingCombineBackward)
}  // namespace cpu

#ifdef SPECTRAL_OPS_HOST

// Fills in what both have in common; weights and places become contiguous.
template <class Arguments>
void set_routing(Arguments& a, const Tensor& y, std::optional<Tensor>& weights, Tensor& places, const Tensor& offsets) {
  check_matrix("y", y);
  check_matrix("places", places);
  a.rows = places.size(0), a.K = places.size(1), a.y_rows = y.size(0), a.columns = y.size(1);
  a.dtype = dtype_of("y", y);
  STD_TORCH_CHECK(places.scalar_type() == ScalarType::Long, "places: wanted int64");
  check_same_device("places", places, y);
  if (!places.is_contiguous()) places = torch::stable::contiguous(places);
  a.places = static_cast<const int64_t*>(places.data_ptr());
  a.weights_dtype = y.scalar_type() == ScalarType::Double ? DType::float64 : DType::float32;
  if (weights) {
    check_matrix("weights", *weights);
    check_size("weights", *weights, 0, a.rows, "the rows of places");
    check_size("weights", *weights, 1, a.K, "the columns of places");
    check_same_device("weights", *weights, y);
    a.weights_dtype = dtype_of("weights", *weights);
    if (!weights->is_contiguous()) weights = torch::stable::contiguous(*weights);
    a.weights = weights->data_ptr();
  }
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets: wanted a vector of one number more than experts");
  const int64_t last = offsets.size(0) - 1;
  if (offsets.scalar_type() == ScalarType::Int) a.end = index_data<int32_t>("offsets", offsets, last + 1, y)[last];
  else a.end = index_data<int64_t>("offsets", offsets, last + 1, y)[last];
  STD_TORCH_CHECK(0 <= a.end && a.end <= a.y_rows, "offsets: got ", a.end, " at the end, wanted 0 to ", a.y_rows, ", the rows");
  for (int64_t i = 0; i < a.rows * a.K; ++i)
    STD_TORCH_CHECK(a.places[i] >= 0, "places: got ", a.places[i], ", wanted numbers from 0 on");
}

template <class Device>
Tensor routing_combine(Tensor y, std::optional<Tensor> weights, Tensor places, Tensor offsets) {
  RoutingCombine a{};
  set_routing(a, y, weights, places, offsets);
  y = rows_of(y);
  const Tensor out = empty(y, {a.rows, a.columns});
  a.y = y.data_ptr(), a.y_stride = y.stride(0), a.out = out.data_ptr();
  Device::launch(a, y);
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> routing_combine_backward(Tensor dout, Tensor y, std::optional<Tensor> weights, Tensor places,
                                                    Tensor offsets, bool need_weights) {
  RoutingCombineBackward a{};
  set_routing(a, y, weights, places, offsets);
  dout = checked_factor("dout", dout, a.rows, a.columns, y, "y");
  if (need_weights) y = rows_of(y);
  const Tensor dy = empty(y, {a.y_rows, a.columns});
  const ScalarType dtype = weights ? weights->scalar_type() : accumulate_type(y);
  const Tensor dweights = need_weights ? empty(y, {a.rows, a.K}, dtype) : empty(y, {0}, dtype);
  a.dout = dout.data_ptr(), a.dout_stride = dout.stride(0), a.y = y.data_ptr(), a.y_stride = y.stride(0);
  a.dy = dy.data_ptr(), a.dweights = need_weights ? dweights.data_ptr() : nullptr;
  Device::launch(a, y);
  return {dy, dweights};
}

template <class Device> void bind_routing(Bindings& rows) {
  if constexpr (has_kernel<Device, RoutingCombine>) rows.add<&routing_combine<Device>>("routing_combine");
  if constexpr (has_kernel<Device, RoutingCombineBackward>)
    rows.add<&routing_combine_backward<Device>>("routing_combine_backward");
}

#endif

}  // namespace spectral_ops
