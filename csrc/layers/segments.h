// Rows with low-rank adapters of their own, on both routes, forward and backward, for any device:
// spectral_ops/functional/segments.py has the mathematics and the same steps in Python.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "../ops/segments.h"
#include "lowrank.h"

namespace spectral_ops {

// out becomes factor t, rounded to its dtype.
inline void scaled_into(Tensor out, const Tensor& t, double factor) {
  if (factor == 1) torch::stable::copy_(out, t);
  else multiply_into(out, t, scalar(factor));
}

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
    if (rank < r) torch::stable::fill_(rows_of(out, s * r + rank, r - rank), 0);
  }
  return out;
}
inline Tensor stack_B(const std::vector<Tensor>& B, const std::vector<double>& scales, int64_t r, const Tensor& like) {
  const int64_t n = static_cast<int64_t>(B.size());
  Tensor out = empty(like, {B[0].size(0), n * r});
  for (int64_t s = 0; s < n; ++s) {
    const int64_t rank = B[s].size(1);
    scaled_into(columns_of(out, s * r, rank), B[s], scales[s]);
    if (rank < r) torch::stable::fill_(columns_of(out, s * r + rank, r - rank), 0);
  }
  return out;
}

// t's elements as [a, b, c, e], with the strides of a contiguous tensor.
inline Tensor as_four(const Tensor& t, int64_t a, int64_t b, int64_t c, int64_t e) {
  return strided(t, {a, b, c, e}, {b * c * e, c * e, e, 1});
}

inline void check_ids(const Tensor& ids, int64_t T) {
  STD_TORCH_CHECK(ids.dim() == 1, "ids: got ", ids.dim(), " dimensions, wanted [m]");
  const int64_t m = ids.size(0);
  STD_TORCH_CHECK(m ? T % m == 0 : T == 0, "ids: got ", m, " for ", T, " rows, wanted a divisor");
}

// What the stacked route returns for order and offsets.
inline Tensor no_rows(const Tensor& like) { return empty(like, {0}, ScalarType::Long); }

// Which of n adapters each of T rows has: ids [m], each of T / m rows in sequence.
struct Owners {
  int64_t m, each, n;
  Tensor foreign;  // [m, 1, n, 1]: whether an adapter is not the rows' own

