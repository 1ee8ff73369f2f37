"""Low-rank linear: the operator behind LoRA and every method that adds γ h' Bᵀ to a frozen product (METHODS 1.1).

    h = drop(x) Aᵀ      h' = h C          C absent, a diagonal c [r], or a core [r, r]
    y = g * (x Wᵀ + γ h' Bᵀ) + b          g absent or a fixed column scale [d]
    backward, with G = g * dy:
      u = γ G B     dB = γ Gᵀ h'     dC = hᵀ u     u' = u Cᵀ     dA = u'ᵀ drop(x)     dx = G W + mask * (u' A)

Plain products are the library's. What it cannot fuse is ours: the epilogue pass over y, one backward pass over dy for
u, dB, db (and Σ dy*(y-b) for DoRA), dropout regenerated inside the products, and a GEMM that adds γ h' Bᵀ before it
stores. Saved for backward: x, which the frozen layer's caller holds anyway, and h [T, r].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops import _library
from spectral_ops._library import Cost, accumulate_dtype, define, nbytes
from spectral_ops.functional import checks, dropout
from spectral_ops.functional.common import (
    apply,
    autocast_arguments,
    backward_pass,
    draw_seed,
    mm,
    overwritable,
    rows,
    shaped,
    tokens,
)

__all__ = ["lowrank_linear", "lowrank_linear_group", "lowrank_update"]


# --- operators -------------------------------------------------------------------------------------------------------


def _matmul_cost(x, weight, h, B, scale, g, bias):
    d, r = B.shape
    return Cost(
        2 * x.shape[0] * d * (weight.shape[1] + r),
        nbytes(x, weight, h, B, g, bias) + x.shape[0] * d * x.element_size(),
    )


@define(
    "lowrank_matmul(Tensor x, Tensor weight, Tensor h, Tensor B, float scale, Tensor? g, Tensor? bias) -> Tensor",
    stem="lowrank",
    fake=lambda x, weight, h, B, scale, g, bias: x.new_empty(x.shape[0], weight.shape[0]),
    cost=_matmul_cost,
)
def lowrank_matmul_op(x, weight, h, B, scale, g, bias):
    """y [T, d] = g * (x Wᵀ + scale h Bᵀ) + bias: one GEMM over [x | h], rounded once to x's dtype."""
    acc = accumulate_dtype(x.dtype)
    y = x.to(acc) @ weight.to(acc).t() + scale * (h.to(acc) @ B.to(acc).t())
    y = y if g is None else y * g
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def _update_cost(out, h, B, scale, g, shift):
    return Cost(2 * out.numel() * (B.shape[1] + 1), 2 * nbytes(out) + nbytes(h, B, g, shift))


@define(
    "lowrank_update_(Tensor(a!) out, Tensor h, Tensor B, float scale, Tensor? g, Tensor? shift) -> ()",
    stem="lowrank",
    fake=lambda out, h, B, scale, g, shift: None,
    cost=_update_cost,
)
def lowrank_update_op(out, h, B, scale, g, shift):
    """out [T, d] becomes g * (out + scale h Bᵀ) + shift, in one pass; h [T, r] and B [d, r] in out's dtype, g and
    shift [d] float32 (float64 for float64)."""
    acc = accumulate_dtype(out.dtype)
    y = out.to(acc) + scale * (h.to(acc) @ B.to(acc).t())
    y = y if g is None else y * g
    out.copy_(y if shift is None else y + shift)


def library_matmul(x, weight, h, B, scale, g, bias):
    """lowrank_matmul as the library's product and an accumulating second one or, with g, our epilogue pass."""
    if g is None:
        return F.linear(x, weight, bias).addmm_(h, B.t(), alpha=scale)
    y = F.linear(x, weight)
    lowrank_update_op(y, h, B, scale, g, None if bias is None else bias.to(g.dtype))
    return y


lowrank_matmul_op.library = library_matmul


def _backward_fake(dy, h, B, scale, g, y, bias, need_u, need_dB, need_db, need_gdy):
    (T, d), r, acc = dy.shape, B.shape[1], accumulate_dtype(dy.dtype)
    return (
        dy.new_empty((T, r) if need_u else (0,)),
        dy.new_empty((d, r) if need_dB else (0,), dtype=acc),
        dy.new_empty((d,) if need_db else (0,), dtype=acc),
        dy.new_empty((0,) if y is None else (d,), dtype=acc),
        dy.new_empty((T, d) if need_gdy else (0,)),
    )


