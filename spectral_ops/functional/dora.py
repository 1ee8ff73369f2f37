"""DoRA: the detached column norm and the weight-decomposed linear layer (METHODS 1.2).

    c_o = ‖W_o + γ(BA)_o‖₂        one value per output row of torch's weight (the papers draw W transposed: "column")
    c²  = ‖W_o‖² + 2γ Σ_p (WAᵀ)_op B_op + γ² Σ_p (B·AAᵀ)_op B_op         reads W once, never forms BA
    y   = g * (x Wᵀ + γ h Bᵀ) + b,  g = m / c,  no gradient through c
    dm  = Σ_t dy * (y - b) / m

Rows of c² that cancel are recomputed exactly. c and g stay float32 at least: in bfloat16 g - 1 (≈1e-3) rounds away.
The layer itself is the low-rank one with g as its column scale; its backward pass over dy also reads y, for dm.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops import _library
from spectral_ops._library import Cost, accumulate_dtype, calls, define, define_layer, nbytes
from spectral_ops.core import checks
from spectral_ops.core.autograd import (
    apply,
    apply_op,
    autocast_arguments,
    backward_pass,
    contiguous_copy,
    draw_seed,
    fresh,
    overwritable,
    rows,
    saved_hidden,
    shaped,
    through,
    tokens,
    wanted,
)
from spectral_ops.functional import dropout, lowrank_routes
from spectral_ops.functional.lowrank import (
    A_gradient,
    fused_forward,
    input_gradient,
    lowrank_backward_op,
    lowrank_matmul_op,
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


def _norm_fake(weight, A, B, scale):
    return weight.new_empty(weight.shape[0], dtype=accumulate_dtype(weight.dtype))


def _norm_cost(weight, A, B, scale):
    (d, k), r = weight.shape, A.shape[0]
    return Cost(2 * d * k * (r + 1) + 2 * r * r * (d + k), nbytes(weight, A, B))


def _norm_samples(s):
    yield s.W, s.A, s.B, 0.5
    yield s.W, s.A.to(s.acc), s.B.to(s.acc), 0.5
    yield s.transposed(s.W), s.A.to(s.acc), s.B.to(s.acc), -2.0


@define(
    "column_norm(Tensor weight, Tensor A, Tensor B, float scale) -> Tensor",
    fake=_norm_fake,
    cost=_norm_cost,
    samples=_norm_samples,
)
def column_norm_op(weight, A, B, scale):
    """c [d] = ‖W_o + scale (BA)_o‖ in float32 (float64 for float64).

    weight [d, k], A [r, k] and B [d, r] each in any floating dtype and with any strides.
    """
    acc = accumulate_dtype(weight.dtype)
    A, B = A.to(acc), B.to(acc)
    square = weight.to(acc).square().sum(1)
    cross = 2 * scale * ((weight.to(acc) @ A.t()) * B)
    own = scale**2 * ((B @ (A @ A.t())) * B)
    c2 = square + cross.sum(1) + own.sum(1)
    cancels = c2 < CANCELLATION * (square + cross.abs().sum(1) + own.abs().sum(1))
    row = cancels.nonzero().squeeze(1)
    exact = (weight[row].to(acc) + scale * (B[row] @ A)).square().sum(1)
    return c2.index_copy(0, row, exact).sqrt()


def _cached_samples(s):
    def unknown():  # a stamp of no A and B
        return s.zeros(s.d, dtype=s.acc), s.zeros(2, dtype=torch.int64)

    yield *unknown(), s.W, s.A, s.B, 0.5, True
    yield *unknown(), s.W, s.A.to(s.acc), s.B.to(s.acc), 0.5, True
    yield *unknown(), s.rows(s.W), s.A, s.B, -0.5, False


@define(
    "column_norm_cached_(Tensor(a!) norm, Tensor(b!) stamp, Tensor weight, Tensor A, Tensor B, float scale,"
    " bool force) -> ()",
    fake=lambda norm, stamp, weight, A, B, scale, force: None,
    cost=lambda norm, stamp, weight, A, B, scale, force: _norm_cost(weight, A, B, scale),
    samples=_cached_samples,
)
def column_norm_cached_op(norm, stamp, weight, A, B, scale, force):
    """Recompute norm [d] unless A, B and a sample of W are, bit for bit, those it was last computed for.

    ``stamp`` [2] int64 holds the fingerprint; the comparison happens on the device, so nothing waits for it. ``force``
    recomputes in any case. This reference always does: it must not depend on the fingerprint it replaces.

    The sample is one entry of W in about s, s = d k / 4096 (at most min(d, k), rounded down to a power of two), or all
    of W below 8192 entries. It lies evenly and meets each row and column. So a change of all entries (a merge, noise, a
    factor), of a row or column, of s neighbours in one, or of a square of side 2 √s is seen. A change of n entries
    elsewhere is missed with probability (1 - 1/s)ⁿ: one of a few entries nearly always, unless it raises W's version,
    which :class:`NormCache` watches besides.
    """
    norm.copy_(column_norm_op(weight, A, B, scale))


def _magnitude_cost(dyz, dy, x, h, weight, B, scale, g, norm, bias):
    return Cost(4 * dyz.numel(), nbytes(dyz, g, norm, bias) + dyz.numel() * dyz.element_size())


def _magnitude_samples(s):
    zero, small = s.g.clone(), s.g.clone()
    zero[: s.d // 2 : 3] = 0
    small[::3] *= 2.0**-20
    for g, bias in ((s.g, None), (zero, None), (small, None), (small, s.bias)):
        yield s.shift, s.dy, s.x, s.h, s.W, s.B, 0.5, g, s.norm, bias


@define(
    "magnitude_grad(Tensor dyz, Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor B, float scale, Tensor g,"
    " Tensor norm, Tensor? bias) -> Tensor",
    fake=lambda dyz, dy, x, h, weight, B, scale, g, norm, bias: dyz.new_empty(dyz.shape),
    cost=_magnitude_cost,
    samples=_magnitude_samples,
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


# --- layers ----------------------------------------------------------------------------------------------------------
# ``gains`` [2 d] is g = m / c followed by c: a copy, as the norm may live in a buffer that its owner overwrites.

_FORWARD = ("lowrank_matmul", "lowrank_update_", "seeded_dropout")
_NORMED = "Tensor A, Tensor B, Tensor magnitude, Tensor? bias, Tensor norm"


def _kept_fake(x, A, norm, d, kept):
    T = math.prod(x.shape[:-1])  # Size.numel makes a symbolic size a constant
    return x.new_empty(T, A.shape[0]), norm.new_empty(2 * d), x.new_empty((T, d) if kept else (0,))


@define_layer(
    f"dora_update_forward_(Tensor(a!) out, Tensor x, {_NORMED}, float scale, bool need_z) -> (Tensor, Tensor, Tensor)",
    fake=lambda out, x, A, B, magnitude, bias, norm, scale, need_z: _kept_fake(
        x, A, norm, out.shape[-1], need_z and bias is not None
    ),
    pieces=("lowrank_update_",),
)
def dora_update_forward_op(out, x, A, B, magnitude, bias, norm, scale, need_z):
    """out [..., d] becomes g * (out - b + γ h Bᵀ) + b; returns h [T, r], gains [2 d] and, with a bias and ``need_z``,
    z = out - b + γ h Bᵀ [T, d], for dm.

    From the output, z = (y - b) / g is off by eps |b| / |g|: no more than out's own rounding where |g| is about 1,
    everything where it is small. Over a weight those rows are computed again from it; to keep z for them alone is to
    wait until it is known which.
    """
    out, b = tokens(out), B.to(x.dtype)
    h = rows(x) @ A.to(x.dtype).t()
    g = magnitude.to(norm.dtype) / norm
    z = out.new_empty(0)
    if need_z and bias is not None:
        z = (out - bias).to(out.dtype).addmm_(h, b.t(), alpha=scale)
    lowrank_update_op(out, h, b, scale, g, None if bias is None else (1 - g) * bias.to(g.dtype))
    return h, torch.cat((g, norm)), z


def _forward_fake(x, weight, base_out, A, B, magnitude, bias, norm, seed, scale, p, need_z):
    d, kept = B.shape[0], need_z and bias is not None if weight is None else seed is not None
    return x.new_empty(*x.shape[:-1], d), *_kept_fake(x, A, norm, d, kept)


@define_layer(
    f"dora_linear_forward(Tensor x, Tensor? weight, Tensor? base_out, {_NORMED}, Tensor? seed, float scale, float p,"
    " bool need_z) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    pieces=_FORWARD,
)
def dora_linear_forward_op(x, weight, base_out, A, B, magnitude, bias, norm, seed, scale, p, need_z):
    """y [..., d], h [T, r], gains [2 d] and, with a seed, z [T, d], which dm needs and y does not determine.

    Without a seed y = g * (x Wᵀ + γ h Bᵀ) + b. With one it is PEFT's form, in which two products share W:
    y = x Wᵀ + b + (g-1) * (x̃ Wᵀ) + g * γ h Bᵀ, x̃ = drop(x), h = x̃ Aᵀ, and z = x̃ Wᵀ + γ h Bᵀ.
    Without a weight: what :func:`dora_update_forward_op` makes of a copy of base_out [..., d].
    """
    if weight is None:
        y = contiguous_copy(base_out)
        return y, *dora_update_forward_op.reference(y, x, A, B, magnitude, bias, norm, scale, need_z)
    x2, a, b = rows(x), A.to(x.dtype), B.to(x.dtype)
    g = magnitude.to(norm.dtype) / norm
    if seed is None:
        h = x2 @ a.t()
        y, z = fused_forward(x2, weight, h, b, scale, g, bias), x.new_empty(0)
    else:
        dropped = dropout.seeded_dropout_op(x2, seed, p)
        h = dropped @ a.t()
        z = F.linear(dropped, weight).addmm_(h, b.t(), alpha=scale)
        y = (z * (g - 1).to(x.dtype)).addmm_(x2, weight.t())
        if bias is None:
            y.addmm_(h, b.t(), alpha=scale)
        else:
            lowrank_update_op(y, h, b, scale, None, bias.to(g.dtype))
    return shaped(y, x), h, torch.cat((g, norm)), z


@define_layer(
    "dora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor A, Tensor B, Tensor magnitude, Tensor? bias,"
    " Tensor gains, Tensor? h, Tensor? y, Tensor? z, Tensor? seed, float scale, float p, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda dy, x, weight, A, B, magnitude, bias, gains, h, y, z, seed, scale, p, needs: wanted(
        dy, needs, (*dy.shape[:-1], A.shape[1]), A, B, magnitude, dy.shape[-1:], dy.shape
    ),
    pieces=(*_FORWARD, "lowrank_backward", "magnitude_grad", "dropout_outer"),
)
def dora_linear_backward_op(dy, x, weight, A, B, magnitude, bias, gains, h, y, z, seed, scale, p, needs):
    """dx, dA, dB, dm, db and dout of both tiers, in the parameters' dtypes; empty [0] where ``needs`` has no bit.

    dm needs z, where forward returned it, else the output y, which over a weight is computed again where it is None.
    Without a weight dx is the update's share, db what Σ dy lacks after the base layer's own node has added g * dy to
    its bias, and dout = g * dy.
    """
    need_x, need_A, need_B, need_m, need_bias, need_out = (bool(needs >> bit & 1) for bit in range(6))
    x2, dy2, a, b = None if x is None else rows(x), rows(dy), A.to(dy.dtype), B.to(dy.dtype)
    g, norm = gains.chunk(2)
    exact = weight is not None and seed is None  # rows of dm that y does not determine come from W
    h = saved_hidden(h, need_B or (need_m and exact), dy2, A.shape[0])
    kept = y if z is None else z
    if need_m and kept is None:
        kept = fused_forward(x2, weight, h, b, scale, g, bias)
    need_gdy = need_out or (need_x and exact and scales_tokens(dy2.shape[0], weight, g))
    u, dB, db, dyz, gdy = lowrank_backward_op(
        dy2, h, b, scale, g, rows(kept) if need_m else None, bias if exact else None,
        need_x or need_A, need_B, need_bias, need_gdy,
    )  # fmt: skip
    dx = dA = dm = dout = dy
    if need_x:
        shape = (*dy.shape[:-1], A.shape[1])
        if weight is None:
            dx = update_input_gradient(u, A, shape, None, 0.0)
        elif seed is None:
            dx = input_gradient(dy2, gdy, weight, g, u, a, None, 0.0).reshape(shape)
        else:
            through_dropout = ((dy2 * (g - 1).to(dy.dtype)) @ weight).addmm_(u, a)
            dx = dropout.seeded_dropout_op(through_dropout, seed, p).addmm_(dy2, weight).reshape(shape)
    if need_A:
        dA = A_gradient(u, x2, seed, p, A.dtype)
    if need_m and exact:
        dm = magnitude_grad_op(dyz, dy2, x2, h, weight, b, scale, g, norm, bias).to(magnitude.dtype)
    elif need_m:  # y is g z; where m is zero z is lost, and the gradient 0, not a division by zero
        dm = (dyz / (norm if z is not None else torch.where(g == 0, float("inf"), g * norm))).to(magnitude.dtype)
    if need_bias:
        db = (db if weight is not None else (1 - g) * db).to(dy.dtype)
    if need_out:
        dout = gdy.reshape(dy.shape)
    return fresh(dy, needs, dx, dA, dB.to(B.dtype), dm, db, dout)


# --- autograd --------------------------------------------------------------------------------------------------------


def _saved(ctx) -> tuple[torch.Tensor, ...]:
    """What forward saved. Where that is an output which somebody has overwritten, the error says how to save none."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if f"output 0 of {ctx._forward_cls.__name__}" not in str(error):
            raise
        raise RuntimeError(
            "dora: got an output that was overwritten in place before its backward, which reads it, wanted it unchanged"
            " (DoRAConfig(recompute=True), accelerate(model, recompute=True) or, for the functions, recompute=True"
            " makes backward do without it)"
        ) from error


