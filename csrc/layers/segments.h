// Rows with low-rank adapters of their own, on the stacked route, forward and backward, for any device:
// spectral_ops/functional/segments.py has the mathematics and the same steps in Python.
#pragma once

#include "lowrank.h"

namespace spectral_ops {

// A number as a tensor [] on the CPU, which every device's operators take for a Scalar: `call` passes none of these.
inline Tensor scalar(double value) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::full({}, value, ScalarType::Double, std::nullopt, cpu);
}

// out becomes factor t, rounded to its dtype.
inline void scaled_into(Tensor out, const Tensor& t, double factor) {
  if (factor == 1) torch::stable::copy_(out, t);
  else call("aten::mul", "out", t, scalar(factor), out);
}

inline void fill_zero(Tensor t) { torch::stable::fill_(t, 0); }

inline int64_t largest_rank(const std::vector<Tensor>& A) {
  int64_t r = 0;
  for (const Tensor& a : A) r = at_least(r, a.size(0));
  return r;
}

// [n r, k] from every A [r_s, k], and [d, n r] from every scale B [d, r_s], with zeros up to the largest rank; in the dtype
// of `like`.
inline Tensor stack_A(const std::vector<Tensor>& A, const Tensor& like) {
  const int64_t n = static_cast<int64_t>(A.size()), r = largest_rank(A);
  Tensor out = empty(like, {n * r, A[0].size(1)});
  for (int64_t s = 0; s < n; ++s) {
    const int64_t rank = A[s].size(0);
    Tensor part = rows_of(out, s * r, rank);
    torch::stable::copy_(part, A[s]);
    if (rank < r) fill_zero(rows_of(out, s * r + rank, r - rank));
  }
  return out;
}
inline Tensor stack_B(const std::vector<Tensor>& B, const std::vector<double>& scales, int64_t r, const Tensor& like) {
  const int64_t n = static_cast<int64_t>(B.size());
  Tensor out = empty(like, {B[0].size(0), n * r});
  for (int64_t s = 0; s < n; ++s) {
    const int64_t rank = B[s].size(1);
    scaled_into(columns_of(out, s * r, rank), B[s], scales[s]);
    if (rank < r) fill_zero(columns_of(out, s * r + rank, r - rank));
  }
  return out;
}

// t's elements as [a, b, c, e], with the strides of a contiguous tensor.
inline Tensor as_four(const Tensor& t, int64_t a, int64_t b, int64_t c, int64_t e) {
  const int64_t sizes[] = {a, b, c, e}, strides[] = {b * c * e, c * e, e, 1};
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 4, sizes, strides, 0, &view));
  return Tensor(view);
}

// Which of n adapters each of T rows has: ids [m], each of T / m rows in sequence.
struct Owners {
  int64_t m, each, n;
  Tensor foreign;  // [m, 1, n, 1]: whether an adapter is not the rows' own

  Owners(const Tensor& ids, int64_t T, int64_t adapters) : m(0), each(0), n(adapters), foreign(ids) {
    STD_TORCH_CHECK(ids.dim() == 1, "ids: got ", ids.dim(), " dimensions, wanted [m]");
    m = ids.size(0), each = m ? T / m : 0;
    STD_TORCH_CHECK(m * each == T, "ids: got ", m, " for ", T, " rows, wanted a divisor");
    const Tensor numbers = call("aten::_dim_arange", "", as_four(ids, 0, 1, n, 1), int64_t{2});
    foreign = as_four(call("aten::ne", "Tensor", as_matrix(ids, m, 1, ids.stride(0), 1), numbers), m, 1, n, 1);
  }

  // stacked [T, n r], in place: zero wherever the column's adapter is not the row's.
  void keep_own_(const Tensor& stacked) const {
    call("aten::masked_fill_", "Tensor", as_four(stacked, m, each, n, stacked.size(1) / n), foreign, scalar(0));
  }

  // [T, r]: the columns of each row's own adapter, from stacked [T, n r] whose other columns are zero.
  Tensor own_of(const Tensor& stacked) const {
    if (n == 1) return stacked;
    const int64_t r = stacked.size(1) / n, dims[] = {2};
    const Tensor four = as_four(stacked, m, each, n, r);
    const Tensor sums = torch::stable::sum(four, torch::headeronly::IntHeaderOnlyArrayRef(dims, 1), false, four.scalar_type());
    return as_matrix(sums, m * each, r, at_least(r, 1), 1);
  }

  // The inverse: [T, n r] from own [T, r].
  Tensor spread(const Tensor& own) const {
    const int64_t r = own.size(1);
    const Tensor all = call("aten::masked_fill", "Tensor", as_four(own, m, each, 1, r), foreign, scalar(0));
    return as_matrix(all, m * each, n * r, at_least(n * r, 1), 1);
  }
};

inline void check_adapters(const Tensor& x, int64_t d, const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                           const Tensor& ids, const std::vector<double>& scales) {
  STD_TORCH_CHECK(!A.empty() && B.size() == A.size() && scales.size() == A.size(), "A, B and scales: got ", A.size(), ", ",
                  B.size(), " and ", scales.size(), ", wanted one of each for every adapter");
  for (size_t s = 0; s < A.size(); ++s) check_factors(x, d, A[s], B[s]);
  check_same_device("ids", ids, x);
}

// h [T, n r], zero in the columns of other adapters than a row's own.
template <class Device>
Tensor stacked_hidden(const Tensor& x2, const std::vector<Tensor>& A, const Owners& owners, const MaybeTensor& seed, double p) {
  Tensor h = project<Device>(x2, stack_A(A, x2), seed, p);
  owners.keep_own_(h);
  return h;
}