def _backward_cost(dy, h, B, scale, g, y, bias, need_u, need_dB, need_db, need_gdy):
    outputs = _backward_fake(*(t.to("meta") for t in (dy, h, B)), scale, g, y, bias, need_u, need_dB, need_db, need_gdy)
    flops = dy.numel() * (2 * B.shape[1] * (need_u + need_dB) + need_db + need_gdy + (0 if y is None else 2))
    return Cost(flops, nbytes(dy, h, B, g, y, bias, *outputs))


@define(
    "lowrank_backward(Tensor dy, Tensor h, Tensor B, float scale, Tensor? g, Tensor? y, Tensor? bias,"
    " bool need_u, bool need_dB, bool need_db, bool need_gdy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    stem="lowrank",
    fake=_backward_fake,
    cost=_backward_cost,
)
def lowrank_backward_op(dy, h, B, scale, g, y, bias, need_u, need_dB, need_db, need_gdy):
    """One pass over dy [T, d] (and y, where given); an output nobody needs is empty [0].

    Returns u [T, r] = scale (g*dy) B in dy's dtype; dB [d, r] = scale (g*dy)ᵀ h, db [d] = Σ_t dy and
    dyz [d] = Σ_t dy*(y - bias) (only with y) in float32 (float64 for float64); gdy [T, d] = g*dy in dy's dtype.
    h [T, r], B [d, r] and y [T, d] have dy's dtype; g and bias [d] any floating dtype.
    """
    acc = accumulate_dtype(dy.dtype)
    full = dy.to(acc)
    scaled = full if g is None else full * g
    none = dy.new_empty(0, dtype=acc)
    u = (scale * (scaled @ B.to(acc))).to(dy.dtype) if need_u else dy.new_empty(0)
    dB = scale * (scaled.t() @ h.to(acc)) if need_dB else none
    db = full.sum(0) if need_db else none.clone()
    dyz = none.clone()
    if y is not None:
        dyz = (full * (y.to(acc) if bias is None else y.to(acc) - bias.to(acc))).sum(0)
    return u, dB, db, dyz, scaled.to(dy.dtype, copy=True) if need_gdy else dy.new_empty(0)


# --- autograd --------------------------------------------------------------------------------------------------------


