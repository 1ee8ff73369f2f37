"""Sparse delta: RoSA's operator (METHODS 1.5).

    y = x (W + S)ᵀ + γ h Bᵀ + b      S [d, k] sparse, in CSR; h = drop(x) Aᵀ (no dropout, no scale on S)
    dS = (dyᵀx) at the pattern       dx = dy (W + S) + mask * (u A)

Three routes carry S: *spmm* multiplies by it beside W, unrounded; *scatter* adds it to a copy of W in a shared buffer;
*resident* writes it into W itself (see resident.py). Three give its gradient: *sampled* computes only the products at
the pattern; *dense* takes them out of tiles of dyᵀx; *compact* does so among the rows and columns that hold any.
rosa_routes.py chooses. Saved for backward: x, and h [T, r].
"""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

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
    contiguous_copy,
    draw_seed,
    fresh,
    gradient_tiles,
    overwritable,
    rows,
    saved_hidden,
    shaped,
    tokens,
    wanted,
)
from spectral_ops.core.scratch import scratch
from spectral_ops.functional import dropout, rosa_routes
from spectral_ops.functional.csr_matrix import CSR, Pattern
from spectral_ops.functional.lowrank import A_gradient, lowrank_backward_op
from spectral_ops.functional.rosa_resident import Claim, residents

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


def _scatter_samples(s):
    for ragged, laid_out, dtype, accumulate in (
        (False, torch.clone, s.acc, True), (True, torch.clone, s.dtype, True), (True, s.transposed, s.acc, False),
    ):  # fmt: skip
        offsets, columns = s.pattern(ragged)
        yield laid_out(s.W), s.randn(columns.numel(), dtype=dtype), offsets, columns, accumulate


@define(
    "csr_scatter_(Tensor(a!) out, Tensor values, Tensor row_offsets, Tensor columns, bool accumulate) -> ()",
    fake=lambda out, values, row_offsets, columns, accumulate: None,
    cost=_scatter_cost,
    samples=_scatter_samples,
)
def csr_scatter_op(out, values, row_offsets, columns, accumulate):
    """out [d, k] at the pattern becomes values (accumulate: out + values, in at least float32), rounded once."""
    index = (_entries(row_offsets, columns.numel()), columns.long())
    if accumulate:
        values = out[index] + values.to(accumulate_dtype(out.dtype))
    out[index] = values.to(out.dtype)


def _gather_cost(out, dense, row_offsets, columns):
    return Cost(0, nbytes(out, row_offsets, columns) + out.numel() * dense.element_size())


def _gather_samples(s):
    for ragged in (False, True):
        offsets, columns = s.pattern(ragged)
        yield s.randn(columns.numel(), dtype=s.acc), s.W, offsets, columns
    half = s.d // 2
    yield s.randn(columns.numel()), s.transposed(s.W[half:]), offsets[half:].clone(), columns


