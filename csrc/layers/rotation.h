// OFT's and BOFT's layers, forward and backward, for any device: spectral_ops/functional/rotation.py has the mathematics and the
// same steps in Python. Matrices [n, b, b] are contiguous.
#pragma once

#include <cmath>
#include <vector>

#include "../ops/bat.h"
#include "../ops/blocksum.h"
#include "../ops/cayley.h"
#include "library.h"

namespace spectral_ops {

// --- batches of square matrices ---

inline Tensor flipped(const Tensor& M) { return strided(M, {M.size(0), M.size(2), M.size(1)}, {M.stride(0), M.stride(2), M.stride(1)}); }

// a + factor b, broadcast
inline Tensor plus(const Tensor& a, const Tensor& b, double factor) { return torch::stable::subtract(a, b, -factor); }

// I [1, b, b]
inline Tensor identity(const Tensor& like, int64_t b) {
  const Tensor eye = empty(like, {1, b, b});
  torch::stable::fill_(eye, 0);
  torch::stable::fill_(strided(eye, {b}, {b + 1}), 1);
  return eye;
}

// --- the blocks of R from their parameters ---

// Rows and columns of the entries above the diagonal, row by row.
struct UpperTriangle {
  UpperTriangle(const Tensor& like, int64_t b) : indices(made(like, b)) {
    const int64_t n = indices.size(1);
    row = elements_of(indices, 0, n), column = elements_of(indices, n, n);
  }

  static Tensor made(const Tensor& like, int64_t b) {
    using torch::headeronly::DeviceType;
    const torch::stable::Device device(like.is_cpu() ? DeviceType::CPU : DeviceType::CUDA, like.get_device_index());
    return call("aten::triu_indices", "", b, b, int64_t{1}, std::optional<ScalarType>(ScalarType::Long),
                std::optional<torch::headeronly::Layout>(), std::optional<torch::stable::Device>(device), std::optional<bool>());
  }

  std::vector<MaybeTensor> places() const { return {std::nullopt, row, column}; }

