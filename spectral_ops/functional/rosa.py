"""RoSA's linear layer: a low-rank and a sparse delta (METHODS 1.5).

    y = x (W + S)ᵀ + γ h Bᵀ + b      S [d, k] sparse, in CSR; h = drop(x) Aᵀ (no dropout, no scale on S)
    dS = (dyᵀx) at the pattern       dx = dy (W + S) + mask * (u A)

Three routes carry S. *spmm* multiplies by it beside W, unrounded. *scatter* adds it to a copy of W in a shared buffer.
*resident* writes it into W itself (rosa_resident.py). The gradient dS has routes of its own (csr.py). rosa_routes.py
chooses both. Saved for backward: x, and h [T, r].
"""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

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
    draw_seed,
    fresh,
    overwritable,
    rows,
    saved_hidden,
    shaped,
    wanted,
)
from spectral_ops.core.scratch import scratch
from spectral_ops.functional import dropout, rosa_routes
from spectral_ops.functional.csr import (
    CSRSpmmFunction,
    check_choice,
    check_csr,
    csr_gather_op,
    csr_scatter_op,
    csr_spmm_backward_op,
    csr_spmm_forward_op,
    csr_spmm_op,
    pattern_for_backward,
    values_gradient,
)
from spectral_ops.functional.csr_matrix import Pattern
from spectral_ops.functional.lowrank import A_gradient, lowrank_backward_op
from spectral_ops.functional.rosa_resident import Claim, residents

__all__ = ["rosa_linear", "rosa_update"]


# --- layer -----------------------------------------------------------------------------------------------------------
# Routes are numbered as in rosa_routes.ROUTES, which csrc/layers/rosa.h repeats.

SCATTER, SPMM = (rosa_routes.ROUTES.index(name) for name in ("scatter", "spmm"))
_PIECES = (
    "csr_spmm_", "csr_scatter_", "csr_sddmm", "csr_gather_", "lowrank_backward", "dropout_project",
    "dropout_outer", "dropout_lift_",
)  # fmt: skip


@contextmanager
def _with_delta(weight, values, row_offsets, columns, route):
    """W + S [d, k] rounded to W's dtype, in scratch memory, on the scatter route; the weight itself on any other."""
    if route != SCATTER:
        yield weight
        return
    with scratch.lease(weight.shape, weight.dtype, weight.device) as total:
        total.copy_(weight)
        csr_scatter_op(total, values, row_offsets, columns, True)
        yield total


def _rosa_forward_fake(x, weight, values, row_offsets, columns, A, B, bias, seed, scale, p, route):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(0) if A is None else x.new_empty(math.prod(x.shape[:-1]), A.shape[0])


@define_layer(
    "rosa_linear_forward(Tensor x, Tensor weight, Tensor values, Tensor row_offsets, Tensor columns, Tensor? A,"
    " Tensor? B, Tensor? bias, Tensor? seed, float scale, float p, int route) -> (Tensor, Tensor)",
    fake=_rosa_forward_fake,
    pieces=_PIECES,
)
def rosa_linear_forward_op(x, weight, values, row_offsets, columns, A, B, bias, seed, scale, p, route):
    """y [..., d] = x (W + S)ᵀ + scale drop(x) AᵀBᵀ + b, and h [T, r] = drop(x) Aᵀ (empty [0] without A and B).

    On the resident route the weight is W + S already. A and B in any floating dtype.
    """
    x2, h = rows(x), x.new_empty(0)
    with _with_delta(weight, values, row_offsets, columns, route) as total:
        y = F.linear(x2, total, bias)
    if route == SPMM:
        csr_spmm_op(y, x2, values, row_offsets, columns, None)
    if A is not None:
        h = dropout.project(x2, A.to(x.dtype), seed, p)
        y.addmm_(h, B.to(x.dtype).t(), alpha=scale)
    return shaped(y, x), h


def _rosa_backward_fake(
    dy, x, weight, values, row_offsets, columns, column_offsets, entry_rows, permutation, active_rows, active_columns,
    compact_offsets, compact_columns, A, B, h, seed, scale, p, route, gradient_route, needs,
):  # fmt: skip
    return wanted(dy, needs, (*dy.shape[:-1], weight.shape[1]), values, A, B, dy.shape[-1:])


