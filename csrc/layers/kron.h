// LoKr's layers, forward and backward, for any device: spectral_ops/functional/kron.py has the mathematics and the same steps in
// Python.
#pragma once

#include "../ops/blocksum.h"
#include "library.h"

namespace spectral_ops {

inline ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The sides w1 [a, b], whole, and w2 [c, q] w2_b [q, e] (or w2 [c, e], q = e), in one dtype, the widest among theirs and x's.
struct Kron {
  Tensor w1, w2;
  MaybeTensor w2_b;
  double scale;
  int64_t a, b, c, q, e;
  ScalarType dtype;
};

template <class Device>
Kron checked_kron(const Tensor& like, const Tensor& w1, const MaybeTensor& w1_b, const Tensor& w2, const MaybeTensor& w2_b,
                  double scale) {
  check_matrix("w1", w1);
  check_matrix("w2", w2);
  ScalarType dtype = promoted(promoted(like.scalar_type(), w1.scalar_type()), w2.scalar_type());
  if (w1_b) {
    check_matrix("w1_b", *w1_b);
    check_size("w1_b", *w1_b, 0, w1.size(1), "the columns of w1");
    dtype = promoted(dtype, w1_b->scalar_type());
  }
  if (w2_b) {
    check_matrix("w2_b", *w2_b);
    check_size("w2_b", *w2_b, 0, w2.size(1), "the columns of w2");
    dtype = promoted(dtype, w2_b->scalar_type());
  }
  const Tensor whole = cast(w1_b ? mm<Device>(w1, *w1_b) : w1, dtype);
  const MaybeTensor inner = w2_b ? MaybeTensor(cast(*w2_b, dtype)) : MaybeTensor();
  return {whole, cast(w2, dtype), inner, scale, whole.size(0), whole.size(1),
          w2.size(0), w2.size(1), w2_b ? w2_b->size(1) : w2.size(1), dtype};
}

// t [T, n] as [T m, n / m].
inline Tensor split_rows(const Tensor& t, int64_t m) {
  const int64_t n = t.size(1) / at_least(m, 1);
  return as_matrix(t.stride(0) == t.size(1) || t.size(0) <= 1 ? t : torch::stable::contiguous(t), t.size(0) * m, n, at_least(n, 1), 1);
}

// t [T, b, q] as [T q, b], contiguous.
inline Tensor turned(const Tensor& t, int64_t T, int64_t b, int64_t q) {
  const Tensor lying = torch::stable::contiguous(strided(t, {T, q, b}, {b * q, 1, q}));
  return as_matrix(lying, T * q, b, at_least(b, 1), 1);
}

// w [a, b] times each of the T matrices t [T, b, q], as [T a, q]. One product, whose factors are laid out anew: a batch of T
// small products costs more.
template <class Device> Tensor across(const Tensor& w, const Tensor& t, int64_t T, int64_t q) {
  return turned(mm<Device>(turned(t, T, w.size(1), q), transposed(w)), T, q, w.size(0));
}

// f(start, n) for the rows of t [N, n] that are cast at a time, where a product takes it in another dtype.
template <class F> void cast_by_chunks(const Tensor& t, const F& f) {
  const int64_t most = at_least((t.is_cpu() ? int64_t{1} << 15 : int64_t{1} << 24) / at_least(t.size(1), 1), 1);
  for (int64_t start = 0; start < t.size(0); start += most) f(start, t.size(0) - start < most ? t.size(0) - start : most);
}

// t [N, n] times w [n, q], in w's dtype.
template <class Device> Tensor cast_product(const Tensor& t, const Tensor& w) {
  const Tensor out = empty(w, {t.size(0), w.size(1)});
  if (t.scalar_type() == w.scalar_type()) mm_out<Device>(out, t, w);
  else cast_by_chunks(t, [&](int64_t start, int64_t n) {
    mm_out<Device>(rows_of(out, start, n), cast_as(rows_of(t, start, n), w), w);
  });
  return out;
}

// y [N, n] += scale left [N, q] right [q, n], in y's place.
template <class Device> void add_cast_product(const Tensor& y, const Tensor& left, const Tensor& right, double scale) {
  if (y.scalar_type() == left.scalar_type()) return add_product<Device>(y, left, right, scale);
  cast_by_chunks(y, [&](int64_t start, int64_t n) {
    const Tensor rows = rows_of(y, start, n), sum = cast_as(rows, left);
    add_product<Device>(sum, rows_of(left, start, n), right, scale);
    copy_into(rows, sum);
  });
}

// scale tᵀ h [n, q] for t [N, n] and h [N, q], in h's dtype.
template <class Device> Tensor cast_outer(const Tensor& t, const Tensor& h, double scale) {
  const Tensor out = empty(h, {t.size(1), h.size(1)});
  if (t.scalar_type() == h.scalar_type()) {
    addmm_out<Device>(out, out, transposed(t), h, 0, scale);
    return out;
  }
  torch::stable::fill_(out, 0);
  cast_by_chunks(t, [&](int64_t start, int64_t n) {
    add_product<Device>(out, transposed(cast_as(rows_of(t, start, n), h)), rows_of(h, start, n), scale);
  });
  return out;
}

// g [T, b, q] = x(t) w2_bᵀ for x [T, k], in the factors' dtype.
template <class Device> Tensor kron_inner(const Tensor& x, const Kron& w) {
  const Tensor g = split_rows(x, w.b);
  return w.w2_b ? cast_product<Device>(g, transposed(*w.w2_b)) : cast(g, w.dtype);
}

template <class Device>
Tensor kron_forward(Tensor x, MaybeTensor weight, MaybeTensor base_out, Tensor w1, MaybeTensor w1_b, Tensor w2, MaybeTensor w2_b,
                    MaybeTensor bias, double scale) {
  const NoGrad guard;
  const Kron w = checked_kron<Device>(x, w1, w1_b, w2, w2_b, scale);
  const Tensor x2 = flat("x", x);
  check_size("x", x2, 1, w.b * w.e, "the columns of w1 times those of w2");
  Tensor y = base_output<Device>(x, weight, base_out, bias);
  const Tensor y2 = flat("y", y);
  check_shape("base_out", y2, x2.size(0), w.a * w.c);
  const int64_t T = x2.size(0);
  const Tensor h = across<Device>(w.w1, kron_inner<Device>(x2, w), T, w.q);
  add_cast_product<Device>(split_rows(y2, w.a), h, transposed(w.w2), scale);
  return y;
}

// Results: dx (of the update alone where there is no weight), dw1, dw1_b, dw2, dw2_b, db; empty [0] where `needs` has no bit.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kron_backward(Tensor dy, MaybeTensor x, MaybeTensor weight, Tensor w1,
                                                                         MaybeTensor w1_b, Tensor w2, MaybeTensor w2_b,
                                                                         double scale, int64_t needs) {
  const NoGrad guard;
  const Kron w = checked_kron<Device>(dy, w1, w1_b, w2, w2_b, scale);
  const bool need_x = wants(needs, 0), need_w1 = wants(needs, 1), need_w1_b = wants(needs, 2), need_w2 = wants(needs, 3),
             need_w2_b = wants(needs, 4), need_first = need_w1 || need_w1_b;
  STD_TORCH_CHECK((w1_b || !need_w1_b) && (w2_b || !need_w2_b), "w1_b and w2_b: got None, wanted tensors, whose gradients are asked for");
  const Tensor dy2 = flat("dy", dy), D = split_rows(dy2, w.a);
  check_size("dy", dy2, 1, w.a * w.c, "the rows of w1 times those of w2");
  const int64_t T = dy2.size(0), a = w.a, b = w.b, q = w.q;
  Tensor dx = nothing(dy), dw1 = nothing(dy), dw1_b = nothing(dy), dw2 = nothing(dy), dw2_b = nothing(dy);
  MaybeTensor x2, g, u, v;
  if (weight) check_shape("weight", *weight, a * w.c, b * w.e);
  if (need_first || need_w2 || need_w2_b) {
    x2 = flat("x", given("x", x));
    check_shape("x", *x2, T, b * w.e);
  }
  if (need_first || need_w2) g = kron_inner<Device>(*x2, w);
  if (need_w2) dw2 = cast_as(cast_outer<Device>(D, across<Device>(w.w1, *g, T, q), scale), w2);
  if (need_x || need_first || need_w2_b) {
    u = empty(w.w2, {T * a, q});
    if (D.scalar_type() == w.dtype) addmm_out<Device>(*u, *u, D, w.w2, 0, scale);
    else cast_by_chunks(D, [&](int64_t start, int64_t n) {
      const Tensor rows = rows_of(*u, start, n);
      addmm_out<Device>(rows, rows, cast(rows_of(D, start, n), w.dtype), w.w2, 0, scale);
    });
  }
  if (need_first) {
    const Tensor dw = cast_as(mm<Device>(transposed(turned(*u, T, a, q)), turned(*g, T, b, q)), w1);
    if (need_w1) dw1 = w1_b ? mm<Device>(dw, transposed(cast_as(*w1_b, dw))) : dw;
    if (need_w1_b) dw1_b = cast_as(mm<Device>(transposed(w1), dw), *w1_b);
  }
  if (need_x || need_w2_b) v = across<Device>(transposed(w.w1), *u, T, q);
  if (need_w2_b) dw2_b = copy_as(transposed(cast_outer<Device>(split_rows(*x2, b), *v, 1)), *w2_b);
  if (need_x) {
    dx = empty_rows(dy, b * w.e);
    const Tensor dx2 = flat("dx", dx), parts = as_matrix(dx, T * b, w.e, at_least(w.e, 1), 1);
    if (weight) mm_out<Device>(dx2, dy2, *weight);
    else torch::stable::fill_(dx, 0);
    if (w.w2_b) add_cast_product<Device>(parts, *v, *w.w2_b, 1);
    else add_<Device>(parts, *v);
  }
  Tensor db = wants(needs, 5) ? column_sum(dy2, dy.scalar_type()) : nothing(dy);
  return {dx, dw1, dw1_b, dw2, dw2_b, db};
}

template <class Device> void bind_kron_layers(Bindings& rows) {
  rows.add<&kron_forward<Device>>("kron_forward");
  rows.add<&kron_backward<Device>>("kron_backward");
}

}  // namespace spectral_ops
