"""Sparse delta: RoSA's operator (METHODS 1.5).

    y = x (W + S)ᵀ + γ h Bᵀ + b      S [d, k] sparse, in CSR; h = drop(x) Aᵀ (no dropout, no scale on S)
    dS = (dyᵀx) at the pattern       dx = dy (W + S) + mask * (u A)

Three routes carry S: *spmm* multiplies by it beside W, unrounded; *scatter* adds it to a copy of W in a shared buffer;
*resident* writes it into W itself (see resident.py). Three give its gradient: *sampled* computes only the products at
the pattern; *dense* takes them out of tiles of dyᵀx; *compact* does so among the rows and columns that hold any.
routes.py chooses. Saved for backward: x, and h [T, r].
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, define, nbytes
from spectral_ops.functional import checks, dropout, routes
from spectral_ops.functional.common import (
    apply,
    autocast_arguments,
    backward_pass,
    draw_seed,
    gradient_tiles,
    overwritable,
    rows,
    shaped,
    tokens,
)
from spectral_ops.functional.lowrank import A_gradient, lowrank_backward_op
from spectral_ops.functional.resident import Claim, residents
from spectral_ops.functional.scratch import scratch
from spectral_ops.functional.sparse import CSR, Pattern

__all__ = ["CSR", "csr_add", "csr_sddmm", "csr_spmm", "rosa_linear", "rosa_update"]


# --- operators -------------------------------------------------------------------------------------------------------
# A matrix [d, k] is values [nnz] in any floating dtype, row_offsets int32 [d + 1] and columns int32 [nnz], ascending
# and unique within each row: CSR.validate() has checked them, no operator does.


def _entries(row_offsets: torch.Tensor, count: int) -> torch.Tensor:
    """The row of each entry, for offsets that may start past 0 or end before ``count``; -1 and d outside."""
    entry = torch.arange(count, device=row_offsets.device, dtype=row_offsets.dtype)
    return torch.searchsorted(row_offsets, entry, right=True) - 1


def _scatter_cost(out, values, row_offsets, columns, accumulate):
    moved = values.numel() * out.element_size() * (2 if accumulate else 1)
    return Cost(values.numel() if accumulate else 0, moved + nbytes(values, row_offsets, columns))


@define(
    "csr_scatter_(Tensor(a!) out, Tensor values, Tensor row_offsets, Tensor columns, bool accumulate) -> ()",
    stem="csr",
    fake=lambda out, values, row_offsets, columns, accumulate: None,
    cost=_scatter_cost,
)
def csr_scatter_op(out, values, row_offsets, columns, accumulate):
    """out [d, k] at the pattern becomes values (accumulate: out + values, in at least float32), rounded once."""
    index = (_entries(row_offsets, columns.numel()), columns.long())
    if accumulate:
        values = out[index] + values.to(accumulate_dtype(out.dtype))
    out[index] = values.to(out.dtype)


def _gather_cost(out, dense, row_offsets, columns):
    return Cost(0, nbytes(out, row_offsets, columns) + out.numel() * dense.element_size())


@define(
    "csr_gather_(Tensor(a!) out, Tensor dense, Tensor row_offsets, Tensor columns) -> ()",
    stem="csr",
    fake=lambda out, dense, row_offsets, columns: None,
    cost=_gather_cost,
)
def csr_gather_op(out, dense, row_offsets, columns):
    """out [nnz] gets dense [n, k] at the entries of n rows, row_offsets [n + 1] being those rows' part of the offsets
    of a larger matrix: entries outside [row_offsets[0], row_offsets[n]) stay as they are. Any floating dtypes."""
    row = _entries(row_offsets, columns.numel())
    inside = (row >= 0) & (row < dense.shape[0])
    if dense.numel():
        taken = dense[row.clamp(0, dense.shape[0] - 1), columns.long()].to(out.dtype)
        out.copy_(torch.where(inside, taken, out))


def _spmm_cost(out, x, values, row_offsets, columns, permutation):
    flops = 2 * x.shape[0] * values.numel()
    return Cost(flops, 2 * nbytes(out) + nbytes(x, values, row_offsets, columns, permutation))


@define(
    "csr_spmm_(Tensor(a!) out, Tensor x, Tensor values, Tensor row_offsets, Tensor columns, Tensor? permutation) -> ()",
    stem="csr",
    fake=lambda out, x, values, row_offsets, columns, permutation: None,
    cost=_spmm_cost,
)
def csr_spmm_op(out, x, values, row_offsets, columns, permutation):
    """out [T, d] += x Sᵀ, x [T, k], in one dtype, summed in at least float32 and rounded once.

    Entry p has the value values[permutation[p]], or values[p] without one: so that dx = dy S reads the transposed
    pattern and the values as they are.
    """
    acc = accumulate_dtype(x.dtype)
    S = torch.zeros(row_offsets.numel() - 1, x.shape[1], dtype=acc, device=x.device)
    values = values if permutation is None else values[permutation.long()]
    S[_entries(row_offsets, columns.numel()), columns.long()] = values.to(acc)
    out.copy_(out.to(acc) + x.to(acc) @ S.t())


def _sddmm_cost(dy, x, row_offsets, columns):
    wide = accumulate_dtype(x.dtype).itemsize
    return Cost(2 * x.shape[0] * columns.numel(), nbytes(dy, x, row_offsets, columns) + columns.numel() * wide)


@define(
    "csr_sddmm(Tensor dy, Tensor x, Tensor row_offsets, Tensor columns) -> Tensor",
    stem="csr",
    fake=lambda dy, x, row_offsets, columns: x.new_empty(columns.numel(), dtype=accumulate_dtype(x.dtype)),
    cost=_sddmm_cost,
)
def csr_sddmm_op(dy, x, row_offsets, columns):
    """(dyᵀx) [nnz] at the pattern, dy [T, d], x [T, k] in one dtype; float32 (float64 for float64). Products elsewhere
    are not computed."""
    acc = accumulate_dtype(x.dtype)
    return (dy.to(acc).t() @ x.to(acc))[_entries(row_offsets, columns.numel()), columns.long()]


# --- gradient of S ---------------------------------------------------------------------------------------------------


def _gathered(dy, x, row_offsets, columns):
    """dS [nnz] out of tiles of dyᵀx, in at least float32."""
    out = x.new_empty(columns.numel(), dtype=accumulate_dtype(x.dtype))
    for start, G in gradient_tiles(dy, x):
        csr_gather_op(out, G, row_offsets[start : start + G.shape[0] + 1], columns)
    return out


def values_gradient(dy, x, pattern: Pattern, route: str):
    """dS [nnz] = (dyᵀx) at the pattern, float32 (float64 for float64), by the route asked for or, "auto", chosen."""
    if route == "auto":
        d, k, nnz = dy.shape[1], x.shape[1], pattern.columns.numel()
        active = (pattern.active_rows.numel(), pattern.active_columns.numel())
        route = routes.gradient_route(x.shape[0], d, k, nnz, *active, x.device.type, x.dtype)
    if route == "sampled":
        return csr_sddmm_op(dy, x, pattern.row_offsets, pattern.columns)
    if route == "dense":
        return _gathered(dy, x, pattern.row_offsets, pattern.columns)
    dy, x = dy.index_select(1, pattern.active_rows), x.index_select(1, pattern.active_columns)
    return _gathered(dy, x, pattern.compact_offsets, pattern.compact_columns)


# --- autograd --------------------------------------------------------------------------------------------------------


class CSRAddFunction(Function):
    """W + S as a new tensor, or in W itself."""

    @staticmethod
    def forward(ctx, weight, values, pattern, inplace):
        if inplace:
            ctx.mark_dirty(weight)
        out = weight if inplace else weight.clone(memory_format=torch.contiguous_format)
        csr_scatter_op(out, values, pattern.row_offsets, pattern.columns, True)
        ctx.pattern, ctx.dtype = pattern, values.dtype
        return out

    @staticmethod
    @backward_pass
    def backward(ctx, dW):
        dS = None
        if ctx.needs_input_grad[1]:
            dS = dW.new_empty(ctx.pattern.columns.numel(), dtype=ctx.dtype)
            csr_gather_op(dS, rows(dW), ctx.pattern.row_offsets, ctx.pattern.columns)
        return dW, dS, None, None


class CSRSpmmFunction(Function):
    """out + x Sᵀ in place on ``out`` [..., d], which None makes zeros; saves x."""

    @staticmethod
    def forward(ctx, out, x, values, pattern, gradient_route):
        if out is None:
            out = x.new_zeros(*x.shape[:-1], pattern.row_offsets.numel() - 1)
        else:
            ctx.mark_dirty(out)
        csr_spmm_op(tokens(out), rows(x), values, pattern.row_offsets, pattern.columns, None)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, values)
        ctx.pattern, ctx.route, ctx.x_shape = pattern, gradient_route, x.shape
        return out

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, values = ctx.saved_tensors
        need_out, need_x, need_values = ctx.needs_input_grad[:3]
        dx, dy2 = None, rows(dy)
        if need_x:
            dx = _spmm_input_gradient(dy2.new_zeros(dy2.shape[0], ctx.x_shape[-1]), dy2, values, ctx.pattern)
            dx = dx.reshape(ctx.x_shape)
        dS = values_gradient(dy2, rows(x), ctx.pattern, ctx.route).to(values.dtype) if need_values else None
        return dy if need_out else None, dx, dS, None, None


class CSRSddmmFunction(Function):
    """(dyᵀx) at the pattern, in the values' dtype."""

    @staticmethod
    def forward(ctx, dy, x, pattern, dtype):
        ctx.save_for_backward(dy, x)
        ctx.pattern = pattern
        return csr_sddmm_op(rows(dy), rows(x), pattern.row_offsets, pattern.columns).to(dtype)

    @staticmethod
    @backward_pass
    def backward(ctx, dS):
        dy, x = ctx.saved_tensors
        ddy = dx = None
        if ctx.needs_input_grad[0]:
            ddy = torch.zeros_like(rows(dy))
            csr_spmm_op(ddy, rows(x), dS.contiguous(), ctx.pattern.row_offsets, ctx.pattern.columns, None)
            ddy = ddy.reshape(dy.shape)
        if ctx.needs_input_grad[1]:
            dx = _spmm_input_gradient(torch.zeros_like(rows(x)), rows(dy), dS.contiguous(), ctx.pattern)
            dx = dx.reshape(x.shape)
        return ddy, dx, None, None


