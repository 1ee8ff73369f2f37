"""Products of Householder reflections of x before a frozen layer: HRA (METHODS 1.19).

    H = Π_i (I - 2 u_i u_iᵀ / ‖u_i‖²) = I - U M⁻¹ Uᵀ      M = diag(UᵀU)/2 + what is above the diagonal of UᵀU
    h = x U     S = M⁻ᵀ     x' = x Hᵀ = x - h S Uᵀ     y = x' Wᵀ + b
    backward:  g = dy W     p = g U     dx = g - p Sᵀ Uᵀ
      dU = -gᵀ h S - xᵀ p Sᵀ + U (N + Nᵀ)     N: S pᵀ h S above the diagonal, its half on it, the gradient of UᵀU

The compact WY form needs no unit columns: their norms are the diagonal of M. With ``orthonormal`` columns S is 2 I. A
matrix [k, k] is never made, nor one [d, k]. Where x takes no gradient, dy meets W U [d, r] and g is not made either.
Saved for backward: x and h [T, r]. All products are the library's, which nothing beats at these shapes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype, calls, define_layer
from spectral_ops.core import checks
from spectral_ops.core.autograd import (
    apply,
    apply_op,
    autocast_arguments,
    backward_pass,
    fresh,
    mm,
    rows,
    shaped,
    wanted,
)

__all__ = ["householder_linear"]


def _inner(U: torch.Tensor, orthonormal: bool) -> torch.Tensor:
    """S [r, r] in at least float32."""
    acc = accumulate_dtype(U.dtype)
    eye = torch.eye(U.shape[1], dtype=acc, device=U.device)
    if orthonormal:
        return 2 * eye
    U = U.to(acc)
    M = (U.t() @ U).triu_()
    M.diagonal().mul_(0.5)
    return torch.linalg.solve_triangular(M, eye, upper=True).t()


def _forward_fake(x, weight, u, bias, orthonormal, keep):
    h = (math.prod(x.shape[:-1]), u.shape[1]) if keep else (0,)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(h)


@define_layer(
    "householder_linear_forward(Tensor x, Tensor weight, Tensor u, Tensor? bias, bool orthonormal, bool keep)"
    " -> (Tensor, Tensor)",
    fake=_forward_fake,
    pieces=(),
)
def householder_linear_forward_op(x, weight, u, bias, orthonormal, keep):
    """y [..., d], and h [T, r] where ``keep`` asks for it."""
    x2, U = rows(x), u.to(x.dtype)
    h = x2 @ U
    turned = torch.addmm(x2, h @ _inner(U, orthonormal).to(x.dtype), U.t(), alpha=-1)
    return shaped(F.linear(turned, weight, bias), x), h if keep else x.new_empty(0)


@define_layer(
    "householder_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor u, Tensor? h, bool orthonormal, int needs)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda dy, x, weight, u, h, orthonormal, needs: wanted(
        dy, needs, (*dy.shape[:-1], weight.shape[1]), u, dy.shape[-1:]
    ),
    pieces=(),
)
def householder_linear_backward_op(dy, x, weight, u, h, orthonormal, needs):
    """dx, dU and db; empty [0] where ``needs`` has no bit. x and h are read for dU alone."""
    need_x, need_u, need_bias = bool(needs & 1), bool(needs & 2), bool(needs & 4)
    dy2, dtype, acc = rows(dy), dy.dtype, accumulate_dtype(dy.dtype)
    dx = du = db = dy
    if need_x or need_u:
        U = u.to(dtype)
        S = _inner(U, orthonormal)
        g = dy2 @ weight if need_x else dy
        p = g @ U if need_x else dy2 @ (weight @ U)
        back = p @ S.t().to(dtype)
        if need_u:
            turned = h @ S.to(dtype)
            du = mm(g.t(), turned, acc) if need_x else mm(weight.t(), dy2.t() @ turned, acc)
            du += mm(rows(x).t(), back, acc)
            if orthonormal:
                du = du.neg_()
            else:
                N = (S @ mm(p.t(), h, acc) @ S).triu_()
                N.diagonal().mul_(0.5)
                du = torch.addmm(du, U.to(acc), N + N.t(), beta=-1)
            du = du.to(u.dtype)
        if need_x:
            dx = g.addmm_(back, U.t(), alpha=-1).reshape(*dy.shape[:-1], weight.shape[1])
    if need_bias:
        db = dy2.sum(0, dtype=acc).to(dtype)
    return fresh(dy, needs, dx, du, db)


class HouseholderFunction(Function):
    """Saves x and h."""

    @staticmethod
    def forward(ctx, x, weight, u, bias, orthonormal):
        keep = ctx.needs_input_grad[2]
        y, h = householder_linear_forward_op(x, weight, u, bias, orthonormal, keep)
        ctx.save_for_backward(*((x, h) if keep else (None, None)), weight, u)
        ctx.orthonormal = orthonormal
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, h, weight, u = ctx.saved_tensors
        need_x, _, need_u, need_bias, _ = ctx.needs_input_grad
        needs = need_x | need_u << 1 | need_bias << 2
        found = householder_linear_backward_op(dy, x, weight, u, h, ctx.orthonormal, needs)
        dx, du, db = (t if needs >> bit & 1 else None for bit, t in enumerate(found))
        return dx, None, du, db, None


def linear(x, weight, u, bias, orthonormal):
    """:func:`householder_linear` past its checks."""
    if torch.is_grad_enabled():
        return apply(HouseholderFunction, x, x, weight, u, bias, orthonormal)
    return apply_op(householder_linear_forward_op, x, x, weight, u, bias, orthonormal, False)[0]


@calls(householder_linear_forward_op, householder_linear_backward_op)
def householder_linear(x, weight, u, bias=None, *, orthonormal=False):
    """Linear layer behind r Householder reflections: y = x (W H)ᵀ + b, H = Π_i (I - 2 u_i u_iᵀ / ‖u_i‖²).

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (under autocast both are cast).
        u: U [k, r], a vector per column, of any length but zero; trained, float32 allowed over a narrower x.
        bias: [d] or None, in x's dtype; may be trainable.
        orthonormal: the columns are orthonormal already, which is not checked: H = I - 2 U Uᵀ.

    Returns y [..., d] in x's dtype. Saves x and h [T, r] for backward.
    Raises TypeError/ValueError that name the argument. METHODS 1.19; HRA, arXiv:2405.17484.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    checks.tensor("u", u, "[in_features, r]", 2)
    checks.size("u", u, 0, x.shape[-1], "in_features, the last dimension of x")
    if u.shape[1] < 1:
        raise ValueError(f"u: got {checks.describe(u)}, wanted at least one column (a reflection)")
    checks.device("x", x, u=u)
    checks.no_narrowing(x, u=u)
    return linear(x, weight, u, bias, orthonormal)