// Results: y, and each row's own h [T, r] (empty [0] without `keep`).
template <class Device>
std::tuple<Tensor, Tensor> segmented_linear_forward(Tensor x, Tensor weight, MaybeTensor bias, std::vector<Tensor> A,
                                                    std::vector<Tensor> B, Tensor ids, MaybeTensor seed,
                                                    std::vector<double> scales, double p, bool keep) {
  const NoGrad guard;
  check_weight(x, weight);
  check_adapters(x, weight.size(0), A, B, ids, scales);
  Tensor y = empty_rows(x, weight.size(0));
  const Tensor x2 = flat("x", x), y2 = flat("y", y);
  const Owners owners(ids, x2.size(0), static_cast<int64_t>(A.size()));
  const Tensor h = stacked_hidden<Device>(x2, A, owners, seed, p);
  adapted_into<Device>(y2, x2, weight, h, stack_B(B, scales, largest_rank(A), x), 1, std::nullopt, bias);
  return {y, keep ? owners.own_of(h) : nothing(x)};
}

// out [..., d] is increased by the update; returns h.
template <class Device>
Tensor segmented_update_forward_(Tensor out, Tensor x, std::vector<Tensor> A, std::vector<Tensor> B, Tensor ids,
                                 MaybeTensor seed, std::vector<double> scales, double p, bool keep) {
  const NoGrad guard;
  STD_TORCH_CHECK(out.dim() >= 1 && out.is_contiguous(), "out: wanted a contiguous tensor of at least one dimension");
  const Tensor out2 = flat("out", out), x2 = flat("x", x);
  check_adapters(x, out2.size(1), A, B, ids, scales);
  const Owners owners(ids, x2.size(0), static_cast<int64_t>(A.size()));
  const Tensor h = stacked_hidden<Device>(x2, A, owners, seed, p);
  add_product<Device>(out2, h, transposed(stack_B(B, scales, largest_rank(A), x)));
  return keep ? owners.own_of(h) : nothing(x);
}

template <class Device>
std::tuple<Tensor, Tensor> segmented_update_forward(Tensor base_out, Tensor x, std::vector<Tensor> A, std::vector<Tensor> B,
                                                    Tensor ids, MaybeTensor seed, std::vector<double> scales, double p,
                                                    bool keep) {
  Tensor out = copy_of(base_out);
  Tensor h = segmented_update_forward_<Device>(out, x, A, B, ids, seed, scales, p, keep);
  return {out, h};
}

// Results: dx, db, and dA and dB of every adapter; empty [0] where nobody wants one: bits 0 and 1 of needs[s] are for dA_s
// and dB_s. Without a weight dx is the update's share alone.
template <class Device>
std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> segmented_linear_backward(
    Tensor dy, MaybeTensor x, MaybeTensor weight, std::vector<Tensor> A, std::vector<Tensor> B, Tensor ids, MaybeTensor seed,
    MaybeTensor h, std::vector<double> scales, double p, bool need_x, bool need_bias, std::vector<int64_t> needs) {
  const NoGrad guard;
  const Tensor dy2 = flat("dy", dy);
  const int64_t n = static_cast<int64_t>(A.size()), T = dy2.size(0), r = largest_rank(A);
  STD_TORCH_CHECK(n > 0 && needs.size() == A.size() && B.size() == A.size() && scales.size() == A.size(),
                  "A, B, scales and needs: wanted one of each for every adapter");
  bool need_A = false, need_B = false;
  for (const int64_t mask : needs) need_A = need_A || wants(mask, 0), need_B = need_B || wants(mask, 1);
  const Tensor a = stack_A(A, dy);
  const Owners owners(ids, T, n);
  const Tensor stacked = h ? owners.spread(*h) : empty(dy, {T, n * r});  // unread when not saved
  auto [u, full_B, db, dyz, gdy] =
      lowrank_backward<Device>(dy2, stacked, stack_B(B, scales, r, dy), 1, std::nullopt, std::nullopt, std::nullopt,
                               need_x || need_A, need_B, need_bias, false);
  if (need_x || need_A) owners.keep_own_(u);
  Tensor dx = nothing(dy);
  if (need_x) {
    dx = empty_rows(dy, a.size(1));
    const Tensor dx2 = flat("dx", dx);
    if (weight) mm_out<Device>(dx2, dy2, *weight);
    else if (seed) fill_zero(dx2);
    if (weight || seed) lift<Device>(dx2, u, a, seed, p);
    else mm_out<Device>(dx2, u, a);
  }
  std::vector<Tensor> dA, dB;
  for (int64_t s = 0; s < n; ++s) dA.push_back(nothing(dy)), dB.push_back(nothing(dy));
  if (need_A) {
    std::vector<Tensor> parts;  // of u: the columns of those whose A trains, without those of padding
    int64_t total = 0;
    for (int64_t s = 0; s < n; ++s)
      if (wants(needs[s], 0)) parts.push_back(columns_of(u, s * r, A[s].size(0))), total += A[s].size(0);
    const Tensor full_A = A_gradient<Device>(total < n * r ? joined(parts, 1) : u, flat("x", given("x", x)), seed, p, accumulate_type(dy));
    int64_t start = 0;
    for (int64_t s = 0; s < n; ++s) {
      if (!wants(needs[s], 0)) continue;
      dA[s] = copy_as(rows_of(full_A, start, A[s].size(0)), A[s]);
      start += A[s].size(0);
    }
  }
  for (int64_t s = 0; s < n; ++s) {
    if (!wants(needs[s], 1)) continue;
    dB[s] = empty(B[s], {B[s].size(0), B[s].size(1)});
    scaled_into(dB[s], columns_of(full_B, s * r, B[s].size(1)), scales[s]);
  }
  return {dx, need_bias ? cast_as(db, dy) : nothing(dy), dA, dB};
}

}  // namespace spectral_ops
