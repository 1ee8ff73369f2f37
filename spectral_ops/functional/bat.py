"""Bat: a block affine transformation of the frozen weight (METHODS 1.4).

    col (the default, PEFT's)   W'(o,j) = W(o,j) (I + B_o) + B_o      B [d/r, r, r], one block per block-row o
    row                         W'(o,j) = W(o,j) (I + C_j) + C_j      C [k/r, r, r], one block per block-column j
    y = x W'ᵀ + b

Col, T >= r: one pass writes W' into a buffer shared by all layers, then the library's product. Backward writes W' anew
for dx = dy W', and with tiles G of dyᵀx:  dB_o = Σ_j W(o,j)ᵀ G(o,j) + G(o,j); no gradient [d, k] reaches memory.
Col, T < r: x meets B first, and W is read once:
    y_o = Σ_j (x_j + x_j B_oᵀ) W(o,j)ᵀ + x_j B_oᵀ        dx_j = Σ_o p + (p + dy_o) B_o,  p = dy_o W(o,j)
Row needs no W' at all:
    z_j = x_j + x_j C_jᵀ     s = Σ_j x_j C_jᵀ     y = z Wᵀ + tile(s) + b
    g = dy W     q = Σ_o dy_o     v_j = g_j + q     dx_j = g_j + v_j C_j     dC_j = v_jᵀ x_j
Saved for backward: x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, calls, define, define_layer, nbytes
from spectral_ops.core import checks
from spectral_ops.core.autograd import (
    apply,
    apply_op,
    autocast_arguments,
    backward_pass,
    fresh,
    gradient_tiles,
    mm,
    rows,
    shaped,
    through,
    wanted,
)
from spectral_ops.core.scratch import scratch
from spectral_ops.functional.blocksum import block_sum_op, block_tile_op

__all__ = ["bat_linear", "bat_weight"]


# --- operators -------------------------------------------------------------------------------------------------------


def _blocks(weight: torch.Tensor, r: int) -> torch.Tensor:
    """weight [d, k] as [d/r, r, k/r, r]: entry (o, i, j, c) is row i, column c of block W(o, j)."""
    return weight.reshape(weight.shape[0] // r, r, weight.shape[1] // r, r)


def _changed(weight, bat, row, delta=False):
    """W' (delta: W' - W) [d, k] in at least float32."""
    acc = accumulate_dtype(weight.dtype)
    W, B = _blocks(weight.to(acc), bat.shape[-1]), bat.to(acc)
    if row:
        change = torch.einsum("oijc,jce->oije", W, B) + B.transpose(0, 1)
    else:
        change = torch.einsum("oijc,oce->oije", W, B) + B.unsqueeze(2)
    return (change if delta else W + change).reshape(weight.shape)


def _weight_cost(out, weight, bat, row, delta):
    return Cost(2 * weight.numel() * (bat.shape[-1] + 1), nbytes(out, weight, bat))


def _block_samples(s):
    """W whose sides are multiples of r, and blocks of its block-rows and block-columns."""
    n, m = max(s.d // max(s.r, 1), 1), max(s.k // max(s.r, 1), 1)
    W = s.randn(n * s.r, m * s.r, scale=max(m * s.r, 1) ** -0.5)
    return W, s.randn(n, s.r, s.r, scale=0.1), s.randn(m, s.r, s.r, scale=0.1)


def _weight_samples(s):
    W, col, row = _block_samples(s)
    yield torch.zeros_like(W), W, col.to(s.acc), False, False
    yield torch.zeros_like(W), W, col, False, False
    yield torch.zeros_like(W), W, row, True, False
    yield s.zeros(*W.shape, dtype=s.acc), s.rows(W), col.to(s.acc), False, True
    yield torch.zeros_like(W), s.transposed(W), col.to(s.acc), False, False


@define(
    "bat_weight_(Tensor(a!) out, Tensor weight, Tensor bat, bool row, bool delta) -> ()",
    fake=lambda out, weight, bat, row, delta: None,
    cost=_weight_cost,
    samples=_weight_samples,
)
def bat_weight_op(out, weight, bat, row, delta):
    """out [d, k] gets W' (delta: W' - W) of weight [d, k] and bat [n, r, r], n = d/r (row: k/r).

    Products of blocks are made in at least float32 from unrounded factors, and the result is rounded once, to out's
    dtype: weight's own, or float32. bat has any floating dtype.
    """
    out.copy_(_changed(weight, bat, row, delta))


def _matmul_cost(x, weight, bat, transpose):
    T, out = x.shape[0], weight.shape[1 if transpose else 0]
    return Cost(4 * T * weight.numel(), nbytes(x, weight, bat) + T * out * x.element_size())


def _matmul_samples(s):
    W, col, _ = _block_samples(s)
    x, dy = (s.randn(s.T, n) for n in W.shape[::-1])
    yield x[: max(s.r - 1, 1)], W, col.to(s.acc), False
    yield x, W, col, False
    yield dy, W, col.to(s.acc), True
    yield s.rows(x), s.transposed(W), col.to(s.acc), False


@define(
    "bat_matmul(Tensor x, Tensor weight, Tensor bat, bool transpose) -> Tensor",
    fake=lambda x, weight, bat, transpose: x.new_empty(x.shape[0], weight.shape[1 if transpose else 0]),
    cost=_matmul_cost,
    samples=_matmul_samples,
)
def bat_matmul_op(x, weight, bat, transpose):
    """x W'ᵀ [T, d] from x [T, k] (transpose: x W' [T, k] from x [T, d]) for Bat-Col, without W' in memory.

    Meant for T < r. Nothing is rounded between x, W (one dtype), bat (any) and the result in x's dtype.
    """
    acc = accumulate_dtype(x.dtype)
    changed = _changed(weight, bat, False)
    return (x.to(acc) @ (changed if transpose else changed.t())).to(x.dtype)


def _contract_cost(dB, weight, G):
    return Cost(weight.numel() * (2 * dB.shape[-1] + 1), nbytes(dB, weight, G))


def _contract_samples(s):
    W, col, _ = _block_samples(s)
    yield torch.zeros_like(col, dtype=s.acc), W, s.randn(*W.shape)
    yield torch.zeros_like(col, dtype=s.acc), s.transposed(W), s.randn(*W.shape).to(s.acc)  # Triton keeps 16 bits of it


@define(
    "bat_contract_(Tensor(a!) dB, Tensor weight, Tensor G) -> ()",
    fake=lambda dB, weight, G: None,
    cost=_contract_cost,
    samples=_contract_samples,
)
def bat_contract_op(dB, weight, G):
    """dB [n, r, r] gets Σ_j W(o,j)ᵀ G(o,j) + G(o,j) for weight and G [n r, k]; dB float32 (float64 for float64), G in
    weight's dtype or dB's."""
    acc, r = dB.dtype, dB.shape[-1]
    W, G = _blocks(weight.to(acc), r), _blocks(G.to(acc), r)
    dB.copy_(torch.einsum("oijc,oije->oce", W, G) + G.sum(2))


def _mix_cost(x, bat):
    T, r = x.shape[0], bat.shape[-1]
    return Cost(2 * x.numel() * (r + 1), 2 * nbytes(x) + nbytes(bat) + T * r * x.element_size())


def _mix_samples(s):
    _, _, row = _block_samples(s)
    x = s.randn(s.T, row.shape[0] * s.r)
    yield x, row.to(s.acc)
    yield x, row
    yield s.rows(x), row.to(s.acc)


@define(
    "bat_mix(Tensor x, Tensor bat) -> (Tensor, Tensor)",
    fake=lambda x, bat: (x.new_empty(x.shape), x.new_empty(x.shape[0], bat.shape[-1])),
    cost=_mix_cost,
    samples=_mix_samples,
)
def bat_mix_op(x, bat):
    """z [T, k], z_j = x_j + x_j C_jᵀ, and s [T, r] = Σ_j x_j C_jᵀ, in x's dtype; x [T, k], bat C [k/r, r, r]."""
    acc, (n, r, _) = accumulate_dtype(x.dtype), bat.shape
    blocks = x.to(acc).reshape(x.shape[0], n, r)
    u = torch.einsum("tjc,jec->tje", blocks, bat.to(acc))
    return (blocks + u).reshape(x.shape).to(x.dtype), u.sum(1).to(x.dtype)


