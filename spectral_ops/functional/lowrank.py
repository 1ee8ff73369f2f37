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
    mm,
    overwritable,
    rows,
    saved_hidden,
    shaped,
    through,
    tokens,
    wanted,
)
from spectral_ops.functional import dropout, lowrank_routes

__all__ = ["lowrank_linear", "lowrank_update"]


# --- operators -------------------------------------------------------------------------------------------------------


def _matmul_cost(x, weight, h, B, scale, g, bias):
    d, r = B.shape
    return Cost(
        2 * x.shape[0] * d * (weight.shape[1] + r),
        nbytes(x, weight, h, B, g, bias) + x.shape[0] * d * x.element_size(),
    )


def _matmul_samples(s):
    yield s.x, s.W, s.h, s.B, 0.5, None, s.bias
    yield s.x, s.W, s.h, s.B, 0.5, s.g, s.bias
    yield s.x, s.W, s.h, s.B, 0.5, s.g, None
    yield s.x, s.W, s.h, s.B, 0.5, None, None
    yield s.rows(s.x), s.transposed(s.W), s.h, s.B, -2.0, None, s.bias
    yield s.x, s.W, s.h, s.transposed(s.B), 0.5, s.g, s.bias
    yield s.dy, s.W.t(), s.h, s.A.t(), 1.0, None, None


@define(
    "lowrank_matmul(Tensor x, Tensor weight, Tensor h, Tensor B, float scale, Tensor? g, Tensor? bias) -> Tensor",
    fake=lambda x, weight, h, B, scale, g, bias: x.new_empty(x.shape[0], weight.shape[0]),
    cost=_matmul_cost,
    samples=_matmul_samples,
)
def lowrank_matmul_op(x, weight, h, B, scale, g, bias):
    """y [T, d] = g * (x Wᵀ + scale h Bᵀ) + bias: one GEMM over [x | h], rounded once to x's dtype."""
    acc = accumulate_dtype(x.dtype)
    y = x.to(acc) @ weight.to(acc).t() + scale * (h.to(acc) @ B.to(acc).t())
    y = y if g is None else y * g
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def _update_cost(out, h, B, scale, g, shift):
    return Cost(2 * out.numel() * (B.shape[1] + 1), 2 * nbytes(out) + nbytes(h, B, g, shift))


def _update_samples(s):
    yield s.randn(s.T, s.d), s.h, s.B, 0.5, s.g, s.bias.to(s.acc)
    yield s.randn(s.T, s.d), s.h, s.B, 0.5, None, None
    yield s.randn(s.T, s.d), s.h, s.B, 0.5, s.g, None
    yield s.randn(s.T, s.d), s.h, s.B, -1.5, s.g, s.shift
    yield s.rows(s.y), s.h, s.B, 0.5, None, s.shift


