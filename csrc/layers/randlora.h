// RandLoRA's layers, forward and backward, for any device: spectral_ops/functional/randlora.py has the mathematics and the same
// steps in Python.
#pragma once

#include "../ops/blocksum.h"
#include "scratch.h"

namespace spectral_ops {

// Whether W + ΔW is formed: with many tokens, in a dtype that rounds no small change away.
inline bool randlora_merges(const Tensor& x, int64_t T, const MaybeTensor& weight) {
  if (!weight || x.scalar_type() != accumulate_type(x)) return false;
  const int64_t d = weight->size(0), k = weight->size(1);
  return d * k < T * (d + k);
}

// A [r, m], B [M, N], λ [r, n] and γ [n, m] as the products read them, tile by tile.
class Bases {
 public:
  static constexpr int64_t kTile = 2048;  // rows or columns of a basis at a time: enough for the library's full speed

  Bases(const Tensor& A, const Tensor& B, const Tensor& lambda, const Tensor& gamma, const Tensor& like)
      : dtype(like.scalar_type()), wide(accumulate_type(like)), A(cast(A, wide)), B(B), lambda(cast(lambda, wide)),
        gamma(cast(gamma, wide)) {
    check_matrix("A", A);
    check_matrix("B", B);
    check_matrix("lambda_", lambda);
    check_matrix("gamma", gamma);
    r = A.size(0), m = A.size(1), n = gamma.size(0), N = lambda.numel(), M = B.size(0);
    check_size("lambda_", lambda, 0, r, "the rows of A");
    check_size("lambda_", lambda, 1, n, "the rows of gamma");
    check_size("gamma", gamma, 1, m, "the columns of A");
    check_size("B", B, 1, N, "the elements of lambda_");
  }

  const ScalarType dtype, wide;
  const Tensor A, B, lambda, gamma;
  int64_t r, m, n, N, M;

  // Rows [base, base + bases) times n of S and its columns [column, column + columns), [bases n, columns] in the products'
  // dtype; made in flat memory of `wide`.
  Tensor fill(const Tensor& memory, int64_t base, int64_t bases, int64_t column, int64_t columns) const {
    const Tensor S = as_three(memory, bases, n, columns);
    multiply_into(S, with_axis(columns_of(rows_of(A, base, bases), column, columns), 1), with_axis(columns_of(gamma, column, columns), 0));
    multiply_into(S, S, with_axis(rows_of(lambda, base, bases), 2));
    return cast(part_of(memory, 0, bases * n, columns), dtype);
  }

  // f(start, S) for tiles of rows, or of columns, of S.
  template <class F> void small_rows(const F& f) const {
    const int64_t most = at_least(kTile / at_least(n, 1), 1);
    const Lease lease(B, 1, (r < most ? r : most) * n * m, wide);
    for (int64_t start = 0; start < r; start += most)
      f(start * n, fill(lease.tensor(), start, r - start < most ? r - start : most, 0, m));
  }
  template <class F> void small_columns(const F& f) const {
    const Lease lease(B, 1, N * (m < kTile ? m : kTile), wide);
    for (int64_t start = 0; start < m; start += kTile)
      f(start, fill(lease.tensor(), 0, r, start, m - start < kTile ? m - start : kTile));
  }

  // f(start, tile) for tiles of rows (dim 0) or columns of B in the products' dtype, in `memory` where it has to be cast.
  template <class F> void large(int64_t dim, const MaybeTensor& memory, const F& f) const {
    for (int64_t start = 0; start < B.size(dim); start += kTile) {
      const int64_t size = B.size(dim) - start < kTile ? B.size(dim) - start : kTile;
      const Tensor part = dim == 0 ? rows_of(B, start, size) : columns_of(B, start, size);
      if (B.scalar_type() == dtype || dtype != wide) {
        f(start, cast(part, dtype));
      } else {
        const Tensor tile = part_of(*memory, 0, part.size(0), part.size(1));
        copy_into(tile, part);
        f(start, tile);
      }
    }
  }
  template <class F> void large(int64_t dim, const F& f) const {
    if (B.scalar_type() == dtype) return f(0, B);
    const Lease lease(B, 1, dtype == wide ? kTile * B.size(1 - dim) : 0, wide);
    large(dim, lease.tensor(), f);
  }