def _mix_backward_cost(g, q, x, bat, need_g, need_dC):
    products = int(need_g) + int(need_dC)
    moved = nbytes(g) * (2 if need_g else 1) + nbytes(q, bat) + (nbytes(x) + nbytes(bat) if need_dC else 0)
    return Cost(2 * g.numel() * bat.shape[-1] * products + 2 * g.numel(), moved)


def _mix_backward_samples(s):
    _, _, row = _block_samples(s)
    x = s.randn(s.T, row.shape[0] * s.r)
    yield s.randn(*x.shape), s.h, x, row.to(s.acc), True, True
    yield s.randn(*x.shape), s.h, x, row, True, True
    yield s.randn(*x.shape), s.h, x, row.to(s.acc), True, False
    yield s.randn(*x.shape), s.h, s.rows(x), row, False, True


@define(
    "bat_mix_backward_(Tensor(a!) g, Tensor q, Tensor x, Tensor bat, bool need_g, bool need_dC) -> Tensor",
    fake=lambda g, q, x, bat, need_g, need_dC: g.new_empty(
        bat.shape if need_dC else (0,), dtype=accumulate_dtype(g.dtype)
    ),
    cost=_mix_backward_cost,
    samples=_mix_backward_samples,
)
def bat_mix_backward_op(g, q, x, bat, need_g, need_dC):
    """With v_j = g_j + q, q [T, r]: g [T, k] becomes g_j + v_j C_j (need_g), and dC_j = v_jᵀ x_j [k/r, r, r] is
    returned in float32 (float64 for float64), or empty [0]. g, q and x in one dtype, bat in any."""
    acc, (n, r, _) = accumulate_dtype(g.dtype), bat.shape
    blocks = g.to(acc).reshape(g.shape[0], n, r)
    v = blocks + q.to(acc).unsqueeze(1)
    dC = torch.einsum("tjc,tje->jce", v, x.to(acc).reshape(v.shape)) if need_dC else g.new_empty(0, dtype=acc)
    if need_g:
        g.copy_((blocks + torch.einsum("tjc,jce->tje", v, bat.to(acc))).reshape(g.shape))
    return dC


