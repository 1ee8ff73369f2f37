"""SVFT's linear layer: a sparse trained matrix between the weight's frozen singular vectors (METHODS 2).

    y = x Wᵀ + ((x V) Mᵀ) Uᵀ + b      U [d, m], Vᵀ [m, k] frozen, M [m, m] sparse, in CSR
    dM = (uᵀh) at the pattern         h = x V, u = dy U [T, m]
    dx = dy W + (u M) Vᵀ

The library makes the dense products, the last of each direction added in place; `csr` has the sparse ones. So it needs
no kernel of its own. Saved for backward: h [T, m], which dM is made of; x is not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import calls, define_layer
from spectral_ops.core import checks
from spectral_ops.core.autograd import apply, autocast_arguments, backward_pass, fresh, rows, shaped, wanted
from spectral_ops.functional import rosa_routes
from spectral_ops.functional.csr import (
    check_choice,
    check_csr,
    csr_spmm_op,
    pattern_for_backward,
    values_gradient,
)
from spectral_ops.functional.csr_matrix import Pattern

__all__ = ["svft_linear"]

_PIECES = ("csr_spmm_", "csr_sddmm", "csr_gather_")


def _sparse_product(h, values, row_offsets, columns, permutation):
    """h Mᵀ [T, m]; with the transposed pattern and its permutation h M."""
    out = torch.zeros_like(h)
    csr_spmm_op(out, h, values, row_offsets, columns, permutation)
    return out


@define_layer(
    "svft_linear_forward(Tensor x, Tensor weight, Tensor U, Tensor Vh, Tensor values, Tensor row_offsets,"
    " Tensor columns, Tensor? bias) -> (Tensor, Tensor)",
    fake=lambda x, weight, U, Vh, values, row_offsets, columns, bias: (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(math.prod(x.shape[:-1]), Vh.shape[0]),
    ),
    pieces=_PIECES,
)
def svft_linear_forward_op(x, weight, U, Vh, values, row_offsets, columns, bias):
    """y [..., d] and h [T, m] = x V. U, Vh and the values in any floating dtype."""
    x2 = rows(x)
    h = x2 @ Vh.to(x.dtype).t()
    y = F.linear(x2, weight, bias)
    y.addmm_(_sparse_product(h, values, row_offsets, columns, None), U.to(x.dtype).t())
    return shaped(y, x), h


@define_layer(
    "svft_linear_backward(Tensor dy, Tensor? h, Tensor weight, Tensor U, Tensor Vh, Tensor values, Tensor row_offsets,"
    " Tensor columns, Tensor? column_offsets, Tensor? entry_rows, Tensor? permutation, Tensor? active_rows,"
    " Tensor? active_columns, Tensor? compact_offsets, Tensor? compact_columns, int gradient_route, int needs)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda dy, h, weight, U, Vh, values, *rest: wanted(
        dy, rest[-1], (*dy.shape[:-1], weight.shape[1]), values, dy.shape[-1:]
    ),
    pieces=_PIECES,
)
def svft_linear_backward_op(
    dy, h, weight, U, Vh, values, row_offsets, columns, column_offsets, entry_rows, permutation, active_rows,
    active_columns, compact_offsets, compact_columns, gradient_route, needs,
):  # fmt: skip
    """dx, dM in the values' dtype, and db; empty [0] where ``needs`` has no bit."""
    need_x, need_values, need_bias = (bool(needs >> bit & 1) for bit in range(3))
    dy2, dx, dM, db = rows(dy), None, None, None
    if need_x or need_values:
        u = dy2 @ U.to(dy.dtype)
    if need_values:
        pattern = Pattern(
            row_offsets, columns, column_offsets, entry_rows, permutation, active_rows, active_columns,
            compact_offsets, compact_columns,
        )  # fmt: skip
        dM = values_gradient(u, h, pattern, rosa_routes.GRADIENT_ROUTES[gradient_route]).to(values.dtype)
    if need_x:
        dx = dy2 @ weight
        dx.addmm_(_sparse_product(u, values, column_offsets, entry_rows, permutation), Vh.to(dy.dtype))
        dx = shaped(dx, dy)
    if need_bias:
        db = dy2.sum(0)
    return fresh(dy, needs, dx, dM, db)


class SVFTFunction(Function):
    @staticmethod
    def forward(ctx, x, weight, U, Vh, values, bias, pattern, gradient_route):
        y, h = svft_linear_forward_op(x, weight, U, Vh, values, pattern.row_offsets, pattern.columns, bias)
        ctx.save_for_backward(h if ctx.needs_input_grad[4] else None, weight, U, Vh, values)
        ctx.pattern, ctx.gradient_route = pattern, gradient_route
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        h, weight, U, Vh, values = ctx.saved_tensors
        need_x, _, _, _, need_values, need_bias, *_ = ctx.needs_input_grad
        needs = need_x | need_values << 1 | need_bias << 2
        # dM is of the pattern in hᵀu, both [T, m]
        pattern, route = pattern_for_backward(ctx.pattern, h, h, needs, ctx.gradient_route, True)
        dx, dM, db = svft_linear_backward_op(dy, h, weight, U, Vh, values, *pattern, route, needs)
        dx, dM, db = (
            t if need else None for t, need in zip((dx, dM, db), (need_x, need_values, need_bias), strict=True)
        )
        return dx, None, None, None, dM, db, None, None


def linear(x, weight, bias, U, Vh, values, pattern, gradient_route="auto"):
    """:func:`svft_linear` past its checks, for layers that know their shapes."""
    return apply(SVFTFunction, x, x, weight, U, Vh, values, bias, pattern, gradient_route)


@calls(svft_linear_forward_op, svft_linear_backward_op)
def svft_linear(x, weight, U, Vh, csr, bias=None, *, gradient_route="auto"):
    """SVFT linear layer: y = x Wᵀ + x V Mᵀ Uᵀ + b, differentiable in x, M's values and b.

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (autocast casts both).
        U: [d, m] and Vh: [m, k], frozen, in any floating dtype (float64 exactly where x is): W's singular vectors.
        csr: M [m, m], a :class:`CSR`; its values may be float32 over a narrower x and get a gradient in their dtype.
        bias: [d] or None; may be trainable.
        gradient_route: how dM is computed: "sampled", "dense", "compact" (see csr.py), or "auto" for the cheapest.

    Returns y [..., d] in x's dtype. Saves x V [T, m]. Raises TypeError/ValueError/IndexError naming the argument.
    METHODS 2; SVFT, arXiv:2405.19597.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    checks.tensor("Vh", Vh, "[m, in_features]", 2)
    checks.tensor("U", U, "[out_features, m]", 2)
    checks.size("Vh", Vh, 1, x.shape[-1], "in_features, the last dimension of x")
    checks.size("U", U, 0, weight.shape[0], "out_features")
    checks.size("U", U, 1, Vh.shape[0], "m, rows of Vh")
    checks.device("x", x, U=U, Vh=Vh)
    checks.no_narrowing(x, U=U, Vh=Vh)
    check_choice("gradient_route", gradient_route, rosa_routes.GRADIENT_ROUTES)
    checks.frozen(U=U, Vh=Vh)
    pattern = check_csr("csr", csr, x, "x", Vh.shape[0], Vh.shape[0])
    return linear(x, weight, bias, U, Vh, csr.ordered(csr.values), pattern, gradient_route)
