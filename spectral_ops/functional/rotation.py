"""Rotations of x block by block before a frozen layer: OFT and BOFT (METHODS 1.18).

    x' = x R,  R = diag(R_1 ... R_n), R_j [b, b]      y = s * (x' Wᵀ) + b
    backward:  dz = s * dy     g = dz W     dx_j = g_j R_jᵀ     dR_j = x_jᵀ g_j     ds = Σ_t dy * z,  z = x' Wᵀ

R comes from skew K_j, by Cayley's transform (METHODS 1.9) or, where ``terms`` m is above 0, by PEFT's cut series

    R = I + 2 K + 2 K² + ... + 2 K^(m-2) + K^(m-1)        m <= 2: I + 2 K or I; m = 3 counts as 4

OFT keeps the upper triangles of K. BOFT keeps squares X, K = (X - Xᵀ)/2, of f butterfly factors: factor i pairs half-
blocks that are 2^i apart, R = F_(f-1) ... F_0. Their product is block-diagonal again, in blocks of b 2^(f-1).

x is rotated and not W, and no matrix [k, k] is made. What turns x is Bat-Row's kernel (1.4), x_j + x_j (R_j - I), which
reads x once and writes x' once; blocks of 256 or more, and all else, are the library's. Saved for backward: x, and z
[T, d] where s is trained. The blocks are computed again from their parameters: k b numbers, against the T k of x.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype, calls, define_layer
from spectral_ops.core import checks
from spectral_ops.core.autograd import apply, apply_op, autocast_arguments, backward_pass, fresh, rows, shaped, wanted
from spectral_ops.functional.bat import bat_mix_backward_op, bat_mix_op
from spectral_ops.functional.cayley import cayley_backward_op, cayley_forward_op

__all__ = ["rotate", "rotation_linear"]

_PIECES = ("bat_mix", "bat_mix_backward_", "cayley_forward", "cayley_backward")
WIDE = 256  # from this side of a block on, the library's products outrun the kernel


# --- the blocks of R from their parameters ----------------------------------------------------------------------------


def block_size(blocks: torch.Tensor) -> int:
    """b of the triangles [n, b(b-1)/2], or of factors [f, n, b, b] the side of their product's blocks."""
    if blocks.dim() == 4:
        return blocks.shape[-1] << (blocks.shape[0] - 1)
    return (1 + math.isqrt(1 + 8 * blocks.shape[1])) // 2


def _skew(triangles: torch.Tensor) -> torch.Tensor:
    b = block_size(triangles)
    K = triangles.new_zeros(triangles.shape[0], b, b)
    row, column = torch.triu_indices(b, b, 1, device=triangles.device)
    K[:, row, column] = triangles
    return K - K.mT


def _coefficients(terms: int) -> list[int]:
    """Of I, K, K², ... in PEFT's series."""
    if terms <= 2:
        return [1, 2][: max(terms, 1)]
    return [1, *[2] * max(terms - 2, 2), 1]


def _series(K: torch.Tensor, terms: int) -> list[torch.Tensor]:
    """Horner's partial sums P_i = c_i I + K P_(i+1), from the last, c I; the first is R."""
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    *rest, last = _coefficients(terms)
    sums = [(last * eye).expand_as(K)]
    for c in reversed(rest):
        sums.append(torch.baddbmm(c * eye, K, sums[-1]) if len(sums) > 1 else last * K + c * eye)
    return sums


def _turned(M: torch.Tensor, R: torch.Tensor, i: int) -> torch.Tensor:
    """M [z, a, B] times factor i, given as blocks R [n, b, b]."""
    z, a, B = M.shape
    Q, h = 1 << i, R.shape[-1] // 2
    M, R = M.view(z, a, -1, 2, Q, h), R.reshape(z, -1, Q, 2, h, 2, h)
    return torch.einsum("zascqh,zsqchde->zasdqe", M, R).reshape(z, a, B)