  Owners(const Tensor& ids, int64_t T, int64_t adapters) : m(0), each(0), n(adapters), foreign(ids) {
    check_ids(ids, T);
    m = ids.size(0), each = m ? T / m : 0;
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

// Every A [r_s, k] and B [d, r_s], on the device of `like`.
inline void check_adapters(int64_t d, const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                           const std::vector<double>& scales, const Tensor& like) {
  STD_TORCH_CHECK(!A.empty() && B.size() == A.size() && scales.size() == A.size(), "A, B and scales: got ", A.size(), ", ",
                  B.size(), " and ", scales.size(), ", wanted one of each for every adapter");
  for (size_t s = 0; s < A.size(); ++s) {
    check_matrix("A", A[s]);
    check_matrix("B", B[s]);
    check_size("A", A[s], 1, A[0].size(1), "the columns of the first");
    check_size("B", B[s], 0, d, "the outputs");
    check_size("B", B[s], 1, A[s].size(0), "the rows of its A");
    check_same_device("A", A[s], like);
    check_same_device("B", B[s], like);
  }
}

// The rows of each adapter, as numbers: order [T] and offsets [n + 1] of ids [m], of which each serves T / m rows in sequence.
// Rows are sorted by id, those of one id stay in their order. Here by counting, in memory that the host reads.
inline std::tuple<Tensor, Tensor> group_rows_here(const Tensor& ids, int64_t T, int64_t n) {
  const int64_t m = ids.size(0), each = m ? T / m : 0;
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids.scalar_type() == ScalarType::Int, "ids: wanted int32 or int64");
  const void* const data = ids.data_ptr();
  const auto group = [&](int64_t i) {  // 0: before the first adapter; n + 1: after the last
    const int64_t at = i * ids.stride(0);
    const int64_t id = wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
    return id < 0 ? 0 : id < n ? id + 1 : n + 1;
  };
  std::vector<int64_t> starts(static_cast<size_t>(n + 3));
  for (int64_t i = 0; i < m; ++i) starts[static_cast<size_t>(group(i) + 1)] += each;
  for (size_t g = 1; g < starts.size(); ++g) starts[g] += starts[g - 1];
  Tensor order = empty(ids, {T}, ScalarType::Long), offsets = empty(ids, {n + 1}, ScalarType::Long);
  std::copy_n(starts.begin() + 1, n + 1, static_cast<int64_t*>(offsets.data_ptr()));
  int64_t* const rows = static_cast<int64_t*>(order.data_ptr());
  for (int64_t i = 0; i < m; ++i) {
    int64_t& next = starts[static_cast<size_t>(group(i))];
    for (int64_t t = i * each; t < (i + 1) * each; ++t) rows[next++] = t;
  }
  return {order, offsets};
}

// The same on the ids' device, which is not waited for.
inline std::tuple<Tensor, Tensor> group_rows_there(const Tensor& ids, int64_t T, int64_t n) {
  const int64_t m = ids.size(0), none = 0;
  const Tensor of_rows = as_matrix(ids, m, m ? T / m : 0, ids.stride(0), 0);  // expanded
  const Tensor each = cast(elements_of(torch::stable::contiguous(of_rows), 0, T), ScalarType::Long);
  const auto [sorted, order] = call_two("aten::sort", "stable", each, std::optional<bool>(true), none, false);
  const Tensor numbers = call("aten::_dim_arange", "", as_matrix(ids, n + 1, 0, 1, 1), none);
  return {order, call("aten::searchsorted", "Tensor", sorted, numbers, false, false, std::nullopt, std::nullopt)};
}

// Every A [n, r, k] and every B [n, d, r] of those stacked.
inline Tensor each_A(const Tensor& a, int64_t n) {
  const int64_t r = a.size(0) / n;
  return strided(a, {n, r, a.size(1)}, {r * a.stride(0), a.stride(0), a.stride(1)});
}
inline Tensor each_B(const Tensor& b, int64_t n) {
  const int64_t r = b.size(1) / n;
  return strided(b, {n, b.size(0), r}, {r * b.stride(1), b.stride(0), b.stride(1)});
}

// A gradient [n, r, k] of all adapters as [n r, k].
inline Tensor joined_rows(const Tensor& t) {
  return as_matrix(t, t.size(0) * t.size(1), t.size(2), at_least(t.size(2), 1), 1);
}

// Adapters, ids and the route fit x [T, k] and d outputs.
inline void check_updates(int64_t d, const Tensor& x, const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                          const Tensor& ids, const MaybeTensor& seed, const std::vector<double>& scales, bool grouped) {
  check_adapters(d, A, B, scales, x);
  check_size("A", A[0], 1, x.size(1), "the columns of x");
  check_same_device("ids", ids, x);
  STD_TORCH_CHECK(!grouped || !seed, "seed: got a tensor, wanted None, since the grouped route has no dropout");
}

// h [T, n r] of all adapters, zero in the columns of others than a row's own; and those [T, r] (empty [0] without `keep`).
template <class Device>
std::tuple<Tensor, Tensor> stacked_hidden(const Tensor& x, const std::vector<Tensor>& A, const Tensor& ids,
                                          const MaybeTensor& seed, double p, bool keep) {
  const Owners owners(ids, x.size(0), static_cast<int64_t>(A.size()));
  const Tensor h = project<Device>(x, stack_A(A, x), seed, p);
  owners.keep_own_(h);
  return {h, keep ? owners.own_of(h) : nothing(x)};
}

// out [T, d] is increased by the update of x [T, k]. Results: each row's own h [T, r] (grouped: by place; empty [0] without
// `keep`), order and offsets (empty [0] on the stacked route).
template <class Device>
std::tuple<Tensor, Tensor, Tensor> add_updates(const Tensor& out, const Tensor& x, const std::vector<Tensor>& A,
                                               const std::vector<Tensor>& B, const Tensor& ids, const MaybeTensor& seed,
                                               const std::vector<double>& scales, double p, bool keep, bool grouped) {
  check_updates(out.size(1), x, A, B, ids, seed, scales, grouped);
  const int64_t n = static_cast<int64_t>(A.size()), T = x.size(0);
  const Tensor b = stack_B(B, scales, largest_rank(A), x);
  if (grouped) {
    check_ids(ids, T);
    const auto [order, offsets] = Device::on_host ? group_rows_here(ids, T, n) : group_rows_there(ids, T, n);
    const Tensor h = segment_project<Device>(x, each_A(stack_A(A, x), n), order, offsets);
    segment_lift_<Device>(out, h, each_B(b, n), order, offsets);
    return {keep ? h : nothing(x), order, offsets};
  }
  const auto [h, own] = stacked_hidden<Device>(x, A, ids, seed, p, keep);
  add_product<Device>(out, h, transposed(b));
  return {own, no_rows(x), no_rows(x)};
}

// out [..., d] is increased by the update; returns what add_updates does.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> segmented_update_forward_(Tensor out, Tensor x, std::vector<Tensor> A,
                                                             std::vector<Tensor> B, Tensor ids, MaybeTensor seed,
                                                             std::vector<double> scales, double p, bool keep, bool grouped) {
  const NoGrad guard;
  check_overwritten(out);
  return add_updates<Device>(flat("out", out), flat("x", x), A, B, ids, seed, scales, p, keep, grouped);
}