def apply_core(h: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """h' = h C for a diagonal core [r] or a full core [r, r]; h itself without one."""
    if core is None:
        return h
    core = core.to(h.dtype)
    return h * core if core.dim() == 1 else h @ core


def core_backward(h, u, core, need_core):
    """u' = u Cᵀ, and the core's gradient (or None)."""
    if core is None:
        return u, None
    dcore = None
    if core.dim() == 1:
        if need_core:
            acc = accumulate_dtype(h.dtype)
            dcore = (h.to(acc) * u.to(acc)).sum(0).to(core.dtype)
        return u * core.to(u.dtype), dcore
    if need_core:
        dcore = mm(h.t(), u, core.dtype)
    return u @ core.to(u.dtype).t(), dcore


def fused_forward(x, weight, h, B, scale, g, bias):
    """y [T, d] = g * (x Wᵀ + scale h Bᵀ) + b for x [T, k], h [T, r]; makes no [T, d] tensor besides y.

    The library's products, unless a backend that has the single-GEMM kernel is forced or a table of measurements has
    another choice than the library for it.
    """
    forced = _library.forced_backend
    if forced in ("triton", "reference") or (forced is None and _library.tuned("lowrank_matmul", x.device)):
        return lowrank_matmul_op(x, weight, h, B, scale, g, bias)
    return library_matmul(x, weight, h, B, scale, g, bias)


def scales_tokens(T, weight, g):
    """Whether dx = (g*dy) W is formed by scaling dy rather than W: the one with fewer bytes to move.

    dy is scaled in the pass that reads it anyway (T d written); W is read and written (2 k d). Either is rounded once
    to the working dtype, with a relative error of half a unit in the last place.
    """
    return g is not None and T <= 2 * weight.shape[1]


def base_input_gradient(dy, gdy, weight, g):
    """(g*dy) W [T, k], from gdy where :func:`scales_tokens` chose to form it."""
    if g is None:
        return dy @ weight
    if gdy.shape[0] == dy.shape[0] and gdy.dim() == 2:
        return gdy @ weight
    return dy @ (weight * g.unsqueeze(1)).to(weight.dtype)


class LowRankFunction(Function):
    """Dense tier: y = g * (x Wᵀ + γ h' Bᵀ) + b; saves x and h."""

    @staticmethod
    def forward(ctx, x, weight, A, B, bias, core, g, seed, scale, p):
        x2 = rows(x)
        h = dropout.project(x2, A.to(x.dtype), seed, p)
        y = fused_forward(x2, weight, apply_core(h, core), B.to(x.dtype), scale, g, bias)
        _, _, need_A, need_B, _, need_core = ctx.needs_input_grad[:6]
        ctx.save_for_backward(x if need_A else None, weight, A, B, core, g, h if need_B or need_core else None, seed)
        ctx.scale, ctx.p, ctx.x_shape = scale, p, x.shape
        return shaped(y, x)

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, A, B, core, g, h, seed = ctx.saved_tensors
        need_x, _, need_A, need_B, need_bias, need_core = ctx.needs_input_grad[:6]
        dy2 = rows(dy)
        need_u = need_x or need_A or need_core
        hc = dy2.new_empty(dy2.shape[0], A.shape[0]) if h is None else apply_core(h, core)  # unread when not saved
        need_gdy = need_x and scales_tokens(dy2.shape[0], weight, g)
        u, dB, db, _, gdy = lowrank_backward_op(
            dy2, hc, B.to(dy2.dtype), ctx.scale, g, None, None, need_u, need_B, need_bias, need_gdy
        )
        dx = dA = dcore = None
        if need_u:
            u, dcore = core_backward(h, u, core, need_core)
        if need_x:
            dx = base_input_gradient(dy2, gdy, weight, g)
            dx = dropout.lift_(dx, u, A.to(dx.dtype), seed, ctx.p).reshape(ctx.x_shape)
        if need_A:
            dA = A_gradient(u, rows(x), seed, ctx.p, A.dtype)
        dB = dB.to(B.dtype) if need_B else None
        db = db.to(dy.dtype) if need_bias else None
        return dx, None, dA, dB, db, dcore, None, None, None, None


def A_gradient(u, x, seed, p, dtype):
    """dA [r, k] = uᵀ drop(x) in ``dtype``."""
    return mm(u.t(), x, dtype) if seed is None else dropout.dropout_outer_op(u, x, seed, p).to(dtype)


class LowRankUpdateFunction(Function):
    """Base-agnostic tier: base_out becomes g * (base_out - b + γ h' Bᵀ) + b, in place; saves x and h."""

    @staticmethod
    def forward(ctx, base_out, x, A, B, bias, core, g, seed, scale, p):
        x2 = rows(x)
        h = dropout.project(x2, A.to(x.dtype), seed, p)
        shift = None if bias is None or g is None else (1 - g) * bias.to(g.dtype)
        out = tokens(base_out)
        if g is None:
            out.addmm_(apply_core(h, core), B.to(x.dtype).t(), alpha=scale)
        else:
            lowrank_update_op(out, apply_core(h, core), B.to(x.dtype), scale, g, shift)
        ctx.mark_dirty(base_out)
        _, need_x, need_A, need_B, _, need_core = ctx.needs_input_grad[:6]
        ctx.save_for_backward(x if need_A else None, A, B, core, g, h if need_B or need_core else None, seed)
        ctx.scale, ctx.p, ctx.x_shape = scale, p, x.shape
        return base_out

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, A, B, core, g, h, seed = ctx.saved_tensors
        need_out, need_x, need_A, need_B, need_bias, need_core = ctx.needs_input_grad[:6]
        dy2 = rows(dy)
        need_u = need_x or need_A or need_core
        hc = dy2.new_empty(dy2.shape[0], A.shape[0]) if h is None else apply_core(h, core)  # unread when not saved
        u, dB, db, _, gdy = lowrank_backward_op(
            dy2, hc, B.to(dy2.dtype), ctx.scale, g, None, None, need_u, need_B, need_bias,
            need_out and g is not None,
        )  # fmt: skip
        dx = dA = dcore = None
        if need_u:
            u, dcore = core_backward(h, u, core, need_core)
        if need_x:
            dx = update_input_gradient(u, A, ctx.x_shape, seed, ctx.p)
        if need_A:
            dA = A_gradient(u, rows(x), seed, ctx.p, A.dtype)
        dout = (dy if g is None else gdy.reshape(dy.shape)) if need_out else None
        # the base layer's own node adds g * dy to its bias; what is missing of Σ dy is returned here
        db = ((1 - g) * db).to(dy.dtype) if need_bias and g is not None else None
        return dout, dx, dA, dB.to(B.dtype) if need_B else None, db, dcore, None, None, None, None


def update_input_gradient(u, A, shape, seed, p):
    """mask * (u A) in x's shape: the adapter's own share of dx, beside what the base layer's node returns."""
    if seed is None:
        return (u @ A.to(u.dtype)).reshape(shape)
    return dropout.lift_(u.new_zeros(u.shape[0], A.shape[1]), u, A.to(u.dtype), seed, p).reshape(shape)


class LowRankGroupFunction(Function):
    """Siblings that read one x: h of all of them is one product over stacked A, and dx is accumulated in place."""

    @staticmethod
    def forward(ctx, x, scales, *layers):
        x2 = rows(x)
        weights, As, Bs, biases = layers[0::4], layers[1::4], layers[2::4], layers[3::4]
        ranks = [A.shape[0] for A in As]
        h = x2 @ torch.cat([A.to(x.dtype) for A in As]).t()
        outputs = [
            shaped(fused_forward(x2, W, part, B.to(x.dtype), scale, None, bias), x)
            for W, part, B, bias, scale in zip(weights, h.split(ranks, 1), Bs, biases, scales, strict=True)
        ]
        need_A = any(ctx.needs_input_grad[3::4])
        ctx.save_for_backward(x if need_A else None, h, *weights, *As, *Bs)
        ctx.scales, ctx.ranks, ctx.x_shape = scales, ranks, x.shape
        ctx.set_materialize_grads(False)  # a sibling whose output nobody used costs nothing
        return tuple(outputs)

    @staticmethod
    @backward_pass
    def backward(ctx, *dys):
        x, h, *rest = ctx.saved_tensors
        n = len(ctx.ranks)
        weights, As, Bs = rest[:n], rest[n : 2 * n], rest[2 * n :]
        need_x, need_A, need_B, need_bias = (ctx.needs_input_grad[j::4] for j in (0, 3, 4, 5))
        need_x = need_x[0]
        grads: list[torch.Tensor | None] = [None] * (2 + 4 * n)
        us, dx = {}, None
        for i, (dy, part) in enumerate(zip(dys, h.split(ctx.ranks, 1), strict=True)):
            if dy is None:
                continue
            dy2 = rows(dy)
            u, dB, db, _, _ = lowrank_backward_op(
                dy2, part, Bs[i].to(dy2.dtype), ctx.scales[i], None, None, None,
                need_x or need_A[i], need_B[i], need_bias[i], False,
            )  # fmt: skip
            if need_x:
                dx = dy2 @ weights[i] if dx is None else dx.addmm_(dy2, weights[i])
            if need_x or need_A[i]:
                us[i] = u
            grads[4 + 4 * i] = dB.to(Bs[i].dtype) if need_B[i] else None
            grads[5 + 4 * i] = db.to(dy.dtype) if need_bias[i] else None
        if dx is not None:
            stacked = torch.cat([As[i].to(dx.dtype) for i in us])
            grads[0] = dx.addmm_(torch.cat(list(us.values()), 1), stacked).reshape(ctx.x_shape)
        trained = [i for i in us if need_A[i]]
        if trained:
            dA = A_gradient(torch.cat([us[i] for i in trained], 1), rows(x), None, 0.0, accumulate_dtype(x.dtype))
            for i, part in zip(trained, dA.split([ctx.ranks[i] for i in trained]), strict=True):
                grads[3 + 4 * i] = part.to(As[i].dtype)
        return tuple(grads)


# --- public functions ------------------------------------------------------------------------------------------------


def _check_extras(x, rank, out_features, core, out_scale, scale, dropout_p):
    if core is not None:
        checks.tensor("core", core, "[r] or [r, r]")
        if core.shape not in ((rank,), (rank, rank)):
            raise ValueError(f"core: got {checks.describe(core)}, wanted [{rank}] or [{rank}, {rank}] (the rank)")
    if out_scale is not None:
        checks.vector("out_scale", out_scale, out_features, "out_features")
        if out_scale.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "out_scale: got requires_grad=True, wanted a fixed scale (only dora_linear trains one, its magnitude)"
            )
    checks.device("x", x, core=core, out_scale=out_scale)
    checks.no_narrowing(x, core=core)
    checks.number("scale", scale)
    checks.probability("dropout_p", dropout_p)