class DoraFunction(Function):
    """Dense tier; saves x, h and y (or computes y again), with dropout z in y's place."""

    @staticmethod
    def forward(ctx, x, weight, A, B, magnitude, bias, norm, seed, scale, p, recompute):
        y, h, gains, z = dora_linear_forward_op(x, weight, None, A, B, magnitude, bias, norm, seed, scale, p, False)
        _, _, need_A, need_B, need_m, *_ = ctx.needs_input_grad
        exact = need_m and seed is None  # rows of dm that y does not determine are computed from x and h
        ctx.save_for_backward(
            x if need_A or exact else None, weight, A, B, magnitude, bias, gains, h if need_B or exact else None,
            y if exact and not recompute else None, z if need_m and not exact else None, seed,
        )  # fmt: skip
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        need_x, _, need_A, need_B, need_m, need_bias, *_ = ctx.needs_input_grad
        needs = need_x | need_A << 1 | need_B << 2 | need_m << 3 | need_bias << 4
        dx, dA, dB, dm, db, _ = dora_linear_backward_op(dy, *_saved(ctx), ctx.scale, ctx.p, needs)
        return (
            dx if need_x else None, None, dA if need_A else None, dB if need_B else None, dm if need_m else None,
            db if need_bias else None, None, None, None, None, None,
        )  # fmt: skip

    @staticmethod
    def twice(ctx, dy):
        x, weight, A, B, magnitude, bias, gains, _, _, _, seed = _saved(ctx)
        if x is None:
            raise RuntimeError("create_graph: got a second derivative where A is frozen, for which x is not kept")
        dropped = dropout.dropped(x, seed, ctx.p)
        g = magnitude.to(gains.dtype) / gains.chunk(2)[1]
        z = dropped @ weight.t() + ctx.scale * ((dropped @ A.to(x.dtype).t()) @ B.to(x.dtype).t())
        y = (g * z).to(x.dtype)
        y = y if seed is None else y + (x - dropped) @ weight.t()
        return through(ctx, y if bias is None else y + bias, (x, weight, A, B, magnitude, bias), dy)