def _spmm_input_gradient(dx, dy, values, pattern: Pattern):
    """dx [T, k] += dy S, by the pattern's transpose, which was built once with it."""
    csr_spmm_op(dx, dy, values, pattern.column_offsets, pattern.rows, pattern.permutation)
    return dx


@contextmanager
def _with_delta(weight, values, pattern, route, claim):
    """W + S [d, k] rounded to W's dtype, for the duration of the block; W itself where the route is "spmm"."""
    if route == "spmm":
        yield weight
    elif route == "resident":
        with residents.holding(weight, values, pattern, claim):
            yield weight
    else:
        with scratch.lease(weight.shape, weight.dtype, weight.device) as total:
            total.copy_(weight)
            csr_scatter_op(total, values, pattern.row_offsets, pattern.columns, True)
            yield total


class RosaFunction(Function):
    """y = x (W + S)ᵀ + γ h Bᵀ + b; saves x and h."""

    @staticmethod
    def forward(ctx, x, weight, values, A, B, bias, seed, scale, p, pattern, route, gradient_route):
        x2, h = rows(x), None
        ctx.claim = Claim() if route == "resident" else None
        with _with_delta(weight, values, pattern, route, ctx.claim) as total:
            y = F.linear(x2, total, bias)
        if route == "spmm":
            csr_spmm_op(y, x2, values, pattern.row_offsets, pattern.columns, None)
        need_values, need_A, need_B = ctx.needs_input_grad[2:5]
        if A is not None:
            h = dropout.project(x2, A.to(x.dtype), seed, p)
            y.addmm_(h, B.to(x.dtype).t(), alpha=scale)
        # a resident weight changes between forward and backward by design, so its version must not be watched
        ctx.weight = weight if route == "resident" else None
        ctx.save_for_backward(
            x if need_values or need_A else None, None if route == "resident" else weight, values, A, B,
            h if need_B else None, seed,
        )  # fmt: skip
        ctx.scale, ctx.p, ctx.x_shape = scale, p, x.shape
        ctx.pattern, ctx.route, ctx.gradient_route = pattern, route, gradient_route
        return shaped(y, x)

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, values, A, B, h, seed = ctx.saved_tensors
        weight = ctx.weight if weight is None else weight
        need_x, _, need_values, need_A, need_B, need_bias = ctx.needs_input_grad[:6]
        dy2 = rows(dy)
        dx = dS = dA = dB = db = None
        if need_x:
            with _with_delta(weight, values, ctx.pattern, ctx.route, ctx.claim) as total:
                dx = dy2 @ total
            if ctx.route == "spmm":
                _spmm_input_gradient(dx, dy2, values, ctx.pattern)
        if A is not None and (need_x or need_A or need_B or need_bias):
            need_u = need_x or need_A
            h = dy2.new_empty(dy2.shape[0], A.shape[0]) if h is None else h  # unread when not saved
            u, dB, db, _, _ = lowrank_backward_op(
                dy2, h, B.to(dy2.dtype), ctx.scale, None, None, None, need_u, need_B, need_bias, False
            )
            dB = dB.to(B.dtype) if need_B else None
            db = db.to(dy.dtype) if need_bias else None
            if need_x:
                dx = dropout.lift_(dx, u, A.to(dx.dtype), seed, ctx.p)
            if need_A:
                dA = A_gradient(u, rows(x), seed, ctx.p, A.dtype)
        elif need_bias:
            db = dy2.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
        if need_values:
            dS = values_gradient(dy2, rows(x), ctx.pattern, ctx.gradient_route).to(values.dtype)
        dx = dx.reshape(ctx.x_shape) if need_x else None
        return dx, None, dS, dA, dB, db, None, None, None, None, None, None