@define_layer(
    "rosa_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor values, Tensor row_offsets, Tensor columns,"
    " Tensor? column_offsets, Tensor? entry_rows, Tensor? permutation, Tensor? active_rows, Tensor? active_columns,"
    " Tensor? compact_offsets, Tensor? compact_columns, Tensor? A, Tensor? B, Tensor? h, Tensor? seed, float scale,"
    " float p, int route, int gradient_route, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_rosa_backward_fake,
    pieces=_PIECES,
)
def rosa_linear_backward_op(
    dy, x, weight, values, row_offsets, columns, column_offsets, entry_rows, permutation, active_rows, active_columns,
    compact_offsets, compact_columns, A, B, h, seed, scale, p, route, gradient_route, needs,
):  # fmt: skip
    """dx, dS, dA, dB and db, in the parameters' dtypes; empty [0] where ``needs`` has no bit.

    The transposed pattern serves dx on the spmm route, the compact one the compact gradient route.
    """
    need_x, need_values, need_A, need_B, need_bias = (bool(needs >> bit & 1) for bit in range(5))
    dy2 = rows(dy)
    dx = dS = dA = dB = db = dy
    if need_x:
        with _with_delta(weight, values, row_offsets, columns, route) as total:
            dx = dy2 @ total
        if route == SPMM:
            csr_spmm_op(dx, dy2, values, column_offsets, entry_rows, permutation)
    if A is not None and (need_x or need_A or need_B or need_bias):
        h = saved_hidden(h, need_B, dy2, A.shape[0])
        u, dB, db, _, _ = lowrank_backward_op(
            dy2, h, B.to(dy.dtype), scale, None, None, None, need_x or need_A, need_B, need_bias, False
        )
        dB, db = dB.to(B.dtype), db.to(dy.dtype)
        if need_x:
            dx = dropout.lift_(dx, u, A.to(dy.dtype), seed, p)
        if need_A:
            dA = A_gradient(u, rows(x), seed, p, A.dtype)
    elif need_bias:
        db = dy2.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
    if need_values:
        pattern = Pattern(
            row_offsets, columns, column_offsets, entry_rows, permutation, active_rows, active_columns,
            compact_offsets, compact_columns,
        )  # fmt: skip
        dS = values_gradient(dy2, rows(x), pattern, rosa_routes.GRADIENT_ROUTES[gradient_route]).to(values.dtype)
    if need_x:
        dx = dx.reshape(*dy.shape[:-1], dx.shape[1])
    return fresh(dy, needs, dx, dS, dA, dB, db)


# --- autograd --------------------------------------------------------------------------------------------------------


def _held(claim: Claim | None, weight, values, pattern):
    """A block in which the weight is W + S, on the resident route, whose calls have a claim."""
    return nullcontext() if claim is None else residents.holding(weight, values, pattern, claim)


class RosaFunction(Function):
    """y = x (W + S)ᵀ + γ h Bᵀ + b; saves x and h."""

    @staticmethod
    def forward(ctx, x, weight, values, A, B, bias, seed, scale, p, pattern, route, gradient_route, claim):
        with _held(claim, weight, values, pattern):
            y, h = rosa_linear_forward_op(
                x, weight, values, pattern.row_offsets, pattern.columns, A, B, bias, seed, scale, p, route
            )
        _, _, need_values, need_A, need_B, *_ = ctx.needs_input_grad
        # a resident weight changes between forward and backward by design, so its version must not be watched
        ctx.weight = None if claim is None else weight
        ctx.save_for_backward(
            x if need_values or need_A else None, weight if claim is None else None, values, A, B,
            h if need_B else None, seed,
        )  # fmt: skip
        ctx.scale, ctx.p, ctx.pattern, ctx.route, ctx.gradient_route = scale, p, pattern, route, gradient_route
        ctx.claim = claim
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, values, A, B, h, seed = ctx.saved_tensors
        weight = ctx.weight if weight is None else weight
        need_x, _, need_values, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        needs = need_x | need_values << 1 | need_A << 2 | need_B << 3 | need_bias << 4
        spmm = ctx.route == SPMM
        pattern, gradient_route = pattern_for_backward(ctx.pattern, dy, x, needs, ctx.gradient_route, spmm)
        with _held(ctx.claim if need_x else None, weight, values, ctx.pattern):
            dx, dS, dA, dB, db = rosa_linear_backward_op(
                dy, x, weight, values, *pattern, A, B, h, seed, ctx.scale, ctx.p, ctx.route, gradient_route, needs
            )
        return (
            dx if need_x else None, None, dS if need_values else None, dA if need_A else None, dB if need_B else None,
            db if need_bias else None, *[None] * 7,
        )  # fmt: skip


def linear(x, weight, values, pattern, A, B, bias, scale, p, route, gradient_route="auto"):
    """:func:`rosa_linear` past its checks, for layers that know their shapes and route; p is 0 where nothing is
    dropped."""
    seed = None if p == 0.0 else draw_seed(x, p)
    if route == "resident" and torch._C._len_torch_dispatch_stack():  # see rosa_resident.py
        residents.restore(weight)
        route = "scatter"
    claim, route = Claim() if route == "resident" else None, rosa_routes.ROUTES.index(route)
    if torch.is_grad_enabled():
        return apply(
            RosaFunction, x, x, weight, values, A, B, bias, seed, scale, p, pattern, route, gradient_route, claim
        )
    with _held(claim, weight, values, pattern):
        return apply_op(
            rosa_linear_forward_op, x, x, weight, values, pattern.row_offsets, pattern.columns, A, B, bias, seed,
            scale, p, route,
        )[0]  # fmt: skip