# --- layers ----------------------------------------------------------------------------------------------------------

_PIECES = (
    "bat_weight_", "bat_matmul", "bat_contract_", "bat_mix", "bat_mix_backward_", "block_sum", "block_tile_",
)  # fmt: skip


def _product(x, weight, bat, bias, transpose, exact):
    """x W'ᵀ + b (transpose: x W') [T, n] for Bat-Col.

    exact matters where x is narrower than float32: W' stays float32. On a GPU W' - W and W are multiplied apart, so
    that TF32 does not round the change away. On a CPU W' is multiplied whole: there x Wᵀ by itself would be rounded.
    """
    if x.shape[0] < bat.shape[-1]:
        y = bat_matmul_op(x, weight, bat, transpose)
        return y if bias is None else y.add_(bias)
    wide = accumulate_dtype(weight.dtype)
    exact = exact and weight.dtype != wide
    apart = exact and x.is_cuda
    with scratch.lease(weight.shape, wide if exact else weight.dtype, weight.device) as changed:
        bat_weight_op(changed, weight, bat, False, apart)
        if not exact:
            return x @ changed if transpose else F.linear(x, changed, bias)
        y = x.to(wide) @ (changed if transpose else changed.t())
        if apart:
            y += mm(x, weight if transpose else weight.t(), wide)
        return (y if bias is None else y.add_(bias)).to(x.dtype)