# --- public functions ------------------------------------------------------------------------------------------------


def _check_csr(name: str, csr: CSR, like: torch.Tensor, like_name: str, d: int | None, k: int | None) -> Pattern:
    if not isinstance(csr, CSR):
        raise TypeError(f"{name}: got {checks.describe(csr)}, wanted a spectral_ops.CSR")
    checks.device(like_name, like, **{name: csr.values})
    pattern = csr.pattern
    for axis, size, what in ((0, d, "rows"), (1, k, "columns")):
        if size is not None and csr.shape[axis] != size:
            raise ValueError(f"{name}: got shape {list(csr.shape)}, wanted {size} {what}")
    checks.no_narrowing(like, **{name: csr.values})
    return pattern


def csr_add(weight, csr, *, inplace=False):
    """weight + S [d, k], rounded once to weight's dtype; differentiable in both.

    weight [d, k] floating point; csr a CSR of that shape, its values in any floating dtype (float64 exactly where
    weight is). inplace: in weight's own memory (which must not be a leaf that requires grad). METHODS 1.5.
    """
    checks.tensor("weight", weight, "[d, k]", 2)
    if inplace and weight.requires_grad and weight.is_leaf and torch.is_grad_enabled():
        raise ValueError("weight: got a leaf that requires grad, wanted one that may be changed in place")
    if inplace and any(step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)):
        raise ValueError(f"weight: got strides {weight.stride()}, wanted entries that share no memory")
    pattern = _check_csr("csr", csr, weight, "weight", *weight.shape)
    return CSRAddFunction.apply(weight, csr.ordered(csr.values), pattern, bool(inplace))


