// importance_update_: its kernel's arguments, free of torch, and its host side for any device. And importance_prune_ on the
// CPU: two passes over a few scores.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include <algorithm>
#include <cstring>
#include <vector>

#include "../ops.h"
#endif

namespace spectral_ops {

// A [rows_A, k], B [rows_B, r] and E [rows_E] of one layer, and their gradients; contiguous. Each is all of a tensor with r,
// d and r rows, or under FSDP2 a part of it along the first dimension.
struct ImportanceLayer {
  const void *p[3], *g[3];
  DType dtypes[3];  // of p and g
  int64_t rows_A, k, rows_B, r, rows_E;
  int64_t offset;       // of A in exp_avg and uncertainty; B and E follow
  int64_t first;        // of its r scores
  int64_t row_A, row_E, d;
};

// exp_avg and uncertainty after one more step, and the scores of every triplet, or null; all float32 (float64 for float64).
struct ImportanceUpdate {
  const ImportanceLayer* layers;
  void *exp_avg, *uncertainty, *scores;
  double beta1, beta2;
  int64_t count;  // of layers
  DType dtype;    // of exp_avg, uncertainty and scores
};

namespace cpu {
SPECTRAL_OPS_CPU_KERNEL(importance_update, ImportanceUpdate)
}  // namespace cpu

#ifdef SPECTRAL_OPS_HOST

inline void check_state(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous() && t.size(0) == like.size(0), name, ": got ", t.numel(), " elements in ",
                  t.dim(), " dimensions, wanted a contiguous vector of ", like.size(0));
  check_same_device(name, t, like);
  check_dtype(name, t, dtype_of("exp_avg", like), "exp_avg");
  STD_TORCH_CHECK(t.scalar_type() == accumulate_type(t), name, ": wanted float32 or float64");
}

template <class Device>
Tensor importance_update_(Tensor exp_avg, Tensor uncertainty, std::vector<Tensor> params, std::vector<Tensor> grads,
                          std::vector<int64_t> shards, double beta1, double beta2, bool score) {
  check_state("exp_avg", exp_avg, exp_avg);
  check_state("uncertainty", uncertainty, exp_avg);
  const int64_t count = static_cast<int64_t>(params.size()) / 3;
  STD_TORCH_CHECK(params.size() % 3 == 0 && grads.size() == params.size(), "grads: got ", grads.size(), " tensors for ",
                  params.size(), " params, wanted three of each for every layer");
  STD_TORCH_CHECK(shards.empty() || shards.size() == params.size(), "shards: got ", shards.size(),
                  " numbers, wanted none or three for every layer");
  std::vector<ImportanceLayer> layers(count);
  int64_t offset = 0, first = 0;
  for (int64_t i = 0; i < count; ++i) {
    ImportanceLayer& l = layers[i];
    l.offset = offset, l.first = first;
    for (int64_t j = 0; j < 3; ++j) {
      Tensor &p = params[3 * i + j], &g = grads[3 * i + j];
      STD_TORCH_CHECK(p.dim() == 2 || (j == 2 && p.dim() == 1), "params: got ", p.dim(),
                      " dimensions, wanted A [r, k], B [d, r] and E [r, 1] in turn");
      STD_TORCH_CHECK(g.dim() == p.dim(), "grads: got ", g.dim(), " dimensions, wanted ", p.dim());
      for (int64_t n = 0; n < p.dim(); ++n) check_size("grads", g, n, p.size(n), "params");
      check_same_device("params", p, exp_avg);
      check_same_device("grads", g, exp_avg);
      l.dtypes[j] = dtype_of("params", p);
      check_dtype("grads", g, l.dtypes[j], "params");
      STD_TORCH_CHECK((l.dtypes[j] == DType::float64) == (exp_avg.scalar_type() == ScalarType::Double),
                      "exp_avg: wanted float64 exactly where params are");
      if (!p.is_contiguous()) p = torch::stable::contiguous(p);
      if (!g.is_contiguous()) g = torch::stable::contiguous(g);
      l.p[j] = p.data_ptr(), l.g[j] = g.data_ptr();
      offset += p.numel();
    }
    const Tensor &A = params[3 * i], &B = params[3 * i + 1], &E = params[3 * i + 2];
    l.rows_A = A.size(0), l.k = A.size(1), l.rows_B = B.size(0), l.r = B.size(1), l.rows_E = E.size(0);
    STD_TORCH_CHECK(E.numel() == l.rows_E, "params: got E with ", E.numel(), " elements, wanted [r, 1] or [r]");
    const int64_t* part = shards.empty() ? nullptr : shards.data() + 3 * i;
    l.row_A = part ? part[0] : 0, l.row_E = part ? part[1] : 0, l.d = part ? part[2] : l.rows_B;
    STD_TORCH_CHECK(l.row_A >= 0 && l.row_E >= 0 && l.row_A + l.rows_A <= l.r && l.row_E + l.rows_E <= l.r,
                    "shards: got A and E past the rank ", l.r, " of B");
    first += l.r;
  }
  STD_TORCH_CHECK(offset == exp_avg.size(0), "exp_avg: got ", exp_avg.size(0), " elements, wanted the ", offset, " of params");
  Tensor scores = empty(exp_avg, {score ? first : 0});
  ImportanceUpdate a{};
  a.layers = layers.data(), a.count = count;
  a.exp_avg = exp_avg.data_ptr(), a.uncertainty = uncertainty.data_ptr();
  a.scores = score ? scores.data_ptr() : nullptr;
  a.beta1 = beta1, a.beta2 = beta2;
  a.dtype = dtype_of("exp_avg", exp_avg);
  Device::launch(a, exp_avg);
  return scores;
}