@define(
    "lowrank_update_(Tensor(a!) out, Tensor h, Tensor B, float scale, Tensor? g, Tensor? shift) -> ()",
    fake=lambda out, h, B, scale, g, shift: None,
    cost=_update_cost,
    samples=_update_samples,
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
lowrank_matmul_op.routes = functools.partial(lowrank_routes.describe, "lowrank_matmul")
_library.PRODUCTS["lowrank_linear"] = functools.partial(lowrank_routes.layer_products, lowrank_matmul_op, False)


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


def _backward_samples(s):
    yield s.dy, s.h, s.B, 0.5, None, None, None, True, True, False, False
    yield s.dy, s.h, s.B, 0.5, s.g, s.y, s.bias, True, True, True, True
    yield s.dy, s.h, s.B, 0.5, None, None, None, True, True, True, False
    yield s.dy, s.h, s.B, 0.5, s.g, s.y, None, True, False, False, False
    yield s.dy, s.h, s.B, 0.5, s.g, None, None, False, True, False, True
    yield s.rows(s.dy), s.h, s.B, -0.5, s.g, s.rows(s.y), s.bias, True, True, False, True
    yield s.randn(1, s.d).expand(s.T, s.d), s.h, s.B, 0.5, None, None, None, True, True, True, False
    yield s.dy, s.h, s.B, 0.5, None, None, None, False, False, False, False


@define(
    "lowrank_backward(Tensor dy, Tensor h, Tensor B, float scale, Tensor? g, Tensor? y, Tensor? bias,"
    " bool need_u, bool need_dB, bool need_db, bool need_gdy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    cost=_backward_cost,
    samples=_backward_samples,
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


def _diagonal(core: torch.Tensor) -> torch.Tensor | None:
    """The diagonal [r] of a core [r] or [r, 1]; None for a full one."""
    return core if core.dim() == 1 else core.squeeze(1) if core.shape[1] == 1 else None


def apply_core(h: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """h' = h C for a diagonal core [r] or [r, 1], or a full core [r, r]; h itself without one."""
    if core is None:
        return h
    core = core.to(h.dtype)
    diagonal = _diagonal(core)
    return h @ core if diagonal is None else h * diagonal


def core_backward(h, u, core, need_core):
    """u' = u Cᵀ, and the core's gradient (or None)."""
    if core is None:
        return u, None
    dcore, diagonal = None, _diagonal(core)
    if diagonal is None:
        return u @ core.to(u.dtype).t(), mm(h.t(), u, core.dtype) if need_core else None
    if need_core:
        acc = accumulate_dtype(h.dtype)
        dcore = (h.to(acc) * u.to(acc)).sum(0).to(core.dtype).reshape(core.shape)
    return u * diagonal.to(u.dtype), dcore


def fused(op, device):
    """Whether ``op``, a product with an update in it, is called, and not ``op.library``: where a backend that has it is
    forced, a table of measurements has another choice than the library, or ``_C_cuda`` has it, which chooses by the
    sizes of each call."""
    forced, backends = _library.forced_backend, _library.backends
    if forced == "triton":
        return backends.has_triton(op.stem, op.name)
    if forced == "reference" or (forced is None and _library.measured(op.name, device)):
        return True
    if device.type != "cuda" or forced not in (None, "cuda") or _library.composing() is not None:
        return False
    return backends.unavailable(op, "cuda", "cuda") is None


def fused_forward(x, weight, h, B, scale, g, bias):
    """y [T, d] = g * (x Wᵀ + scale h Bᵀ) + b for x [T, k], h [T, r]; makes no [T, d] tensor besides y.

    The library's products, but where :func:`fused` says otherwise.
    """
    run = lowrank_matmul_op if fused(lowrank_matmul_op, x.device) else library_matmul
    return run(x, weight, h, B, scale, g, bias)


def scales_tokens(T, weight, g):
    """Whether dx = (g*dy) W is formed by scaling dy rather than W: the one with fewer bytes to move.

    dy is scaled in the pass that reads it anyway (T d written); W is read and written (2 k d). Either is rounded once
    to the working dtype, with a relative error of half a unit in the last place.
    """
    return g is not None and T <= 2 * weight.shape[1]


def input_gradient(dy, gdy, weight, g, u, A, seed, p):
    """(g*dy) W + mask * (u A) [T, k], from gdy where :func:`scales_tokens` chose to form it."""
    if g is not None and scales_tokens(dy.shape[0], weight, g):
        dy = gdy
    elif g is not None:
        weight = (weight * g.unsqueeze(1)).to(weight.dtype)
    if seed is None:
        return fused_forward(dy, weight.t(), u, A.t(), 1.0, None, None)
    return dropout.lift_(dy @ weight, u, A, seed, p)


def A_gradient(u, x, seed, p, dtype):
    """dA [r, k] = uᵀ drop(x) in ``dtype``."""
    return mm(u.t(), x, dtype) if seed is None else dropout.dropout_outer_op(u, x, seed, p).to(dtype)


def update_input_gradient(u, A, shape, seed, p):
    """mask * (u A) in x's shape: the adapter's own share of dx, beside what the base layer's node returns."""
    if seed is None:
        return (u @ A.to(u.dtype)).reshape(shape)
    return dropout.lift_(u.new_zeros(u.shape[0], A.shape[1]), u, A.to(u.dtype), seed, p).reshape(shape)


# --- layers ----------------------------------------------------------------------------------------------------------
# Dense tier: y = g * (x Wᵀ + γ h' Bᵀ) + b over a weight. Base-agnostic tier: the same over somebody else's x Wᵀ + b,
# which the operator with an underscore overwrites and the one without copies.

_PIECES = ("lowrank_update_", "lowrank_backward", "dropout_project", "dropout_outer", "dropout_lift_")
_FACTORS = "Tensor A, Tensor B, Tensor? bias, Tensor? core, Tensor? g, Tensor? seed, float scale, float p"


def _hidden(x, A):
    return x.new_empty(math.prod(x.shape[:-1]), A.shape[0])


@define_layer(
    f"lowrank_update_forward_(Tensor(a!) out, Tensor x, {_FACTORS}) -> Tensor",
    fake=lambda out, x, A, B, bias, core, g, seed, scale, p: _hidden(x, A),
    pieces=_PIECES,
)
def lowrank_update_forward_op(out, x, A, B, bias, core, g, seed, scale, p):
    """out [..., d] becomes g * (out - b + γ h' Bᵀ) + b; returns h [T, r]."""
    x2, out = rows(x), tokens(out)
    h = dropout.project(x2, A.to(x.dtype), seed, p)
    hc, b = apply_core(h, core), B.to(x.dtype)
    if g is None:
        out.addmm_(hc, b.t(), alpha=scale)
    else:
        lowrank_update_op(out, hc, b, scale, g, None if bias is None else (1 - g) * bias.to(g.dtype))
    return h


@define_layer(
    f"lowrank_linear_forward(Tensor x, Tensor? weight, Tensor? base_out, {_FACTORS}) -> (Tensor, Tensor)",
    fake=lambda x, weight, base_out, A, B, bias, core, g, seed, scale, p: (
        x.new_empty(*x.shape[:-1], B.shape[0]), _hidden(x, A),
    ),
    pieces=("lowrank_matmul", *_PIECES),
)  # fmt: skip
def lowrank_linear_forward_op(x, weight, base_out, A, B, bias, core, g, seed, scale, p):
    """y [..., d] and h [T, r] = drop(x) Aᵀ. A, B and core in any floating dtype; g float32 (float64 for float64).

    Without a weight y is a copy of base_out [..., d], somebody else's x Wᵀ + b, with the update added.
    """
    if weight is None:
        y = contiguous_copy(base_out)
        return y, lowrank_update_forward_op.reference(y, x, A, B, bias, core, g, seed, scale, p)
    x2 = rows(x)
    h = dropout.project(x2, A.to(x.dtype), seed, p)
    y = fused_forward(x2, weight, apply_core(h, core), B.to(x.dtype), scale, g, bias)
    return shaped(y, x), h


@define_layer(
    "lowrank_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor A, Tensor B, Tensor? core, Tensor? g,"
    " Tensor? h, Tensor? seed, float scale, float p, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda dy, x, weight, A, B, core, g, h, seed, scale, p, needs: wanted(
        dy, needs, (*dy.shape[:-1], A.shape[1]), A, B, dy.shape[-1:], core, dy.shape
    ),
    pieces=("lowrank_matmul", *_PIECES),
)
def lowrank_linear_backward_op(dy, x, weight, A, B, core, g, h, seed, scale, p, needs):
    """dx, dA, dB, db, dcore and dout of both tiers, in the parameters' dtypes; empty [0] where ``needs`` has no bit.

    Without a weight (base-agnostic): dx is the update's share, db (only with g) what Σ dy lacks after the base layer's
    own node has added g * dy to its bias, and dout = g * dy (only with g; it is dy without).
    """
    need_x, need_A, need_B, need_bias, need_core, need_out = (bool(needs >> bit & 1) for bit in range(6))
    dy2, need_u = rows(dy), need_x or need_A or need_core
    h = saved_hidden(h, need_B or need_core, dy2, A.shape[0])
    hc = apply_core(h, core) if need_B else h
    need_gdy = need_out or (need_x and weight is not None and scales_tokens(dy2.shape[0], weight, g))
    u, dB, db, _, gdy = lowrank_backward_op(
        dy2, hc, B.to(dy.dtype), scale, g, None, None, need_u, need_B, need_bias, need_gdy
    )
    dx = dA = dcore = dout = dy.new_empty(0)
    if need_u:
        u, dcore = core_backward(h, u, core, need_core)
    if need_x:
        shape = (*dy.shape[:-1], A.shape[1])
        if weight is None:
            dx = update_input_gradient(u, A, shape, seed, p)
        else:
            dx = input_gradient(dy2, gdy, weight, g, u, A.to(dy.dtype), seed, p).reshape(shape)
    if need_A:
        dA = A_gradient(u, rows(x), seed, p, A.dtype)
    if need_bias:
        db = (db if weight is not None else (1 - g) * db).to(dy.dtype)
    if need_out:
        dout = gdy.reshape(dy.shape)
    return fresh(dy, needs, dx, dA, dB.to(B.dtype), db, dcore, dout)


# --- autograd --------------------------------------------------------------------------------------------------------


class LowRankFunction(Function):
    """Dense tier; saves x and h."""

    @staticmethod
    def forward(ctx, x, weight, A, B, bias, core, g, seed, scale, p):
        y, h = lowrank_linear_forward_op(x, weight, None, A, B, bias, core, g, seed, scale, p)
        _, _, need_A, need_B, _, need_core, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A else None, weight, A, B, core, g, h if need_B or need_core else None, seed)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, A, B, core, g, h, seed = ctx.saved_tensors
        need_x, _, need_A, need_B, need_bias, need_core, *_ = ctx.needs_input_grad
        needs = need_x | need_A << 1 | need_B << 2 | need_bias << 3 | need_core << 4
        dx, dA, dB, db, dcore, _ = lowrank_linear_backward_op(
            dy, x, weight, A, B, core, g, h, seed, ctx.scale, ctx.p, needs
        )
        return (
            dx if need_x else None, None, dA if need_A else None, dB if need_B else None, db if need_bias else None,
            dcore if need_core else None, None, None, None, None,
        )  # fmt: skip

    @staticmethod
    def twice(ctx, dy):
        x, weight, A, B, core, g, _, seed = ctx.saved_tensors
        if x is None:
            raise RuntimeError("create_graph: got a second derivative where A is frozen, for which x is not kept")
        bias = x.new_zeros(weight.shape[0], requires_grad=ctx.needs_input_grad[4])  # its values are in no derivative
        y = plain(x, dropout.dropped(x, seed, ctx.p), weight, A, B, None, core, ctx.scale)
        y = y if g is None else (y * g).to(x.dtype)
        return through(ctx, y + bias, (x, weight, A, B, bias, core), dy)


class LowRankUpdateFunction(Function):
    """Base-agnostic tier, in place on ``base_out`` or on a copy; saves x and h."""

    @staticmethod
    def forward(ctx, base_out, x, A, B, bias, core, g, seed, scale, p, inplace):
        if inplace:
            y, h = base_out, lowrank_update_forward_op(base_out, x, A, B, bias, core, g, seed, scale, p)
            ctx.mark_dirty(base_out)
        else:
            y, h = lowrank_linear_forward_op(x, None, base_out, A, B, bias, core, g, seed, scale, p)
        _, _, need_A, need_B, _, need_core, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A else None, A, B, core, g, h if need_B or need_core else None, seed)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, A, B, core, g, h, seed = ctx.saved_tensors
        need_out, need_x, need_A, need_B, need_bias, need_core, *_ = ctx.needs_input_grad
        scaled = need_out and g is not None
        needs = need_x | need_A << 1 | need_B << 2 | need_bias << 3 | need_core << 4 | scaled << 5
        dx, dA, dB, db, dcore, dout = lowrank_linear_backward_op(
            dy, x, None, A, B, core, g, h, seed, ctx.scale, ctx.p, needs
        )
        return (
            (dout if scaled else dy) if need_out else None, dx if need_x else None, dA if need_A else None,
            dB if need_B else None, db if need_bias else None, dcore if need_core else None, *[None] * 5,
        )  # fmt: skip