// The same over x Wᵀ + b, or on a copy of base_out. Results: y, and those of add_updates.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> segmented_linear_forward(
    Tensor x, MaybeTensor weight, MaybeTensor base_out, MaybeTensor bias, std::vector<Tensor> A, std::vector<Tensor> B,
    Tensor ids, MaybeTensor seed, std::vector<double> scales, double p, bool keep, bool grouped) {
  const NoGrad guard;
  if constexpr (has_kernel<Device, LowRankMatmul>) {
    if (weight && !base_out && !grouped) {
      check_weight(x, *weight);
      const Tensor x2 = flat("x", x), y = empty_rows(x, weight->size(0));
      check_updates(weight->size(0), x2, A, B, ids, seed, scales, grouped);
      const auto [h, own] = stacked_hidden<Device>(x2, A, ids, seed, p, keep);
      const Tensor b = stack_B(B, scales, largest_rank(A), x);
      matmul_into<Device>(flat("y", y), x2, *weight, h, b, 1, std::nullopt, bias);
      return {y, own, no_rows(x), no_rows(x)};
    }
  }
  const Tensor y = base_output<Device>(x, weight, base_out, bias);
  const auto [h, order, offsets] = add_updates<Device>(flat("y", y), flat("x", x), A, B, ids, seed, scales, p, keep, grouped);
  return {y, h, order, offsets};
}

// What the adapters' gradients are made of: u, [T, n r] on the stacked route, where it is zero in the columns of others than
// a row's own, and [T, r] by place on the grouped one; the Σ dyᵀ h of all adapters [d, n r], not yet scaled; and db.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> stacked_pass(const Tensor& dy, const Tensor& b, const Owners& owners, const Tensor& h,
                                                bool need_u, bool need_B, bool need_bias) {
  const Tensor stacked = need_B ? owners.spread(h) : empty(dy, {dy.size(0), b.size(1)});  // unread
  const auto [u, full_B, db, dyz, gdy] = lowrank_backward<Device>(dy, stacked, b, 1, std::nullopt, std::nullopt, std::nullopt,
                                                                  need_u, need_B, need_bias, false);
  if (need_u) owners.keep_own_(u);
  return {u, full_B, db};
}
template <class Device>
std::tuple<Tensor, Tensor, Tensor> grouped_pass(const Tensor& dy, const Tensor& b, const Tensor& order, const Tensor& offsets,
                                                const Tensor& h, bool need_u, bool need_B, bool need_bias) {
  const Tensor B = each_B(b, offsets.size(0) - 1);
  const Tensor turned = strided(B, {B.size(0), B.size(2), B.size(1)}, {B.stride(0), B.stride(2), B.stride(1)});
  return {need_u ? segment_project<Device>(dy, turned, order, offsets) : nothing(dy),
          need_B ? transposed(joined_rows(segment_outer<Device>(h, dy, order, offsets))) : nothing(dy),
          need_bias ? column_sum(dy, accumulate_type(dy)) : nothing(dy)};
}

// The columns of u [T, n r] whose A trains, side by side without those of padding; u itself where that is all of them.
inline Tensor trained_columns(const Tensor& u, const std::vector<Tensor>& A, const std::vector<int64_t>& needs) {
  const int64_t r = largest_rank(A);
  std::vector<Tensor> parts;
  int64_t total = 0;
  for (size_t s = 0; s < A.size(); ++s)
    if (wants(needs[s], 0)) parts.push_back(columns_of(u, static_cast<int64_t>(s) * r, A[s].size(0))), total += A[s].size(0);
  return total < u.size(1) ? joined(parts, 1) : u;
}