template <class A> void find_kept(const A* scores, int64_t count, bool* keep, int64_t n) {
  std::vector<A> sorted(scores, scores + n);
  const auto below = [](A a, A b) { return a < b || (b != b && a == a); };  // a NaN is above everything
  std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), below);
  const A threshold = sorted[static_cast<size_t>(count - 1)];
  for (int64_t i = 0; i < n; ++i) keep[i] = !(scores[i] <= threshold);
}

inline Tensor importance_prune_(Tensor scores, std::vector<Tensor> lora_E, std::vector<int64_t> first, int64_t count) {
  STD_TORCH_CHECK(scores.dim() == 1, "scores: got ", scores.dim(), " dimensions, wanted [R]");
  STD_TORCH_CHECK(scores.scalar_type() == accumulate_type(scores), "scores: wanted float32 or float64");
  const int64_t n = scores.size(0);
  STD_TORCH_CHECK(count >= 0 && count <= n, "count: got ", count, ", wanted at least 0 and at most ", n);
  STD_TORCH_CHECK(first.size() == lora_E.size(), "first: got ", first.size(), " entries for ", lora_E.size(), " layers");
  scores = torch::stable::contiguous(scores);
  Tensor kept = empty(scores, {n}, ScalarType::Bool);
  bool* const keep = static_cast<bool*>(kept.data_ptr());
  if (count == 0)
    std::fill(keep, keep + n, true);
  else if (scores.scalar_type() == ScalarType::Double)
    find_kept(static_cast<const double*>(scores.data_ptr()), count, keep, n);
  else
    find_kept(static_cast<const float*>(scores.data_ptr()), count, keep, n);
  for (size_t l = 0; l < lora_E.size(); ++l) {
    const Tensor& E = lora_E[l];
    const DType dtype = dtype_of("lora_E", E);
    const int64_t entries = E.numel(), size = element_size(dtype);
    STD_TORCH_CHECK(E.dim() >= 1 && E.dim() <= 2 && E.size(0) == entries, "lora_E: wanted [r, 1] or [r]");
    STD_TORCH_CHECK(first[l] >= 0 && first[l] + entries <= n, "first: got ", first[l], " for ", entries, " of ", n, " scores");
    check_same_device("lora_E", E, scores);
    check_written_once("lora_E", E);
    char* const data = static_cast<char*>(E.data_ptr());
    for (int64_t i = 0; i < entries; ++i)
      if (!keep[first[l] + i]) std::memset(data + i * size * (entries > 1 ? E.stride(0) : 1), 0, static_cast<size_t>(size));
  }
  return kept;
}

template <class Device> void bind_importance(Bindings& rows) {
  if constexpr (has_kernel<Device, ImportanceUpdate>) rows.add<&importance_update_<Device>>("importance_update_");
  if constexpr (Device::on_host) rows.add<&importance_prune_>("importance_prune_");
}

#endif

}  // namespace spectral_ops
