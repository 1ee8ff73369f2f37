"""VeRA: two trained vectors around frozen random factors (METHODS 1.11; arXiv:2310.11454).

    h = drop(x) Aᵀ      h' = h * λ_d      B' = λ_b * B (by row)      y = x Wᵀ + h' B'ᵀ + b
    backward:
      u = dy B'     dλ_d = Σ_t h * u     dλ_b = the row sums of (dyᵀ h') * B     dx = dy W + mask * ((u * λ_d) A)

A [r, k] and B [d, r] take no gradient, so x is not kept: saved for backward is h [T, r] alone. The gradient of λ_b is
Σ_t dy * (h' Bᵀ) as well, for which a [T, d] product would be kept or made again. B' [d, r], and dyᵀ h' of its shape,
live in the shared buffer. All products are the library's: at VeRA's ranks (256) they are most of the time, and there is
no pass over [T, d] beside them that a kernel of its own could save.
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
    contiguous_copy,
    draw_seed,
    fresh,
    mm,
    rows,
    saved_hidden,
    shaped,
    wanted,
)
from spectral_ops.core.scratch import scratch
from spectral_ops.functional import dropout
from spectral_ops.functional.lowrank import update_input_gradient

__all__ = ["vera_linear", "vera_update"]

_PIECES = ("dropout_project", "dropout_lift_")


def _scaled(out: torch.Tensor, B: torch.Tensor, lambda_b: torch.Tensor) -> torch.Tensor:
    """B' [d, r] in out's dtype, rounded once."""
    return torch.mul(B, lambda_b.to(torch.promote_types(lambda_b.dtype, B.dtype)).unsqueeze(1), out=out)


@define_layer(
    "vera_linear_forward(Tensor x, Tensor? weight, Tensor? base_out, Tensor A, Tensor B, Tensor lambda_d,"
    " Tensor lambda_b, Tensor? bias, Tensor? seed, float p) -> (Tensor, Tensor)",
    fake=lambda x, weight, base_out, A, B, lambda_d, lambda_b, bias, seed, p: (
        x.new_empty(*x.shape[:-1], B.shape[0]), x.new_empty(math.prod(x.shape[:-1]), A.shape[0]),
    ),
    pieces=_PIECES,
)  # fmt: skip
def vera_linear_forward_op(x, weight, base_out, A, B, lambda_d, lambda_b, bias, seed, p):
    """y [..., d] and h [T, r] = drop(x) Aᵀ; without a weight y is a copy of base_out with the update added."""
    if (weight is None) == (base_out is None):
        raise RuntimeError("weight and base_out: wanted exactly one of them")
    x2 = rows(x)
    h = dropout.project(x2, A.to(x.dtype), seed, p)
    y = rows(contiguous_copy(base_out)) if weight is None else F.linear(x2, weight, bias)
    with scratch.lease(B.shape, x.dtype, x.device) as b:
        y.addmm_(h * lambda_d.to(h.dtype), _scaled(b, B, lambda_b).t())
    return shaped(y, x), h


@define_layer(
    "vera_linear_backward(Tensor dy, Tensor? weight, Tensor A, Tensor B, Tensor lambda_d, Tensor lambda_b, Tensor? h,"
    " Tensor? seed, float p, int needs) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda dy, weight, A, B, lambda_d, lambda_b, h, seed, p, needs: wanted(
        dy, needs, (*dy.shape[:-1], A.shape[1]), lambda_d, lambda_b, dy.shape[-1:]
    ),
    pieces=_PIECES,
)
def vera_linear_backward_op(dy, weight, A, B, lambda_d, lambda_b, h, seed, p, needs):
    """dx, dλ_d, dλ_b and db; empty [0] where ``needs`` has no bit. Without a weight dx is the update's share."""
    need_x, need_d, need_b, need_bias = (bool(needs >> bit & 1) for bit in range(4))
    dy2, acc = rows(dy), accumulate_dtype(dy.dtype)
    h = saved_hidden(h, need_d or need_b, dy2, A.shape[0])
    d = lambda_d.to(dy.dtype)
    dx = d_d = d_b = db = dy
    with scratch.lease(B.shape, dy.dtype, dy.device) as b:
        if need_x or need_d:
            u = dy2 @ _scaled(b, B, lambda_b)
        if need_b:  # into the same memory: B' has been read
            dB = torch.mm(dy2.t(), h * d, out=b) if b.dtype is acc else mm(dy2.t(), h * d, acc)
            d_b = dB.mul_(B).sum(1).to(lambda_b.dtype)
    if need_d:
        d_d = (h.to(acc) * u.to(acc)).sum(0).to(lambda_d.dtype)
    if need_x:
        u *= d
        shape = (*dy.shape[:-1], A.shape[1])
        if weight is None:
            dx = update_input_gradient(u, A, shape, seed, p)
        else:
            dx = dy2 @ weight
            dx = dx.addmm_(u, A.to(u.dtype)) if seed is None else dropout.lift_(dx, u, A.to(u.dtype), seed, p)
            dx = dx.reshape(shape)
    if need_bias:
        db = dy2.sum(0, dtype=acc).to(dy.dtype)
    return fresh(dy, needs, dx, d_d, d_b, db)


