// Siblings with low-rank updates over one x, forward and backward, for any device: spectral_ops/functional/group.py has the
// mathematics and the same steps in Python.
#pragma once

#include "lowrank.h"

namespace spectral_ops {

inline void check_siblings(size_t wanted, const char* name, size_t got) {
  STD_TORCH_CHECK(got == wanted && got > 0, name, ": got ", got, ", wanted one for each of ", wanted, " weights");
}

// Results: y of every sibling, and their h side by side.
template <class Device>
std::tuple<std::vector<Tensor>, Tensor> lowrank_group_forward(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> A,
                                                              std::vector<Tensor> B, std::vector<MaybeTensor> biases,
                                                              std::vector<double> scales) {
  const NoGrad guard;
  const size_t n = weights.size();
  check_siblings(n, "A", A.size());
  check_siblings(n, "B", B.size());
  check_siblings(n, "biases", biases.size());
  check_siblings(n, "scales", scales.size());
  for (size_t i = 0; i < n; ++i) {
    check_weight(x, weights[i]);
    check_factors(x, weights[i].size(0), A[i], B[i]);
    A[i] = cast_as(A[i], x);
  }
  const Tensor x2 = flat("x", x);
  Tensor h = mm<Device>(x2, transposed(joined(A, 0)));
  std::vector<Tensor> outputs;
  int64_t start = 0;
  for (size_t i = 0; i < n; ++i) {
    outputs.push_back(empty_rows(x, weights[i].size(0)));
    const int64_t r = A[i].size(0);
    adapted_into<Device>(flat("y", outputs[i]), x2, weights[i], columns_of(h, start, r), cast_as(B[i], x), scales[i],
                         std::nullopt, biases[i]);
    start += r;
  }
  return {outputs, h};
}

// Results: dx, and dA, dB and db of every sibling; empty [0] where needs[i], bits for dx, dA_i, dB_i and db_i, has none.
template <class Device>
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lowrank_group_backward(
    Tensor h, MaybeTensor x, std::vector<MaybeTensor> dys, std::vector<Tensor> weights, std::vector<Tensor> A,
    std::vector<Tensor> B, std::vector<double> scales, std::vector<int64_t> needs) {
  const NoGrad guard;
  check_matrix("h", h);
  const size_t n = weights.size();
  check_siblings(n, "dys", dys.size());
  check_siblings(n, "A", A.size());
  check_siblings(n, "B", B.size());
  check_siblings(n, "scales", scales.size());
  check_siblings(n, "needs", needs.size());
  MaybeTensor dx;
  std::vector<Tensor> dA, dB, db, trained;          // u of those whose A trains
  std::vector<Tensor> grads, bases, lifted, lifts;  // dy, weight, u and A of those that add to dx
  int64_t start = 0;
  for (size_t i = 0; i < n; ++i) {
    const bool need_x = wants(needs[i], 0), need_A = wants(needs[i], 1), need_B = wants(needs[i], 2);
    const Tensor part = columns_of(h, start, A[i].size(0));
    start += A[i].size(0);
    dA.push_back(nothing(h)), dB.push_back(nothing(h)), db.push_back(nothing(h));
    if (!needs[i]) continue;
    STD_TORCH_CHECK(dys[i].has_value(), "dys: got none for a sibling of which a gradient is wanted");
    const Tensor dy2 = flat("dy", *dys[i]);
    auto [u, full_B, full_b, dyz, gdy] =
        lowrank_backward<Device>(dy2, part, cast_as(B[i], h), scales[i], std::nullopt, std::nullopt, std::nullopt,
                                 need_x || need_A, need_B, wants(needs[i], 3), false);
    if (need_x && !dx) dx = empty_rows(*dys[i], weights[i].size(1));
    if (need_x) grads.push_back(dy2), bases.push_back(weights[i]);
    if (need_x) lifted.push_back(u), lifts.push_back(cast_as(A[i], h));
    if (need_A) trained.push_back(u);
    if (need_B) dB[i] = cast_as(full_B, B[i]);
    if (wants(needs[i], 3)) db[i] = cast_as(full_b, h);
  }
  if (dx) {
    constexpr bool joins = has_kernel<Device, LowRankMatmul>;  // the first product takes u A with it
    const Tensor dx2 = flat("dx", *dx), u = joined(lifted, 1), a = joined(lifts, 0);
    if constexpr (joins)
      matmul_into<Device>(dx2, grads[0], transposed(bases[0]), u, transposed(a), 1, std::nullopt, std::nullopt);
    else mm_out<Device>(dx2, grads[0], bases[0]);
    for (size_t i = 1; i < grads.size(); ++i) add_product<Device>(dx2, grads[i], bases[i]);
    if constexpr (!joins) add_product<Device>(dx2, u, a);
  }
  if (!trained.empty()) {
    const Tensor stacked = A_gradient<Device>(joined(trained, 1), flat("x", given("x", x)), std::nullopt, 0, accumulate_type(h));
    start = 0;
    for (size_t i = 0; i < n; ++i) {
      if (!wants(needs[i], 1)) continue;
      dA[i] = copy_as(rows_of(stacked, start, A[i].size(0)), A[i]);
      start += A[i].size(0);
    }
  }
  return {dx ? *dx : nothing(h), dA, dB, db};
}

template <class Device> void bind_group_layers(Bindings& rows) {
  rows.add<&lowrank_group_forward<Device>>("lowrank_group_forward");
  rows.add<&lowrank_group_backward<Device>>("lowrank_group_backward");
}

}  // namespace spectral_ops
