"""Products with a sparse matrix (METHODS 1.5).

    csr_add      W + S                   dS = dW at the pattern
    csr_spmm     y = x Sᵀ                dx = dy S, dS = (dyᵀx) at the pattern
    csr_sddmm    (dyᵀx) at the pattern   its gradients are sparse products

S [d, k] is a CSR (csr_matrix.py). Three routes give the gradient of csr_spmm's values. *sampled* computes only the
products at the pattern. *dense* takes them out of tiles of dyᵀx. *compact* does so among the rows and columns that hold
any. rosa_routes.py chooses. Saved for backward: x.
"""

from __future__ import annotations

import math

import torch
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, calls, define, define_layer, nbytes
from spectral_ops.core import checks
from spectral_ops.core.autograd import (
    apply,
    backward_pass,
    contiguous_copy,
    fresh,
    gradient_tiles,
    rows,
    tokens,
    wanted,
)
from spectral_ops.functional import rosa_routes
from spectral_ops.functional.csr_matrix import CSR, Pattern

__all__ = ["csr_add", "csr_sddmm", "csr_spmm"]


# --- operators -------------------------------------------------------------------------------------------------------
# A matrix [d, k] is values [nnz] in any floating dtype, row_offsets int32 [d + 1] and columns int32 [nnz], ascending
# and unique within each row: CSR.validate() has checked them, no operator does.


def _entries(row_offsets: torch.Tensor, count: int) -> torch.Tensor:
    """The row of each entry. Entries before the first offset get -1, those after the last d."""
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
# Gradient routes are numbered as in rosa_routes.GRADIENT_ROUTES, which csrc/layers/csr.h repeats.


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


def pattern_for_backward(pattern: Pattern, dy, x, needs: int, gradient_route: str, spmm: bool):
    """The pattern's tensors as a backward operator takes them, and the number of the gradient route.

    A tensor that is not read is None. dx (bit 0 of ``needs``) reads the transposed pattern where it is a sparse product
    (``spmm``). dS (bit 1) reads the compact pattern on the compact route.
    """
    route = gradient_route
    if route == "auto" and needs & 2:
        T, d, k, nnz = math.prod(dy.shape[:-1]), dy.shape[-1], x.shape[-1], pattern.columns.numel()
        active = (pattern.active_rows.numel(), pattern.active_columns.numel())
        route = rosa_routes.gradient_route(T, d, k, nnz, *active, dy.device.type, dy.dtype)
    transposed = pattern[2:5] if spmm and needs & 1 else (None,) * 3
    compact = pattern[5:] if needs & 2 and route == "compact" else (None,) * 4
    number = rosa_routes.GRADIENT_ROUTES.index(route) if needs & 2 else 0
    return (*pattern[:2], *transposed, *compact), number


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


def _spmm_backward_fake(
    dy, x, values, row_offsets, columns, column_offsets, entry_rows, permutation, active_rows, active_columns,
    compact_offsets, compact_columns, gradient_route, needs,
):  # fmt: skip
    k = column_offsets.numel() - 1 if needs & 1 else 0
    return wanted(dy, needs, (*dy.shape[:-1], k), values)


@define_layer(
    "csr_spmm_backward(Tensor dy, Tensor? x, Tensor values, Tensor row_offsets, Tensor columns, Tensor? column_offsets,"
    " Tensor? entry_rows, Tensor? permutation, Tensor? active_rows, Tensor? active_columns, Tensor? compact_offsets,"
    " Tensor? compact_columns, int gradient_route, int needs) -> (Tensor, Tensor)",
    fake=_spmm_backward_fake,
    pieces=("csr_spmm_", "csr_sddmm", "csr_gather_"),
)
def csr_spmm_backward_op(
    dy, x, values, row_offsets, columns, column_offsets, entry_rows, permutation, active_rows, active_columns,
    compact_offsets, compact_columns, gradient_route, needs,
):  # fmt: skip
    """dx = dy S [..., k] in dy's dtype, and dS [nnz] = (dyᵀx) at the pattern in the values' dtype; empty [0] where
    ``needs`` has no bit."""
    dy2 = rows(dy)
    dx = dS = dy
    if needs & 1:
        dx = dy2.new_zeros(dy2.shape[0], column_offsets.numel() - 1)
        csr_spmm_op(dx, dy2, values, column_offsets, entry_rows, permutation)
        dx = dx.reshape(*dy.shape[:-1], dx.shape[1])
    if needs & 2:
        pattern = Pattern(
            row_offsets, columns, column_offsets, entry_rows, permutation, active_rows, active_columns,
            compact_offsets, compact_columns,
        )  # fmt: skip
        dS = values_gradient(dy2, rows(x), pattern, rosa_routes.GRADIENT_ROUTES[gradient_route]).to(values.dtype)
    return fresh(dy, needs, dx, dS)


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


