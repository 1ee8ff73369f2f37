"""Updates that are elementwise products (METHODS 1.16): LoHa's, of two low-rank matrices, and HiRA's, with the weight.

    HiRA   ΔW = W * (B A)             LoHa   ΔW = γ (B A) * (B₂ A₂)          A, A₂ [r, k]; B, B₂ [d, r]
    y = x (W + ΔW)ᵀ + b

By tiles: W + ΔW is written row tile by row tile into a buffer shared by all layers, then the library's product.
Backward writes it anew for dx, and contracts tiles G of dyᵀx, so that no gradient [d, k] reaches memory:
    M = W, or B₂ A₂      dB = γ (G * M) Aᵀ      dA = γ Bᵀ (G * M)      and for LoHa's other pair the same with B A for M
By factors, for LoHa of small rank, whose ΔW is of rank r² only: with j = (p, q),
    ΔW = γ P Q      P[o, j] = B[o, p] B₂[o, q]      Q[j, i] = A[p, i] A₂[q, i]
which is LoRA with those factors, and their gradients are contracted to the four.
Saved for backward: x. All products are the library's. A tile takes a product and one elementwise pass over W, which a
kernel of its own would make one pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype, calls, define_layer
from spectral_ops.core import checks
from spectral_ops.core.autograd import (
    apply,
    autocast_arguments,
    backward_pass,
    fresh,
    gradient_tiles,
    rows,
    shaped,
    wanted,
)
from spectral_ops.core.scratch import scratch

__all__ = ["hira_linear", "loha_linear", "loha_update"]

TILE = {"cpu": 512, "cuda": 2048}  # rows of ΔW at a time: enough for the library's full speed


def _tiles(d: int, device: torch.device):
    step = TILE.get(device.type, 512)
    return [slice(start, min(start + step, d)) for start in range(0, d, step)]


def _write(out, weight, A, B, A2, B2, scale):
    """out [d, k] gets W + ΔW (ΔW without a weight), formed in at least float32 and rounded once."""
    wide = accumulate_dtype(out.dtype)
    A, B, A2, B2 = (t if t is None else t.to(wide) for t in (A, B, A2, B2))
    for part in _tiles(*out.shape[:1], out.device):
        tile = torch.mm(B[part], A, out=out[part]) if out.dtype == wide else B[part] @ A
        W = None if weight is None else weight[part].to(wide)
        other = W if A2 is None else B2[part] @ A2
        if W is None:
            tile.mul_(other).mul_(scale)
        else:
            torch.addcmul(W, tile, other, value=scale, out=tile)
        if out.dtype != wide:
            out[part] = tile


def _product(x, weight, A, B, A2, B2, bias, scale, exact, transpose):
    """x (W + ΔW)ᵀ + b [T, d] in x's dtype; transpose: x (W + ΔW) [T, k]. exact: W + ΔW is not rounded to x's dtype.

    LoHa's ΔW, which need not be near W in size, is multiplied apart in narrow dtypes: in W it would be rounded away."""
    if A2 is not None and weight is not None and x.dtype != accumulate_dtype(x.dtype):
        y = x @ weight if transpose else F.linear(x, weight, bias)
        return y.add_(_product(x, None, A, B, A2, B2, None, scale, exact, transpose))
    dtype = accumulate_dtype(x.dtype) if exact else x.dtype
    with scratch.lease((B.shape[0], A.shape[1]), dtype, x.device) as changed:
        _write(changed, weight, A, B, A2, B2, scale)
        if transpose:
            return (x.to(dtype) @ changed).to(x.dtype)
        return F.linear(x.to(dtype), changed, None if bias is None else bias.to(dtype)).to(x.dtype)


def _factors(A, B, A2, B2, dtype):
    """P [d, r²] and Q [r², k], formed in at least float32."""
    wide = accumulate_dtype(dtype)
    A, B, A2, B2 = (t.to(wide) for t in (A, B, A2, B2))
    P = (B.unsqueeze(2) * B2.unsqueeze(1)).flatten(1)
    Q = (A.unsqueeze(1) * A2.unsqueeze(0)).flatten(0, 1)
    return P.to(dtype), Q.to(dtype)


def tiles_cost_less(T: int, d: int, k: int, r: int) -> bool:
    """Whether LoHa takes less by tiles, of memory or of operations in a step. By tiles those are the gradient's T d k
    and ten products of d, k and r; by factors seven products of T, r² and a side."""
    if r * r * (d + k) > d * k:  # P and Q would be larger than W
        return True
    return 3.5 * T * (d + k) * r * r > T * d * k + 10 * r * d * k