# --- public functions ------------------------------------------------------------------------------------------------


def _check_adapters(x, out_features, lora_A, lora_B, scale, dropout_p, gradient_route):
    if (lora_A is None) != (lora_B is None):
        missing = "lora_A" if lora_A is None else "lora_B"
        raise ValueError(f"{missing}: got None beside its partner, wanted both or neither")
    if lora_A is not None:
        checks.low_rank(x, out_features, lora_A, lora_B)
    checks.number("scale", scale)
    checks.probability("dropout_p", dropout_p)
    check_choice("gradient_route", gradient_route, rosa_routes.GRADIENT_ROUTES)


@calls(rosa_linear_forward_op, rosa_linear_backward_op, csr_scatter_op, csr_gather_op)
def rosa_linear(
    x, weight, csr, lora_A=None, lora_B=None, bias=None, *, scale=1.0, route="auto", gradient_route="auto",
    dropout_p=0.0, training=False,
):  # fmt: skip
    """RoSA linear layer: y = x (W + S)ᵀ + scale drop(x) AᵀBᵀ + b.

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (autocast casts both).
        csr: S [d, k], a :class:`CSR`; its values may be float32 over a narrower x and get a gradient in their dtype.
        lora_A [r, k], lora_B [d, r]: the low-rank part, or None for S alone. dropout_p acts on it only, scale too.
        bias: [d] or None; may be trainable.
        route: how S takes part.
            "spmm": a sparse product beside W. S is not rounded.
            "scatter": a copy of W + S in a shared buffer, rounded to W's dtype. In bfloat16 the rounding loses 3 to
            30 % of a small change.
            "resident": W itself is overwritten with W + S. It stays so after the call, until
            ``residents.restore(weight)`` puts W back. rosa_resident.py says where that is safe.
            "auto": "spmm" or "scatter", whichever costs less.
        gradient_route: how dS is computed: "sampled", "dense", "compact" (see csr.py), or "auto" for the cheapest.

    Returns y [..., d] in x's dtype. Saves x and h [T, r]. Raises TypeError/ValueError/IndexError naming the
    argument. METHODS 1.5; RoSA, arXiv:2401.04679.
    """
    W = weight
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    pattern = check_csr("csr", csr, x, "x", *weight.shape)
    _check_adapters(x, weight.shape[0], lora_A, lora_B, scale, dropout_p, gradient_route)
    check_choice("route", route, rosa_routes.ROUTES)
    if route == "resident" and weight is not W and residents.holds(W):  # it was cast, and with it what W holds
        residents.restore(W)
        weight = W.to(weight.dtype)
    if route == "auto":
        T = x.numel() // max(x.shape[-1], 1)
        route = rosa_routes.forward_route(T, *weight.shape, csr.nnz, x.device.type, x.dtype)
    p = dropout_p if training and lora_A is not None else 0.0
    values = csr.ordered(csr.values)
    return linear(x, weight, values, pattern, lora_A, lora_B, bias, float(scale), p, route, gradient_route)


def update(base_out, x, values, pattern, gradient_route="auto"):
    """:func:`rosa_update` past its checks: values in the pattern's order, x in base_out's dtype."""
    return apply(CSRSpmmFunction, x, base_out, x, values, pattern, gradient_route, overwritable(base_out))


@calls(csr_spmm_op, csr_spmm_forward_op, csr_spmm_backward_op)
def rosa_update(base_out, x, csr, *, gradient_route="auto"):
    """base_out + x Sᵀ, in place on base_out [..., d]: the sparse delta over any base layer (bitsandbytes, GPTQ, FP8).

    ``base_out`` = base(x) is overwritten, so it must be a fresh result that nobody else reads. A view or a trained leaf
    is copied first. x [..., k] is cast to its dtype. S is not rounded. ``gradient_route`` is :func:`rosa_linear`'s.
    The low-rank part is :func:`lowrank_update`'s. Raises TypeError/ValueError/IndexError naming the argument.
    METHODS 1.5.
    """
    checks.base(base_out, x)
    x = x.to(base_out.dtype)
    pattern = check_csr("csr", csr, x, "x", base_out.shape[-1], x.shape[-1])
    check_choice("gradient_route", gradient_route, rosa_routes.GRADIENT_ROUTES)
    return update(base_out, x, csr.ordered(csr.values), pattern, gradient_route)
