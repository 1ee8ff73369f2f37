"""LoKr's update, a Kronecker product (METHODS 1.17): y = x Wᵀ + γ x (w1 ⊗ w2)ᵀ + b.

    w1 [a, b], w2 [c, e]; d = a c, k = b e; either may be a product of two factors, w1 = w1 w1_b, w2 = w2 w2_b
    with x as [T, b, e] and y as [T, a, c]:      y(t) += γ w1 x(t) w2ᵀ

Three small products instead of ΔW [d, k]: g = x(t) w2_bᵀ [T, b, q] (x itself where w2 is whole), h = w1 g(t) [T, a, q],
and y(t) += γ h w2ᵀ, added in place by the library's product. Backward, with D = dy as [T, a, c] and x alone saved:

    u = γ D w2      dw2 = γ Dᵀ h      dw1 = Σ_t u(t) g(t)ᵀ      v = w1ᵀ u(t)      dw2_b = vᵀ x      dx = dy W + v w2_b

They are the library's products throughout; a kernel of its own would save the passes over g and h, T·b·q numbers.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import calls, define_layer
from spectral_ops.core import checks
from spectral_ops.core.autograd import apply, autocast_arguments, backward_pass, fresh, rows, shaped, wanted

__all__ = ["kron_linear", "kron_update"]


def _whole(w, w_b):
    """The product of a side's two factors, or the side itself."""
    return w if w_b is None else w @ w_b


def _across(w, t):
    """w [a, b] times each of the T matrices t [T, b, q]: [T, a, q], contiguous. One product, whose factors are laid out
    anew, T·(a + b)·q numbers: a batch of T small products costs more."""
    T, b, q = t.shape
    out = t.transpose(1, 2).reshape(T * q, b) @ w.t()
    return out.view(T, q, w.shape[0]).transpose(1, 2).contiguous()


def _chunks(t):
    """Row slices of t [N, n] that are cast at a time, where a product takes it in another dtype."""
    step = max((1 << 24 if t.is_cuda else 1 << 15) // max(t.shape[1], 1), 1)
    return [slice(start, start + step) for start in range(0, t.shape[0], step)]


def _times(t, w):
    """t [N, n] times w [n, q], in w's dtype."""
    if t.dtype == w.dtype:
        return t @ w
    out = w.new_empty(t.shape[0], w.shape[1])
    for part in _chunks(t):
        torch.mm(t[part].to(w.dtype), w, out=out[part])
    return out


def _add(y, left, right, scale=1.0):
    """y [N, n] += scale left [N, q] right [q, n], in y's place."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=scale)
        return
    for part in _chunks(y):
        y[part] += (left[part] @ right).mul_(scale)


def _outer(t, h):
    """tᵀ h [n, q] for t [N, n] and h [N, q], in h's dtype."""
    if t.dtype == h.dtype:
        return t.t() @ h
    out = h.new_zeros(t.shape[1], h.shape[1])
    for part in _chunks(t):
        out.addmm_(t[part].to(h.dtype).t(), h[part])
    return out


def _inner(x, w1, w2, w2_b):
    """g [T, b, q] and h [T, a, q] for x [T, k], in the factors' dtype."""
    b = w1.shape[1]
    g = x.reshape(x.shape[0] * b, x.shape[1] // b)
    g = (g.to(w1.dtype) if w2_b is None else _times(g, w2_b.t())).view(x.shape[0], b, w2.shape[1])
    return g, _across(w1, g)


def _wide(x, w1, w1_b, w2, w2_b):
    """w1 whole, w2 and w2_b in one dtype, the widest among theirs and x's: what lies between the products is small, and
    its rounding would reach every gradient."""
    given = [t for t in (w1, w1_b, w2, w2_b) if t is not None]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in given), x.dtype)
    return (t if t is None else t.to(dtype) for t in (_whole(w1, w1_b), w2, w2_b))