class DoraUpdateFunction(Function):
    """Base-agnostic tier, in place on ``base_out`` or on a copy; saves x, h and that output (or a copy), or z with a
    bias."""

    @staticmethod
    def forward(ctx, base_out, x, A, B, magnitude, bias, norm, scale, inplace, recompute):
        _, _, need_A, need_B, need_m, *_ = ctx.needs_input_grad
        args = A, B, magnitude, bias, norm
        if inplace:
            y, (h, gains, z) = base_out, dora_update_forward_op(base_out, x, *args, scale, need_m)
            ctx.mark_dirty(base_out)
        else:
            y, h, gains, z = dora_linear_forward_op(x, None, base_out, *args, None, scale, 0.0, need_m)
        need_y = need_m and bias is None
        ctx.save_for_backward(
            x if need_A else None, A, B, magnitude, gains, h if need_B else None,
            (y.clone() if recompute else y) if need_y else None, z if need_m and bias is not None else None,
        )  # fmt: skip
        ctx.scale = scale
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, A, B, magnitude, gains, h, y, z = _saved(ctx)
        out, *wanted = ctx.needs_input_grad[:6]
        wanted.append(out)
        needs = sum(need << bit for bit, need in enumerate(wanted))
        grads = dora_linear_backward_op(dy, x, None, A, B, magnitude, None, gains, h, y, z, None, ctx.scale, 0.0, needs)
        *grads, dout = (grad if need else None for grad, need in zip(grads, wanted, strict=True))
        return dout, *grads, None, None, None, None