  // Memory of S [N, m], of a row tile of W, and of one of B where it has to be cast.
  int64_t whole() const { return N * m + kTile * m + (B.scalar_type() == dtype ? 0 : kTile * N); }
  Tensor tile_of(const Tensor& memory, int64_t rows) const { return part_of(memory, N * m, rows, m); }
  MaybeTensor cast_of(const Tensor& memory) const {
    if (B.scalar_type() == dtype) return std::nullopt;
    return elements_of(memory, N * m + kTile * m, kTile * N);
  }
};

// t Sᵀ of the small side, or t B of the large one: [T, N].
template <class Device> Tensor bases_hidden(const Bases& bases, const Tensor& t, bool small) {
  const Tensor h = empty(t, {t.size(0), bases.N});
  const auto fill = [&](int64_t start, const Tensor& factor) {
    mm_out<Device>(columns_of(h, start, factor.size(1)), t, factor);
  };
  if (small) bases.small_rows([&](int64_t start, const Tensor& S) { fill(start, transposed(S)); });
  else bases.large(1, fill);
  return h;
}

// out += scale h S towards the small side, or scale h Bᵀ towards the large one.
template <class Device> void bases_add(const Bases& bases, const Tensor& out, const Tensor& h, bool small, double scale) {
  const auto add = [&](int64_t start, const Tensor& factor) {
    add_product<Device>(columns_of(out, start, factor.size(1)), h, factor, scale);
  };
  if (small) bases.small_columns(add);
  else bases.large(0, [&](int64_t start, const Tensor& B) { add(start, transposed(B)); });
}

// y = t times W + scale B S, for weight [M, m]: from the large side to the small one (small), or back.
template <class Device>
void bases_merged(const Bases& bases, const Tensor& y, const Tensor& t, const Tensor& weight, bool small, double scale) {
  const Lease lease(t, 1, bases.whole(), bases.wide);
  const Tensor& memory = lease.tensor();
  const Tensor S = bases.fill(memory, 0, bases.r, 0, bases.m);
  bases.large(0, bases.cast_of(memory), [&](int64_t start, const Tensor& B) {
    const int64_t rows = B.size(0);
    const Tensor W = bases.tile_of(memory, rows);
    addmm_out<Device>(W, rows_of(weight, start, rows), B, S, 1, scale);
    if (small) addmm_out<Device>(y, y, columns_of(t, start, rows), W, start ? 1 : 0);
    else mm_out<Device>(columns_of(y, start, rows), t, transposed(W));
  });
}

// Columns [start, start + w) of dS [N, w], which are overwritten, enter dλ, held as [n, r], and dγ, those that there are.
template <class Device>
void bases_contract(const Bases& bases, const Tensor& dS, int64_t start, const MaybeTensor& dlambda, const MaybeTensor& dgamma) {
  const int64_t r = bases.r, n = bases.n, w = dS.size(1);
  const Tensor by_base = as_three(dS, r, n, w);
  multiply_into(by_base, by_base, with_axis(columns_of(bases.A, start, w), 1));
  const Tensor G = strided(dS, {n, r, w}, {w, n * w, 1});
  if (dgamma) {
    const Tensor sums = bmm(with_axis(transposed(bases.lambda), 1), G);
    copy_into(columns_of(*dgamma, start, w), as_matrix(sums, n, w, at_least(w, 1), 1));
  }
  if (dlambda) {
    const Tensor sums = bmm(G, with_axis(columns_of(bases.gamma, start, w), 2));
    add_<Device>(*dlambda, as_matrix(sums, n, r, at_least(r, 1), 1));
  }
}

// dλ [r, n] and dγ [n, m], those that are wanted, in at least float32: from h = large B where it is there or is the cheaper way,
// else from largeᵀ small.
template <class Device>
std::array<MaybeTensor, 2> bases_gradients(const Bases& bases, MaybeTensor h, const MaybeTensor& large, const Tensor& small,
                                           double scale, bool need_lambda, bool need_gamma) {
  const int64_t T = small.size(0), r = bases.r, n = bases.n, m = bases.m, N = bases.N, M = bases.M;
  const bool narrow = bases.dtype != bases.wide;
  MaybeTensor dlambda, dgamma;
  if (need_lambda) {
    dlambda = empty(small, {n, r}, bases.wide);
    torch::stable::fill_(*dlambda, 0);
  }
  if (need_gamma) dgamma = empty(small, {n, m}, bases.wide);
  if (!h && !narrow && (T + N) * M * m < T * N * (M + m)) {
    const Lease lease(small, 1, bases.whole(), bases.wide);
    const Tensor& memory = lease.tensor();
    const Tensor dS = part_of(memory, 0, N, m);
    bases.large(0, bases.cast_of(memory), [&](int64_t start, const Tensor& B) {
      const Tensor G = bases.tile_of(memory, B.size(0));
      mm_out<Device>(G, transposed(columns_of(*large, start, B.size(0))), small);
      addmm_out<Device>(dS, dS, transposed(B), G, start ? 1 : 0);
    });
    bases_contract<Device>(bases, dS, 0, dlambda, dgamma);
  } else {
    if (!h) h = bases_hidden<Device>(bases, *large, false);
    const Lease lease(small, 1, narrow ? 0 : N * (m < Bases::kTile ? m : Bases::kTile), bases.wide);
    for (int64_t start = 0; start < m; start += Bases::kTile) {
      const Tensor s = columns_of(small, start, m - start < Bases::kTile ? m - start : Bases::kTile);
      Tensor dS = narrow ? mm<Device>(transposed(*h), s, bases.wide) : part_of(lease.tensor(), 0, N, s.size(1));
      if (!narrow) mm_out<Device>(dS, transposed(*h), s);
      bases_contract<Device>(bases, dS, start, dlambda, dgamma);
    }
  }
  if (dlambda) dlambda = call("aten::mul", "Tensor", transposed(*dlambda), scalar(scale));
  if (dgamma) multiply_into(*dgamma, *dgamma, scalar(scale));
  return {dlambda, dgamma};
}

// Results: y [..., d], and H [T, N] where backward reads it in x's place, else empty [0].
template <class Device>
std::tuple<Tensor, Tensor> randlora_linear_forward(Tensor x, MaybeTensor weight, MaybeTensor base_out, Tensor A, Tensor B,
                                                   Tensor lambda, Tensor gamma, MaybeTensor bias, double scale) {
  const NoGrad guard;
  check_tier(weight, base_out);
  const Bases bases(A, B, lambda, gamma, x);
  const Tensor x2 = flat("x", x);
  const bool tall = bases.m == x2.size(1);
  const int64_t k = tall ? bases.m : bases.M, d = tall ? bases.M : bases.m;
  check_size("x", x2, 1, k, "a side of the bases");
  if (weight) check_shape("weight", *weight, d, k);
  if (randlora_merges(x, x2.size(0), weight)) {
    Tensor y = empty_rows(x, d);
    const Tensor y2 = flat("y", y);
    bases_merged<Device>(bases, y2, x2, tall ? *weight : transposed(*weight), !tall, scale);
    if (bias) add_bias<Device>(y2, *bias);
    return {y, nothing(x)};
  }
  Tensor h = bases_hidden<Device>(bases, x2, tall);
  Tensor y = base_output<Device>(x, weight, base_out, bias);
  const Tensor y2 = flat("y", y);
  check_shape("base_out", y2, x2.size(0), d);
  bases_add<Device>(bases, y2, h, !tall, scale);
  return {y, tall ? nothing(x) : h};
}

// Results: dx, dλ, dγ, db; empty [0] where `needs` has no bit for it. Without a weight dx is the update's share. dλ and dγ are
// made of h where that is given, else of x.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> randlora_linear_backward(Tensor dy, MaybeTensor x, MaybeTensor h, MaybeTensor weight,
                                                                    Tensor A, Tensor B, Tensor lambda, Tensor gamma,
                                                                    double scale, int64_t needs) {
  const NoGrad guard;
  const Bases bases(A, B, lambda, gamma, dy);
  const bool need_x = wants(needs, 0), need_lambda = wants(needs, 1), need_gamma = wants(needs, 2);
  const Tensor dy2 = flat("dy", dy);
  const int64_t T = dy2.size(0), k = bases.M == dy2.size(1) ? bases.m : bases.M;
  const bool tall = bases.m == k;
  check_size("dy", dy2, 1, tall ? bases.M : bases.m, "a side of the bases");
  if (weight) check_shape("weight", *weight, dy2.size(1), k);
  if (h) check_shape("h", *h, T, bases.N);
  Tensor dx = need_x ? empty_rows(dy, k) : nothing(dy), dlambda = nothing(dy), dgamma = nothing(dy);
  MaybeTensor hidden;  // of dy
  if (need_x) {
    const Tensor dx2 = flat("dx", dx);
    if (randlora_merges(dy, T, weight)) {
      bases_merged<Device>(bases, dx2, dy2, tall ? *weight : transposed(*weight), tall, scale);
    } else {
      hidden = bases_hidden<Device>(bases, dy2, !tall);
      if (weight) mm_out<Device>(dx2, dy2, *weight);
      else torch::stable::fill_(dx2, 0);
      bases_add<Device>(bases, dx2, *hidden, tall, scale);
    }
  }
  if (need_lambda || need_gamma) {
    MaybeTensor x2;
    if (x || tall || !h) {
      x2 = flat("x", given("x", x));
      check_shape("x", *x2, T, k);
    }
    const auto [found_lambda, found_gamma] =
        bases_gradients<Device>(bases, tall ? hidden : h, tall ? MaybeTensor(dy2) : x2, tall ? *x2 : dy2, scale, need_lambda, need_gamma);
    if (need_lambda) dlambda = copy_as(*found_lambda, lambda);
    if (need_gamma) dgamma = cast_as(*found_gamma, gamma);
  }
  return {dx, dlambda, dgamma, wants(needs, 3) ? column_sum(dy2, dy.scalar_type()) : nothing(dy)};
}

template <class Device> void bind_randlora_layers(Bindings& rows) {
  rows.add<&randlora_linear_forward<Device>>("randlora_linear_forward");
  rows.add<&randlora_linear_backward<Device>>("randlora_linear_backward");
}

}  // namespace spectral_ops