def _block_gradient(dy, x, weight, r):
    """dB [d/r, r, r] in at least float32 from tiles of dyᵀx; dy [T, d], x [T, k]."""
    dB = weight.new_empty(weight.shape[0] // r, r, r, dtype=accumulate_dtype(weight.dtype))
    for start, G in gradient_tiles(dy, x, r):
        stop = start + G.shape[0]
        bat_contract_op(dB[start // r : stop // r], weight[start:stop], G)
    return dB


@define_layer(
    "bat_linear_forward(Tensor x, Tensor weight, Tensor bat, Tensor? bias, bool row, bool exact) -> Tensor",
    fake=lambda x, weight, bat, bias, row, exact: x.new_empty(*x.shape[:-1], weight.shape[0]),
    pieces=_PIECES,
)
def bat_linear_forward_op(x, weight, bat, bias, row, exact):
    """y [..., d] = x W'ᵀ + b, or by row (x + u) Wᵀ + tile(Σ_j u_j) + b, u_j = x_j C_jᵀ. W' lives in scratch only."""
    if not row:
        return shaped(_product(rows(x), weight, bat, bias, False, exact), x)
    z, s = bat_mix_op(rows(x), bat)
    y = F.linear(z, weight, bias)
    block_tile_op(y, s, None, None, 0.0, True)
    return shaped(y, x)


@define_layer(
    "bat_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor bat, bool row, bool exact, int needs)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda dy, x, weight, bat, row, exact, needs: wanted(
        dy, needs, (*dy.shape[:-1], weight.shape[1]), bat, dy.shape[-1:]
    ),
    pieces=_PIECES,
)
def bat_linear_backward_op(dy, x, weight, bat, row, exact, needs):
    """dx [..., k], dB in bat's dtype and db; empty [0] where ``needs`` has no bit. x is read for dB alone."""
    dy2, need_x, need_bat = rows(dy), bool(needs & 1), bool(needs & 2)
    dx = dB = db = dy
    if row and (need_x or need_bat):
        dx = dy2 @ weight
        q = block_sum_op(dy2, bat.shape[-1], None, None, 0.0)
        dB = bat_mix_backward_op(dx, q, rows(x) if need_bat else dx, bat, need_x, need_bat)
    else:
        if need_x:
            dx = _product(dy2, weight, bat, None, True, exact)
        if need_bat:
            dB = _block_gradient(dy2, rows(x), weight, bat.shape[-1])
    if need_x:
        dx = dx.reshape(*dy.shape[:-1], weight.shape[1])
    if need_bat:
        dB = dB.to(bat.dtype)
    if needs & 4:
        db = dy2.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
    return fresh(dy, needs, dx, dB, db)


@define_layer(
    "bat_weight_forward(Tensor weight, Tensor bat, bool row) -> Tensor",
    fake=lambda weight, bat, row: weight.new_empty(weight.shape),
    pieces=("bat_weight_",),
)
def bat_weight_forward_op(weight, bat, row):
    """W' [d, k] in weight's dtype."""
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    bat_weight_op(out, weight, bat, row, False)
    return out


@define_layer(
    "bat_weight_backward(Tensor dW, Tensor weight, Tensor bat, bool row) -> Tensor",
    fake=lambda dW, weight, bat, row: bat.new_empty(bat.shape),
    pieces=("bat_contract_",),
)
def bat_weight_backward_op(dW, weight, bat, row):
    """The blocks' gradient, in their dtype, from that of W' [d, k]."""
    if row:  # blocks of one column, side by side, are then a block-row
        weight, dW = (_blocks(t, bat.shape[-1]).permute(2, 1, 0, 3).reshape(t.shape[::-1]) for t in (weight, dW))
    dB = bat.new_empty(bat.shape, dtype=accumulate_dtype(weight.dtype))
    bat_contract_op(dB, weight, dW.contiguous())
    return dB.to(bat.dtype)


# --- autograd --------------------------------------------------------------------------------------------------------


class BatFunction(Function):
    """y = x W'ᵀ + b in either mode. Saves x."""

    @staticmethod
    def forward(ctx, x, weight, bat, bias, row, exact):
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, bat)
        ctx.options = row, exact
        return bat_linear_forward_op(x, weight, bat, bias, row, exact)

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, bat = ctx.saved_tensors
        need_x, _, need_bat, need_bias, *_ = ctx.needs_input_grad
        dx, dB, db = bat_linear_backward_op(
            dy, x, weight, bat, *ctx.options, need_x | need_bat << 1 | need_bias << 2
        )  # fmt: skip
        return dx if need_x else None, None, dB if need_bat else None, db if need_bias else None, None, None

    @staticmethod
    def twice(ctx, dy):
        x, weight, bat = ctx.saved_tensors
        if x is None:
            raise RuntimeError("create_graph: got a second derivative where bat is frozen, for which x is not kept")
        wide = accumulate_dtype(x.dtype)
        y = (x.to(wide) @ _changed(weight, bat, ctx.options[0]).t()).to(x.dtype)
        bias = x.new_zeros(weight.shape[0], requires_grad=ctx.needs_input_grad[3])
        return through(ctx, y + bias, (x, weight, bat, bias), dy)


class BatWeightFunction(Function):
    """W' [d, k], differentiable in its blocks."""

    @staticmethod
    def forward(ctx, weight, bat, row):
        ctx.save_for_backward(weight, bat)
        ctx.row = row
        return bat_weight_forward_op(weight, bat, row)

    @staticmethod
    @backward_pass
    def backward(ctx, dW):
        weight, bat = ctx.saved_tensors
        return None, bat_weight_backward_op(dW, weight, bat, ctx.row), None

    @staticmethod
    def twice(ctx, dW):
        weight, bat = ctx.saved_tensors
        return through(ctx, _changed(weight, bat, ctx.row).to(weight.dtype), (weight, bat), dW)


def linear(x, weight, bat, bias, row, exact):
    """:func:`bat_linear` past its checks, for layers that know their shapes."""
    if torch.is_grad_enabled():
        return apply(BatFunction, x, x, weight, bat, bias, row, exact)
    return apply_op(bat_linear_forward_op, x, x, weight, bat, bias, row, exact)


# --- public functions ------------------------------------------------------------------------------------------------


def _check_bat(weight: torch.Tensor, bat: torch.Tensor, mode: str) -> None:
    if mode not in ("col", "row"):
        raise ValueError(f'mode: got {mode!r}, wanted "col" or "row"')
    side, features = ("out_features", weight.shape[0]) if mode == "col" else ("in_features", weight.shape[1])
    checks.tensor("bat", bat, f"[{side} / r, r, r]", 3)
    n, r, columns = bat.shape
    if r < 1 or r != columns or n * r != features:
        raise ValueError(f"bat: got {checks.describe(bat)}, wanted [n, r, r] with n r = {side} ({features})")
    if weight.shape[0] % r or weight.shape[1] % r:
        raise ValueError(
            f"bat: got blocks of {r}, wanted a size that divides out_features and in_features {list(weight.shape)}"
        )
    checks.device("weight", weight, bat=bat)
    checks.no_narrowing(weight, bat=bat)


@calls(bat_weight_forward_op, bat_weight_backward_op)
def bat_weight(weight, bat, *, mode="col"):
    """The transformed weight W' [d, k]: W(o,j)(I + B_o) + B_o per r x r block (mode="row": C_j in place of B_o).

    weight [d, k], frozen; bat [d/r, r, r] (row: [k/r, r, r]), r dividing d and k; float32 allowed over a narrower
    weight. Returns W' in weight's dtype, computed in at least float32 and rounded once; differentiable in ``bat``. In
    bf16 that rounding takes a third of a change of 1e-4: see ``exact`` of :func:`bat_linear`. Raises
    TypeError/ValueError naming the argument. METHODS 1.4; Bone/Bat, arXiv:2409.15371.
    """
    checks.tensor("weight", weight, "[out_features, in_features]", 2)
    checks.frozen(weight=weight)
    _check_bat(weight, bat, mode)
    return apply(BatWeightFunction, weight, weight, bat, mode == "row")


@calls(bat_linear_forward_op, bat_linear_backward_op)
def bat_linear(x, weight, bat, bias=None, *, mode="col", exact=False):
    """Bat linear layer: y = x W'ᵀ + b with W' = bat_weight(weight, bat, mode=mode).

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (autocast casts both).
        bat: mode "col": B [d/r, r, r]; mode "row": C [k/r, r, r]; r divides d and k. float32 is allowed over a narrower
            x; the gradient comes back in bat's dtype.
        bias: [d] or None; may be trainable.
        mode: "col" (PEFT's ``init_weights="bat"``) or "row", which never forms W' and is cheaper.
        exact: over bf16 or fp16, keep W' - W in float32 instead of rounding W' (which loses a third of a change of 1e-4
            in bf16). Costs a float32 product. No effect in "row", which rounds activations only, or over float32.

    Returns y [..., d] in x's dtype. Saves x alone; W' is written into a shared buffer, again in backward.
    Raises TypeError/ValueError that name the argument. METHODS 1.4; Bone/Bat, arXiv:2409.15371.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    _check_bat(weight, bat, mode)
    return linear(x, weight, bat, bias, mode == "row", bool(exact))
