"""Segmented low-rank products over rows grouped by adapter (METHODS 1.7), or by expert (1.10).

No number of rows is known on the host, and nothing waits for it. A grid has as many programs as there can be tiles;
each finds its own from the offsets, which are one load and one scan, and belongs to one adapter. Those left over end.

* ``segment_project``: x once, P k s bytes; A_s from L2; h once out. Rows in sequence are blocks of memory, and rows of
  an order are read where they are.
* ``segment_lift_``: out once in and once out, 2 P d s. A program walks the columns of its rows, so that a step's rows
  of out are on their way while the last one's are added to.
* ``segment_outer``: u and x once. A program has a range of columns and at most ``span`` places of an adapter. What has
  more than those is summed from partial results in a second kernel, in their order: no atomics, no adapter that all
  others wait for.

Adapters that are fastest in memory (PEFT's lora_B of experts) are copied first, one after the other: read where they
are, every element would be a sector of its own, and that for each tile.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from spectral_ops.triton_kernels.common import (
    aligned,
    cdiv,
    dot,
    narrow,
    on_device,
    power_of_2,
    processors,
    reference,
    split,
    tile,
    turned,
)

# element size, or (architecture, element size): rows, inputs per step, greatest rank, warps, stages
PROJECT = {2: (64, 64, 128, 4, 4), (80, 2): (64, 64, 64, 8, 3), 4: (32, 32, 32, 4, 2)}
PROJECT_UNALIGNED = (32, 32, 32, 4, 1)
# element size, or (architecture, element size): rows, outputs, greatest rank per step, warps, stages
LIFT = {2: (64, 64, 64, 4, 3), (80, 2): (64, 64, 64, 4, 2), 4: (32, 64, 32, 8, 2)}
LIFT_UNALIGNED = (32, 32, 32, 8, 1)
# element size, or (architecture, element size): rows per step, columns, greatest rank, warps, stages
OUTER = {2: (64, 64, 128, 4, 3), (80, 2): (64, 64, 64, 4, 3), 4: (32, 32, 32, 4, 2)}
OUTER_UNALIGNED = (32, 32, 32, 4, 1)
SPAN = 2048  # places that a program of segment_outer takes at most
JOINED = 1024  # elements of a program of join_kernel


@triton.jit
def _offset(offsets, s, live, other, P):
    """offsets[s], or ``other``: a place, whatever the memory holds."""
    return tl.minimum(tl.maximum(tl.load(offsets + s, mask=live, other=other), 0), P).to(tl.int32)


@triton.jit
def _at(values, s, own):
    """values[own], of a vector over s."""
    return tl.sum(tl.where(s == own, values, 0), 0)


@triton.jit
def _tile_at(offsets, number, P, n, BT: tl.constexpr, N: tl.constexpr):
    """(whose, first place, end) of tile ``number``: s + 1 for adapter s; 0 and n + 1 for the places before and after
    all of them; more, and no place, where there is no such tile."""
    s = tl.arange(0, N)
    begin = _offset(offsets, s - 1, (s > 0) & (s <= n + 1), 0, P)
    end = _offset(offsets, s, s <= n, P, P)
    count = tl.where(s <= n + 1, tl.maximum(end - begin, 0), 0)
    upto = tl.cumsum((count + (BT - 1)) // BT, 0)
    own = tl.sum((upto <= number).to(tl.int32), 0)
    before = tl.max(tl.where(s < own, upto, 0), 0)
    return own, _at(begin, s, own) + (number - before) * BT, _at(end, s, own)


@triton.jit(do_not_specialize=["P", "n"])
def project_kernel(
    x, A, order, offsets, out, P, n, k, r, x_t, x_i, A_s, A_p, A_i,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    own, first, last = _tile_at(offsets, tl.program_id(0), P, n, BT, N)
    i = first + tl.arange(0, BT)
    row = i.to(tl.int64)
    if order is not None:
        row = tl.load(order + i, mask=i < last, other=0)
    p = tl.program_id(1) * R + tl.arange(0, R)
    source = A + (own.to(tl.int64) - 1) * A_s
    total = tl.zeros([BT, R], tl.float32)
    for i0 in tl.range(0, tl.where((own > 0) & (own <= n), k, 0), BK, num_stages=STAGES):
        c = i0 + tl.arange(0, BK)
        a = tl.load(x + row[:, None] * x_t + c[None, :].to(tl.int64) * x_i, mask=(i < last)[:, None] & (c < k)[None, :],
                    other=0.0)  # fmt: skip
        b = tl.load(source + p[None, :].to(tl.int64) * A_p + c[:, None].to(tl.int64) * A_i,
                    mask=(p < r)[None, :] & (c < k)[:, None], other=0.0)  # fmt: skip
        total = dot(a, b, total, "ieee")
    target = out + i[:, None].to(tl.int64) * r + p[None, :]
    tl.store(target, narrow(total, out.dtype.element_ty), mask=(i < last)[:, None] & (p < r)[None, :])


def segment_project(x, A, order, offsets, tiles: Literal["", "short", "narrow"] = ""):
    if x.dtype == torch.float64:
        return reference("segment_project")(x, A, order, offsets)
    (T, k), (n, r, _) = x.shape, A.shape
    P = T if order is None else order.shape[0]
    h = x.new_empty(P, r)
    if h.numel() == 0:
        return h
    BT, BK, R, warps, stages = tile(PROJECT, x, tiles)
    if not aligned(x):
        BT, BK, R, warps, stages = PROJECT_UNALIGNED
    R = power_of_2(r, 16, R)
    with on_device(x):
        A = _near(A, P)
        project_kernel[(_tiles(P, n, BT), cdiv(r, R))](
            x, A, order, offsets, h, P, n, k, r, *x.stride(), *A.stride(),
            BT=BT, BK=BK, R=R, N=power_of_2(n + 2, 1, 1 << 30), STAGES=stages, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return h


@triton.jit(do_not_specialize=["P", "n", "steps"])
def lift_kernel(
    out, h, B, order, offsets, P, n, d, r, steps, out_t, out_o, h_t, h_p, B_s, B_o, B_p,
    BT: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    own, first, last = _tile_at(offsets, tl.program_id(0), P, n, BT, N)
    i = first + tl.arange(0, BT)
    row = i.to(tl.int64)
    if order is not None:
        row = tl.load(order + i, mask=i < last, other=0)
    source = B + (own.to(tl.int64) - 1) * B_s
    begin = tl.program_id(1) * steps
    end = tl.where((own > 0) & (own <= n), tl.minimum(begin + steps, tl.cdiv(d, BD)), begin)
    for block in tl.range(begin, end, num_stages=STAGES):
        o = block * BD + tl.arange(0, BD)
        target = out + row[:, None] * out_t + o[None, :].to(tl.int64) * out_o
        live = (i < last)[:, None] & (o < d)[None, :]
        value, total = tl.load(target, mask=live, other=0.0), tl.zeros([BT, BD], tl.float32)
        for step in tl.static_range(STEPS):
            p = step * R + tl.arange(0, R)
            a = tl.load(h + i[:, None].to(tl.int64) * h_t + p[None, :] * h_p,
                        mask=(i < last)[:, None] & (p < r)[None, :], other=0.0)  # fmt: skip
            b = tl.load(source + o[None, :].to(tl.int64) * B_o + p[:, None].to(tl.int64) * B_p,
                        mask=(o < d)[None, :] & (p < r)[:, None], other=0.0)  # fmt: skip
            total = dot(a, b, total, "ieee")
        tl.store(target, narrow(value.to(tl.float32) + total, out.dtype.element_ty), mask=live)


def segment_lift_(out, h, B, order, offsets, tiles: Literal["", "short"] = "") -> None:
    if out.dtype == torch.float64:
        return reference("segment_lift_")(out, h, B, order, offsets)
    P, (n, d, r) = h.shape[0], B.shape
    if out.numel() == 0 or P == 0 or r == 0:
        return None
    BT, BD, R, warps, stages = tile(LIFT, out, tiles) if aligned(out) else LIFT_UNALIGNED
    R, rows = power_of_2(r, 16, R), _tiles(P, n, BT)
    stages = stages if r <= R else min(stages, 2)  # a step holds all ranks
    ranges, steps = split(cdiv(d, BD), rows, 4 * processors(out))
    with on_device(out):
        B = _near(B, P)
        lift_kernel[(rows, ranges)](
            out, h, B, order, offsets, P, n, d, r, steps, *out.stride(), *h.stride(), *B.stride(),
            BT=BT, BD=BD, R=R, STEPS=cdiv(r, R), N=power_of_2(n + 2, 1, 1 << 30), STAGES=stages,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return None


@triton.jit
def _chunks(offsets, P, n, span, N: tl.constexpr):
    """Each adapter's first place, its end, and its number of chunks of ``span`` places: one where it has none."""
    s = tl.arange(0, N)
    begin, end = _offset(offsets, s, s < n, 0, P), _offset(offsets, s + 1, s < n, 0, P)
    return s, begin, end, tl.where(s < n, tl.maximum(tl.cdiv(tl.maximum(end - begin, 0), span), 1), 0)