@define_layer(
    "kron_forward(Tensor x, Tensor? weight, Tensor? base_out, Tensor w1, Tensor? w1_b, Tensor w2, Tensor? w2_b,"
    " Tensor? bias, float scale) -> Tensor",
    fake=lambda x, weight, base_out, w1, w1_b, w2, *rest: x.new_empty(*x.shape[:-1], w1.shape[0] * w2.shape[0]),
    pieces=(),
)
def kron_forward_op(x, weight, base_out, w1, w1_b, w2, w2_b, bias, scale):
    """y [..., d] = x Wᵀ + b + scale x (w1 ⊗ w2)ᵀ, or base_out in place of the first two. Factors in any dtype."""
    x2 = rows(x)
    w1, w2, w2_b = _wide(x, w1, w1_b, w2, w2_b)
    y = (
        F.linear(x2, weight, bias)
        if base_out is None
        else torch.clone(rows(base_out), memory_format=torch.contiguous_format)
    )
    _, h = _inner(x2, w1, w2, w2_b)
    _add(y.view(-1, w2.shape[0]), h.view(-1, w2.shape[1]), w2.t(), scale)
    return shaped(y, x)


def _kron_backward_fake(dy, x, weight, w1, w1_b, w2, w2_b, scale, needs):
    k = (w1 if w1_b is None else w1_b).shape[1] * (w2 if w2_b is None else w2_b).shape[1]
    return wanted(dy, needs, (*dy.shape[:-1], k), w1, w1_b, w2, w2_b, dy.shape[-1:])


@define_layer(
    "kron_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor w1, Tensor? w1_b, Tensor w2, Tensor? w2_b, float scale,"
    " int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_kron_backward_fake,
    pieces=(),
)
def kron_backward_op(dy, x, weight, w1, w1_b, w2, w2_b, scale, needs):
    """dx (of the update alone where there is no weight), dw1, dw1_b, dw2, dw2_b in the parameters' dtypes, and db;
    empty [0] where ``needs`` has no bit."""
    need_x, need_w1, need_w1_b, need_w2, need_w2_b, need_bias = (bool(needs >> bit & 1) for bit in range(6))
    dy2 = rows(dy)
    whole, wide, wide_b = _wide(dy, w1, w1_b, w2, w2_b)
    T, (a, b), (c, q) = dy2.shape[0], whole.shape, wide.shape
    e = q if wide_b is None else wide_b.shape[1]
    D = dy2.reshape(T * a, c)
    dx = dw1 = dw1_b = dw2 = dw2_b = None
    if need_w1 or need_w1_b or need_w2:
        g, h = _inner(rows(x), whole, wide, wide_b)
    if need_w2:
        dw2 = _outer(D, h.view(T * a, q)).mul_(scale).to(w2.dtype)
    if need_x or need_w1 or need_w1_b or need_w2_b:
        u = _times(D, wide).mul_(scale).view(T, a, q)
    if need_w1 or need_w1_b:
        u2, g2 = u.transpose(1, 2).reshape(T * q, a), g.transpose(1, 2).reshape(T * q, b)
        dw = (u2.t() @ g2).to(w1.dtype)
        dw1 = dw if w1_b is None else dw @ w1_b.to(dw.dtype).t() if need_w1 else None
        dw1_b = (w1.t() @ dw).to(w1_b.dtype) if need_w1_b else None
    if need_x or need_w2_b:
        v = _across(whole.t(), u).view(T * b, q)
    if need_w2_b:
        dw2_b = _outer(rows(x).reshape(T * b, e), v).t().to(w2_b.dtype).contiguous()
    if need_x:
        dx = dy2.new_zeros(T, b * e) if weight is None else dy2 @ weight
        if wide_b is None:
            dx.view(T * b, e).add_(v)
        else:
            _add(dx.view(T * b, e), v, wide_b)
        dx = shaped(dx, dy)
    db = dy2.sum(0) if need_bias else None
    return fresh(dy, needs, dx, dw1, dw1_b, dw2, dw2_b, db)