def linear(x, weight, A, B, magnitude, bias, norm, scale, p, recompute=False):
    """:func:`dora_linear` past its checks, for layers that know their shapes; p is 0 where nothing is dropped."""
    seed = None if p == 0.0 else draw_seed(x, p)
    args = A, B, magnitude, bias, norm, seed, scale, p
    if torch.is_grad_enabled():
        return apply(DoraFunction, x, x, weight, *args, recompute)
    return apply_op(dora_linear_forward_op, x, x, weight, None, *args, False)[0]


def update(base_out, x, A, B, magnitude, bias, norm, scale, recompute=False):
    """:func:`dora_update` past its checks."""
    inplace, args = overwritable(base_out), (A, B, magnitude, bias, norm)
    if torch.is_grad_enabled():
        return apply(DoraUpdateFunction, x, base_out, x, *args, scale, inplace, recompute)
    if inplace:
        apply_op(dora_update_forward_op, x, base_out, x, *args, scale, False)
        return base_out
    return apply_op(dora_linear_forward_op, x, x, None, base_out, *args, None, scale, 0.0, False)[0]


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
        return column_norm_op(weight.detach(), lora_A.detach(), lora_B.detach(), float(scale))


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


_library.PRODUCTS["dora_linear"] = functools.partial(lowrank_routes.layer_products, lowrank_matmul_op, True)


