"""Segmented low-rank products over rows grouped by adapter (METHODS 1.7).

A program takes BT consecutive places of ``order``: rows of one adapter, or of the few that follow each other there. It
walks the adapters it meets, so the arithmetic is T r and at most one tile per adapter more.

* ``segment_project``: x once, T k s bytes, gathered by rows; A_s from L2; h once out.
* ``segment_lift_``: out once in and once out, 2 T d s.
* ``segment_outer``: u and x once. A program owns an adapter and a range of columns and walks that adapter's rows in
  their order: no partial sums, no atomics. Where one adapter has nearly all rows, few programs do the work.
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
    reference,
    tile,
)

# element size, or (architecture, element size): rows, inputs per step, greatest rank, warps, stages
PROJECT = {2: (64, 128, 128, 8, 3), (80, 2): (64, 64, 64, 8, 3), 4: (32, 32, 32, 4, 2)}
PROJECT_UNALIGNED = (32, 32, 32, 4, 1)
# (architecture, element size): rows, outputs, greatest rank per step, warps
LIFT_UNALIGNED = (32, 64, 32, 8)  # which float32 takes too: others spill
LIFT = {2: (64, 128, 64, 8), 4: LIFT_UNALIGNED}
# element size, or (architecture, element size): rows per step, columns, greatest rank, warps, stages
OUTER = {2: (64, 64, 128, 4, 3), (80, 2): (64, 64, 64, 4, 3), 4: (32, 32, 32, 4, 2)}
OUTER_UNALIGNED = (32, 32, 32, 4, 1)


@triton.jit
def _places(order, offsets, first, T, n, BT: tl.constexpr, HALVINGS: tl.constexpr):
    """The rows at places first + [0, BT) of order, their adapters (-1: none), and the least and greatest met."""
    i = first + tl.arange(0, BT)
    row = tl.load(order + i, mask=i < T, other=0).to(tl.int64)
    own = tl.zeros([BT], tl.int32)  # the last s in [0, n] with offsets[s] <= i, or 0
    for h in tl.static_range(HALVINGS):
        s = own + (1 << (HALVINGS - 1 - h))
        own = tl.where(tl.load(offsets + s, mask=s <= n, other=T) <= i, s, own)
    own = tl.where((i < T) & (own < n) & (tl.load(offsets) <= i), own, -1)
    return i, row, own, tl.min(tl.where(own < 0, n, own), 0), tl.max(own, 0)


@triton.jit(do_not_specialize=["T", "n"])
def project_kernel(
    x, A, order, offsets, out, T, n, k, r, x_t, x_i, A_s, A_p, A_i,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, HALVINGS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i, row, own, low, high = _places(order, offsets, tl.program_id(0) * BT, T, n, BT, HALVINGS)
    p = tl.program_id(1) * R + tl.arange(0, R)
    total = tl.zeros([BT, R], tl.float32)
    for s in range(low, high + 1):
        mine = own == s
        if tl.max(mine.to(tl.int32), 0) > 0:
            part = tl.zeros([BT, R], tl.float32)
            source = A + (tl.zeros([1, 1], tl.int64) + s) * A_s
            for i0 in tl.range(0, k, BK, num_stages=STAGES):
                c = i0 + tl.arange(0, BK)
                a = tl.load(x + row[:, None] * x_t + c[None, :].to(tl.int64) * x_i,
                            mask=mine[:, None] & (c < k)[None, :], other=0.0)  # fmt: skip
                b = tl.load(source + p[None, :].to(tl.int64) * A_p + c[:, None].to(tl.int64) * A_i,
                            mask=(p < r)[None, :] & (c < k)[:, None], other=0.0)  # fmt: skip
                part = dot(a, b, part, "ieee")
            total = tl.where(mine[:, None], part, total)
    target = out + row[:, None] * r + p[None, :]
    tl.store(target, narrow(total, out.dtype.element_ty), mask=(i < T)[:, None] & (p < r)[None, :])


def segment_project(x, A, order, offsets, tiles: Literal["", "short", "narrow"] = ""):
    if x.dtype == torch.float64:
        return reference("segment_project")(x, A, order, offsets)
    (T, k), (n, r, _) = x.shape, A.shape
    h = x.new_empty(T, r)
    if h.numel() == 0:
        return h
    BT, BK, R, warps, stages = tile(PROJECT, x, tiles)
    if not aligned(x):
        BT, BK, R, warps, stages = PROJECT_UNALIGNED
    R = power_of_2(r, 16, R)
    with on_device(x):
        project_kernel[(cdiv(T, BT), cdiv(r, R))](
            x, A, order, offsets, h, T, n, k, r, *x.stride(), *A.stride(),
            BT=BT, BK=BK, R=R, HALVINGS=n.bit_length(), STAGES=stages, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return h


@triton.jit(do_not_specialize=["T", "n"])
def lift_kernel(
    out, h, B, order, offsets, T, n, d, r, out_t, out_o, h_t, h_p, B_s, B_o, B_p,
    BT: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(d, BD)
    i, row, own, low, high = _places(order, offsets, (tl.program_id(0) // tiles) * BT, T, n, BT, HALVINGS)
    o = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    update = tl.zeros([BT, BD], tl.float32)
    for s in range(low, high + 1):
        mine = own == s
        if tl.max(mine.to(tl.int32), 0) > 0:
            source = B + (tl.zeros([1, 1], tl.int64) + s) * B_s
            for p0 in range(0, r, R):
                p = p0 + tl.arange(0, R)
                a = tl.load(h + row[:, None] * h_t + p[None, :] * h_p, mask=mine[:, None] & (p < r)[None, :],
                            other=0.0)  # fmt: skip
                b = tl.load(source + o[None, :].to(tl.int64) * B_o + p[:, None].to(tl.int64) * B_p,
                            mask=(o < d)[None, :] & (p < r)[:, None], other=0.0)  # fmt: skip
                part = dot(a, b, tl.zeros([BT, BD], tl.float32), "ieee")
                update += tl.where(mine[:, None], part, 0.0)  # 0 times another adapter's infinity stays out
    target = out + row[:, None] * out_t + o[None, :].to(tl.int64) * out_o
    live = (own >= 0)[:, None] & (o < d)[None, :]
    value = tl.load(target, mask=live, other=0.0).to(tl.float32) + update
    tl.store(target, narrow(value, out.dtype.element_ty), mask=live)


def segment_lift_(out, h, B, order, offsets, tiles: Literal["", "short"] = "") -> None:
    if out.dtype == torch.float64:
        return reference("segment_lift_")(out, h, B, order, offsets)
    (T, d), (n, _, r) = out.shape, B.shape
    if out.numel() == 0:
        return None
    BT, BD, R, warps = tile(LIFT, out, tiles) if aligned(out) else LIFT_UNALIGNED
    with on_device(out):
        lift_kernel[(cdiv(T, BT) * cdiv(d, BD),)](
            out, h, B, order, offsets, T, n, d, r, *out.stride(), *h.stride(), *B.stride(),
            BT=BT, BD=BD, R=power_of_2(r, 16, R), HALVINGS=n.bit_length(), num_warps=warps, num_stages=1,
        )  # fmt: skip
    return None


@triton.jit
def outer_kernel(
    u, x, order, offsets, out, k, r, u_t, u_p, x_t, x_i,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    p = tl.program_id(2) * R + tl.arange(0, R)
    last = tl.load(offsets + s + 1)
    total = tl.zeros([R, BK], tl.float32)
    for first in tl.range(tl.load(offsets + s), last, BT, num_stages=STAGES):
        i = first + tl.arange(0, BT)
        row = tl.load(order + i, mask=i < last, other=0).to(tl.int64)
        a = tl.load(u + row[:, None] * u_t + p[None, :] * u_p, mask=(i < last)[:, None] & (p < r)[None, :], other=0.0)
        b = tl.load(x + row[:, None] * x_t + c[None, :].to(tl.int64) * x_i, mask=(i < last)[:, None] & (c < k)[None, :],
                    other=0.0)  # fmt: skip
        total = dot(tl.trans(a), b, total, "ieee")
    target = out + (s.to(tl.int64) * r + p[:, None]) * k + c[None, :]
    tl.store(target, total, mask=(p < r)[:, None] & (c < k)[None, :])


def segment_outer(u, x, order, offsets, tiles: Literal["", "short", "narrow"] = ""):
    if x.dtype == torch.float64:
        return reference("segment_outer")(u, x, order, offsets)
    n, r, k = offsets.shape[0] - 1, u.shape[1], x.shape[1]
    out = torch.empty((n, r, k), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    BT, BK, R, warps, stages = tile(OUTER, x, tiles) if aligned(x) else OUTER_UNALIGNED
    R = power_of_2(r, 16, R)
    with on_device(x):
        outer_kernel[(cdiv(k, BK), n, cdiv(r, R))](
            u, x, order, offsets, out, k, r, *u.stride(), *x.stride(),
            BT=BT, BK=BK, R=R, STAGES=stages, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