def csr_spmm(x, csr, *, gradient_route="auto"):
    """x Sᵀ [..., d] for x [..., k] and S [d, k], summed in at least float32; differentiable in x and the values.

    The gradient of x reads the transposed pattern that the CSR built when it was checked; that of the values takes
    ``gradient_route``, as in :func:`rosa_linear`. METHODS 1.5.
    """
    checks.tensor("x", x, "[..., k]")
    if x.dim() < 1:
        raise ValueError(f"x: got {checks.describe(x)}, wanted at least one dimension [..., k]")
    pattern = _check_csr("csr", csr, x, "x", None, x.shape[-1])
    _check_choice("gradient_route", gradient_route, routes.GRADIENT_ROUTES)
    return CSRSpmmFunction.apply(None, x, csr.ordered(csr.values), pattern, gradient_route)


def csr_sddmm(dy, x, csr):
    """(dyᵀx) at the pattern of ``csr``: one value per stored entry, in the values' order and dtype, summed in at least
    float32; what lies outside is never computed. dy [..., d], x [..., k] in one dtype; differentiable. METHODS 1.5.
    """
    checks.tensor("dy", dy, "[..., d]")
    checks.tensor("x", x, "[..., k]")
    if dy.dim() < 1 or x.dim() < 1 or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"dy: got {checks.describe(dy)}, wanted the leading dimensions of x {list(x.shape[:-1])}")
    checks.same_dtype("x", x, dy=dy)
    checks.device("x", x, dy=dy)
    pattern = _check_csr("csr", csr, x, "x", dy.shape[-1], x.shape[-1])
    return csr.unordered(CSRSddmmFunction.apply(dy, x, pattern, csr.values.dtype))


