"""Sums over shards of the features, and their transpose (METHODS 1.3).

Cyclic shards: a program owns a few tokens and walks tiles [tokens, turns, r] whose elements turn * r + p are contiguous
where r is a power of two. Sums stay in registers until the last turn, so block_sum reads x once and writes h: T (k + r)
elements. block_tile_ reads s once and writes (or reads and writes) out: T (n + r), or T (2 n + r), elements.
Contiguous shards of given sizes: a program owns the run of one shard.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from spectral_ops.triton_kernels.common import (
    cdiv,
    kept,
    narrow,
    on_device,
    power_of_2,
    processors,
    reference,
    split,
    strides,
    threshold,
    tile,
)  # fmt: skip

# element size, or (architecture, element size): elements per tile, elements along the features, warps
SUM = {2: (4096, 512, 4), 4: (2048, 512, 4)}
TILE = SUM  # the same tiles walked the other way


@triton.jit(do_not_specialize=["T", "limit"])
def block_sum_kernel(
    x, h, seed, limit, factor, T, k, r, turns, x_t, x_i,
    BT: tl.constexpr, TURNS: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    p0 = tl.program_id(1) * R
    p = p0 + tl.arange(0, R)
    turn = tl.arange(0, TURNS)
    rows = x + t[:, None, None] * x_t
    inside = (t < T)[:, None, None] & (p < r)[None, None, :]
    total = tl.zeros([BT, TURNS, R], tl.float32)
    for first in range(0, turns, TURNS):
        i = (first + turn)[None, :, None] * r + p[None, None, :]
        value = tl.load(rows + i.to(tl.int64) * x_i, mask=inside & (i < k), other=0.0).to(tl.float32)
        if seed is not None:
            column = (first + turn)[None, :, None] * r + p0
            value = tl.where(kept(tl.load(seed), t[:, None, None] * k, column, limit, R, ALIGNED), value, 0.0)
        total += value
    sums = tl.sum(total, 1) * factor  # [BT, R]
    out = h + t[:, None] * r + p[None, :]
    tl.store(out, narrow(sums, h.dtype.element_ty), mask=(t < T)[:, None] & (p < r)[None, :])


@triton.jit(do_not_specialize=["T", "limit"])
def run_sum_kernel(x, h, offsets, seed, limit, factor, T, k, r, x_t, x_i, BT: tl.constexpr, BK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    p = tl.program_id(1)
    start, end = tl.load(offsets + p), tl.load(offsets + p + 1)
    total = tl.zeros([BT, BK], tl.float32)
    for first in range(start, end, BK):
        i = first + tl.arange(0, BK)
        live = (t < T)[:, None] & (i < end)[None, :]
        value = tl.load(x + t[:, None] * x_t + i[None, :].to(tl.int64) * x_i, mask=live, other=0.0).to(tl.float32)
        if seed is not None:
            value = tl.where(kept(tl.load(seed), t[:, None] * k, first, limit, BK, False), value, 0.0)
        total += value
    tl.store(h + t * r + p, narrow(tl.sum(total, 1) * factor, h.dtype.element_ty), mask=t < T)


def block_sum(
    x,
    r: int,
    offsets: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    tiles: Literal["", "short", "tall"] = "",
):
    if x.dtype == torch.float64:
        return reference("block_sum")(x, r, offsets, seed, p)
    T, k = x.shape
    h = x.new_empty(T, r)
    if h.numel() == 0:
        return h
    elements, width, warps = tile(SUM, x, tiles)
    limit, factor = (0, 1.0) if seed is None else (threshold(p), 1.0 / (1.0 - p))
    with on_device(x):
        if offsets is not None:
            BK = power_of_2(cdiv(k, r), 32, width)
            BT = elements // 2 // BK
            run_sum_kernel[(cdiv(T, BT), r)](
                x, h, offsets, seed, limit, factor, T, k, r, *x.stride(), BT=BT, BK=BK, num_warps=warps
            )
            return h
        R = power_of_2(r, 1, width)
        turns = cdiv(k, r)
        TURNS = power_of_2(turns, 1, width // R)
        BT = max(1, elements // width)
        block_sum_kernel[(cdiv(T, BT), cdiv(r, R))](
            x, h, seed, limit, factor, T, k, r, turns, *x.stride(),
            BT=BT, TURNS=TURNS, R=R, ALIGNED=r % 4 == 0 and k % 4 == 0, num_warps=warps,
        )  # fmt: skip
    return h


@triton.jit(do_not_specialize=["T", "limit"])
def block_tile_kernel(
    out, s, seed, limit, factor, T, n, r, turns, span, out_t, out_i, s_t, s_p,
    ACCUMULATE: tl.constexpr, BT: tl.constexpr, TURNS: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    p0 = tl.program_id(1) * R
    p = p0 + tl.arange(0, R)
    turn = tl.arange(0, TURNS)
    source = s + t[:, None] * s_t + p[None, :].to(tl.int64) * s_p
    shard = tl.load(source, mask=(t < T)[:, None] & (p < r)[None, :], other=0.0).to(tl.float32) * factor
    shard = tl.broadcast_to(shard[:, None, :], [BT, TURNS, R])
    rows = out + t[:, None, None] * out_t
    inside = (t < T)[:, None, None] & (p < r)[None, None, :]
    begin = tl.program_id(2) * span
    for first in range(begin, tl.minimum(begin + span, turns), TURNS):
        i = (first + turn)[None, :, None] * r + p[None, None, :]
        target = rows + i.to(tl.int64) * out_i
        live = inside & (i < n)
        value = shard
        if seed is not None:
            column = (first + turn)[None, :, None] * r + p0
            value = tl.where(kept(tl.load(seed), t[:, None, None] * n, column, limit, R, ALIGNED), value, 0.0)
        if ACCUMULATE:
            value += tl.load(target, mask=live, other=0.0).to(tl.float32)
        tl.store(target, narrow(value, out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["T", "limit"])
def run_tile_kernel(
    out, s, offsets, seed, limit, factor, T, n, out_t, out_i, s_t, s_p,
    ACCUMULATE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    p = tl.program_id(1)
    start, end = tl.load(offsets + p), tl.load(offsets + p + 1)
    shard = tl.load(s + t * s_t + p.to(tl.int64) * s_p, mask=t < T, other=0.0).to(tl.float32) * factor
    shard = tl.broadcast_to(shard[:, None], [BT, BN])
    for first in range(start, end, BN):
        i = first + tl.arange(0, BN)
        target = out + t[:, None] * out_t + i[None, :].to(tl.int64) * out_i
        live = (t < T)[:, None] & (i < end)[None, :]
        value = shard
        if seed is not None:
            value = tl.where(kept(tl.load(seed), t[:, None] * n, first, limit, BN, False), value, 0.0)
        if ACCUMULATE:
            value += tl.load(target, mask=live, other=0.0).to(tl.float32)
        tl.store(target, narrow(value, out.dtype.element_ty), mask=live)


def block_tile_(
    out,
    s,
    offsets: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    accumulate: bool,
    tiles: Literal["", "short", "tall"] = "",
) -> None:
    if out.dtype == torch.float64 or s.dtype == torch.float64:
        return reference("block_tile_")(out, s, offsets, seed, p, accumulate)
    T, n = out.shape
    r = s.shape[1]
    if out.numel() == 0:
        return
    elements, width, warps = tile(TILE, out, tiles)
    limit, factor = (0, 1.0) if seed is None else (threshold(p), 1.0 / (1.0 - p))
    BT = elements // width
    with on_device(out):
        if offsets is not None:
            BN = power_of_2(cdiv(n, r), 32, width)
            BT = elements // 2 // BN
            run_tile_kernel[(cdiv(T, BT), r)](
                out, s, offsets, seed, limit, factor, T, n, *out.stride(), *strides(s),
                ACCUMULATE=accumulate, BT=BT, BN=BN, num_warps=warps,
            )  # fmt: skip
            return
        R = power_of_2(r, 1, width)
        turns = cdiv(n, r)
        TURNS = power_of_2(turns, 1, width // R)
        programs = cdiv(T, BT) * cdiv(r, R)
        splits, chunks = split(cdiv(turns, TURNS), programs, 8 * processors(out))
        block_tile_kernel[(cdiv(T, BT), cdiv(r, R), splits)](
            out, s, seed, limit, factor, T, n, r, turns, chunks * TURNS, *out.stride(), *s.stride(),
            ACCUMULATE=accumulate, BT=BT, TURNS=TURNS, R=R, ALIGNED=r % 4 == 0 and n % 4 == 0, num_warps=warps,
        )  # fmt: skip