def lowrank_linear(
    x, weight, lora_A, lora_B, bias=None, *, scale=1.0, core=None, out_scale=None, dropout_p=0.0, training=False
):
    """Linear layer with a low-rank update: y = out_scale * (x Wᵀ + scale h' Bᵀ) + b, h' = drop(x) Aᵀ C.

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (under autocast both are cast).
        lora_A: A [r, k]; lora_B: B [d, r]. May be float32 over a narrower x; gradients come back in their dtype.
        bias: [d] or None, in x's dtype; may be trainable. Never scaled.
        scale: γ, a number (α/r in LoRA).
        core: C absent, a diagonal [r] (AdaLoRA, Spectral Adapter A) or [r, r] (Spectral Adapter R); may be trainable.
        out_scale: g [d], fixed; a trained one is DoRA's magnitude, see :func:`dora_linear`.
        dropout_p, training: inverted dropout on the adapter branch, active only while training.

    Returns y [..., d] in x's dtype. Saves x and h [T, r] for backward.
    Raises TypeError/ValueError that name the argument. METHODS 1.1; LoRA, arXiv:2106.09685.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    checks.low_rank(x, weight.shape[0], lora_A, lora_B)
    _check_extras(x, lora_A.shape[0], weight.shape[0], core, out_scale, scale, dropout_p)
    g = None if out_scale is None else out_scale.to(accumulate_dtype(x.dtype))
    seed = draw_seed(x, dropout_p, training)
    return apply(
        LowRankFunction, x.device.type, x, weight, lora_A, lora_B, bias, core, g, seed, float(scale), dropout_p
    )


def lowrank_update(
    base_out, x, lora_A, lora_B, *, scale=1.0, core=None, out_scale=None, bias=None, dropout_p=0.0, training=False
):
    """The same update over a base layer somebody else computed (bitsandbytes, GPTQ, FP8), in one in-place pass.

    base_out [..., d] = base(x), bias included, becomes out_scale * (base_out - b + scale h' Bᵀ) + b and is returned;
    it must be a fresh result nobody else reads (a view or a trained leaf is copied first). ``bias`` [d] is the base
    layer's own, needed only with ``out_scale`` because a bias is never scaled. The other arguments are those of
    :func:`lowrank_linear`; x is cast to base_out's dtype. METHODS 1.1, base-agnostic tier.
    """
    checks.base(base_out, x)
    checks.device("x", x, bias=bias)
    x = x.to(base_out.dtype)
    checks.low_rank(x, base_out.shape[-1], lora_A, lora_B)
    if bias is not None:
        checks.vector("bias", bias, base_out.shape[-1], "out_features")
    _check_extras(x, lora_A.shape[0], base_out.shape[-1], core, out_scale, scale, dropout_p)
    g = None if out_scale is None else out_scale.to(accumulate_dtype(x.dtype))
    bias = None if g is None else bias
    seed = draw_seed(x, dropout_p, training)
    out = overwritable(base_out)
    return apply(
        LowRankUpdateFunction, x.device.type, out, x, lora_A, lora_B, bias, core, g, seed, float(scale), dropout_p
    )


def lowrank_linear_group(x, layers: Sequence[tuple]):
    """Several low-rank linear layers over one x (q, k, v; gate, up): their projections share one read of x.

    ``layers`` is a sequence of (weight [d, k], lora_A [r, k], lora_B [d, r], bias [d] or None, scale); sizes and ranks
    may differ. Returns the list of outputs [..., d]. Saves x and the stacked h [T, Σr]. METHODS 1.1, siblings.
    """
    if not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"layers: got {type(layers).__name__} of no layers, wanted a non-empty sequence")
    checks.tensor("x", x, "[..., in_features]")
    flat, scales = [], []
    for i, layer in enumerate(layers):
        if not isinstance(layer, (tuple, list)) or len(layer) != 5:
            got = f"{len(layer)} entries" if isinstance(layer, (tuple, list)) else type(layer).__name__
            raise ValueError(f"layers[{i}]: got {got}, wanted (weight, lora_A, lora_B, bias, scale)")
        weight, A, B, bias, scale = layer
        x, weight, bias = autocast_arguments(x, weight, bias)  # x is cast once: the next time it is already
        try:
            checks.linear(x, weight, bias)
            checks.same_dtype("x", x, weight=weight, bias=bias)
            checks.low_rank(x, weight.shape[0], A, B)
            checks.number("scale", scale)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layers[{i}]: {error}") from None
        flat += [weight, A, B, bias]
        scales.append(float(scale))
    return list(apply(LowRankGroupFunction, x.device.type, x, tuple(scales), *flat))