@define(
    "csr_gather_(Tensor(a!) out, Tensor dense, Tensor row_offsets, Tensor columns) -> ()",
    fake=lambda out, dense, row_offsets, columns: None,
    cost=_gather_cost,
    samples=_gather_samples,
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


def _spmm_samples(s):
    offsets, columns = s.pattern()
    values = s.randn(columns.numel(), dtype=s.acc)
    yield s.randn(s.T, s.d), s.x, values, offsets, columns, None
    yield s.randn(s.T, s.d), s.x, values, offsets, columns, s.order(columns.numel()).to(torch.int32)
    offsets, columns = s.pattern(ragged=True)
    values, order = s.randn(columns.numel()), s.order(columns.numel()).to(torch.int32)
    yield s.randn(s.T, s.d), s.x, values, offsets, columns, None
    yield s.rows(s.y), s.rows(s.x), values.to(s.acc), offsets, columns, order


@define(
    "csr_spmm_(Tensor(a!) out, Tensor x, Tensor values, Tensor row_offsets, Tensor columns, Tensor? permutation) -> ()",
    fake=lambda out, x, values, row_offsets, columns, permutation: None,
    cost=_spmm_cost,
    samples=_spmm_samples,
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


def _sddmm_samples(s):
    yield s.dy, s.x, *s.pattern()
    yield s.dy, s.x, *s.pattern(ragged=True)
    yield s.rows(s.dy), s.rows(s.x), *s.pattern(ragged=True)


@define(
    "csr_sddmm(Tensor dy, Tensor x, Tensor row_offsets, Tensor columns) -> Tensor",
    fake=lambda dy, x, row_offsets, columns: x.new_empty(columns.numel(), dtype=accumulate_dtype(x.dtype)),
    cost=_sddmm_cost,
    samples=_sddmm_samples,
)
def csr_sddmm_op(dy, x, row_offsets, columns):
    """(dyᵀx) [nnz] at the pattern, dy [T, d], x [T, k] in one dtype; float32 (float64 for float64). Products elsewhere
    are not computed."""
    acc = accumulate_dtype(x.dtype)
    return (dy.to(acc).t() @ x.to(acc))[_entries(row_offsets, columns.numel()), columns.long()]


# --- layers ----------------------------------------------------------------------------------------------------------
# Routes are numbered as in rosa_routes.ROUTES and rosa_routes.GRADIENT_ROUTES, which csrc/layers/csr.h repeats.

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


def _gathered(dy, x, row_offsets, columns):
    """dS [nnz] out of tiles of dyᵀx, in at least float32."""
    out = x.new_empty(columns.numel(), dtype=accumulate_dtype(x.dtype))
    for start, G in gradient_tiles(dy, x):
        csr_gather_op(out, G, row_offsets[start : start + G.shape[0] + 1], columns)
    return out


def values_gradient(dy, x, pattern: Pattern, route: str):
    """dS [nnz] = (dyᵀx) at the pattern for dy [T, d] and x [T, k], float32 (float64 for float64)."""
    if route == "sampled":
        return csr_sddmm_op(dy, x, pattern.row_offsets, pattern.columns)
    if route == "dense":
        return _gathered(dy, x, pattern.row_offsets, pattern.columns)
    dy, x = dy.index_select(1, pattern.active_rows), x.index_select(1, pattern.active_columns)
    return _gathered(dy, x, pattern.compact_offsets, pattern.compact_columns)


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
    k = 0 if not needs & 1 else column_offsets.numel() - 1 if weight is None else weight.shape[1]
    return wanted(dy, needs, (*dy.shape[:-1], k), values, A, B, dy.shape[-1:])


@define_layer(
    "rosa_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor values, Tensor row_offsets, Tensor columns,"
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

    The transposed pattern serves dx on the spmm route, the compact one the compact gradient route. Without a weight, on
    the spmm route: dx is the share of S alone, beside what the base layer's own node returns.
    """
    need_x, need_values, need_A, need_B, need_bias = (bool(needs >> bit & 1) for bit in range(5))
    dy2 = rows(dy)
    dx = dS = dA = dB = db = dy
    if need_x and weight is None:
        dx = dy2.new_zeros(dy2.shape[0], column_offsets.numel() - 1)
    elif need_x:
        with _with_delta(weight, values, row_offsets, columns, route) as total:
            dx = dy2 @ total
    if need_x and route == SPMM:
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


@define_layer(
    "csr_spmm_forward(Tensor x, Tensor? base_out, Tensor values, Tensor row_offsets, Tensor columns,"
    " Tensor? permutation) -> Tensor",
    fake=lambda x, base_out, values, row_offsets, columns, permutation: x.new_empty(
        *x.shape[:-1], row_offsets.numel() - 1
    ),
    pieces=("csr_spmm_",),
)
def csr_spmm_forward_op(x, base_out, values, row_offsets, columns, permutation):
    """x Sᵀ [..., d], added to a copy of base_out where it is given; the permutation as :func:`csr_spmm_op` takes it."""
    if base_out is None:
        out = x.new_zeros(*x.shape[:-1], row_offsets.numel() - 1)
    else:
        out = contiguous_copy(base_out)
    csr_spmm_op(tokens(out), rows(x), values, row_offsets, columns, permutation)
    return out


@define_layer(
    "csr_add_forward(Tensor weight, Tensor values, Tensor row_offsets, Tensor columns) -> Tensor",
    fake=lambda weight, values, row_offsets, columns: weight.new_empty(weight.shape),
    pieces=("csr_scatter_",),
)
def csr_add_forward_op(weight, values, row_offsets, columns):
    """weight + S [d, k], rounded once, as a new tensor."""
    out = contiguous_copy(weight)
    csr_scatter_op(out, values, row_offsets, columns, True)
    return out


@define_layer(
    "csr_add_backward(Tensor dW, Tensor row_offsets, Tensor columns, ScalarType dtype) -> Tensor",
    fake=lambda dW, row_offsets, columns, dtype: dW.new_empty(columns.shape, dtype=dtype),
    pieces=("csr_gather_",),
)
def csr_add_backward_op(dW, row_offsets, columns, dtype):
    """dW [d, k] at the pattern, [nnz] in ``dtype``."""
    out = dW.new_empty(columns.numel(), dtype=dtype)
    csr_gather_op(out, rows(dW), row_offsets, columns)
    return out


# --- autograd --------------------------------------------------------------------------------------------------------


def _gradients(ctx, dy, x, weight, values, A, B, h, seed, needs):
    """dx, dS, dA, dB and db of every layer here, with as much of the pattern as their routes read."""
    pattern, route = ctx.pattern, ctx.gradient_route
    if route == "auto" and needs & 2:
        T, d, k, nnz = math.prod(dy.shape[:-1]), dy.shape[-1], x.shape[-1], pattern.columns.numel()
        active = (pattern.active_rows.numel(), pattern.active_columns.numel())
        route = rosa_routes.gradient_route(T, d, k, nnz, *active, dy.device.type, dy.dtype)
    transposed = pattern[2:5] if needs & 1 and ctx.route == SPMM else (None,) * 3
    compact = pattern[5:] if needs & 2 and route == "compact" else (None,) * 4
    return rosa_linear_backward_op(
        dy, x, weight, values, pattern.row_offsets, pattern.columns, *transposed, *compact, A, B, h, seed, ctx.scale,
        ctx.p, ctx.route, rosa_routes.GRADIENT_ROUTES.index(route) if needs & 2 else 0, needs,
    )  # fmt: skip


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
        with _held(ctx.claim if need_x else None, weight, values, ctx.pattern):
            dx, dS, dA, dB, db = _gradients(ctx, dy, x, weight, values, A, B, h, seed, needs)
        return (
            dx if need_x else None, None, dS if need_values else None, dA if need_A else None, dB if need_B else None,
            db if need_bias else None, *[None] * 7,
        )  # fmt: skip


class SparseFunction(Function):
    """x Sᵀ alone or, where there is a ``base_out``, added to it in place or on a copy; saves x."""

    @staticmethod
    def forward(ctx, base_out, x, values, pattern, gradient_route, inplace):
        if inplace:
            csr_spmm_op(tokens(base_out), rows(x), values, pattern.row_offsets, pattern.columns, None)
            ctx.mark_dirty(base_out)
            y = base_out
        else:
            y = csr_spmm_forward_op(x, base_out, values, pattern.row_offsets, pattern.columns, None)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, values)
        ctx.scale, ctx.p, ctx.pattern, ctx.route, ctx.gradient_route = 1.0, 0.0, pattern, SPMM, gradient_route
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, values = ctx.saved_tensors
        need_out, need_x, need_values, *_ = ctx.needs_input_grad
        needs = need_x | need_values << 1
        dx, dS, *_ = _gradients(ctx, dy, x, None, values, None, None, None, None, needs)
        return dy if need_out else None, dx if need_x else None, dS if need_values else None, None, None, None


class CSRAddFunction(Function):
    """W + S as a new tensor, or in W itself."""

    @staticmethod
    def forward(ctx, weight, values, pattern, inplace):
        ctx.pattern, ctx.dtype = pattern, values.dtype
        if inplace and (torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack()):
            csr_scatter_op(weight, values, pattern.row_offsets, pattern.columns, True)
        else:
            out = csr_add_forward_op(weight, values, pattern.row_offsets, pattern.columns)
            if not inplace:
                return out
            weight.copy_(out)  # a mode that keeps our operators' results must still see the sum where they are skipped
        ctx.mark_dirty(weight)
        return weight

    @staticmethod
    @backward_pass
    def backward(ctx, dW):
        dS = None
        if ctx.needs_input_grad[1]:
            dS = csr_add_backward_op(dW, ctx.pattern.row_offsets, ctx.pattern.columns, ctx.dtype)
        return dW, dS, None, None


class CSRSddmmFunction(Function):
    """(dyᵀx) at the pattern, in the values' dtype; its gradients are x and dy times the sparse one."""

    @staticmethod
    def forward(ctx, dy, x, pattern, dtype):
        ctx.save_for_backward(dy, x)
        ctx.pattern = pattern
        return csr_sddmm_op(rows(dy), rows(x), pattern.row_offsets, pattern.columns).to(dtype)

    @staticmethod
    @backward_pass
    def backward(ctx, dS):
        (dy, x), pattern, dS = ctx.saved_tensors, ctx.pattern, dS.contiguous()
        ddy = dx = None
        if ctx.needs_input_grad[0]:
            ddy = csr_spmm_forward_op(x, None, dS, pattern.row_offsets, pattern.columns, None)
        if ctx.needs_input_grad[1]:
            dx = csr_spmm_forward_op(dy, None, dS, pattern.column_offsets, pattern.rows, pattern.permutation)
        return ddy, dx, None, None


def linear(x, weight, values, pattern, A, B, bias, scale, p, route, gradient_route="auto"):
    """:func:`rosa_linear` past its checks, for layers that know their shapes and route; p is 0 where nothing is
    dropped."""
    seed = None if p == 0.0 else draw_seed(x, p)
    if route == "resident" and torch._C._len_torch_dispatch_stack():  # see resident.py
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


def update(base_out, x, values, pattern, gradient_route="auto"):
    """:func:`rosa_update` past its checks."""
    return apply(SparseFunction, x, base_out, x, values, pattern, gradient_route, overwritable(base_out))


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


@calls(csr_add_forward_op, csr_scatter_op, csr_add_backward_op)
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
    return apply(CSRAddFunction, weight, weight, csr.ordered(csr.values), pattern, bool(inplace))


@calls(csr_spmm_forward_op, rosa_linear_backward_op)
def csr_spmm(x, csr, *, gradient_route="auto"):
    """x Sᵀ [..., d] for x [..., k] and S [d, k], summed in at least float32; differentiable in x and the values.

    The gradient of x reads the transposed pattern that the CSR built when it was checked; that of the values takes
    ``gradient_route``, as in :func:`rosa_linear`. METHODS 1.5.
    """
    checks.tensor("x", x, "[..., k]")
    if x.dim() < 1:
        raise ValueError(f"x: got {checks.describe(x)}, wanted at least one dimension [..., k]")
    pattern = _check_csr("csr", csr, x, "x", None, x.shape[-1])
    _check_choice("gradient_route", gradient_route, rosa_routes.GRADIENT_ROUTES)
    return apply(SparseFunction, x, None, x, csr.ordered(csr.values), pattern, gradient_route, False)


@calls(csr_sddmm_op, csr_spmm_forward_op)
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
    return csr.unordered(apply(CSRSddmmFunction, x, dy, x, pattern, csr.values.dtype))


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
    _check_choice("gradient_route", gradient_route, rosa_routes.GRADIENT_ROUTES)


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
        route: how S takes part. "spmm": a sparse product beside W, S unrounded. "scatter": a copy of W + S in a shared
            buffer, rounded to W's dtype (which in bf16 takes 3 to 30 % of a small change). "resident": W itself holds
            W + S, also after this call, until ``residents.restore(weight)``; read resident.py first. "auto" chooses
            between the first two by cost.
        gradient_route: how dS is computed: "sampled", "dense", "compact" or "auto"; see rosa_routes.py.

    Returns y [..., d] in x's dtype. Saves x and h [T, r]. Raises TypeError/ValueError/IndexError naming the
    argument. METHODS 1.5; RoSA, arXiv:2401.04679.
    """
    W = weight
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    pattern = _check_csr("csr", csr, x, "x", *weight.shape)
    _check_adapters(x, weight.shape[0], lora_A, lora_B, scale, dropout_p, gradient_route)
    _check_choice("route", route, rosa_routes.ROUTES)
    if route == "resident" and weight is not W and residents.holds(W):  # it was cast, and with it what W holds
        residents.restore(W)
        weight = W.to(weight.dtype)
    if route == "auto":
        T = x.numel() // max(x.shape[-1], 1)
        route = rosa_routes.forward_route(T, *weight.shape, csr.nnz, x.device.type, x.dtype)
    p = dropout_p if training and lora_A is not None else 0.0
    values = csr.ordered(csr.values)
    return linear(x, weight, values, pattern, lora_A, lora_B, bias, float(scale), p, route, gradient_route)


@calls(csr_spmm_op, csr_spmm_forward_op, rosa_linear_backward_op)
def rosa_update(base_out, x, csr, *, gradient_route="auto"):
    """base_out + x Sᵀ, in place on base_out [..., d]: the sparse delta over any base layer (bitsandbytes, GPTQ, FP8).

    ``base_out`` = base(x) must be a fresh result nobody else reads (a view or a trained leaf is copied first); x
    [..., k] is cast to its dtype. S is not rounded. The low-rank part is :func:`lowrank_update`'s. METHODS 1.5.
    """
    checks.base(base_out, x)
    x = x.to(base_out.dtype)
    pattern = _check_csr("csr", csr, x, "x", base_out.shape[-1], x.shape[-1])
    _check_choice("gradient_route", gradient_route, rosa_routes.GRADIENT_ROUTES)
    return update(base_out, x, csr.ordered(csr.values), pattern, gradient_route)