def plain(x, dropped, weight, A, B, bias, core, scale):
    """x Wᵀ + b + scale h' Bᵀ with h' = dropped Aᵀ C, as torch's own products."""
    h = apply_core(F.linear(dropped, A.to(x.dtype)), core)
    return torch.add(F.linear(x, weight, bias), F.linear(h, B.to(x.dtype)), alpha=scale)


def _chosen_elsewhere(x):
    """Whether somebody has said, by forcing a backend or by a table of measurements, what runs instead."""
    return _library.forced_backend is not None or _library.measured("lowrank_linear_forward", x.device)


def linear(x, weight, A, B, bias, core, g, scale, p):
    """:func:`lowrank_linear` past its checks, for layers that know their shapes; p is 0 where nothing is dropped.

    A compiler gets the formula, which it fuses better than it schedules our operator (docs/PERFORMANCE.md); with
    dropout or a column scale, whose passes it does not save, the operator.
    """
    if torch.compiler.is_compiling() and p == 0.0 and g is None and not _chosen_elsewhere(x):
        return plain(x, x, weight, A, B, bias, core, scale)
    seed = None if p == 0.0 else draw_seed(x, p)
    if torch.is_grad_enabled():
        return apply(LowRankFunction, x, x, weight, A, B, bias, core, g, seed, scale, p)
    return apply_op(lowrank_linear_forward_op, x, x, weight, None, A, B, bias, core, g, seed, scale, p)[0]


def update(base_out, x, A, B, bias, core, g, scale, p):
    """:func:`lowrank_update` past its checks."""
    seed, inplace = draw_seed(x, p), overwritable(base_out)
    return apply(LowRankUpdateFunction, x, base_out, x, A, B, bias, core, g, seed, scale, p, inplace)


# --- public functions ------------------------------------------------------------------------------------------------


def _check_extras(x, rank, out_features, core, out_scale, scale, dropout_p):
    if core is not None:
        checks.tensor("core", core, "[r], [r, 1] or [r, r]")
        if core.shape not in ((rank,), (rank, 1), (rank, rank)):
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


@calls(lowrank_linear_forward_op, lowrank_linear_backward_op)
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
        core: C absent, a diagonal [r] or [r, 1] (AdaLoRA, Spectral Adapter A), or [r, r] (Spectral Adapter R); may be
            trainable.
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
    return linear(x, weight, lora_A, lora_B, bias, core, g, float(scale), dropout_p if training else 0.0)


@calls(lowrank_update_forward_op, lowrank_linear_forward_op, lowrank_linear_backward_op)
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
    return update(base_out, x, lora_A, lora_B, bias, core, g, float(scale), dropout_p if training else 0.0)