@triton.jit(do_not_specialize=["P", "n", "span", "slots"])
def outer_kernel(
    u, x, order, offsets, out, partial, P, n, k, r, span, slots, u_t, u_p, x_t, x_i,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    s, begins, ends, chunks = _chunks(offsets, P, n, span, N)
    upto, number = tl.cumsum(chunks, 0), tl.program_id(1)
    own = tl.sum((upto <= number).to(tl.int32), 0)
    chunk = number - tl.max(tl.where(s < own, upto, 0), 0)
    begin, several = _at(begins, s, own) + chunk * span, _at(chunks, s, own) > 1
    end = tl.minimum(begin + span, _at(ends, s, own))
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    p = tl.program_id(2) * R + tl.arange(0, R)
    total = tl.zeros([BK, R], tl.float32)
    for first in tl.range(begin, end, BT, num_stages=STAGES):
        i = first + tl.arange(0, BT)
        row = i.to(tl.int64)
        if order is not None:
            row = tl.load(order + i, mask=i < end, other=0)
        a = tl.load(x + row[:, None] * x_t + c[None, :].to(tl.int64) * x_i, mask=(i < end)[:, None] & (c < k)[None, :],
                    other=0.0)  # fmt: skip
        b = tl.load(u + i[:, None].to(tl.int64) * u_t + p[None, :] * u_p, mask=(i < end)[:, None] & (p < r)[None, :],
                    other=0.0)  # fmt: skip
        total = dot(tl.trans(a), b, total, "ieee")
    within = p[None, :].to(tl.int64) * k + c[:, None]
    live = (c < k)[:, None] & (p < r)[None, :]
    if partial is not None:
        if several:
            slot = tl.sum(tl.where((s < own) & (chunks > 1), chunks, 0), 0) + chunk
            if slot < slots:  # else the offsets do not ascend
                tl.store(partial + slot.to(tl.int64) * r * k + within, total, mask=live)
    if (own < n) & (several == 0):
        tl.store(out + own.to(tl.int64) * r * k + within, total, mask=live)


@triton.jit(do_not_specialize=["P", "n", "span", "slots"])
def join_kernel(partial, offsets, out, P, n, span, slots, size, BLOCK: tl.constexpr, N: tl.constexpr):
    """out [n, size] of the adapters of several chunks: a program has a block of one, the number of which it counts."""
    s, begins, ends, chunks = _chunks(offsets, P, n, span, N)
    several = chunks > 1
    own = tl.sum((tl.cumsum(several.to(tl.int32), 0) <= tl.program_id(1)).to(tl.int32), 0)
    if own < n:
        slot = tl.sum(tl.where((s < own) & several, chunks, 0), 0)
        e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        source = partial + slot.to(tl.int64) * size + e
        total = tl.zeros([BLOCK], tl.float32)
        for _ in range(slot, tl.minimum(slot + _at(chunks, s, own), slots)):
            total += tl.load(source, mask=e < size, other=0.0)
            source += size
        tl.store(out + own.to(tl.int64) * size + e, total, mask=e < size)


def segment_outer(u, x, order, offsets, tiles: Literal["", "short", "narrow"] = ""):
    if x.dtype == torch.float64:
        return reference("segment_outer")(u, x, order, offsets)
    n, (P, r), k = offsets.shape[0] - 1, u.shape, x.shape[1]
    out = torch.empty((n, r, k), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    BT, BK, R, warps, stages = tile(OUTER, x, tiles) if aligned(x) else OUTER_UNALIGNED
    R = power_of_2(r, 16, R)
    columns = cdiv(k, BK), cdiv(r, R)
    _, steps = split(cdiv(P, BT) or 1, columns[0] * columns[1], 2 * processors(x))
    span = min(steps * BT, SPAN)
    most = min(n, P // (span + 1))  # adapters of several chunks, and how many chunks those can have
    slots = min(2 * P // span, P // span + most) if most else 0
    partial = torch.empty((slots, r, k), dtype=torch.float32, device=x.device) if most else None
    numbers = {"N": power_of_2(n, 1, 1 << 30)}
    with on_device(x):
        outer_kernel[(columns[0], min(P // span, P) + n, columns[1])](
            u, x, order, offsets, out, partial, P, n, k, r, span, slots, *u.stride(), *x.stride(),
            BT=BT, BK=BK, R=R, STAGES=stages, num_warps=warps, num_stages=stages, **numbers,
        )  # fmt: skip
        if most:
            join_kernel[(cdiv(r * k, 1024), most)](
                partial, offsets, out, P, n, span, slots, r * k, BLOCK=1024, **numbers
            )
    return out


def _tiles(P: int, n: int, BT: int) -> int:
    """How many tiles of BT places there are at most: of n adapters, and of the places before and after them."""
    return P // BT + min(n + 2, P)


def _near(stack: torch.Tensor, P: int) -> torch.Tensor:
    """stack [n, a, b], copied adapter by adapter where the adapters are fastest in memory and have places enough."""
    (n, a, b), (fastest, of_a, of_b) = stack.shape, stack.stride()
    if fastest != 1 or not 1 < n <= min(P, of_a, of_b):
        return stack
    if of_a == b * of_b:
        return turned(stack.as_strided((a * b, n), (of_b, 1)), a * b).view(n, a, b)
    if of_b == a * of_a:
        return turned(stack.as_strided((a * b, n), (of_a, 1)), a * b).view(n, b, a).mT
    return stack
