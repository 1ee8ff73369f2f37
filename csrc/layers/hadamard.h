// LoHa's and HiRA's layers, forward and backward, for any device: spectral_ops/functional/hadamard.py has the mathematics and
// the same steps in Python.
#pragma once

#include <array>

#include "../ops/blocksum.h"
#include "scratch.h"

namespace spectral_ops {

// ΔW = scale (B A) * M [d, k]: M is LoHa's other product B2 A2, for HiRA the weight.
struct Hadamard {
  Tensor A, B;
  MaybeTensor A2, B2;
  double scale;

  Hadamard in(ScalarType dtype) const {
    if (!A2) return {cast(A, dtype), cast(B, dtype), A2, B2, scale};
    return {cast(A, dtype), cast(B, dtype), cast(*A2, dtype), cast(*B2, dtype), scale};
  }
};

inline Hadamard checked_hadamard(const Tensor& A, const Tensor& B, const MaybeTensor& A2, const MaybeTensor& B2,
                                 const MaybeTensor& weight, double scale, bool tiles) {
  check_matrix("A", A);
  check_matrix("B", B);
  check_size("B", B, 1, A.size(0), "the rows of A");
  STD_TORCH_CHECK(A2.has_value() == B2.has_value(), "A2 and B2: wanted both or neither");
  if (A2) {
    check_matrix("A2", *A2);
    check_matrix("B2", *B2);
    check_size("A2", *A2, 1, A.size(1), "the columns of A");
    check_size("B2", *B2, 0, B.size(0), "the rows of B");
    check_size("B2", *B2, 1, A2->size(0), "the rows of A2");
  }
  STD_TORCH_CHECK(A2 || (weight && tiles), "A2: got None without a weight, or with tiles=False, wanted a tensor");
  if (weight) check_shape("weight", *weight, B.size(0), A.size(1));
  return {A, B, A2, B2, scale};
}

// f(start, n) for every tile of `rows` rows.
template <class F> void hadamard_tiles(const Tensor& like, int64_t rows, const F& f) {
  const int64_t most = like.is_cpu() ? 512 : 2048;
  for (int64_t start = 0; start < rows; start += most) f(start, rows - start < most ? rows - start : most);
}

// out [d, k] gets W + ΔW (ΔW without a weight), formed in at least float32 and rounded once.
template <class Device> void hadamard_weight(const Tensor& out, const MaybeTensor& weight, const Hadamard& given) {
  const ScalarType wide = accumulate_type(out);
  const bool narrow = out.scalar_type() != wide;
  const Hadamard h = given.in(wide);
  Tensor one = empty(out, {1}, wide);
  if (!h.A2) torch::stable::fill_(one, 1);
  hadamard_tiles(out, out.size(0), [&](int64_t start, int64_t n) {
    const int64_t k = out.size(1);
    const Tensor rows = rows_of(out, start, n), B = rows_of(h.B, start, n), tile = narrow ? empty(out, {n, k}, wide) : rows;
    MaybeTensor W;
    if (weight) W = cast(rows_of(*weight, start, n), wide);
    if (h.A2) {
      addmm_out<Device>(tile, tile, B, h.A, 0, h.scale);
      multiply_into(tile, tile, mm<Device>(rows_of(*h.B2, start, n), *h.A2));
      if (W) add_<Device>(tile, *W);
    } else {  // W * (1 + scale B A)
      addmm_out<Device>(tile, as_matrix(one, n, k, 0, 0), B, h.A, 1, h.scale);
      multiply_into(tile, tile, *W);
    }
    if (narrow) copy_into(rows, tile);
  });
}

// y = x (W + ΔW)ᵀ + b [T, d]; transpose: x (W + ΔW) [T, k]. exact: W + ΔW is not rounded to x's dtype.
template <class Device>
void hadamard_product(const Tensor& y, const Tensor& x, const MaybeTensor& weight, const Hadamard& h, const MaybeTensor& bias,
                      bool exact, bool transpose) {
  const ScalarType wide = accumulate_type(x), dtype = exact ? wide : x.scalar_type();
  const bool narrow = x.scalar_type() != wide;
  if (h.A2 && weight && narrow) {  // LoHa's ΔW need not be near W in size, which would round it away
    if (transpose) mm_out<Device>(y, x, *weight);
    else linear_into<Device>(y, x, *weight, bias);
    const Tensor update = empty(y, {y.size(0), y.size(1)});
    hadamard_product<Device>(update, x, std::nullopt, h, std::nullopt, exact, transpose);
    return add_<Device>(y, update);
  }
  const Lease lease(x, h.B.size(0), h.A.size(1), dtype);
  const Tensor& changed = lease.tensor();
  hadamard_weight<Device>(changed, weight, h);
  const bool rounds = dtype != x.scalar_type();
  const Tensor out = rounds ? empty(y, {y.size(0), y.size(1)}, dtype) : y;
  if (transpose) mm_out<Device>(out, cast(x, dtype), changed);
  else linear_into<Device>(out, cast(x, dtype), changed, bias ? MaybeTensor(cast(*bias, dtype)) : MaybeTensor());
  if (rounds) copy_into(y, out);
}

// P [d, r r2] and Q [r r2, k], ΔW = scale P Q, formed in at least float32 and rounded to dtype.
inline std::tuple<Tensor, Tensor> hadamard_factors(const Hadamard& given, ScalarType dtype) {
  const Hadamard h = given.in(dtype == ScalarType::Double ? dtype : ScalarType::Float);
  const int64_t d = h.B.size(0), k = h.A.size(1), r = h.A.size(0), r2 = h.A2->size(0);
  const Tensor P = empty(h.B, {d, r * r2}), Q = empty(h.A, {r * r2, k});
  multiply_into(as_three(P, d, r, r2), with_axis(h.B, 2), with_axis(*h.B2, 1));
  multiply_into(as_three(Q, r, r2, k), with_axis(h.A, 1), with_axis(*h.A2, 0));
  return {cast(P, dtype), cast(Q, dtype)};
}

template <class Device>
Tensor hadamard_forward(Tensor x, MaybeTensor weight, MaybeTensor base_out, Tensor A, Tensor B, MaybeTensor A2, MaybeTensor B2,
                        MaybeTensor bias, double scale, bool tiles, bool exact) {
  const NoGrad guard;
  const Hadamard h = checked_hadamard(A, B, A2, B2, weight, scale, tiles);
  check_tier(weight, base_out);
  check_size("A", A, 1, x.size(x.dim() - 1), "the last dimension of x");
  const Tensor x2 = flat("x", x);
  if (!tiles) {
    Tensor y = base_output<Device>(x, weight, base_out, bias);
    const auto [P, Q] = hadamard_factors(h, x.scalar_type());
    add_product<Device>(flat("y", y), mm<Device>(x2, transposed(Q)), transposed(P), scale);
    return y;
  }
  Tensor y = empty_rows(x, B.size(0));
  const Tensor y2 = flat("y", y);
  hadamard_product<Device>(y2, x2, weight, h, bias, exact, false);
  if (base_out) add_<Device>(y2, flat("base_out", *base_out));
  return y;
}

using HadamardGradients = std::array<MaybeTensor, 4>;  // dA, dB, dA2, dB2, those that are wanted

// They are in at least float32, of tiles of dyᵀx.
template <class Device>
HadamardGradients hadamard_contract(const Tensor& dy, const Tensor& x, const MaybeTensor& weight, const Hadamard& given,
                                    int64_t needs) {
  const ScalarType wide = accumulate_type(x);
  const Hadamard h = given.in(wide);
  HadamardGradients grads;
  const MaybeTensor like[] = {h.A, h.B, h.A2, h.B2};
  for (int i = 0; i < 4; ++i) {
    if (!wants(needs, i + 1)) continue;
    grads[i] = empty(x, {like[i]->size(0), like[i]->size(1)}, wide);
    torch::stable::fill_(*grads[i], 0);
  }
  // g [n, k] is that of B A in rows [start, start + n), or of B2 A2.
  const auto add = [&](const Tensor& g, int64_t start, const Tensor& A, const Tensor& B, const MaybeTensor& dA, const MaybeTensor& dB) {
    const int64_t n = g.size(0);
    if (dB) {
      const Tensor rows = rows_of(*dB, start, n);
      addmm_out<Device>(rows, rows, g, transposed(A), 0, h.scale);
    }
    if (dA) add_product<Device>(*dA, transposed(rows_of(B, start, n)), g, h.scale);
  };
  gradient_tiles<Device>(dy, x, 1, [&](int64_t first, const Tensor& G) {
    hadamard_tiles(G, G.size(0), [&](int64_t from, int64_t n) {
      const int64_t start = first + from;
      const Tensor g = cast(rows_of(G, from, n), wide);
      if (grads[2] || grads[3]) {
        const Tensor other = mm<Device>(rows_of(h.B, start, n), h.A);
        multiply_into(other, other, g);
        add(other, start, *h.A2, *h.B2, grads[2], grads[3]);
      }
      if (grads[0] || grads[1]) {
        multiply_into(g, g, h.A2 ? mm<Device>(rows_of(*h.B2, start, n), *h.A2) : cast(rows_of(*weight, start, n), wide));
        add(g, start, h.A, h.B, grads[0], grads[1]);
      }
    });
  });
  return grads;
}

// Σ over axis `over` of dP * f, for dP [a, b, c].
inline Tensor contracted(const Tensor& dP, const Tensor& f, int64_t over) {
  const Tensor product = empty(dP, {dP.size(0), dP.size(1), dP.size(2)});
  multiply_into(product, dP, f);
  return torch::stable::sum(product, torch::headeronly::IntHeaderOnlyArrayRef(&over, 1), false, std::nullopt);
}

// The same from those of P and Q; u = dy P.
template <class Device>
HadamardGradients hadamard_contract_factors(const Tensor& dy, const Tensor& x, const MaybeTensor& u, const Tensor& Q,
                                            const Hadamard& given, int64_t needs) {
  const ScalarType wide = accumulate_type(dy);
  const Hadamard h = given.in(wide);
  const int64_t d = h.B.size(0), k = h.A.size(1), r = h.A.size(0), r2 = h.A2->size(0);
  const auto scaled = [&](const Tensor& a, const Tensor& b) {
    if (wide != a.scalar_type()) return call("aten::mul", "Tensor", mm<Device>(a, b, wide), scalar(h.scale));
    Tensor out = empty(a, {a.size(0), b.size(1)});
    addmm_out<Device>(out, out, a, b, 0, h.scale);
    return out;
  };
  HadamardGradients grads;
  if (wants(needs, 2) || wants(needs, 4)) {
    const Tensor dP = as_three(scaled(transposed(dy), mm<Device>(x, transposed(Q))), d, r, r2);
    if (wants(needs, 2)) grads[1] = contracted(dP, with_axis(*h.B2, 1), 2);
    if (wants(needs, 4)) grads[3] = contracted(dP, with_axis(h.B, 2), 1);
  }
  if (wants(needs, 1) || wants(needs, 3)) {
    const Tensor dQ = as_three(scaled(transposed(*u), x), r, r2, k);
    if (wants(needs, 1)) grads[0] = contracted(dQ, with_axis(*h.A2, 0), 1);
    if (wants(needs, 3)) grads[2] = contracted(dQ, with_axis(h.A, 1), 0);
  }
  return grads;
}

// Results: dx, dA, dB, dA2, dB2, db; empty [0] where `needs` has no bit for it.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hadamard_backward(
    Tensor dy, MaybeTensor x, MaybeTensor weight, Tensor A, Tensor B, MaybeTensor A2, MaybeTensor B2, double scale, bool tiles,
    bool exact, int64_t needs) {
  const NoGrad guard;
  const Hadamard h = checked_hadamard(A, B, A2, B2, weight, scale, tiles);
  check_size("B", B, 0, dy.size(dy.dim() - 1), "the last dimension of dy");
  const bool need_x = wants(needs, 0), need_factors = (needs & 0b11110) != 0;
  STD_TORCH_CHECK(A2 || !(needs & 0b11000), "A2 and B2: got None, wanted tensors, whose gradients are asked for");
  const Tensor dy2 = flat("dy", dy);
  MaybeTensor x2;
  if (need_factors) {
    x2 = flat("x", given("x", x));
    check_shape("x", *x2, dy2.size(0), A.size(1));
  }
  Tensor dx = need_x ? empty_rows(dy, A.size(1)) : nothing(dy);
  HadamardGradients grads;
  if (tiles) {
    if (need_x) hadamard_product<Device>(flat("dx", dx), dy2, weight, h, std::nullopt, exact, true);
    if (need_factors) grads = hadamard_contract<Device>(dy2, *x2, weight, h, needs);
  } else {
    const auto [P, Q] = hadamard_factors(h, dy.scalar_type());
    MaybeTensor u;
    if (need_x || (needs & 0b01010)) u = mm<Device>(dy2, P);
    if (need_x) {
      const Tensor dx2 = flat("dx", dx);
      if (weight) mm_out<Device>(dx2, dy2, *weight);
      addmm_out<Device>(dx2, dx2, *u, Q, weight ? 1 : 0, scale);
    }
    if (need_factors) grads = hadamard_contract_factors<Device>(dy2, *x2, u, Q, h, needs);
  }
  const MaybeTensor like[] = {A, B, A2, B2};
  const auto gradient = [&](int i) { return grads[i] ? cast_as(*grads[i], *like[i]) : nothing(dy); };
  Tensor db = wants(needs, 5) ? column_sum(dy2, dy.scalar_type()) : nothing(dy);
  return {dx, gradient(0), gradient(1), gradient(2), gradient(3), db};
}

template <class Device> void bind_hadamard_layers(Bindings& rows) {
  rows.add<&hadamard_forward<Device>>("hadamard_forward");
  rows.add<&hadamard_backward<Device>>("hadamard_backward");
}

}  // namespace spectral_ops
