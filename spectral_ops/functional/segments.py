"""Segmented low-rank linear: several LoRA adapters over one base product, one of them for each row (METHODS 1.7).

    h_t = drop(x_t) A_sᵀ      y_t = x_t Wᵀ + γ_s h_t B_sᵀ + b      s = segment_ids[t]; -1: no adapter
    backward: u_t = γ_s dy_t B_s      dx_t = dy_t W + mask * (u_t A_s)
              dB_s = γ_s Σ_t dy_tᵀ h_t      dA_s = Σ_t u_tᵀ drop(x_t)      over the rows t of adapter s

The adapters are stacked, A [n r, k] and γB [d, n r], ranks padded with zeros to the largest. Two routes:

* stacked: one product projects every row onto all adapters, the columns that are not a row's own become zero, and the
  operators of 1.1 do the rest. Right for a policy and its value model, for few rows, and with dropout.
* grouped: rows are sorted by id on their device, and the operators below give each its own adapter's product alone:
  arithmetic T r instead of T n r, for many adapters.

Saved for backward: x and each row's own h [T, r]; grouped, in the order of the places, with two vectors of indices.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Sequence

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
    overwritable,
    rows,
    saved_hidden,
    shaped,
    tokens,
    wanted,
)
from spectral_ops.functional import dropout
from spectral_ops.functional.lowrank import A_gradient, fused_forward, input_gradient, lowrank_backward_op

__all__ = ["segmented_lowrank_linear", "segmented_lowrank_update"]


# --- stacking --------------------------------------------------------------------------------------------------------


def _padded(tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """``tensors`` one after the other along their rank, ``axis``, each followed by zeros up to the largest rank."""
    r = max(t.shape[axis] for t in tensors)
    parts = []
    for t in tensors:
        parts.append(t)
        if missing := r - t.shape[axis]:
            parts.append(t.new_zeros((missing, t.shape[1]) if axis == 0 else (t.shape[0], missing)))
    return torch.cat(parts, axis)


def stack_A(As: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[n r, k] from every A [r_s, k]."""
    return _padded(As, 0).to(dtype)