@define_layer(
    "hadamard_forward(Tensor x, Tensor? weight, Tensor? base_out, Tensor A, Tensor B, Tensor? A2, Tensor? B2,"
    " Tensor? bias, float scale, bool tiles, bool exact) -> Tensor",
    fake=lambda x, weight, base_out, A, B, *rest: x.new_empty(*x.shape[:-1], B.shape[0]),
    pieces=(),
)
def hadamard_forward_op(x, weight, base_out, A, B, A2, B2, bias, scale, tiles, exact):
    """y [..., d] = x (W + ΔW)ᵀ + b, or base_out + x ΔWᵀ where there is no weight. HiRA has neither A2 nor B2."""
    x2 = rows(x)
    if tiles:
        y = _product(x2, weight, A, B, A2, B2, bias, scale, exact, False)
        return shaped(y if base_out is None else y.add_(rows(base_out)), x)
    P, Q = _factors(A, B, A2, B2, x.dtype)
    y = F.linear(x2, weight, bias) if base_out is None else rows(base_out).clone()
    y.addmm_(x2 @ Q.t(), P.t(), alpha=scale)
    return shaped(y, x)


def _hadamard_backward_fake(dy, x, weight, A, B, A2, B2, scale, tiles, exact, needs):
    return wanted(dy, needs, (*dy.shape[:-1], A.shape[1]), A, B, A2, B2, dy.shape[-1:])


@define_layer(
    "hadamard_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor A, Tensor B, Tensor? A2, Tensor? B2, float scale,"
    " bool tiles, bool exact, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_hadamard_backward_fake,
    pieces=(),
)
def hadamard_backward_op(dy, x, weight, A, B, A2, B2, scale, tiles, exact, needs):
    """dx (of the update alone where there is no weight), dA, dB, dA2, dB2 in the parameters' dtypes, and db; empty [0]
    where ``needs`` has no bit."""
    need_x, need_factors, need_bias = bool(needs & 1), bool(needs & 0b11110), bool(needs >> 5 & 1)
    dy2 = rows(dy)
    x2 = None if x is None else rows(x)
    dx, grads = None, (None,) * 4
    if tiles:
        if need_x:
            dx = _product(dy2, weight, A, B, A2, B2, None, scale, exact, True)
        if need_factors:
            grads = _contract(dy2, x2, weight, A, B, A2, B2, scale, needs)
    else:
        P, Q = _factors(A, B, A2, B2, dy.dtype)
        u = dy2 @ P if need_x or needs & 0b01010 else None
        if need_x:
            dx = dy2 @ weight if weight is not None else dy2.new_zeros(dy2.shape[0], A.shape[1])
            dx.addmm_(u, Q, alpha=scale)
        grads = _contract_factors(dy2, x2, u, Q, A, B, A2, B2, scale, needs)
    grads = [g if g is None else g.to(p.dtype) for g, p in zip(grads, (A, B, A2, B2), strict=True)]
    db = dy2.sum(0) if need_bias else None
    return fresh(dy, needs, None if dx is None else shaped(dx, dy), *grads, db)


def _contract(dy, x, weight, A, B, A2, B2, scale, needs):
    """dA, dB, dA2, dB2 in at least float32, those that are needed, out of tiles of dyᵀx."""
    wide = accumulate_dtype(x.dtype)
    factors = A, B, A2, B2 = [t if t is None else t.to(wide) for t in (A, B, A2, B2)]
    grads = dA, dB, dA2, dB2 = [torch.zeros_like(t) if needs >> i & 2 else None for i, t in enumerate(factors)]

    def add(g, here, A, B, dA, dB):
        if dB is not None:
            torch.mm(g, A.t(), out=dB[here])
        if dA is not None:
            dA.addmm_(B[here].t(), g)

    for start, G in gradient_tiles(dy, x):
        for part in _tiles(*G.shape[:1], G.device):
            here, g = slice(start + part.start, start + part.stop), G[part].to(wide)
            if dA2 is not None or dB2 is not None:
                add((B[here] @ A).mul_(g), here, A2, B2, dA2, dB2)
            if dA is not None or dB is not None:
                other = weight[here].to(wide) if A2 is None else B2[here] @ A2
                add(g.mul_(other), here, A, B, dA, dB)
    return [t if t is None else t.mul_(scale) for t in grads]


def _contract_factors(dy, x, u, Q, A, B, A2, B2, scale, needs):
    """The same through P and Q, those of the needed sides."""
    wide, r, r2 = accumulate_dtype(dy.dtype), A.shape[0], A2.shape[0]
    A, B, A2, B2 = (t.to(wide) for t in (A, B, A2, B2))
    dA = dB = dA2 = dB2 = None
    if needs & 0b10100:
        dP = (dy.t() @ (x @ Q.t())).to(wide).mul_(scale).unflatten(1, (r, r2))
        dB = (dP * B2.unsqueeze(1)).sum(2) if needs & 0b00100 else None
        dB2 = (dP * B.unsqueeze(2)).sum(1) if needs & 0b10000 else None
    if needs & 0b01010:
        dQ = (u.t() @ x).to(wide).mul_(scale).unflatten(0, (r, r2))
        dA = (dQ * A2.unsqueeze(0)).sum(1) if needs & 0b00010 else None
        dA2 = (dQ * A.unsqueeze(1)).sum(0) if needs & 0b01000 else None
    return dA, dB, dA2, dB2