  Tensor indices, row, column;
};

// K [n, b, b], skew, of its upper triangles [n, b (b - 1) / 2].
inline Tensor skew(const Tensor& triangles, const UpperTriangle& upper, int64_t b) {
  const Tensor K = empty(triangles, {triangles.size(0), b, b});
  torch::stable::fill_(K, 0);
  call("aten::index_put_", "", K, upper.places(), triangles, false);
  return torch::stable::subtract(K, flipped(K));
}

// Of I, K, K², ... in PEFT's series.
inline std::vector<double> series_coefficients(int64_t terms) {
  if (terms <= 1) return {1};
  if (terms == 2) return {1, 2};
  std::vector<double> c(static_cast<size_t>(at_least(terms, 4)), 2);
  c.front() = c.back() = 1;
  return c;
}

// M [z, a, B] as batches [z s q, a, 2 h] of the columns that factor i, of blocks [z s q, 2 h, 2 h], pairs; and back.
inline Tensor paired(const Tensor& M, int64_t i, int64_t h) {
  const int64_t z = M.size(0), a = M.size(1), B = M.size(2), q = int64_t{1} << i, s = B / (2 * q * h);
  const Tensor lying = torch::stable::contiguous(strided(M, {z, s, q, a, 2, h}, {a * B, 2 * q * h, h, B, q * h, 1}));
  return as_three(lying, z * s * q, a, 2 * h);
}
inline Tensor unpaired(const Tensor& P, int64_t z, int64_t B, int64_t i, int64_t h) {
  const int64_t a = P.size(1), q = int64_t{1} << i, s = B / (2 * q * h);
  const Tensor lying = torch::stable::contiguous(strided(P, {z, a, s, 2, q, h}, {s * q * a * 2 * h, 2 * h, q * a * 2 * h, h, a * 2 * h, 1}));
  return as_three(lying, z, a, B);
}

// Everything that R is made of, and C [k / b, b, b] = (R - I)ᵀ, as Bat-Row's kernel takes it.
template <class Device> class Rotation {
 public:
  Rotation(const Tensor& parameters, int64_t terms, int64_t k) : parameters_(parameters), terms_(terms) {
    const Tensor& p = parameters_;
    STD_TORCH_CHECK(p.dim() == 2 || p.dim() == 4, "blocks: got ", p.dim(), " dimensions, wanted [n, b(b-1)/2] or [f, n, b, b]");
    const Tensor blocks = cast(p, accumulate_type(p));
    if (p.dim() == 2) {
      b_ = (1 + static_cast<int64_t>(std::sqrt(static_cast<double>(1 + 8 * p.size(1))) + 0.5)) / 2;
      check_size("blocks", p, 1, b_ * (b_ - 1) / 2, "an upper triangle");
      upper_.emplace(blocks, b_);
      const Tensor K = skew(blocks, *upper_, b_);
      if (terms == 0) Q_ = cayley_forward<Device>(K);
      change_ = terms > 0 ? series(K) : turned_round(*Q_);
    } else {
      const int64_t f = p.size(0), n = p.size(1), b = p.size(2);
      check_size("blocks", p, 3, b, "the rows of a block");
      STD_TORCH_CHECK(f >= 1 && b >= 1 && (f == 1 || b % 2 == 0), "blocks: got ", f, " factors of blocks of ", b);
      b_ = b << (f - 1);
      STD_TORCH_CHECK((n * b) % b_ == 0, "blocks: got ", n, " of ", b, ", wanted a multiple of ", b_);
      Q_ = cayley_forward<Device>(as_three(torch::stable::contiguous(blocks), f * n, b, b));
      change_ = turned_round(f == 1 ? *Q_ : product(f, n, b));
    }
    const int64_t n = k / b_;
    STD_TORCH_CHECK(n * b_ == k && (change_->size(0) == n || (p.dim() == 2 && change_->size(0) == 1)), "blocks: wanted blocks that tile ", k);
    if (change_->size(0) != n) change_ = torch::stable::contiguous(strided(*change_, {n, b_, b_}, {0, b_, 1}));
  }

  const Tensor& change() const { return *change_; }

  // The gradient of the parameters, in their dtype, from that of C.
  Tensor gradient(Tensor dC) const {
    if (parameters_.dim() == 2 && parameters_.size(0) == 1) {
      const int64_t over = 0;
      dC = torch::stable::sum(dC, torch::headeronly::IntHeaderOnlyArrayRef(&over, 1), true, std::nullopt);
    }
    const Tensor dR = torch::stable::contiguous(flipped(dC));
    if (parameters_.dim() == 4) return cast_as(factor_gradient(dR), parameters_);
    const Tensor dK = terms_ > 0 ? series_gradient(dR) : cayley_backward<Device>(*Q_, dR);
    const Tensor both = torch::stable::subtract(dK, flipped(dK));
    return cast_as(call("aten::index", "Tensor", both, upper_->places()), parameters_);
  }

 private:
  // (R - I)ᵀ
  static Tensor turned_round(const Tensor& R) {
    return torch::stable::subtract(torch::stable::contiguous(flipped(R)), identity(R, R.size(1)));
  }

  // R - I = K P, P = c_1 I + K (c_2 I + K (...)), whose sums but the last, a multiple of I, are kept.
  Tensor series(const Tensor& K) {
    K_ = K;
    const std::vector<double> c = series_coefficients(terms_);
    const Tensor eye = identity(K, b_);
    if (c.size() == 1) return call("aten::mul", "Tensor", K, scalar(0));
    if (c.size() == 2) return call("aten::mul", "Tensor", K, scalar(-c[1]));  // Kᵀ = -K
    size_t i = c.size() - 2;
    sums_.push_back(plus(c.back() == 1 ? K : call("aten::mul", "Tensor", K, scalar(c.back())), eye, c[i]));
    while (--i > 0) sums_.push_back(plus(bmm(K, sums_.back()), eye, c[i]));
    return bmm(flipped(sums_.back()), flipped(K));
  }

  Tensor series_gradient(const Tensor& dR) const {
    const std::vector<double> c = series_coefficients(terms_);
    if (c.size() <= 2) return call("aten::mul", "Tensor", dR, scalar(c.size() == 2 ? c[1] : 0));
    Tensor dP = dR;
    MaybeTensor dK;
    for (auto P = sums_.rbegin(); P != sums_.rend(); ++P) {
      const Tensor part = bmm(dP, flipped(*P));
      dK = dK ? plus(*dK, part, 1) : part;
      dP = bmm(flipped(*K_), dP);
    }
    return plus(*dK, dP, c.back());
  }

  // F_(f-1) ... F_0 as blocks; what each factor multiplies is kept, from the last on.
  Tensor product(int64_t f, int64_t n, int64_t b) {
    const int64_t z = n * b / b_;
    Tensor M = torch::stable::contiguous(strided(identity(*Q_, b_), {z, b_, b_}, {0, b_, 1}));
    for (int64_t i = f; i-- > 0;) {
      sums_.push_back(paired(M, i, b / 2));
      M = unpaired(bmm(sums_.back(), factor(i, n, b)), z, b_, i, b / 2);
    }
    return M;
  }

  Tensor factor(int64_t i, int64_t n, int64_t b) const { return strided(*Q_, {n, b, b}, {b * b, b, 1}, i * n * b * b); }

  Tensor factor_gradient(Tensor dR) const {
    const int64_t f = parameters_.size(0), n = parameters_.size(1), b = parameters_.size(2), z = n * b / b_;
    Tensor dQ = dR;
    if (f > 1) {
      dQ = empty(*Q_, {f * n, b, b});
      for (int64_t i = 0; i < f; ++i) {
        const Tensor dN = paired(dR, i, b / 2);
        copy_into(strided(dQ, {n, b, b}, {b * b, b, 1}, i * n * b * b), bmm(flipped(sums_[f - 1 - i]), dN));
        if (i + 1 < f) dR = unpaired(bmm(dN, flipped(factor(i, n, b))), z, b_, i, b / 2);
      }
    }
    const Tensor dX = cayley_backward<Device>(*Q_, dQ);
    return strided(dX, {f, n, b, b}, {n * b * b, b * b, b, 1});
  }

  Tensor parameters_;
  int64_t terms_, b_ = 0;
  std::optional<UpperTriangle> upper_;
  MaybeTensor Q_, K_, change_;
  std::vector<Tensor> sums_;
};

// --- layers ---

// From this side of a block on, the library's products outrun the kernel; a narrower x keeps it, which takes blocks in float32.
inline bool turns_by_library(const Tensor& x, const Tensor& C) { return C.size(1) >= 256 && x.scalar_type() == C.scalar_type(); }

inline Tensor block_of(const Tensor& C, int64_t j) {
  const int64_t b = C.size(1);
  return as_matrix(C, b, b, b, 1, j * b * b);
}

// x R [T, k]
template <class Device> Tensor turn(const Tensor& x, const Tensor& C) {
  if (!turns_by_library(x, C)) return std::get<0>(bat_mix<Device>(x, C));
  const Tensor y = empty(x, {x.size(0), x.size(1)});
  const int64_t b = C.size(1);
  for (int64_t j = 0; j < C.size(0); ++j) {
    const Tensor part = columns_of(x, j * b, b);
    addmm_out<Device>(columns_of(y, j * b, b), part, part, transposed(block_of(C, j)));
  }
  return y;
}

// g becomes g Rᵀ where need_x; the gradient of C where x is given.
template <class Device> Tensor turn_back(const Tensor& g, const MaybeTensor& x, const Tensor& C, bool need_x) {
  const int64_t b = C.size(1);
  if (!turns_by_library(g, C)) {
    const Tensor q = empty(g, {g.size(0), b});
    torch::stable::fill_(q, 0);
    return bat_mix_backward_<Device>(g, q, x ? *x : g, C, need_x, x.has_value());
  }
  const Tensor dC = x ? empty(C, {C.size(0), b, b}) : nothing(C);
  for (int64_t j = 0; j < C.size(0); ++j) {
    const Tensor part = columns_of(g, j * b, b);
    if (x) mm_out<Device>(block_of(dC, j), transposed(part), columns_of(*x, j * b, b));
    if (need_x) addmm_out<Device>(part, part, copy_as(part, part), block_of(C, j));
  }
  return dC;
}

inline Tensor scale_row(const Tensor& scale, int64_t outputs, const Tensor& like) {
  STD_TORCH_CHECK(scale.dim() == 1, "scale: got ", scale.dim(), " dimensions, wanted a vector");
  check_size("scale", scale, 0, outputs, "the outputs");
  return as_matrix(cast_as(scale, like), 1, scale.size(0), 1, like.scalar_type() == scale.scalar_type() ? scale.stride(0) : 1);
}

// Results: y [..., d], without a weight x' [..., k]; and z [T, d], empty [0] where it is not to be kept.
template <class Device>
std::tuple<Tensor, Tensor> rotation_linear_forward(Tensor x, MaybeTensor weight, Tensor blocks, MaybeTensor scale,
                                                   MaybeTensor bias, int64_t terms, bool keep) {
  const NoGrad guard;
  const Tensor x2 = flat("x", x);
  const Rotation<Device> rotation(blocks, terms, x2.size(1));
  const Tensor turned = turn<Device>(x2, rotation.change());
  if (!weight) return {shaped_like(x, turned), nothing(x)};
  check_weight(x, *weight);
  Tensor y = empty_rows(x, weight->size(0));
  const Tensor y2 = flat("y", y);
  if (!scale) {
    linear_into<Device>(y2, turned, *weight, bias);
    return {y, nothing(x)};
  }
  Tensor z = keep ? empty(x, {x2.size(0), weight->size(0)}) : y2;
  mm_out<Device>(z, turned, transposed(*weight));
  multiply_into(y2, z, scale_row(*scale, y2.size(1), x));
  if (bias) add_bias<Device>(y2, *bias);
  return {y, keep ? z : nothing(x)};
}

// Results: dx [..., k], dblocks, dscale, db; empty [0] where `needs` has no bit for it.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> rotation_linear_backward(Tensor dy, MaybeTensor x, MaybeTensor weight, Tensor blocks,
                                                                    MaybeTensor scale, MaybeTensor z, int64_t terms,
                                                                    int64_t needs) {
  const NoGrad guard;
  const bool need_x = wants(needs, 0), need_blocks = wants(needs, 1), need_scale = wants(needs, 2);
  const Tensor dy2 = flat("dy", dy);
  Tensor dx = nothing(dy), dblocks = nothing(dy), dscale = nothing(dy);
  if (need_scale) dscale = column_dot(dy2, given("z", z), given("scale", scale).scalar_type());
  if (need_x || need_blocks) {
    const Tensor dz = scale ? call("aten::mul", "Tensor", dy2, scale_row(*scale, dy2.size(1), dy)) : dy2;
    const int64_t k = weight ? weight->size(1) : dy2.size(1);
    if (weight) check_shape("weight", *weight, dy2.size(1), k);
    const Tensor g = empty_rows(dy, k), g2 = flat("dx", g);
    if (weight) mm_out<Device>(g2, dz, *weight);
    else copy_into(g2, dz);
    const Rotation<Device> rotation(blocks, terms, k);
    const MaybeTensor x2 = need_blocks ? MaybeTensor(flat("x", given("x", x))) : MaybeTensor();
    if (x2) check_shape("x", *x2, dy2.size(0), k);
    const Tensor dC = turn_back<Device>(g2, x2, rotation.change(), need_x);
    if (need_x) dx = g;
    if (need_blocks) dblocks = rotation.gradient(dC);
  }
  return {dx, dblocks, dscale, wants(needs, 3) ? column_sum(dy2, dy.scalar_type()) : nothing(dy)};
}

template <class Device> void bind_rotation_layers(Bindings& rows) {
  rows.add<&rotation_linear_forward<Device>>("rotation_linear_forward");
  rows.add<&rotation_linear_backward<Device>>("rotation_linear_backward");
}

}  // namespace spectral_ops