@calls(column_norm_op, column_norm_cached_op, dora_linear_forward_op, dora_linear_backward_op)
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
            own output: whoever overwrites it in place makes backward raise RuntimeError.

    Returns y [..., d] in x's dtype. Saves x, h [T, r] and y. METHODS 1.2; DoRA, arXiv:2402.09353.
    """
    norm_weight = weight
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    _check_dora(x, weight.shape[0], lora_A, lora_B, magnitude, norm, scale)
    checks.probability("dropout_p", dropout_p)
    norm = column_norm(norm_weight, lora_A, lora_B, scale) if norm is None else norm
    p = dropout_p if training else 0.0
    return linear(x, weight, lora_A, lora_B, magnitude, bias, norm, float(scale), p, recompute)


@calls(dora_update_forward_op, dora_linear_forward_op, dora_linear_backward_op)
def dora_update(base_out, x, lora_A, lora_B, magnitude, norm, bias=None, *, scale=1.0, recompute=False):
    """DoRA over a base layer somebody else computed: base_out [..., d] becomes g * (base_out - b + scale h Bᵀ) + b.

    ``base_out`` = base(x), bias included, is overwritten and returned (a view or a trained leaf is copied first);
    ``norm`` c [d] float32 comes from column_norm of the dequantised weight. x is cast to base_out's dtype. No dropout:
    PEFT's form then needs a second pass through the base layer.

    Saves x, h [T, r] and, for the magnitude's gradient, [T, d]: the output itself, which costs memory only where nobody
    else keeps it; with a bias a tensor of its own, z = base_out - b + scale h Bᵀ, since beside b the rounded output
    loses z where g is small. Without a bias the gradient of a magnitude that is 0 is 0. Whoever overwrites it in place
    makes backward raise RuntimeError; with ``recompute`` a copy is saved (without W nothing can be computed
    again). METHODS 1.1 and 1.2.
    """
    checks.base(base_out, x)
    checks.device("x", x, bias=bias)
    if bias is not None:
        checks.vector("bias", bias, base_out.shape[-1], "out_features")
    x = x.to(base_out.dtype)
    checks.vector("norm", norm, base_out.shape[-1], "out_features")
    _check_dora(x, base_out.shape[-1], lora_A, lora_B, magnitude, norm, scale)
    return update(base_out, x, lora_A, lora_B, magnitude, bias, norm, float(scale), recompute)
