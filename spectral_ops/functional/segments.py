"""Segmented low-rank linear: several LoRA adapters over one base product, one of them for each row (METHODS 1.7).

    h_t = drop(x_t) A_sᵀ      y_t = x_t Wᵀ + γ_s h_t B_sᵀ + b      s = segment_ids[t]; -1: no adapter
    backward: u_t = γ_s dy_t B_s      dx_t = dy_t W + mask * (u_t A_s)
              dB_s = γ_s Σ_t dy_tᵀ h_t      dA_s = Σ_t u_tᵀ drop(x_t)      over the rows t of adapter s

The adapters are stacked, A [n r, k] and γB [d, n r], ranks padded with zeros to the largest. Two routes:

* stacked: one product projects every row onto all adapters, the columns that are not a row's own become zero, and the
  operators of 1.1 do the rest. Right for the two to four adapters of a policy and its value model.
* grouped: rows are sorted by id on their device, and the operators below give each its own adapter's product alone:
  arithmetic T r instead of T n r, for many adapters. On the CPU their references are the library's products already.

Saved for backward: x and each row's own h [T, r]; grouped, two vectors of indices besides.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, define, nbytes
from spectral_ops.functional import checks, dropout
from spectral_ops.functional.common import (
    apply,
    autocast_arguments,
    backward_pass,
    draw_seed,
    overwritable,
    rows,
    shaped,
    tokens,
)
from spectral_ops.functional.lowrank import A_gradient, fused_forward, lowrank_backward_op

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
    stacked.unflatten(1, (foreign.shape[1], stacked.shape[1] // foreign.shape[1])).masked_fill_(foreign, 0)
    return stacked


def own_of(stacked: torch.Tensor, n: int) -> torch.Tensor:
    """[T, r]: the columns of each row's own adapter, from stacked [T, n r] whose other columns are zero."""
    return stacked if n == 1 else stacked.unflatten(1, (n, stacked.shape[1] // n)).sum(1)


def spread(own: torch.Tensor, foreign: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`own_of`: [T, n r] from own [T, r]."""
    return own.unsqueeze(1).masked_fill(foreign, 0).flatten(1)


# --- operators: rows grouped by adapter ------------------------------------------------------------------------------
# The rows of adapter s are order[offsets[s] : offsets[s + 1]]; all others have none. Adapters are 3-d, any strides.


def group_rows(ids: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """order [T] and offsets [n + 1], int64, of ids [T]: computed on their device, which is not waited for."""
    ids, order = torch.sort(ids, stable=True)
    return order, torch.searchsorted(ids, torch.arange(n + 1, dtype=ids.dtype, device=ids.device))


def _groups(order: torch.Tensor, offsets: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(adapter, its rows) for each that has any. Reads the offsets: only for the CPU, and as a reference."""
    ends = offsets.tolist()
    return [(s, order[a:b]) for s, (a, b) in enumerate(zip(ends, ends[1:], strict=False)) if a < b]


def _project_cost(x, A, order, offsets):
    return Cost(2 * x.numel() * A.shape[1], nbytes(x, A, order, offsets) + x.shape[0] * A.shape[1] * x.element_size())


@define(
    "segment_project(Tensor x, Tensor A, Tensor order, Tensor offsets) -> Tensor",
    stem="segments",
    fake=lambda x, A, order, offsets: x.new_empty(x.shape[0], A.shape[1]),
    cost=_project_cost,
)
def segment_project_op(x, A, order, offsets):
    """h [T, r]: h_t = x_t A_sᵀ in x's dtype, zero for a row without adapter; x [T, k], A [n, r, k] in x's dtype."""
    acc = accumulate_dtype(x.dtype)
    h = x.new_zeros(x.shape[0], A.shape[1])
    for s, own in _groups(order, offsets):
        h[own] = (x[own].to(acc) @ A[s].to(acc).t()).to(x.dtype)
    return h


def _lift_cost(out, h, B, order, offsets):
    return Cost(2 * out.numel() * h.shape[1], 2 * nbytes(out) + nbytes(h, B, order, offsets))


@define(
    "segment_lift_(Tensor(a!) out, Tensor h, Tensor B, Tensor order, Tensor offsets) -> ()",
    stem="segments",
    fake=lambda out, h, B, order, offsets: None,
    cost=_lift_cost,
)
def segment_lift_op(out, h, B, order, offsets):
    """out [T, d]: out_t += h_t B_sᵀ, for h [T, r] and B [n, d, r] of out's dtype."""
    acc = accumulate_dtype(out.dtype)
    for s, own in _groups(order, offsets):
        out[own] = torch.addmm(out[own].to(acc), h[own].to(acc), B[s].to(acc).t()).to(out.dtype)


def _outer_cost(u, x, order, offsets):
    out = (offsets.shape[0] - 1) * u.shape[1] * x.shape[1]
    return Cost(2 * x.numel() * u.shape[1], nbytes(u, x, order, offsets) + out * accumulate_dtype(x.dtype).itemsize)


@define(
    "segment_outer(Tensor u, Tensor x, Tensor order, Tensor offsets) -> Tensor",
    stem="segments",
    fake=lambda u, x, order, offsets: x.new_empty(
        offsets.shape[0] - 1, u.shape[1], x.shape[1], dtype=accumulate_dtype(x.dtype)
    ),
    cost=_outer_cost,
)
def segment_outer_op(u, x, order, offsets):
    """[n, r, k]: Σ u_tᵀ x_t over the rows of each adapter, in float32 (float64); u [T, r] and x [T, k] of one dtype."""
    acc = accumulate_dtype(x.dtype)
    out = x.new_zeros(offsets.shape[0] - 1, u.shape[1], x.shape[1], dtype=acc)
    for s, own in _groups(order, offsets):
        torch.mm(u[own].to(acc).t(), x[own].to(acc), out=out[s])
    return out


# --- autograd --------------------------------------------------------------------------------------------------------


class SegmentedFunction(Function):
    """y from x and a frozen ``weight``, or, where ``base_out`` is given, in place over somebody else's x Wᵀ + b."""

    @staticmethod
    def forward(ctx, x, base_out, weight, bias, ids, seed, p, scales, *adapters):
        n = len(scales)
        As, Bs = adapters[:n], adapters[n:]
        x2 = rows(x)
        A, B = stack_A(As, x.dtype), stack_B(Bs, scales, x.dtype)
        h = keep_own_(dropout.project(x2, A, seed, p), others(row_ids(ids, x2.shape[0]), n))
        if base_out is None:
            y = shaped(fused_forward(x2, weight, h, B, 1.0, None, bias), x)
        else:
            y = base_out
            tokens(y).addmm_(h, B.t())
            ctx.mark_dirty(base_out)
        need_A, need_B = ctx.needs_input_grad[8 : 8 + n], ctx.needs_input_grad[8 + n :]
        ctx.save_for_backward(
            x if any(need_A) else None, weight, ids, seed, own_of(h, n) if any(need_B) else None, *adapters
        )
        ctx.p, ctx.scales, ctx.x_shape = p, scales, x.shape
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, ids, seed, h, *adapters = ctx.saved_tensors
        n = len(ctx.scales)
        As, Bs = adapters[:n], adapters[n:]
        need_x, need_out, _, need_bias = ctx.needs_input_grad[:4]
        need_A, need_B = ctx.needs_input_grad[8 : 8 + n], ctx.needs_input_grad[8 + n :]
        need_u = need_x or any(need_A)
        dy2 = rows(dy)
        A, B = stack_A(As, dy.dtype), stack_B(Bs, ctx.scales, dy.dtype)
        r = A.shape[0] // n
        foreign = others(row_ids(ids, dy2.shape[0]), n)
        stacked = dy2.new_empty(dy2.shape[0], n * r) if h is None else spread(h, foreign)  # unread when not saved
        u, dB, db, _, _ = lowrank_backward_op(
            dy2, stacked, B, 1.0, None, None, None, need_u, any(need_B), need_bias, False
        )
        if need_u:
            keep_own_(u, foreign)
        dx = None
        if need_x:
            dx = dy2 @ weight if weight is not None else dy2.new_zeros(dy2.shape[0], A.shape[1])
            dx = dropout.lift_(dx, u, A, seed, ctx.p).reshape(ctx.x_shape)
        grads: list[torch.Tensor | None] = [None] * (2 * n)
        trained = [s for s in range(n) if need_A[s]]
        if trained:
            ranks = [As[s].shape[0] for s in trained]
            if sum(ranks) < n * r:
                u = torch.cat([u[:, s * r : s * r + rank] for s, rank in zip(trained, ranks, strict=True)], 1)
            dA = A_gradient(u, rows(x), seed, ctx.p, accumulate_dtype(x.dtype))
            for s, part in zip(trained, dA.split(ranks), strict=True):
                grads[s] = part.to(As[s].dtype)
        for s in range(n):
            if need_B[s]:
                part = dB[:, s * r : s * r + Bs[s].shape[1]]
                grads[n + s] = (ctx.scales[s] * part).to(Bs[s].dtype)
        db = db.to(dy.dtype) if need_bias else None
        return dx, dy if need_out else None, None, db, None, None, None, None, *grads


class GroupedFunction(Function):
    """The same on the grouped route, without dropout. A gradient is computed for every adapter if one needs it."""

    @staticmethod
    def forward(ctx, x, base_out, weight, bias, ids, scales, *adapters):
        n, x2 = len(scales), rows(x)
        groups = group_rows(row_ids(ids, x2.shape[0]), n)
        A, B = stack_A(adapters[:n], x.dtype), stack_B(adapters[n:], scales, x.dtype)
        h = segment_project_op(x2, _each(A, n, 0), *groups)
        if base_out is None:
            y2 = F.linear(x2, weight, bias)
        else:
            y2 = tokens(base_out)
            ctx.mark_dirty(base_out)
        segment_lift_op(y2, h, _each(B, n, 1), *groups)
        need_A, need_B = ctx.needs_input_grad[6 : 6 + n], ctx.needs_input_grad[6 + n :]
        ctx.save_for_backward(x if any(need_A) else None, weight, *groups, h if any(need_B) else None, *adapters)
        ctx.scales, ctx.x_shape = scales, x.shape
        return shaped(y2, x) if base_out is None else base_out

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, order, offsets, h, *adapters = ctx.saved_tensors
        n = len(ctx.scales)
        As, Bs, groups = adapters[:n], adapters[n:], (order, offsets)
        need_x, need_out, _, need_bias = ctx.needs_input_grad[:4]
        need_A, need_B = ctx.needs_input_grad[6 : 6 + n], ctx.needs_input_grad[6 + n :]
        dy2 = rows(dy)
        dx = u = None
        if need_x or any(need_A):
            u = segment_project_op(dy2, _each(stack_B(Bs, ctx.scales, dy.dtype), n, 1).transpose(1, 2), *groups)
        if need_x:
            A = _each(stack_A(As, dy.dtype), n, 0)
            dx = dy2 @ weight if weight is not None else dy2.new_zeros(dy2.shape[0], A.shape[2])
            segment_lift_op(dx, u, A.transpose(1, 2), *groups)
            dx = dx.reshape(ctx.x_shape)
        grads: list[torch.Tensor | None] = [None] * (2 * n)
        if any(need_A):
            dA = segment_outer_op(u, rows(x), *groups)
        if any(need_B):
            dB = segment_outer_op(h, dy2, *groups)
        for s in range(n):
            if need_A[s]:
                grads[s] = dA[s, : As[s].shape[0]].to(As[s].dtype)
            if need_B[s]:
                grads[n + s] = (ctx.scales[s] * dB[s, : Bs[s].shape[1]].t()).to(Bs[s].dtype)
        db = dy2.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype) if need_bias else None
        return dx, dy if need_out else None, None, db, None, None, *grads


def _each(stacked: torch.Tensor, n: int, axis: int) -> torch.Tensor:
    """A view of the n adapters stacked along ``axis``, one after the other in the first dimension."""
    return stacked.unflatten(axis, (n, stacked.shape[axis] // n)).movedim(axis, 0)


# --- routes ----------------------------------------------------------------------------------------------------------

ROUTES = ("auto", "stacked", "grouped")
# device, half precision or not -> from how many stacked columns, and how many rows, sorting the rows costs less than a
# product with all adapters: measured on the CPU, whose grouped operators multiply half precision in float32; on a GPU
# from the operators' arithmetic, not yet measured
GROUPED_FROM = {
    ("cpu", False): (96, 256),
    ("cpu", True): (128, 256),
    ("cuda", False): (128, 1024),
    ("cuda", True): (128, 1024),
}
_TRITON = importlib.util.find_spec("triton") is not None


def choose_route(T: int, columns: int, dtype: torch.dtype, device_type: str, dropout: bool) -> str:
    """ "grouped" for many rows over many adapters, where its kernels are and draw no mask; else "stacked"."""
    key = device_type, dtype.itemsize == 2
    if dropout or key not in GROUPED_FROM or (device_type == "cuda" and not _TRITON):
        return "stacked"
    least_columns, least_rows = GROUPED_FROM[key]
    return "grouped" if columns >= least_columns and T >= least_rows else "stacked"


def _run(route, x, base_out, weight, bias, lora_A_list, lora_B_list, segment_ids, scales, dropout_p, training):
    """The checked arguments through one route."""
    if route not in ROUTES:
        raise ValueError(f"route: got {route!r}, wanted one of {', '.join(map(repr, ROUTES))}")
    checks.probability("dropout_p", dropout_p)
    seed = draw_seed(x, dropout_p, training)
    adapters = (*lora_A_list, *lora_B_list)
    if route == "auto":
        columns = len(lora_A_list) * max(A.shape[0] for A in lora_A_list)
        route = choose_route(x.shape[:-1].numel(), columns, x.dtype, x.device.type, seed is not None)
    common = x, base_out, weight, bias, segment_ids.reshape(-1)
    if route == "stacked":
        return apply(SegmentedFunction, x.device.type, *common, seed, dropout_p, scales, *adapters)
    if seed is not None:
        raise ValueError(f"route: got 'grouped' with dropout_p {dropout_p!r}, wanted 'stacked' (or 'auto')")
    return apply(GroupedFunction, x.device.type, *common, scales, *adapters)


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
        route: "stacked", "grouped" (no dropout), or "auto", which goes by T, n max r_s, the dtype and the device.

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
    out = overwritable(base_out)
    return _run(route, x, out, None, None, lora_A_list, lora_B_list, segment_ids, scales, dropout_p, training)
