"""DoRA: the detached column norm and the weight-decomposed linear layer (METHODS 1.2).

    c_o = ‖W_o + γ(BA)_o‖₂        one value per output row of torch's weight (the papers draw W transposed: "column")
    c²  = ‖W_o‖² + 2γ Σ_p (WAᵀ)_op B_op + γ² Σ_p (B·AAᵀ)_op B_op         reads W once, never forms BA
    y   = g * (x Wᵀ + γ h Bᵀ) + b,  g = m / c,  no gradient through c
    dm  = Σ_t dy * (y - b) / m

Rows of c² that cancel are recomputed exactly. c and g stay float32 at least: in bfloat16 g - 1 (≈1e-3) rounds away.
The layer itself is the low-rank one with g as its column scale; its backward pass over dy also reads y, for dm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, define, nbytes
from spectral_ops.functional import checks, dropout
from spectral_ops.functional.common import (
    apply,
    autocast_arguments,
    backward_pass,
    draw_seed,
    overwritable,
    rows,
    shaped,
    tokens,
)
from spectral_ops.functional.lowrank import (
    A_gradient,
    base_input_gradient,
    fused_forward,
    lowrank_backward_op,
    lowrank_update_op,
    scales_tokens,
    update_input_gradient,
)

__all__ = ["column_norm", "dora_linear", "dora_update"]

CANCELLATION = 2.0**-6  # below this fraction of the terms' absolute sum, c² has lost digits and is recomputed
VANISHING = (
    2.0**-14
)  # below this |g| (and below |b| / 64 in units of c), y holds too few digits of x·V_o to divide by m


# --- operators -------------------------------------------------------------------------------------------------------


@define(
    "row_square(Tensor weight) -> Tensor",
    stem="dora",
    fake=lambda weight: weight.new_empty(weight.shape[0], dtype=accumulate_dtype(weight.dtype)),
    cost=lambda weight: Cost(2 * weight.numel(), nbytes(weight)),
)
def row_square_op(weight):
    """‖W_o‖² [d] in float32 (float64 for float64), for W [d, k]: constant while W is."""
    return weight.to(accumulate_dtype(weight.dtype)).square().sum(1)


def _norm_fake(weight, A, B, scale, square):
    return weight.new_empty(weight.shape[0], dtype=accumulate_dtype(weight.dtype))


def _norm_cost(weight, A, B, scale, square):
    (d, k), r = weight.shape, A.shape[0]
    return Cost(2 * d * k * (r + (square is None)) + 2 * r * r * (d + k), nbytes(weight, A, B, square))


@define(
    "column_norm(Tensor weight, Tensor A, Tensor B, float scale, Tensor? square) -> Tensor",
    stem="dora",
    fake=_norm_fake,
    cost=_norm_cost,
)
def column_norm_op(weight, A, B, scale, square):
    """c [d] = ‖W_o + scale (BA)_o‖ in float32 (float64 for float64); ``square`` is row_square(W) where it is known.

    weight [d, k], A [r, k] and B [d, r] each in any floating dtype and with any strides.
    """
    acc = accumulate_dtype(weight.dtype)
    A, B = A.to(acc), B.to(acc)
    square = weight.to(acc).square().sum(1) if square is None else square
    cross = 2 * scale * ((weight.to(acc) @ A.t()) * B)
    own = scale**2 * ((B @ (A @ A.t())) * B)
    c2 = square + cross.sum(1) + own.sum(1)
    cancels = c2 < CANCELLATION * (square + cross.abs().sum(1) + own.abs().sum(1))
    row = cancels.nonzero().squeeze(1)
    exact = (weight[row].to(acc) + scale * (B[row] @ A)).square().sum(1)
    return c2.index_copy(0, row, exact).sqrt()


@define(
    "column_norm_cached_(Tensor(a!) norm, Tensor(b!) stamp, Tensor weight, Tensor A, Tensor B, float scale,"
    " Tensor square, bool force) -> ()",
    stem="dora",
    fake=lambda norm, stamp, weight, A, B, scale, square, force: None,
    cost=lambda norm, stamp, weight, A, B, scale, square, force: _norm_cost(weight, A, B, scale, square),
)
def column_norm_cached_op(norm, stamp, weight, A, B, scale, square, force):
    """Recompute norm [d] unless A and B are, bit for bit, those it was last computed for.

    ``stamp`` [2] int64 holds a fingerprint of A and B; the comparison happens on the device, so nothing waits for it.
    ``force`` recomputes in any case. This reference always does: it must not depend on the fingerprint it replaces.
    """
    norm.copy_(column_norm_op(weight, A, B, scale, square))


def _magnitude_cost(dyz, dy, x, h, weight, B, scale, g, norm, bias):
    return Cost(4 * dyz.numel(), nbytes(dyz, g, norm, bias) + dyz.numel() * dyz.element_size())


@define(
    "magnitude_grad(Tensor dyz, Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor B, float scale, Tensor g,"
    " Tensor norm, Tensor? bias) -> Tensor",
    stem="dora",
    fake=lambda dyz, dy, x, h, weight, B, scale, g, norm, bias: dyz.new_empty(dyz.shape),
    cost=_magnitude_cost,
)
def magnitude_grad_op(dyz, dy, x, h, weight, B, scale, g, norm, bias):
    """dm [d] = Σ_t dy (y - b) / m from dyz = Σ_t dy (y - b) and m = g c.

    Where m vanishes y says nothing of x·V_o, V = W + scale B A: those rows are Σ_t dy (x·W_o + scale h·B_o) / c.
    """
    vanishing = g.abs() < VANISHING
    if bias is not None:
        vanishing |= g.abs() * norm < bias.to(g.dtype).abs() / 64
    row = vanishing.nonzero().squeeze(1)
    acc = dyz.dtype
    z = x.to(acc) @ weight[row].to(acc).t() + scale * (h.to(acc) @ B[row].to(acc).t())
    exact = (dy[:, row].to(acc) * z).sum(0) / norm[row]
    return (dyz / (g * norm)).index_copy(0, row, exact)


# --- autograd --------------------------------------------------------------------------------------------------------


class DoraFunction(Function):
    """y = g * (x Wᵀ + γ h Bᵀ) + b, g = m / c, no dropout; saves x, h and y (or recomputes y)."""

    @staticmethod
    def forward(ctx, x, weight, A, B, magnitude, bias, norm, scale, recompute):
        x2 = rows(x)
        h = x2 @ A.to(x.dtype).t()
        g = magnitude.to(norm.dtype) / norm
        y = fused_forward(x2, weight, h, B.to(x.dtype), scale, g, bias)
        out = shaped(y, x)
        need_A, need_m = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        saved_y = out if need_m and not recompute else None
        ctx.x_shape = x.shape
        x = x if need_A or need_m else None
        ctx.save_for_backward(x, weight, A, B, magnitude, bias, norm.clone() if need_m else None, g, h, saved_y)
        ctx.scale = scale
        return out

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, A, B, magnitude, bias, norm, g, h, y = ctx.saved_tensors
        need_x, _, need_A, need_B, need_m, need_bias = ctx.needs_input_grad[:6]
        x2, dy2, b = None if x is None else rows(x), rows(dy), B.to(dy.dtype)
        if need_m and y is None:
            y = fused_forward(x2, weight, h, b, ctx.scale, g, bias)
        u, dB, db, dyz, gdy = lowrank_backward_op(
            dy2, h, b, ctx.scale, g, tokens(y) if need_m else None, bias,
            need_x or need_A, need_B, need_bias, need_x and scales_tokens(dy2.shape[0], weight, g),
        )  # fmt: skip
        dx = dA = dm = None
        if need_x:
            dx = base_input_gradient(dy2, gdy, weight, g).addmm_(u, A.to(dy.dtype)).reshape(ctx.x_shape)
        if need_A:
            dA = A_gradient(u, x2, None, 0.0, A.dtype)
        if need_m:
            dm = magnitude_grad_op(dyz, dy2, x2, h, weight, b, ctx.scale, g, norm, bias).to(magnitude.dtype)
        dB = dB.to(B.dtype) if need_B else None
        return dx, None, dA, dB, dm, db.to(dy.dtype) if need_bias else None, None, None, None


class DoraDropoutFunction(Function):
    """DoRA with dropout as PEFT defines it: y = x Wᵀ + b + (g-1) * (x̃ Wᵀ) + g * γ(x̃ Aᵀ)Bᵀ with x̃ = drop(x).

    Two products share W. Saves x, h and z = x̃ Wᵀ + γ h Bᵀ [T, d], which dm needs and y does not determine.
    """

    @staticmethod
    def forward(ctx, x, weight, A, B, magnitude, bias, norm, scale, seed, p):
        x2, a, b = rows(x), A.to(x.dtype), B.to(x.dtype)
        dropped = dropout.seeded_dropout_op(x2, seed, p)
        h = dropped @ a.t()
        g = magnitude.to(norm.dtype) / norm
        z = F.linear(dropped, weight).addmm_(h, b.t(), alpha=scale)
        y = F.linear(x2, weight, bias).addmm_(h, b.t(), alpha=scale).addcmul_(z, (g - 1).to(x.dtype))
        need_m = ctx.needs_input_grad[4]
        ctx.save_for_backward(x, weight, A, B, magnitude, norm.clone(), g, h, z if need_m else None, seed)
        ctx.scale, ctx.p = scale, p
        return shaped(y, x)

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, A, B, magnitude, norm, g, h, z, seed = ctx.saved_tensors
        need_x, _, need_A, need_B, need_m, need_bias = ctx.needs_input_grad[:6]
        dy2 = rows(dy)
        u, dB, db, dyz, _ = lowrank_backward_op(
            dy2, h, B.to(dy.dtype), ctx.scale, g, z, None, need_x or need_A, need_B, need_bias, False
        )
        dx = dA = dm = None
        if need_x:
            through_dropout = ((dy2 * (g - 1).to(dy.dtype)) @ weight).addmm_(u, A.to(dy.dtype))
            dx = (dy2 @ weight).add_(dropout.seeded_dropout_op(through_dropout, seed, ctx.p)).reshape(x.shape)
        if need_A:
            dA = A_gradient(u, rows(x), seed, ctx.p, A.dtype)
        if need_m:
            dm = (dyz / norm).to(magnitude.dtype)
        dB = dB.to(B.dtype) if need_B else None
        return dx, None, dA, dB, dm, db.to(dy.dtype) if need_bias else None, None, None, None, None


class DoraUpdateFunction(Function):
    """Base-agnostic tier: base_out becomes g * (base_out - b + γ h Bᵀ) + b in place; saves x, h and that output.

    With a bias it saves z = base_out - b + γ h Bᵀ [T, d] instead. From the output, z = (y - b) / g is off by
    eps |b| / |g|: no more than base_out's own rounding where |g| is about 1, everything where it is small. dora_linear
    computes those rows again from W, which is not here; to keep z for them alone is to wait until it is known which.
    """

    @staticmethod
    def forward(ctx, base_out, x, A, B, magnitude, bias, norm, scale):
        h = rows(x) @ A.to(x.dtype).t()
        g = magnitude.to(norm.dtype) / norm
        b, out = B.to(x.dtype), tokens(base_out)
        need_A, need_m = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        saved = base_out if need_m else None
        if need_m and bias is not None:
            saved = (out - bias).to(out.dtype).addmm_(h, b.t(), alpha=scale)
        lowrank_update_op(out, h, b, scale, g, None if bias is None else (1 - g) * bias.to(g.dtype))
        ctx.mark_dirty(base_out)
        ctx.save_for_backward(x if need_A else None, A, B, magnitude, norm.clone(), g, h, saved)
        ctx.scale, ctx.has_bias, ctx.x_shape = scale, bias is not None, x.shape
        return base_out

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, A, B, magnitude, norm, g, h, y = ctx.saved_tensors
        need_out, need_x, need_A, need_B, need_m, need_bias = ctx.needs_input_grad[:6]
        dy2 = rows(dy)
        u, dB, db, dyz, gdy = lowrank_backward_op(
            dy2, h, B.to(dy.dtype), ctx.scale, g, tokens(y) if need_m else None, None,
            need_x or need_A, need_B, need_bias, need_out,
        )  # fmt: skip
        dx = update_input_gradient(u, A, ctx.x_shape, None, 0.0) if need_x else None
        dA = A_gradient(u, rows(x), None, 0.0, A.dtype) if need_A else None
        dm = None
        if need_m:  # y is g z without a bias; where m is zero it is lost, and the gradient 0, not a division by zero
            scaled = norm if ctx.has_bias else torch.where(g == 0, float("inf"), g * norm)
            dm = (dyz / scaled).to(magnitude.dtype)
        db = ((1 - g) * db).to(dy.dtype) if need_bias else None
        return (
            gdy.reshape(dy.shape) if need_out else None,
            dx,
            dA,
            dB.to(B.dtype) if need_B else None,
            dm,
            db,
            None,
            None,
        )


# --- public functions ------------------------------------------------------------------------------------------------


def column_norm(weight, lora_A, lora_B, scale=1.0):
    """c_o = ‖W_o + scale (B A)_o‖₂, one value per output row of W; no gradient flows through it.

    weight [d, k], lora_A [r, k], lora_B [d, r] in any floating dtype and with any strides (Conv1D's transposed weight
    included). Returns [d] float32, or float64 for a float64 weight. Reads W once and never forms B A; rows where the
    sum cancels are recomputed exactly. METHODS 1.2; DoRA, arXiv:2402.09353.
    """
    checks.tensor("weight", weight, "[out_features, in_features]", 2)
    checks.low_rank(weight, weight.shape[0], lora_A, lora_B)
    checks.number("scale", scale)
    with torch.no_grad():
        return column_norm_op(weight.detach(), lora_A.detach(), lora_B.detach(), float(scale), None)


def _check_dora(x, out_features, lora_A, lora_B, magnitude, norm, scale):
    checks.low_rank(x, out_features, lora_A, lora_B)
    checks.vector("magnitude", magnitude, out_features, "out_features")
    checks.device("x", x, magnitude=magnitude, norm=norm)
    checks.no_narrowing(x, magnitude=magnitude)
    if norm is not None:
        checks.vector("norm", norm, out_features, "out_features")
        if norm.dtype != accumulate_dtype(x.dtype):
            raise TypeError(f"norm: got {norm.dtype}, wanted {accumulate_dtype(x.dtype)}, as column_norm returns it")
    checks.number("scale", scale)


def dora_linear(
    x, weight, lora_A, lora_B, magnitude, bias=None, *, scale=1.0, norm=None, dropout_p=0.0, training=False,
    recompute=False,
):  # fmt: skip
    """DoRA linear layer: y = g * (x Wᵀ + scale (x Aᵀ) Bᵀ) + b with g = m / c, c = column_norm(W, A, B, scale) detached.

    Args:
        x: [..., k]; weight: W [d, k], frozen, in x's dtype (autocast casts both); bias: [d] or None, never scaled.
        lora_A: [r, k]; lora_B: [d, r]; magnitude: m [d]. float32 is allowed over a narrower x.
        norm: c [d] where the caller has it already (it depends on the weights only); computed when None.
        dropout_p, training: with dropout, PEFT's form: y = x Wᵀ + b + (g-1) * (x̃ Wᵀ) + g * scale (x̃ Aᵀ) Bᵀ.
        recompute: save no y for backward; costs a second forward product there. The default saves y, this function's
            own output: whoever overwrites it in place makes backward raise.

    Returns y [..., d] in x's dtype. Saves x, h [T, r] and y. METHODS 1.2; DoRA, arXiv:2402.09353.
    """
    norm_weight = weight
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    _check_dora(x, weight.shape[0], lora_A, lora_B, magnitude, norm, scale)
    checks.probability("dropout_p", dropout_p)
    norm = column_norm(norm_weight, lora_A, lora_B, scale) if norm is None else norm.detach()
    seed = draw_seed(x, dropout_p, training)
    if seed is None:
        return apply(
            DoraFunction, x.device.type, x, weight, lora_A, lora_B, magnitude, bias, norm, float(scale), recompute
        )
    return apply(
        DoraDropoutFunction, x.device.type,
        x, weight, lora_A, lora_B, magnitude, bias, norm, float(scale), seed, dropout_p,
    )  # fmt: skip


def dora_update(base_out, x, lora_A, lora_B, magnitude, norm, bias=None, *, scale=1.0):
    """DoRA over a base layer somebody else computed: base_out [..., d] becomes g * (base_out - b + scale h Bᵀ) + b.

    ``base_out`` = base(x), bias included, is overwritten and returned (a view or a trained leaf is copied first);
    ``norm`` c [d] float32 comes from column_norm of the dequantised weight. x is cast to base_out's dtype. No dropout:
    PEFT's form then needs a second pass through the base layer.

    Saves x, h [T, r] and, for the magnitude's gradient, [T, d]: the output itself, which costs memory only where nobody
    else keeps it; with a bias a tensor of its own, z = base_out - b + scale h Bᵀ, since beside b the rounded output
    loses z where g is small. Without a bias the gradient of a magnitude that is 0 is 0. METHODS 1.1 and 1.2.
    """
    checks.base(base_out, x)
    checks.device("x", x, bias=bias)
    if bias is not None:
        checks.vector("bias", bias, base_out.shape[-1], "out_features")
    x = x.to(base_out.dtype)
    checks.vector("norm", norm, base_out.shape[-1], "out_features")
    _check_dora(x, base_out.shape[-1], lora_A, lora_B, magnitude, norm, scale)
    out = overwritable(base_out)
    return apply(
        DoraUpdateFunction, x.device.type, out, x, lora_A, lora_B, magnitude, bias, norm.detach(), float(scale)
    )
