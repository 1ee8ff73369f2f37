"""VeRA: two trained vectors around frozen random factors (METHODS 1.12; arXiv:2310.11454).

    h = drop(x) Aᵀ      B' = diag(λ_b) B diag(λ_d)      y = x Wᵀ + h B'ᵀ + b
    backward:
      Q = (dyᵀ h) * B     dλ_b = Q λ_d     dλ_d = Qᵀ λ_b     dx = dy W + mask * ((dy B') A)

A [r, k] and B [d, r] take no gradient, so x is not kept: saved for backward is h [T, r] alone. Plain autograd keeps
h Bᵀ [T, d] for dλ_b as well; the product dyᵀ h, which stands in for it, gives both gradients. B' and Q [d, r] live in
the shared buffer. By the number of tokens:

    T < r            λ multiplies h and [T, d] instead: z = (h * λ_d) Bᵀ, y = x Wᵀ + λ_b * z + b, and so backward
    T > k            y = x W'ᵀ, W' = W + B' A in the shared buffer; in float32 and float64, without dropout
    T > d k/(d + k)  dx = dy W' the same way

All products are the library's: at VeRA's ranks (256) they are most of the time.
"""

from __future__ import annotations

import contextlib
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


def _scaled(out, B, lambda_d, lambda_b):
    """B' [d, r] in out's dtype."""
    wide = accumulate_dtype(out.dtype)
    return torch.mul(B, torch.outer(lambda_b.to(wide), lambda_d.to(wide)), out=out)


@contextlib.contextmanager
def _memory(B, dtype, weight=None):
    """Memory for B' [d, r], and for W' with a weight."""
    side = 0 if weight is None else weight.shape[1]
    with scratch.lease((B.numel() + B.shape[0] * side,), dtype, B.device) as flat:
        yield flat[: B.numel()].view(B.shape), flat[B.numel() :].view(B.shape[0], side)


def _merges(weight, seed, dtype) -> bool:
    """Whether W + B'A may be formed: nothing is dropped, and no small change rounded away."""
    return weight is not None and seed is None and dtype is accumulate_dtype(dtype)


def _forward_fake(x, weight, base_out, A, B, lambda_d, lambda_b, bias, seed, p, keep):
    T, d = math.prod(x.shape[:-1]), B.shape[0]
    return x.new_empty(*x.shape[:-1], d), x.new_empty((T, A.shape[0]) if keep else (0,))


@define_layer(
    "vera_linear_forward(Tensor x, Tensor? weight, Tensor? base_out, Tensor A, Tensor B, Tensor lambda_d,"
    " Tensor lambda_b, Tensor? bias, Tensor? seed, float p, bool keep) -> (Tensor, Tensor)",
    fake=_forward_fake,
    pieces=_PIECES,
)
def vera_linear_forward_op(x, weight, base_out, A, B, lambda_d, lambda_b, bias, seed, p, keep):
    """y [..., d], and h [T, r] where ``keep`` asks for it; without a weight y is a copy of base_out with the update."""
    if (weight is None) == (base_out is None):
        raise RuntimeError("weight and base_out: wanted exactly one of them")
    x2, (r, k), dtype = rows(x), A.shape, x.dtype
    A, few, merged = A.to(dtype), x2.shape[0] < r, _merges(weight, seed, dtype) and k < x2.shape[0]
    h = dropout.project(x2, A, seed, p) if keep or not merged else x.new_empty(0)
    if merged:
        with _memory(B, dtype, weight) as (b, changed):
            y = F.linear(x2, torch.addmm(weight, _scaled(b, B, lambda_d, lambda_b), A, out=changed), bias)
        return shaped(y, x), h
    y = rows(contiguous_copy(base_out)) if weight is None else F.linear(x2, weight, bias)
    if few:
        y.addcmul_((h * lambda_d.to(dtype)) @ B.to(dtype).t(), lambda_b.to(dtype))
    else:
        with _memory(B, dtype) as (b, _):
            y.addmm_(h, _scaled(b, B, lambda_d, lambda_b).t())
    return shaped(y, x), h if keep else x.new_empty(0)


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
    dy2, dtype, acc, (r, k) = rows(dy), dy.dtype, accumulate_dtype(dy.dtype), A.shape
    T, d = dy2.shape
    h, A = saved_hidden(h, need_d or need_b, dy2, r), A.to(dtype)
    dx = d_d = d_b = db = u = dy
    if T < r:
        B, d_lambda = B.to(dtype), lambda_d.to(dtype)
        if need_x or need_d:
            u = (dy2 * lambda_b.to(dtype)) @ B
        if need_b:
            d_b = ((h * d_lambda) @ B.t()).mul_(dy2).sum(0, dtype=acc)
        if need_d:
            d_d = (h.to(acc) * u.to(acc)).sum(0)
        if need_x:
            u = u.mul_(d_lambda)
    else:
        merged = need_x and _merges(weight, seed, dtype) and d * k < T * (d + k)
        with _memory(B, dtype, weight if merged else None) as (b, changed):
            if merged:
                dx = dy2 @ torch.addmm(weight, _scaled(b, B, lambda_d, lambda_b), A, out=changed)
            elif need_x:
                u = dy2 @ _scaled(b, B, lambda_d, lambda_b)
            if need_d or need_b:  # into the same memory: B' has been read
                Q = (torch.mm(dy2.t(), h, out=b) if dtype is acc else mm(dy2.t(), h, acc)).mul_(B)
                d_d = Q.t() @ lambda_b.to(acc) if need_d else dy
                d_b = Q @ lambda_d.to(acc) if need_b else dy
    if need_x:
        shape = (*dy.shape[:-1], k)
        if weight is None:
            dx = update_input_gradient(u, A, shape, seed, p)
        else:
            dx = (dropout.lift_(dy2 @ weight, u, A, seed, p) if dx is dy else dx).reshape(shape)
    d_d, d_b = d_d.to(lambda_d.dtype) if need_d else dy, d_b.to(lambda_b.dtype) if need_b else dy
    if need_bias:
        db = dy2.sum(0, dtype=acc).to(dtype)
    return fresh(dy, needs, dx, d_d, d_b, db)


class VeRAFunction(Function):
    """Over a weight, or over what somebody else's layer returned; saves h."""

    @staticmethod
    def forward(ctx, x, weight, base_out, A, B, lambda_d, lambda_b, bias, seed, p):
        keep = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
        y, h = vera_linear_forward_op(x, weight, base_out, A, B, lambda_d, lambda_b, bias, seed, p, keep)
        ctx.save_for_backward(weight, A, B, lambda_d, lambda_b, h if keep else None, seed)
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
    return apply_op(vera_linear_forward_op, x, *args, False)[0]


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
    Raises TypeError/ValueError that name the argument. METHODS 1.12; VeRA, arXiv:2310.11454.
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