def _turn_gradient(M: torch.Tensor, dN: torch.Tensor, R: torch.Tensor, i: int) -> torch.Tensor:
    """The gradient of those blocks, from that of the product."""
    z, a, _ = M.shape
    M, dN = (t.reshape(z, a, -1, 2, 1 << i, R.shape[-1] // 2) for t in (M, dN))
    return torch.einsum("zascqh,zasdqe->zsqchde", M, dN).reshape(R.shape)


def _products(factors: torch.Tensor) -> list[torch.Tensor]:
    """I, F_(f-1), F_(f-1) F_(f-2), ..., R as blocks [k/B, B, B], of the orthogonal factors [f, n, b, b]."""
    f, n, b, _ = factors.shape
    B = b << (f - 1)
    eye = torch.eye(B, dtype=factors.dtype, device=factors.device)
    products = [eye.expand(n * b // B, B, B)]
    for i in reversed(range(f)):
        products.append(_turned(products[-1], factors[i], i))
    return products


def _rotations(blocks: torch.Tensor, terms: int) -> list[torch.Tensor]:
    """What R is made of in at least float32, and last R itself as blocks [n, B, B]."""
    blocks = blocks.to(accumulate_dtype(blocks.dtype))
    if blocks.dim() == 2:
        K = _skew(blocks)
        return [K, *_series(K, terms)] if terms else [cayley_forward_op(K)]
    Q = cayley_forward_op(blocks.flatten(0, 1))
    return [Q] if len(blocks) == 1 else [Q, *_products(Q.view(blocks.shape))]


def _rotations_gradient(blocks: torch.Tensor, terms: int, made: list[torch.Tensor], dR: torch.Tensor) -> torch.Tensor:
    """The gradient of their parameters, in those's dtype, from that of the blocks of R, and what R was made of."""
    first, *sums = made
    if blocks.dim() == 4:
        Q, dQ = first, dR
        if sums:
            factors, dQ = Q.view(blocks.shape), torch.empty_like(Q).view(blocks.shape)
            for i, before in enumerate(reversed(sums[:-1])):
                dQ[i] = _turn_gradient(before, dR, factors[i], i)
                dR = _turned(dR, factors[i].mT, i)
        return cayley_backward_op(Q, dQ.reshape(Q.shape)).view(blocks.shape).to(blocks.dtype)
    if sums:
        K, dK, dP = first, torch.zeros_like(first), dR
        for P in reversed(sums[1:-1]):
            dK.baddbmm_(dP, P.mT)
            dP = K.mT @ dP
        if len(sums) > 1:  # the last sum is a multiple of I
            dK.add_(dP, alpha=_coefficients(terms)[-1])
    else:
        dK = cayley_backward_op(first, dR)
    row, column = torch.triu_indices(*dK.shape[1:], 1, device=dK.device)
    return (dK[:, row, column] - dK[:, column, row]).to(blocks.dtype)


def _change(R: torch.Tensor, k: int) -> torch.Tensor:
    """(R_j - I)ᵀ [k/B, B, B], as Bat-Row's kernel takes it."""
    change = R.mT.clone(memory_format=torch.contiguous_format)
    change.diagonal(dim1=1, dim2=2).sub_(1)
    return change.expand(k // R.shape[-1], -1, -1).contiguous()


def _by_library(x: torch.Tensor, change: torch.Tensor) -> bool:
    """A narrower x keeps the kernel, which takes the blocks in float32."""
    return change.shape[-1] >= WIDE and x.dtype == change.dtype


def _turn(x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """x R [T, k]."""
    if not _by_library(x, change):
        return bat_mix_op(x, change)[0]
    y = x.new_empty(x.shape)
    for x_j, y_j, C in zip(*(t.split(change.shape[-1], 1) for t in (x, y)), change, strict=True):
        torch.addmm(x_j, x_j, C.t(), out=y_j)
    return y


def _turn_back(g: torch.Tensor, x: torch.Tensor | None, change: torch.Tensor, need_x: bool) -> torch.Tensor | None:
    """g becomes g Rᵀ where need_x; the gradient of ``change`` where x is given."""
    B = change.shape[-1]
    if not _by_library(g, change):
        return bat_mix_backward_op(g, g.new_zeros(g.shape[0], B), g if x is None else x, change, need_x, x is not None)
    dC = None if x is None else torch.empty_like(change)
    for j, (g_j, C) in enumerate(zip(g.split(B, 1), change, strict=True)):
        if x is not None:
            torch.mm(g_j.t(), x[:, j * B : (j + 1) * B], out=dC[j])
        if need_x:
            g_j.add_(g_j @ C)
    return dC


# --- layers ----------------------------------------------------------------------------------------------------------


def _forward_fake(x, weight, blocks, scale, bias, terms, keep):
    y = x.new_empty(*x.shape[:-1], x.shape[-1] if weight is None else weight.shape[0])
    return y, x.new_empty((math.prod(x.shape[:-1]), y.shape[-1]) if keep else (0,))


@define_layer(
    "rotation_linear_forward(Tensor x, Tensor? weight, Tensor blocks, Tensor? scale, Tensor? bias, int terms,"
    " bool keep) -> (Tensor, Tensor)",
    fake=_forward_fake,
    pieces=_PIECES,
)
def rotation_linear_forward_op(x, weight, blocks, scale, bias, terms, keep):
    """y [..., d], and z [T, d] where ``keep`` asks for it; without a weight x' [..., k]."""
    turned = _turn(rows(x), _change(_rotations(blocks, terms)[-1], x.shape[-1]))
    if weight is None:
        return shaped(turned, x), x.new_empty(0)
    if scale is None:
        return shaped(F.linear(turned, weight, bias), x), x.new_empty(0)
    z, scale = turned @ weight.t(), scale.to(x.dtype)
    y = z * scale if keep else z.mul_(scale)
    return shaped(y if bias is None else y.add_(bias), x), z if keep else x.new_empty(0)


@define_layer(
    "rotation_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor blocks, Tensor? scale, Tensor? z, int terms,"
    " int needs) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda dy, x, weight, blocks, scale, z, terms, needs: wanted(
        dy, needs, dy.shape if weight is None else (*dy.shape[:-1], weight.shape[1]), blocks, scale, dy.shape[-1:]
    ),
    pieces=_PIECES,
)
def rotation_linear_backward_op(dy, x, weight, blocks, scale, z, terms, needs):
    """dx [..., k], dblocks, dscale, db; empty [0] where ``needs`` has no bit. x is read for dblocks, z for dscale."""
    need_x, need_blocks, need_scale, need_bias = (bool(needs >> bit & 1) for bit in range(4))
    dy2, acc = rows(dy), accumulate_dtype(dy.dtype)
    dx = d_blocks = d_scale = db = dy
    if need_scale:
        d_scale = (dy2 * z).sum(0, dtype=acc).to(scale.dtype)
    if need_x or need_blocks:
        dz = dy2 if scale is None else dy2 * scale.to(dy.dtype)
        g = dz.clone(memory_format=torch.contiguous_format) if weight is None else dz @ weight
        made = _rotations(blocks, terms)
        change = _change(made[-1], g.shape[1])
        dC = _turn_back(g, rows(x) if need_blocks else None, change, need_x)
        if need_x:
            dx = g.reshape(*dy.shape[:-1], g.shape[1])
        if need_blocks:
            dR = dC.sum(0, keepdim=True) if blocks.dim() == 2 and len(blocks) == 1 else dC
            d_blocks = _rotations_gradient(blocks, terms, made, dR.mT)
    if need_bias:
        db = dy2.sum(0, dtype=acc).to(dy.dtype)
    return fresh(dy, needs, dx, d_blocks, d_scale, db)


class RotationFunction(Function):
    """Over a weight, or x' alone. Saves x, and z where the scale is trained."""

    @staticmethod
    def forward(ctx, x, weight, blocks, scale, bias, terms):
        keep = scale is not None and ctx.needs_input_grad[3]
        y, z = rotation_linear_forward_op(x, weight, blocks, scale, bias, terms, keep)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, blocks, scale, z if keep else None)
        ctx.terms = terms
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, blocks, scale, z = ctx.saved_tensors
        need_x, _, need_blocks, need_scale, need_bias, _ = ctx.needs_input_grad
        needs = need_x | need_blocks << 1 | need_scale << 2 | need_bias << 3
        found = rotation_linear_backward_op(dy, x, weight, blocks, scale, z, ctx.terms, needs)
        dx, d_blocks, d_scale, db = (t if needs >> bit & 1 else None for bit, t in enumerate(found))
        return dx, None, d_blocks, d_scale, db, None


def linear(x, weight, blocks, scale, bias, terms):
    """:func:`rotation_linear`, or without a weight :func:`rotate`, past its checks."""
    if torch.is_grad_enabled():
        return apply(RotationFunction, x, x, weight, blocks, scale, bias, terms)
    return apply_op(rotation_linear_forward_op, x, x, weight, blocks, scale, bias, terms, False)[0]


# --- public functions ------------------------------------------------------------------------------------------------


def _check(x, blocks, terms):
    checks.tensor("blocks", blocks, "[n, b(b-1)/2] or [f, n, b, b]")
    checks.integer("terms", terms, 0, None, "of the series; 0 is Cayley's transform itself")
    b, k = block_size(blocks) if blocks.dim() in (2, 4) and 0 not in blocks.shape[:-1] else 0, x.shape[-1]
    if blocks.dim() == 2:
        fits = b * (b - 1) // 2 == blocks.shape[1] and (
            b * len(blocks) == k or (len(blocks) == 1 and k % max(b, 1) == 0)
        )
    else:
        n, size = blocks.shape[1:3] if b else (0, 0)
        fits = b and size == blocks.shape[3] and n * size == k and k % b == 0 and (len(blocks) == 1 or size % 2 == 0)
    if not fits:
        raise ValueError(
            f"blocks: got {checks.describe(blocks)}, wanted triangles [n, b(b-1)/2], n b = in_features ({k}) or n = 1;"
            " or butterfly factors [f, n, b, b], n b = in_features, a multiple of b 2^(f-1), with b even for f > 1"
        )
    if blocks.dim() == 4 and terms:
        raise ValueError(f"terms: got {terms} with butterfly factors, wanted 0 (Cayley's transform)")
    checks.device("x", x, blocks=blocks)
    checks.no_narrowing(x, blocks=blocks)


@calls(rotation_linear_forward_op, rotation_linear_backward_op)
def rotation_linear(x, weight, blocks, bias=None, *, scale=None, terms=0):
    """Linear layer whose input is rotated block by block: y = s * (x R Wᵀ) + b.

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (under autocast both are cast).
        blocks: the skew parameters, trained: upper triangles [n, b(b-1)/2], row by row, n b = k (OFT; n = 1: one block
            for all), or squares [f, n, b, b] of f butterfly factors (BOFT), of which the skew part counts. float32
            allowed over a narrower x.
        bias: [d] or None, in x's dtype; may be trainable.
        scale: s [d] or None; trained, float32 allowed over a narrower x.
        terms: 0 for Cayley's transform, else the terms of the series that PEFT cuts it to (triangles only).

    Returns y [..., d] in x's dtype. Saves x for backward, and x R Wᵀ where the scale is trained.
    Raises TypeError/ValueError that name the argument. METHODS 1.18; OFT, arXiv:2306.07280; BOFT, arXiv:2311.06243.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    _check(x, blocks, terms)
    if scale is not None:
        checks.vector("scale", scale, weight.shape[0], "out_features")
        checks.device("x", x, scale=scale)
        checks.no_narrowing(x, scale=scale)
    return linear(x, weight, blocks, scale, bias, terms)


@calls(rotation_linear_forward_op, rotation_linear_backward_op)
def rotate(x, blocks, *, terms=0):
    """x R [..., k] for a layer that somebody else computes; the arguments are those of :func:`rotation_linear`."""
    checks.tensor("x", x, "[..., in_features]")
    if x.dim() < 1:
        raise ValueError(f"x: got {checks.describe(x)}, wanted at least one dimension [..., in_features]")
    _check(x, blocks, terms)
    return linear(x, None, blocks, None, None, terms)