def stack_B(Bs: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """[d, n r] from every γ_s B_s [d, r_s]; in ``dtype`` only once it is scaled."""
    stacked = _padded(Bs, 1)
    if all(scale == scales[0] for scale in scales):
        return stacked.mul_(scales[0]).to(dtype)
    for part, scale in zip(stacked.chunk(len(scales), 1), scales, strict=True):
        part.mul_(scale)
    return stacked.to(dtype)


def row_ids(ids: torch.Tensor, T: int) -> torch.Tensor:
    """One id per row [T], from ids [m] that each serve T / m rows in sequence."""
    return ids.unsqueeze(1).expand(-1, T // max(ids.shape[0], 1)).reshape(-1)


def others(ids: torch.Tensor, n: int) -> torch.Tensor:
    """[T, n, 1]: whether adapter s is not the row's own."""
    return (ids.unsqueeze(1) != torch.arange(n, dtype=ids.dtype, device=ids.device)).unsqueeze(2)


def keep_own_(stacked: torch.Tensor, foreign: torch.Tensor) -> torch.Tensor:
    """stacked [T, n r], in place: zero wherever the column's adapter is not the row's."""
    T, n = foreign.shape[:2]
    stacked.view(T, n, stacked.shape[1] // n).masked_fill_(foreign, 0)
    return stacked


def own_of(stacked: torch.Tensor, n: int) -> torch.Tensor:
    """[T, r]: the columns of each row's own adapter, from stacked [T, n r] whose other columns are zero."""
    return stacked if n == 1 else stacked.unflatten(1, (n, stacked.shape[1] // n)).sum(1)


def spread(own: torch.Tensor, foreign: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`own_of`: [T, n r] from own [T, r]."""
    return own.unsqueeze(1).masked_fill(foreign, 0).flatten(1)


# --- operators: rows grouped by adapter ------------------------------------------------------------------------------
# Adapter s has places offsets[s] to offsets[s + 1] - 1; place i has row order[i], or i where there is no order. What is
# of the rank, h and u, is stored by place, so that it is read and written in sequence. What other places have is never
# read. Adapters are 3-d, any strides; offsets [n + 1] are int32 or int64, order [P] int64. A GPU clamps offsets to
# [0, P]; elsewhere those that do not ascend raise.


def group_rows(ids: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """order [T] and offsets [n + 1], int64, of ids [T]: computed on their device, which is not waited for."""
    ids, order = torch.sort(ids, stable=True)
    return order, torch.searchsorted(ids, torch.arange(n + 1, dtype=ids.dtype, device=ids.device))


def _groups(order, offsets, places: int, rows: int):
    """(adapter, its places, their rows) for each that has any. Reads the offsets: for the CPU, and as a reference."""
    ends = [0, *offsets.tolist()]
    for a, b in itertools.pairwise(ends):
        if not a <= b <= places:
            raise ValueError(f"offsets: got {b} after {a}, wanted numbers that ascend from 0 to {places}")
    for s, (a, b) in enumerate(itertools.pairwise(ends[1:])):
        if a == b:
            continue
        own = slice(a, b)
        of_own = own if order is None else order[own]
        if order is not None and not 0 <= of_own.amin() <= of_own.amax() < rows:
            raise ValueError(f"order: got {of_own.amin()} to {of_own.amax()}, wanted numbers of {rows} rows")
        yield s, own, of_own


def _places(order, x) -> int:
    return x.shape[0] if order is None else order.shape[0]


def _project_cost(x, A, order, offsets):
    P, (_, r, k) = _places(order, x), A.shape
    moved = min(P, x.shape[0]) * k + P * r
    return Cost(2 * P * k * r, nbytes(A, order, offsets) + moved * x.element_size())


def _group_samples(s):
    """Rows of three adapters, the first rows of none; of four, one of them without rows; all rows of one of four."""
    T = s.T
    ends = (T // 8, T // 3, T // 2, T), (T // 7, T // 3, T // 3, T // 2, T - T // 5), (0, T, T, T, T)
    return [(s.order(T), torch.tensor(each, device=s.device)) for each in ends]


def _sorted_samples(s):
    """No order: int32 offsets [5] with places of nobody on both sides, and which places those are."""
    T = s.T
    first, last = T // 6, T - T // 4
    ends = torch.tensor([first, T // 2, T // 2, last, last], dtype=torch.int32, device=s.device)
    foreign = torch.arange(T, device=s.device)
    return ends, (foreign < first) | (foreign >= last)


def _poisoned(t, foreign):
    return t.masked_fill(foreign.unsqueeze(1), float("nan"))


def _project_samples(s):
    some, uneven, alone = _group_samples(s)
    yield s.x, s.randn(3, s.r, s.k, scale=max(s.k, 1) ** -0.5), *some
    A = s.randn(4, s.r, s.k, scale=max(s.k, 1) ** -0.5)
    yield s.x, A, *uneven
    yield s.x, A, *alone
    yield s.rows(s.x), s.transposed(A), *uneven
    ends, foreign = _sorted_samples(s)
    yield _poisoned(s.x, foreign), A, None, ends
    yield s.x, A.permute(1, 2, 0).contiguous().permute(2, 0, 1), torch.cat([s.order(s.T), s.order(s.T)]), 2 * ends


@define(
    "segment_project(Tensor x, Tensor A, Tensor? order, Tensor offsets) -> Tensor",
    fake=lambda x, A, order, offsets: x.new_empty(_places(order, x), A.shape[1]),
    cost=_project_cost,
    samples=_project_samples,
)
def segment_project_op(x, A, order, offsets):
    """h [P, r] by place: h_i = x_row(i) A_sᵀ in x's dtype, zero at a place without adapter; x [T, k] and A [n, r, k] of
    one dtype. A row may have several places."""
    acc, P = accumulate_dtype(x.dtype), _places(order, x)
    h = x.new_zeros(P, A.shape[1])
    for s, own, of_own in _groups(order, offsets, P, x.shape[0]):
        h[own] = (x[of_own].to(acc) @ A[s].to(acc).t()).to(x.dtype)
    return h


def _lift_cost(out, h, B, order, offsets):
    (P, r), d = h.shape, out.shape[1]
    return Cost(2 * P * d * r, 2 * P * d * out.element_size() + nbytes(h, B, order, offsets))


def _lift_samples(s):
    some, uneven, alone = _group_samples(s)
    yield s.randn(s.T, s.d), s.h, s.randn(3, s.d, s.r, scale=0.3), *some
    B = s.randn(4, s.d, s.r, scale=0.3)
    yield s.randn(s.T, s.d), s.h, B, *uneven
    yield s.rows(s.y), s.rows(s.h), B.transpose(0, 1).contiguous().transpose(0, 1), *alone
    ends, foreign = _sorted_samples(s)
    yield s.randn(s.T, s.d), _poisoned(s.h, foreign), B.permute(1, 2, 0).contiguous().permute(2, 0, 1), None, ends
    yield s.randn(s.T, s.d), s.h[: s.T // 2], B, s.order(s.T)[: s.T // 2], ends // 2


@define(
    "segment_lift_(Tensor(a!) out, Tensor h, Tensor B, Tensor? order, Tensor offsets) -> ()",
    fake=lambda out, h, B, order, offsets: None,
    cost=_lift_cost,
    samples=_lift_samples,
)
def segment_lift_op(out, h, B, order, offsets):
    """out [T, d]: out_row(i) += h_i B_sᵀ, for h [P, r] by place and B [n, d, r] of out's dtype; a row has one place."""
    acc = accumulate_dtype(out.dtype)
    for s, own, of_own in _groups(order, offsets, _places(order, out), out.shape[0]):
        out[of_own] = torch.addmm(out[of_own].to(acc), h[own].to(acc), B[s].to(acc).t()).to(out.dtype)


def _outer_cost(u, x, order, offsets):
    (P, r), k, out = u.shape, x.shape[1], (offsets.shape[0] - 1) * u.shape[1] * x.shape[1]
    moved = min(P, x.shape[0]) * k * x.element_size() + out * accumulate_dtype(x.dtype).itemsize
    return Cost(2 * P * k * r, nbytes(u, order, offsets) + moved)


def _outer_samples(s):
    some, uneven, alone = _group_samples(s)
    yield s.h, s.x, *some
    yield s.h, s.x, *uneven
    yield s.rows(s.h), s.rows(s.x), *alone
    ends, foreign = _sorted_samples(s)
    yield _poisoned(s.h, foreign), _poisoned(s.x, foreign), None, ends
    yield s.randn(2 * s.T, s.r), s.x, torch.cat([s.order(s.T), s.order(s.T)]), 2 * ends


@define(
    "segment_outer(Tensor u, Tensor x, Tensor? order, Tensor offsets) -> Tensor",
    fake=lambda u, x, order, offsets: x.new_empty(
        offsets.shape[0] - 1, u.shape[1], x.shape[1], dtype=accumulate_dtype(x.dtype)
    ),
    cost=_outer_cost,
    samples=_outer_samples,
)
def segment_outer_op(u, x, order, offsets):
    """[n, r, k]: Σ u_iᵀ x_row(i) over the places of each adapter, in float32 (float64); u [P, r] by place and x [T, k]
    of one dtype."""
    acc = accumulate_dtype(x.dtype)
    out = x.new_zeros(offsets.shape[0] - 1, u.shape[1], x.shape[1], dtype=acc)
    for s, own, of_own in _groups(order, offsets, _places(order, x), x.shape[0]):
        torch.mm(u[own].to(acc).t(), x[of_own].to(acc), out=out[s])
    return out


def _each(stacked: torch.Tensor, n: int, axis: int) -> torch.Tensor:
    """A view of the n adapters stacked along ``axis``, one after the other in the first dimension."""
    return stacked.unflatten(axis, (n, stacked.shape[axis] // n)).movedim(axis, 0)


# --- layers ----------------------------------------------------------------------------------------------------------
# Dense tier over a weight; base-agnostic tier over somebody else's x Wᵀ + b, which the operator with an underscore
# overwrites and the one without copies. h is each row's own [T, r] (grouped: by place), empty [0] without ``keep``;
# order and offsets are those of group_rows, empty [0] on the stacked route. Backward's ``needs[s]`` is a mask of dA_s
# and dB_s; a gradient nobody wants is empty [0]. The grouped route has no dropout.

_ADAPTERS = "Tensor[] A, Tensor[] B, Tensor ids"
_OPTIONS = "Tensor? seed, float[] scales, float p, bool keep, bool grouped"
_GROUPED = ("segment_project", "segment_lift_")


def _kept_fake(x, A, ids, keep, grouped):
    T = math.prod(x.shape[:-1])
    h = x.new_empty((T, max(a.shape[0] for a in A)) if keep else (0,))
    return h, *(ids.new_empty(size if grouped else 0, dtype=torch.int64) for size in (T, len(A) + 1))


def _forward_fake(x, weight, base_out, bias, A, B, ids, seed, scales, p, keep, grouped):
    shape = base_out.shape if weight is None else (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), *_kept_fake(x, A, ids, keep, grouped)


@define_layer(
    f"segmented_linear_forward(Tensor x, Tensor? weight, Tensor? base_out, Tensor? bias, {_ADAPTERS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    pieces=("lowrank_matmul", "dropout_project", *_GROUPED),
)
def segmented_linear_forward_op(x, weight, base_out, bias, A, B, ids, seed, scales, p, keep, grouped):
    """y [..., d], h, order and offsets: over ``weight``, or on a copy of ``base_out``."""
    if weight is None:
        y = contiguous_copy(base_out)
    elif grouped:
        y = shaped(F.linear(rows(x), weight, bias), x)
    else:
        x2 = rows(x)
        h = _stacked_hidden(x2, A, ids, seed, p)
        y = fused_forward(x2, weight, h, stack_B(B, scales, x.dtype), 1.0, None, bias)
        return shaped(y, x), *_kept(h, len(A), ids, keep)
    return y, *segmented_update_forward_op.reference(y, x, A, B, ids, seed, scales, p, keep, grouped)


@define_layer(
    f"segmented_update_forward_(Tensor(a!) out, Tensor x, {_ADAPTERS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda out, x, A, B, ids, seed, scales, p, keep, grouped: _kept_fake(x, A, ids, keep, grouped),
    pieces=("dropout_project", *_GROUPED),
)
def segmented_update_forward_op(out, x, A, B, ids, seed, scales, p, keep, grouped):
    """out [..., d] is increased by the update; returns h, order and offsets."""
    n, x2, b = len(A), rows(x), stack_B(B, scales, x.dtype)
    if not grouped:
        h = _stacked_hidden(x2, A, ids, seed, p)
        tokens(out).addmm_(h, b.t())
        return _kept(h, n, ids, keep)
    groups = group_rows(row_ids(ids, x2.shape[0]), n)
    h = segment_project_op(x2, _each(stack_A(A, x.dtype), n, 0), *groups)
    segment_lift_op(tokens(out), h, _each(b, n, 1), *groups)
    return h if keep else x.new_empty(0), *groups


def _stacked_hidden(x2, A, ids, seed, p):
    n = len(A)
    return keep_own_(dropout.project(x2, stack_A(A, x2.dtype), seed, p), others(row_ids(ids, x2.shape[0]), n))


def _kept(h, n, ids, keep):
    """What the stacked route returns besides y."""
    own = own_of(h, n) if keep else h.new_empty(0)
    return own, *(ids.new_empty(0, dtype=torch.int64) for _ in range(2))


def _backward_fake(dy, x, weight, A, B, ids, order, offsets, seed, h, scales, p, need_x, need_bias, needs):
    dx, db = wanted(dy, need_x | need_bias << 1, (*dy.shape[:-1], A[0].shape[1]), dy.shape[-1:])
    each = [wanted(dy, need, a, b) for need, a, b in zip(needs, A, B, strict=True)]
    return dx, db, *map(list, zip(*each, strict=True))


@define_layer(
    "segmented_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor[] A, Tensor[] B, Tensor? ids,"
    " Tensor? order, Tensor? offsets, Tensor? seed, Tensor? h, float[] scales, float p, bool need_x, bool need_bias,"
    " int[] needs) -> (Tensor, Tensor, Tensor[], Tensor[])",
    fake=_backward_fake,
    pieces=("lowrank_matmul", "lowrank_backward", "dropout_outer", "dropout_lift_", *_GROUPED, "segment_outer"),
)
def segmented_linear_backward_op(
    dy, x, weight, A, B, ids, order, offsets, seed, h, scales, p, need_x, need_bias, needs
):
    """dx, db, every dA_s and every dB_s of both tiers, grouped where order is given; without a weight dx is the
    update's share. Grouped, a gradient is computed for every adapter if one needs it."""
    n, dy2, groups = len(A), rows(dy), None if order is None else (order, offsets)
    trained, lifted = ([s for s in range(n) if needs[s] >> bit & 1] for bit in (0, 1))
    b, asked = stack_B(B, scales, dy.dtype), (need_x or bool(trained), bool(lifted), need_bias)
    r = b.shape[1] // n
    h = saved_hidden(h, bool(lifted), dy2, r)
    u, full_B, db = _grouped_pass(dy2, b, groups, h, *asked) if groups else _stacked_pass(dy2, b, ids, n, h, *asked)
    dx = dy.new_empty(0)
    if need_x:
        a = stack_A(A, dy.dtype)
        if weight is not None and not groups:
            dx = input_gradient(dy2, None, weight, None, u, a, seed, p)
        else:
            dx = dy2 @ weight if weight is not None else dy2.new_zeros(dy2.shape[0], a.shape[1])
        if groups:
            segment_lift_op(dx, u, _each(a, n, 0).transpose(1, 2), *groups)
        elif weight is None:
            dropout.lift_(dx, u, a, seed, p)
        dx = dx.reshape(*dy.shape[:-1], a.shape[1])
    dA, dB = ([dy.new_empty(0) for _ in A] for _ in range(2))
    if trained:
        ranks = [A[s].shape[0] for s in trained]
        if groups:
            each_A = segment_outer_op(u, rows(x), *groups)
            parts = [each_A[s, :rank] for s, rank in zip(trained, ranks, strict=True)]
        else:
            if sum(ranks) < n * r:
                u = torch.cat([u[:, s * r : s * r + rank] for s, rank in zip(trained, ranks, strict=True)], 1)
            parts = A_gradient(u, rows(x), seed, p, accumulate_dtype(dy.dtype)).split(ranks)
        for s, part in zip(trained, parts, strict=True):
            dA[s] = part.to(A[s].dtype, copy=True)
    for s in lifted:
        dB[s] = (scales[s] * full_B[:, s * r : s * r + B[s].shape[1]]).to(B[s].dtype).contiguous()
    return dx, db.to(dy.dtype) if need_bias else dy.new_empty(0), dA, dB


def _stacked_pass(dy2, b, ids, n, h, need_u, need_B, need_bias):
    """u [T, n r], zero in the columns of others than a row's own; Σ dyᵀ h of all adapters [d, n r]; and db."""
    foreign = others(row_ids(ids, dy2.shape[0]), n)
    stacked = spread(h, foreign) if need_B else dy2.new_empty(dy2.shape[0], b.shape[1])  # unread
    u, full_B, db, _, _ = lowrank_backward_op(dy2, stacked, b, 1.0, None, None, None, need_u, need_B, need_bias, False)
    return keep_own_(u, foreign) if need_u else u, full_B, db


def _grouped_pass(dy2, b, groups, h, need_u, need_B, need_bias):
    """The same but for u, which is each place's own [T, r], as h is."""
    u = segment_project_op(dy2, _each(b, groups[1].shape[0] - 1, 1).transpose(1, 2), *groups) if need_u else None
    full_B = segment_outer_op(h, dy2, *groups).flatten(0, 1).t() if need_B else None
    return u, full_B, dy2.sum(0, dtype=accumulate_dtype(dy2.dtype)) if need_bias else None


# --- autograd --------------------------------------------------------------------------------------------------------


def _forward(x, base_out, weight, bias, ids, seed, p, scales, grouped, inplace, A, B, keep):
    """y, h, order and offsets of either tier and route."""
    options = A, B, ids, seed, scales, p, keep, grouped
    if inplace:
        return base_out, *segmented_update_forward_op(base_out, x, *options)
    return segmented_linear_forward_op(x, weight, base_out, bias, *options)


class SegmentsFunction(Function):
    """Both tiers on both routes: over a frozen ``weight``, or over ``base_out`` where it is given, in place or on a
    copy. Saves x and each row's own h."""

    @staticmethod
    def forward(ctx, x, base_out, weight, bias, ids, seed, p, scales, grouped, inplace, *adapters):
        n = len(scales)
        need_A, need_B = any(ctx.needs_input_grad[10 : 10 + n]), any(ctx.needs_input_grad[10 + n :])
        y, h, *groups = _forward(
            x, base_out, weight, bias, ids, seed, p, scales, grouped, inplace, adapters[:n], adapters[n:], need_B
        )
        if inplace:
            ctx.mark_dirty(base_out)
        places = (None, *groups, None) if grouped else (ids, None, None, seed)
        ctx.save_for_backward(x if need_A else None, weight, h if need_B else None, *places, *adapters)
        ctx.scales, ctx.p = scales, p
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, h, *places = ctx.saved_tensors
        n, places, adapters = len(ctx.scales), places[:4], places[4:]
        need_x, need_out, _, need_bias, *_ = ctx.needs_input_grad
        need_A, need_B = ctx.needs_input_grad[10 : 10 + n], ctx.needs_input_grad[10 + n :]
        needs = [a | b << 1 for a, b in zip(need_A, need_B, strict=True)]
        dx, db, dA, dB = segmented_linear_backward_op(
            dy, x, weight, adapters[:n], adapters[n:], *places, h, ctx.scales, ctx.p, need_x, need_bias, needs
        )
        return (
            dx if need_x else None, dy if need_out else None, None, db if need_bias else None, *[None] * 6,
            *[grad if need & 1 else None for grad, need in zip(dA, needs, strict=True)],
            *[grad if need & 2 else None for grad, need in zip(dB, needs, strict=True)],
        )  # fmt: skip


# --- routes ----------------------------------------------------------------------------------------------------------

ROUTES = ("auto", "stacked", "grouped")
# device -> from how many stacked columns, and how many rows, sorting the rows costs less than a product with all
# adapters: measured on the CPU (2048 x 2048, rank 16, forward and backward, float32 and bfloat16); on a GPU from the
# operators' arithmetic, not yet measured
GROUPED_FROM = {"cpu": (48, 128), "cuda": (128, 1024)}
_TRITON = importlib.util.find_spec("triton") is not None


def choose_route(T: int, columns: int, device_type: str, dropout: bool) -> str:
    """ "grouped" for many rows over many adapters, where its kernels are and draw no mask; else "stacked"."""
    if dropout or device_type not in GROUPED_FROM or (device_type == "cuda" and not _TRITON):
        return "stacked"
    least_columns, least_rows = GROUPED_FROM[device_type]
    return "grouped" if columns >= least_columns and T >= least_rows else "stacked"


def _run(route, x, base_out, weight, bias, lora_A_list, lora_B_list, segment_ids, scales, dropout_p, training):
    """The checked arguments through one route."""
    if route not in ROUTES:
        raise ValueError(f"route: got {route!r}, wanted one of {', '.join(map(repr, ROUTES))}")
    checks.probability("dropout_p", dropout_p)
    p = dropout_p if training else 0.0
    seed = draw_seed(x, p)
    if route == "auto":
        columns = len(lora_A_list) * max(A.shape[0] for A in lora_A_list)
        route = choose_route(math.prod(x.shape[:-1]), columns, x.device.type, seed is not None)
    grouped, inplace = route == "grouped", base_out is not None and overwritable(base_out)
    if grouped and seed is not None:
        raise ValueError(f"route: got 'grouped' with dropout_p {dropout_p!r}, wanted 'stacked' (or 'auto')")
    common = x, base_out, weight, bias, segment_ids.reshape(-1), seed, p, scales, grouped, inplace
    if torch.is_grad_enabled():
        return apply(SegmentsFunction, x, *common, *lora_A_list, *lora_B_list)
    return apply_op(_forward, x, *common, lora_A_list, lora_B_list, False)[0]


# --- public functions ------------------------------------------------------------------------------------------------


def _check_adapters(x, out_features, lora_A_list, lora_B_list, segment_ids, scales):
    """The scales as a tuple, after every check of the adapters and ids."""
    for name, value in (("lora_A_list", lora_A_list), ("lora_B_list", lora_B_list)):
        if not isinstance(value, Sequence) or not value:
            raise ValueError(
                f"{name}: got {type(value).__name__} of no adapters, wanted a non-empty sequence of tensors"
            )
    n = len(lora_A_list)
    if len(lora_B_list) != n:
        raise ValueError(f"lora_B_list: got {len(lora_B_list)} tensors, wanted {n} as in lora_A_list")
    for s, (A, B) in enumerate(zip(lora_A_list, lora_B_list, strict=True)):
        try:
            checks.low_rank(x, out_features, A, B)
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapter {s}: {error}") from None
    if scales is None:
        scales = [1.0] * n
    if not isinstance(scales, Sequence) or len(scales) != n:
        got = f"{len(scales)} numbers" if isinstance(scales, Sequence) else checks.describe(scales)
        raise ValueError(f"scales: got {got}, wanted {n} numbers, one for each adapter")
    for s, scale in enumerate(scales):
        checks.number(f"scales[{s}]", scale)
    check_ids(segment_ids, x, n)
    return tuple(float(scale) for scale in scales)


def check_ids(segment_ids, x, n: int) -> None:
    """Integers over the leading dimensions of x, in [-1, n) where they can be read without waiting for a device."""
    lead = x.shape[:-1]
    wanted = f"int32 or int64 {list(lead)} (or its first dimensions), the leading dimensions of x"
    if not isinstance(segment_ids, torch.Tensor) or segment_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"segment_ids: got {checks.describe(segment_ids)}, wanted {wanted}")
    if segment_ids.shape != lead[: segment_ids.dim()]:
        raise ValueError(f"segment_ids: got {checks.describe(segment_ids)}, wanted {wanted}")
    checks.device("x", x, segment_ids=segment_ids)
    if segment_ids.device.type != "cpu" or torch.compiler.is_compiling() or not segment_ids.numel():
        return
    low, high = (int(end) for end in segment_ids.aminmax())
    if low < -1 or high >= n:
        raise ValueError(f"segment_ids: got values from {low} to {high}, wanted -1 (no adapter) to {n - 1}")


@calls(segmented_linear_forward_op, segmented_linear_backward_op)
def segmented_lowrank_linear(
    x,
    weight,
    lora_A_list,
    lora_B_list,
    segment_ids,
    bias=None,
    *,
    scales=None,
    dropout_p=0.0,
    training=False,
    route="auto",
):
    """Linear layer whose rows each have a low-rank adapter of their own: y_t = x_t Wᵀ + γ_s drop(x_t) A_sᵀ B_sᵀ + b.

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (under autocast both are cast).
        lora_A_list, lora_B_list: n adapters, A_s [r_s, k] and B_s [d, r_s]; ranks may differ. They may be float32 over
            a narrower x; gradients come back in their dtype, and are zero for an adapter that no row has.
        segment_ids: int32 or int64 on x's device, the s of each row: with the leading dimensions of x, or the first of
            them (one id per sequence). -1 is no adapter. On the CPU another value raises ValueError; a GPU is not
            waited for, and there a row whose id is not in [0, n) has no adapter.
        bias: [d] or None, in x's dtype; may be trainable.
        scales: γ_s, a number for each adapter; None: all 1.
        dropout_p, training: inverted dropout on the adapter branch, active only while training.
        route: "stacked", "grouped" (no dropout), or "auto", which goes by T, n max r_s and the device.

    Returns y [..., d] in x's dtype. Saves x and h [T, max r_s] for backward. On the stacked route, 0 times an infinite
    entry of one adapter's B reaches the rows of another. Raises TypeError/ValueError that name the argument.
    METHODS 1.7.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    scales = _check_adapters(x, weight.shape[0], lora_A_list, lora_B_list, segment_ids, scales)
    return _run(
        route, x, None, weight, bias, lora_A_list, lora_B_list, segment_ids, scales, dropout_p, training
    )  # fmt: skip


@calls(segmented_update_forward_op, segmented_linear_forward_op, segmented_linear_backward_op)
def segmented_lowrank_update(
    base_out,
    x,
    lora_A_list,
    lora_B_list,
    segment_ids,
    *,
    scales=None,
    dropout_p=0.0,
    training=False,
    route="auto",
):
    """The same update over a base layer somebody else computed (bitsandbytes, GPTQ, FP8), in place.

    base_out [..., d] = base(x), bias included, becomes the result and is returned; it must be fresh (a view or a
    trained leaf is copied first). x is cast to base_out's dtype. The other arguments are those of
    :func:`segmented_lowrank_linear`. METHODS 1.7 on the base-agnostic tier of 1.1.
    """
    checks.base(base_out, x)
    x = x.to(base_out.dtype)
    scales = _check_adapters(x, base_out.shape[-1], lora_A_list, lora_B_list, segment_ids, scales)
    return _run(route, x, base_out, None, None, lora_A_list, lora_B_list, segment_ids, scales, dropout_p, training)