class HadamardFunction(Function):
    @staticmethod
    def forward(ctx, x, weight, base_out, A, B, A2, B2, bias, scale, tiles, exact):
        y = hadamard_forward_op(x, weight, base_out, A, B, A2, B2, bias, scale, tiles, exact)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:7]) else None, weight, A, B, A2, B2)
        ctx.settings = scale, tiles, exact
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, A, B, A2, B2 = ctx.saved_tensors
        need_x, _, need_out, *need, need_bias = ctx.needs_input_grad[:8]
        need = [need_x, *need, need_bias]
        needs = sum(bit << i for i, bit in enumerate(need))
        found = hadamard_backward_op(dy, x, weight, A, B, A2, B2, *ctx.settings, needs) if needs else [None] * 6
        dx, dA, dB, dA2, dB2, db = (t if wanted else None for t, wanted in zip(found, need, strict=True))
        return dx, None, dy if need_out else None, dA, dB, dA2, dB2, db, None, None, None


def linear(x, weight, base_out, A, B, A2, B2, bias, scale, tiles, exact=False):
    """The public functions past their checks, for layers that know their shapes."""
    return apply(HadamardFunction, x, x, weight, base_out, A, B, A2, B2, bias, scale, tiles, exact)


# --- public functions ------------------------------------------------------------------------------------------------


def _route(route, x, d, k, r):
    if route not in ("auto", "tiles", "factors"):
        raise ValueError(f"route: got {route!r}, wanted 'auto', 'tiles' or 'factors'")
    return tiles_cost_less(x.numel() // max(k, 1), d, k, r) if route == "auto" else route == "tiles"


def _check_factors(x, d, **pairs):
    for (b, B), (a, A) in zip(*(iter(pairs.items()),) * 2, strict=True):
        checks.tensor(a, A, "[r, in_features]", 2)
        checks.tensor(b, B, "[out_features, r]", 2)
        checks.size(a, A, 1, x.shape[-1], "in_features, the last dimension of x")
        checks.size(b, B, 0, d, "out_features")
        checks.size(b, B, 1, A.shape[0], f"the rank, rows of {a}")
    checks.device("x", x, **pairs)
    checks.no_narrowing(x, **pairs)


@calls(hadamard_forward_op, hadamard_backward_op)
def hira_linear(x, weight, hira_A, hira_B, bias=None, *, exact=False):
    """HiRA linear layer: y = x (W + W * (B A))ᵀ + b.

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (autocast casts both).
        hira_A: [r, k] and hira_B: [d, r], in any floating dtype (float64 exactly where x is).
        bias: [d] or None; may be trainable.
        exact: keep the changed weight in float32 where x is narrower. By default it is rounded to x's dtype, which in
            bfloat16 loses a change below a 256th of the weight.

    Returns y [..., d] in x's dtype. Saves x. Raises TypeError/ValueError naming the argument. METHODS 1.16; HiRA,
    ICLR 2025 (openreview TwJrTz9cRS).
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    _check_factors(x, weight.shape[0], hira_B=hira_B, hira_A=hira_A)
    return linear(x, weight, None, hira_A, hira_B, None, None, bias, 1.0, True, bool(exact))


@calls(hadamard_forward_op, hadamard_backward_op)
def loha_linear(x, weight, w1_a, w1_b, w2_a, w2_b, bias=None, *, scale=1.0, route="auto"):
    """LoHa linear layer: y = x (W + scale (w1_a w1_b) * (w2_a w2_b))ᵀ + b.

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (autocast casts both).
        w1_a, w2_a: [d, r]; w1_b, w2_b: [r, k], in any floating dtype (float64 exactly where x is).
        bias: [d] or None; may be trainable.
        route: "factors" (a low-rank product of rank r²), "tiles" (the changed weight in a shared buffer, rounded to x's
            dtype), or "auto" for the one that takes fewer operations.

    Returns y [..., d] in x's dtype. Saves x. Raises TypeError/ValueError naming the argument. METHODS 1.16; LoHa,
    arXiv:2108.06098.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    checks.number("scale", scale)
    _check_factors(x, weight.shape[0], w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b)
    tiles = _route(route, x, *weight.shape, w1_b.shape[0])
    return linear(x, weight, None, w1_b, w1_a, w2_b, w2_a, bias, scale, tiles)


@calls(hadamard_forward_op, hadamard_backward_op)
def loha_update(base_out, x, w1_a, w1_b, w2_a, w2_b, *, scale=1.0, route="auto"):
    """base_out + scale x ((w1_a w1_b) * (w2_a w2_b))ᵀ, over what another layer returned for x.

    base_out [..., d] is left as it is, and x cast to its dtype; the others as in :func:`loha_linear`. Saves x.
    """
    checks.base(base_out, x)
    x = x.to(base_out.dtype)
    checks.number("scale", scale)
    _check_factors(x, base_out.shape[-1], w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b)
    tiles = _route(route, x, base_out.shape[-1], x.shape[-1], w1_b.shape[0])
    return linear(x, None, base_out, w1_b, w1_a, w2_b, w2_a, None, scale, tiles)