// Results: dx, db, and dA and dB of every adapter; empty [0] where nobody wants one: bits 0 and 1 of needs[s] are for dA_s
// and dB_s. Without a weight dx is the update's share alone. Grouped where order is given.
template <class Device>
std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> segmented_linear_backward(
    Tensor dy, MaybeTensor x, MaybeTensor weight, std::vector<Tensor> A, std::vector<Tensor> B, MaybeTensor ids,
    MaybeTensor order, MaybeTensor offsets, MaybeTensor seed, MaybeTensor h, std::vector<double> scales, double p, bool need_x, bool need_bias,
    std::vector<int64_t> needs) {
  const NoGrad guard;
  const Tensor dy2 = flat("dy", dy);
  const int64_t n = static_cast<int64_t>(A.size()), T = dy2.size(0), r = largest_rank(A);
  const bool grouped = order.has_value();
  STD_TORCH_CHECK(!grouped || !seed, "seed: got a tensor, wanted None, since the grouped route has no dropout");
  STD_TORCH_CHECK(needs.size() == A.size(), "needs: got ", needs.size(), ", wanted one for every adapter");
  check_adapters(dy2.size(1), A, B, scales, dy);
  if (grouped) check_size("offsets", given("offsets", offsets), 0, n + 1, "one more than adapters");
  bool need_A = false, need_B = false;
  for (const int64_t mask : needs) need_A = need_A || wants(mask, 0), need_B = need_B || wants(mask, 1);
  const bool need_u = need_x || need_A;
  const Tensor b = stack_B(B, scales, r, dy), own = torch::stable::contiguous(saved_hidden(h, need_B, dy2, r));
  const auto [u, full_B, db] =
      grouped ? grouped_pass<Device>(dy2, b, *order, *offsets, own, need_u, need_B, need_bias)
              : stacked_pass<Device>(dy2, b, Owners(given("ids", ids), T, n), own, need_u, need_B, need_bias);
  Tensor dx = nothing(dy);
  if (need_x) {
    const Tensor a = stack_A(A, dy);
    dx = empty_rows(dy, a.size(1));
    const Tensor dx2 = flat("dx", dx);
    if (weight && !grouped) {
      input_gradient<Device>(dx2, dy2, dy2, *weight, std::nullopt, u, a, seed, p);
    } else if (grouped) {
      if (weight) mm_out<Device>(dx2, dy2, *weight);
      else torch::stable::fill_(dx2, 0);
      const Tensor turned = strided(a, {n, a.size(1), r}, {r * a.stride(0), a.stride(1), a.stride(0)});
      segment_lift_<Device>(dx2, u, turned, *order, *offsets);
    } else if (seed) {
      torch::stable::fill_(dx2, 0);
      lift<Device>(dx2, u, a, seed, p);
    } else {
      mm_out<Device>(dx2, u, a);
    }
  }
  Tensor full_A = nothing(dy);  // of those that train on the stacked route; of all, padding included, on the grouped one
  if (need_A) {
    const Tensor x2 = flat("x", given("x", x));
    full_A = grouped ? joined_rows(segment_outer<Device>(u, x2, *order, *offsets))
                     : A_gradient<Device>(trained_columns(u, A, needs), x2, seed, p, accumulate_type(dy));
  }
  std::vector<Tensor> dA, dB;
  int64_t start = 0;
  for (int64_t s = 0; s < n; ++s) {
    const int64_t rank = A[s].size(0);
    dA.push_back(wants(needs[s], 0) ? copy_as(rows_of(full_A, grouped ? s * r : start, rank), A[s]) : nothing(dy));
    if (wants(needs[s], 0)) start += rank;
    dB.push_back(wants(needs[s], 1) ? empty(B[s], {B[s].size(0), rank}) : nothing(dy));
    if (wants(needs[s], 1)) scaled_into(dB[s], columns_of(full_B, s * r, rank), scales[s]);
  }
  return {dx, need_bias ? cast_as(db, dy) : nothing(dy), dA, dB};
}

template <class Device> void bind_segments_layers(Bindings& rows) {
  rows.add<&segmented_linear_forward<Device>>("segmented_linear_forward");
  rows.mutating<&segmented_update_forward_<Device>>("segmented_update_forward_");
  rows.add<&segmented_linear_backward<Device>>("segmented_linear_backward");
}

}  // namespace spectral_ops