class KronFunction(Function):
    @staticmethod
    def forward(ctx, x, weight, base_out, w1, w1_b, w2, w2_b, bias, scale):
        y = kron_forward_op(x, weight, base_out, w1, w1_b, w2, w2_b, bias, scale)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:7]) else None, weight, w1, w1_b, w2, w2_b)
        ctx.scale = scale
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, w1, w1_b, w2, w2_b = ctx.saved_tensors
        need_x, _, need_out, *need, need_bias = ctx.needs_input_grad[:8]
        need = [need_x, *need, need_bias]
        needs = sum(bit << i for i, bit in enumerate(need))
        found = kron_backward_op(dy, x, weight, w1, w1_b, w2, w2_b, ctx.scale, needs) if needs else [None] * 6
        dx, dw1, dw1_b, dw2, dw2_b, db = (t if wanted else None for t, wanted in zip(found, need, strict=True))
        return dx, None, dy if need_out else None, dw1, dw1_b, dw2, dw2_b, db, None


def linear(x, weight, base_out, w1, w1_b, w2, w2_b, bias, scale):
    """The public functions past their checks, for layers that know their shapes."""
    return apply(KronFunction, x, x, weight, base_out, w1, w1_b, w2, w2_b, bias, scale)


# --- public functions ------------------------------------------------------------------------------------------------


def _check_factors(x, d, w1, w1_b, w2, w2_b):
    given = {"w1": w1, "w1_b": w1_b, "w2": w2, "w2_b": w2_b}
    given = {name: t for name, t in given.items() if t is not None}
    for name, t in given.items():
        checks.tensor(name, t, "two dimensions", 2)
    for name, left in (("w1_b", w1), ("w2_b", w2)):
        if name in given:
            checks.size(name, given[name], 0, left.shape[1], f"columns of {name[:2]}")
    ins = [given.get(f"{name}_b", given[name]).shape[1] for name in ("w1", "w2")]
    if (w1.shape[0] * w2.shape[0], ins[0] * ins[1]) != (d, x.shape[-1]):
        raise ValueError(
            f"w1, w2: got [{w1.shape[0]}, {ins[0]}] and [{w2.shape[0]}, {ins[1]}], wanted sides whose products are"
            f" {d} and {x.shape[-1]}"
        )
    checks.device("x", x, **given)
    checks.no_narrowing(x, **given)


@calls(kron_forward_op, kron_backward_op)
def kron_linear(x, weight, w1, w2, bias=None, *, w1_b=None, w2_b=None, scale=1.0):
    """LoKr linear layer: y = x (W + scale w1 ⊗ w2)ᵀ + b, with w1 w1_b for w1 and w2 w2_b for w2 where those are given.

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (autocast casts both).
        w1: [a, b], or [a, r] with w1_b [r, b]. w2: [c, e], or [c, r] with w2_b [r, e]. a c = d and b e = k. In any
            floating dtype (float64 exactly where x is).
        bias: [d] or None; may be trainable.

    Returns y [..., d] in x's dtype. Saves x. Raises TypeError/ValueError naming the argument. METHODS 1.17; LoKr,
    arXiv:2309.14859.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    checks.number("scale", scale)
    _check_factors(x, weight.shape[0], w1, w1_b, w2, w2_b)
    return linear(x, weight, None, w1, w1_b, w2, w2_b, bias, scale)


@calls(kron_forward_op, kron_backward_op)
def kron_update(base_out, x, w1, w2, *, w1_b=None, w2_b=None, scale=1.0):
    """base_out + scale x (w1 ⊗ w2)ᵀ, over what another layer returned for x.

    base_out [..., d] is left as it is, and x cast to its dtype; the others as in :func:`kron_linear`. Saves x.
    """
    checks.base(base_out, x)
    x = x.to(base_out.dtype)
    checks.number("scale", scale)
    _check_factors(x, base_out.shape[-1], w1, w1_b, w2, w2_b)
    return linear(x, None, base_out, w1, w1_b, w2, w2_b, None, scale)