class Reorder(Function):
    """values [nnz] at ``order``, a permutation whose ``inverse`` takes the gradient back: nothing is saved."""

    @staticmethod
    def forward(ctx, values, order, inverse):
        ctx.order, ctx.inverse = order, inverse
        return values.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        return Reorder.apply(grad, ctx.inverse, ctx.order), None, None


class CSRSpmmFunction(Function):
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
        ctx.pattern, ctx.gradient_route = pattern, gradient_route
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, values = ctx.saved_tensors
        need_out, need_x, need_values, *_ = ctx.needs_input_grad
        needs = need_x | need_values << 1
        pattern, route = pattern_for_backward(ctx.pattern, dy, x, needs, ctx.gradient_route, spmm=True)
        dx, dS = csr_spmm_backward_op(dy, x, values, *pattern, route, needs)
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


# --- public functions ------------------------------------------------------------------------------------------------


def check_csr(name: str, csr: CSR, like: torch.Tensor, like_name: str, d: int | None, k: int | None) -> Pattern:
    if not isinstance(csr, CSR):
        raise TypeError(f"{name}: got {checks.describe(csr)}, wanted a spectral_ops.CSR")
    checks.device(like_name, like, **{name: csr.values})
    pattern = csr.pattern
    for axis, size, what in ((0, d, "rows"), (1, k, "columns")):
        if size is not None and csr.shape[axis] != size:
            raise ValueError(f"{name}: got shape {list(csr.shape)}, wanted {size} {what}")
    checks.no_narrowing(like, **{name: csr.values})
    return pattern


def check_choice(name, value, choices):
    if value != "auto" and value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, ('auto', *choices)))}")


@calls(csr_add_forward_op, csr_scatter_op, csr_add_backward_op)
def csr_add(weight, csr, *, inplace=False):
    """weight + S [d, k], rounded once to weight's dtype; differentiable in both.

    weight [d, k] floating point; csr a CSR of that shape, its values in any floating dtype (float64 exactly where
    weight is). inplace: in weight's own memory (which must not be a leaf that requires grad). Raises
    TypeError/ValueError/IndexError naming the argument. METHODS 1.5.
    """
    checks.tensor("weight", weight, "[d, k]", 2)
    if inplace and weight.requires_grad and weight.is_leaf and torch.is_grad_enabled():
        raise ValueError("weight: got a leaf that requires grad, wanted one that may be changed in place")
    if inplace and any(step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)):
        raise ValueError(f"weight: got strides {weight.stride()}, wanted entries that share no memory")
    pattern = check_csr("csr", csr, weight, "weight", *weight.shape)
    return apply(CSRAddFunction, weight, weight, csr.ordered(csr.values), pattern, bool(inplace))


@calls(csr_spmm_forward_op, csr_spmm_backward_op)
def csr_spmm(x, csr, *, gradient_route="auto"):
    """x Sᵀ [..., d] for x [..., k] and S [d, k], summed in at least float32; differentiable in x and the values.

    x and csr's values in any floating dtypes (float64 exactly where the other is). The gradient of x reads the
    transposed pattern, which the CSR built when it was checked. gradient_route: how the values' gradient is computed:
    "sampled", "dense", "compact" (see csr.py), or "auto" for the cheapest. Raises TypeError/ValueError/IndexError
    naming the argument. METHODS 1.5.
    """
    checks.tensor("x", x, "[..., k]")
    if x.dim() < 1:
        raise ValueError(f"x: got {checks.describe(x)}, wanted at least one dimension [..., k]")
    pattern = check_csr("csr", csr, x, "x", None, x.shape[-1])
    check_choice("gradient_route", gradient_route, rosa_routes.GRADIENT_ROUTES)
    return apply(CSRSpmmFunction, x, None, x, csr.ordered(csr.values), pattern, gradient_route, False)


@calls(csr_sddmm_op, csr_spmm_forward_op)
def csr_sddmm(dy, x, csr):
    """(dyᵀx) at the pattern of ``csr`` [d, k], summed in at least float32; differentiable in dy and x.

    dy [..., d] and x [..., k] in one dtype. Returns [nnz]: one value per stored entry, in the order and dtype of csr's
    values. What lies outside the pattern is never computed. Raises TypeError/ValueError/IndexError naming the argument.
    METHODS 1.5.
    """
    checks.tensor("dy", dy, "[..., d]")
    checks.tensor("x", x, "[..., k]")
    if dy.dim() < 1 or x.dim() < 1 or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"dy: got {checks.describe(dy)}, wanted the leading dimensions of x {list(x.shape[:-1])}")
    checks.same_dtype("x", x, dy=dy)
    checks.device("x", x, dy=dy)
    pattern = check_csr("csr", csr, x, "x", dy.shape[-1], x.shape[-1])
    return csr.unordered(apply(CSRSddmmFunction, x, dy, x, pattern, csr.values.dtype))