def _check_choice(name, value, choices):
    if value != "auto" and value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, ('auto', *choices)))}")


def _check_adapters(x, out_features, lora_A, lora_B, scale, dropout_p, gradient_route):
    if (lora_A is None) != (lora_B is None):
        missing = "lora_A" if lora_A is None else "lora_B"
        raise ValueError(f"{missing}: got None beside its partner, wanted both or neither")
    if lora_A is not None:
        checks.low_rank(x, out_features, lora_A, lora_B)
    checks.number("scale", scale)
    checks.probability("dropout_p", dropout_p)
    _check_choice("gradient_route", gradient_route, routes.GRADIENT_ROUTES)


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
        route: how S takes part. "spmm": a sparse product beside W, S unrounded. "scatter": a copy of W + S in a shared
            buffer, rounded to W's dtype (which in bf16 takes 3 to 30 % of a small change). "resident": W itself holds
            W + S, also after this call, until ``residents.restore(weight)``; read resident.py first. "auto" chooses
            between the first two by cost.
        gradient_route: how dS is computed: "sampled", "dense", "compact" or "auto"; see routes.py.

    Returns y [..., d] in x's dtype. Saves x and h [T, r]. Raises TypeError/ValueError/IndexError naming the
    argument. METHODS 1.5; RoSA, arXiv:2401.04679.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    pattern = _check_csr("csr", csr, x, "x", *weight.shape)
    _check_adapters(x, weight.shape[0], lora_A, lora_B, scale, dropout_p, gradient_route)
    _check_choice("route", route, routes.ROUTES)
    if route == "auto":
        T = x.numel() // max(x.shape[-1], 1)
        route = routes.forward_route(T, *weight.shape, csr.nnz, x.device.type, x.dtype)
    seed = draw_seed(x, dropout_p if lora_A is not None else 0.0, training)
    return apply(
        RosaFunction, x.device.type, x, weight, csr.ordered(csr.values), lora_A, lora_B, bias, seed, float(scale),
        dropout_p, pattern, route, gradient_route,
    )  # fmt: skip


def rosa_update(base_out, x, csr, *, gradient_route="auto"):
    """base_out + x Sᵀ, in place on base_out [..., d]: the sparse delta over any base layer (bitsandbytes, GPTQ, FP8).

    ``base_out`` = base(x) must be a fresh result nobody else reads (a view or a trained leaf is copied first); x
    [..., k] is cast to its dtype. S is not rounded. The low-rank part is :func:`lowrank_update`'s. METHODS 1.5.
    """
    checks.base(base_out, x)
    x = x.to(base_out.dtype)
    pattern = _check_csr("csr", csr, x, "x", base_out.shape[-1], x.shape[-1])
    _check_choice("gradient_route", gradient_route, routes.GRADIENT_ROUTES)
    values = csr.ordered(csr.values)
    return apply(CSRSpmmFunction, x.device.type, overwritable(base_out), x, values, pattern, gradient_route)