class VeRAFunction(Function):
    """Over a weight, or over what somebody else's layer returned; saves h."""

    @staticmethod
    def forward(ctx, x, weight, base_out, A, B, lambda_d, lambda_b, bias, seed, p):
        y, h = vera_linear_forward_op(x, weight, base_out, A, B, lambda_d, lambda_b, bias, seed, p)
        _, _, _, _, _, need_d, need_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(weight, A, B, lambda_d, lambda_b, h if need_d or need_b else None, seed)
        ctx.p = p
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        weight, A, B, lambda_d, lambda_b, h, seed = ctx.saved_tensors
        need_x, _, need_out, _, _, need_d, need_b, need_bias, *_ = ctx.needs_input_grad
        dx, d_d, d_b, db = vera_linear_backward_op(
            dy, weight, A, B, lambda_d, lambda_b, h, seed, ctx.p, need_x | need_d << 1 | need_b << 2 | need_bias << 3
        )
        return (
            dx if need_x else None, None, dy if need_out else None, None, None, d_d if need_d else None,
            d_b if need_b else None, db if need_bias else None, None, None,
        )  # fmt: skip


def linear(x, weight, base_out, A, B, lambda_d, lambda_b, bias, p):
    """:func:`vera_linear`, or with base_out :func:`vera_update`, past its checks."""
    seed = draw_seed(x, p)
    args = x, weight, base_out, A, B, lambda_d, lambda_b, bias, seed, p
    if torch.is_grad_enabled():
        return apply(VeRAFunction, x, *args)
    return apply_op(vera_linear_forward_op, x, *args)[0]


def _check(x, out_features, vera_A, vera_B, lambda_d, lambda_b, dropout_p):
    checks.low_rank(x, out_features, vera_A, vera_B)
    checks.frozen(vera_A=vera_A, vera_B=vera_B)
    checks.vector("lambda_d", lambda_d, vera_A.shape[0], "the rank")
    checks.vector("lambda_b", lambda_b, out_features, "out_features")
    checks.device("x", x, lambda_d=lambda_d, lambda_b=lambda_b)
    checks.no_narrowing(x, lambda_d=lambda_d, lambda_b=lambda_b)
    checks.probability("dropout_p", dropout_p)


@calls(vera_linear_forward_op, vera_linear_backward_op)
def vera_linear(x, weight, vera_A, vera_B, lambda_d, lambda_b, bias=None, *, dropout_p=0.0, training=False):
    """Linear layer with a VeRA update: y = x Wᵀ + λ_b * ((drop(x) Aᵀ * λ_d) Bᵀ) + b.

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (under autocast both are cast).
        vera_A: A [r, k]; vera_B: B [d, r]; frozen, any row stride. May be float32 over a narrower x.
        lambda_d: [r]; lambda_b: [d]; trained, float32 allowed over a narrower x.
        bias: [d] or None, in x's dtype; may be trainable.
        dropout_p, training: inverted dropout on the adapter branch, active only while training.

    Returns y [..., d] in x's dtype. Saves h [T, r] for backward, and not x.
    Raises TypeError/ValueError that name the argument. METHODS 1.11; VeRA, arXiv:2310.11454.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    _check(x, weight.shape[0], vera_A, vera_B, lambda_d, lambda_b, dropout_p)
    p = dropout_p if training else 0.0
    return linear(x, weight, None, vera_A, vera_B, lambda_d, lambda_b, bias, p)


@calls(vera_linear_forward_op, vera_linear_backward_op)
def vera_update(base_out, x, vera_A, vera_B, lambda_d, lambda_b, *, dropout_p=0.0, training=False):
    """The same update over base_out [..., d] = base(x), which somebody else computed, as a new tensor.

    The other arguments are those of :func:`vera_linear`; x is cast to base_out's dtype.
    """
    checks.base(base_out, x)
    x = x.to(base_out.dtype)
    _check(x, base_out.shape[-1], vera_A, vera_B, lambda_d, lambda_b, dropout_p)
    return linear(x, None, base_out, vera_A, vera_B, lambda_d, lambda_b, None, dropout_p if training else 0.0)
