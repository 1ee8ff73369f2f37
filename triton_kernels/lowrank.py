"""Low-rank linear: a product with a second K segment, the in-place epilogue, one backward pass over dy (METHODS 1.1).

Bytes moved, for elements of s bytes:

* ``lowrank_update_``: out once in and once out, 2 T d s; h and B come back from L2 for every tile.
* ``lowrank_backward``: dy (and y) once, T d s each, whatever subset is asked for; gdy once out. A program owns a block
  of BT tokens and a range of output features. It holds u [BT, r] in registers while it walks the features, and writes
  the finished dB [BD, r] of its tokens for each step. Partial sums are float32: T r per range of features and d r per
  block of tokens, written and read once and meanwhile in L2 if it holds them. With T = 8192,
  d = 4096, r = 16 in bfloat16 on 132 processors: 67 MB of dy from memory (22 us at 3 TB/s), and 10.5 MB of partial sums
  each way for 32 blocks by 4 ranges. Ranks above 128 (64 with y or gdy) read dy again. Where dB's partial sums would
  move more than dy, a second pass makes it: a program owns outputs there, and walks the tokens.
* ``lowrank_matmul``: x and W as any product does; h and B add r / k to it.

Where rows can be described to the copy engine (``described``), ``lowrank_matmul`` of 16-bit elements reads its tiles
through tensor descriptors, with a warpgroup or warps of its own for the copies. What Triton 3.6 compiles decides its
form:

* sm_90: the loop over tiles is specialised whole, so the next tile's copies run under this one's end. It takes
  num_warps = 4, which become a producer (40 registers) and two consumers of half a tile each (232). With 8 warps the
  request is passed over. Descriptors are made on the device: one that comes from the host keeps the whole tile's box
  where a consumer waits for half of it. 256 x 128 outputs fit; 128 x 256 spill. The ranks come 16 at a time, since
  their tiles are as many stages deep as those of x and W.
* sm_100: the loop over inputs alone. Specialising the outer loop fails in the compiler (NVWSInsertAref), and with the
  loops flattened it compiles to a kernel that stores nothing.
* Clusters (num_ctas = 2), which would halve what crosses L2, fail on sm_90: "remote CTA is not supported yet". They
  were not tried on sm_100.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import triton
import triton.language as tl

from spectral_ops.triton_kernels.common import (
    aligned,
    arch,
    cdiv,
    described,
    dot,
    narrow,
    on_device,
    power_of_2,
    processors,
    reference,
    split,
    strides,
    sum_partials,
    tile,
    varied,
    with_workspace,
)  # fmt: skip

# element size, or (architecture, that): tokens, outputs, inputs per step, tiles of tokens per group, warps, stages
MATMUL = {
    (80, 2): (128, 128, 32, 8, 8, 3),
    (90, 2): (256, 128, 64, 8, 8, 3),
    (100, 2): (128, 128, 64, 8, 8, 4),
    4: (64, 64, 16, 8, 8, 2),
}
MATMUL_UNALIGNED = (64, 64, 32, 8, 8, 2)
# of 2-byte elements, by architecture: tokens, outputs, inputs and ranks per step, tiles per group, warps, stages
MATMUL_DESCRIBED = {90: (256, 128, 64, 16, 8, 4, 3), 100: (128, 128, 64, 64, 8, 8, 4)}
# element size, or (architecture, element size): tokens, outputs, greatest rank per step, warps
UPDATE = {2: (64, 128, 64, 8), 4: (64, 64, 16, 8)}
UPDATE_UNALIGNED = (32, 64, 32, 8)
# element size, or (architecture, element size): for each padded rank, tokens, outputs per step, warps, stages
BACKWARD = {
    2: {16: (256, 64, 8, 3), 32: (256, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3)},
    (90, 2): {16: (256, 64, 8, 3), 32: (256, 64, 8, 3), 64: (256, 64, 8, 3), 128: (128, 64, 8, 3)},
    (80, 2): {16: (256, 32, 8, 3), 32: (256, 32, 8, 3), 64: (128, 32, 8, 3), 128: (64, 32, 8, 3)},
    4: {16: (64, 32, 8, 2), 32: (64, 32, 8, 2), 64: (32, 16, 8, 2), 128: (32, 32, 8, 2)},
}
# element size, or (architecture, that): tokens per step, outputs, greatest rank, warps, stages
OUTER = {2: (64, 128, 128, 8, 3), (80, 2): (64, 64, 64, 4, 3), 4: (32, 32, 32, 4, 2)}
OUTER_UNALIGNED = (32, 32, 32, 4, 1)
HELD = 1 << 25  # bytes of partial sums that L2 may hold: for more of them, dy is read twice where that is less
BACKWARD_UNALIGNED = {2: (64, 32, 8, 1), 4: (32, 32, 8, 1)}


@triton.jit
def _tile_at(index, T, d, BT: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr):
    """The first token and output of tile ``index``: in groups of GROUP along the tokens, so that the tiles in flight
    share x and W in L2."""
    tiles_t, tiles_d = tl.cdiv(T, BT), tl.cdiv(d, BD)
    group = index // (GROUP * tiles_d)
    height = tl.minimum(tiles_t - group * GROUP, GROUP)
    within = index % (GROUP * tiles_d)
    return (group * GROUP + within % height) * BT, (within // height) * BD


@triton.jit(do_not_specialize=["T"])
def matmul_kernel(
    x, w, h, B, out, g, bias, scale, T, d, k, r, x_t, x_i, w_o, w_i, h_t, h_p, B_o, B_p,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BT) * tl.cdiv(d, BD)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        t0, o0 = _tile_at(index, T, d, BT, BD, GROUP)
        t = t0.to(tl.int64) + tl.arange(0, BT)
        o = o0 + tl.arange(0, BD)
        t_in = tl.where(t < T, t, 0)  # rows past the end read row 0: no masks in the loop, and none of it is stored
        o_in = tl.where(o < d, o, 0).to(tl.int64)
        total = tl.zeros([BT, BD], tl.float32)
        for p0 in range(0, r, R):  # first the rank, so that scale multiplies it alone, unrounded
            p = p0 + tl.arange(0, R)
            a = tl.load(h + t_in[:, None] * h_t + p[None, :] * h_p, mask=(p < r)[None, :], other=0.0)
            b = tl.load(B + o_in[None, :] * B_o + p[:, None] * B_p, mask=(p < r)[:, None], other=0.0)
            total = dot(a, b, total, "ieee")
        total *= scale
        i = tl.arange(0, BK)
        left = x + t_in[:, None] * x_t + i[None, :].to(tl.int64) * x_i
        right = w + o_in[None, :] * w_o + i[:, None].to(tl.int64) * w_i
        for i0 in range(0, k, BK):
            if EVEN:
                a = tl.load(left)
                b = tl.load(right)
            else:
                a = tl.load(left, mask=(i0 + i < k)[None, :], other=0.0)
                b = tl.load(right, mask=(i0 + i < k)[:, None], other=0.0)
            total = dot(a, b, total, "ieee")
            left += BK * x_i
            right += BK * w_i
        if g is not None:
            total *= tl.load(g + o_in).to(tl.float32)[None, :]
        if bias is not None:
            total += tl.load(bias + o_in).to(tl.float32)[None, :]
        target = out + t[:, None] * d + o[None, :]
        tl.store(target, narrow(total, out.dtype.element_ty), mask=(t < T)[:, None] & (o < d)[None, :])


@triton.jit(do_not_specialize=["T"])
def described_matmul_kernel(
    x, w, h, B, out, g, bias, scale, T, d, k, r, x_t, w_o, h_t, B_o,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """matmul_kernel through tensor descriptors: past the ends they give zeros. OUTER: which loop is specialised."""
    x_tiles = tl.make_tensor_descriptor(x, [T, k], [x_t, 1], [BT, BK])
    w_tiles = tl.make_tensor_descriptor(w, [d, k], [w_o, 1], [BD, BK])
    h_tiles = tl.make_tensor_descriptor(h, [T, r], [h_t, 1], [BT, R])
    B_tiles = tl.make_tensor_descriptor(B, [d, r], [B_o, 1], [BD, R])
    tiles = tl.cdiv(T, BT) * tl.cdiv(d, BD)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=OUTER):
        t0, o0 = _tile_at(index, T, d, BT, BD, GROUP)
        total = tl.zeros([BT, BD], tl.float32)
        for p0 in range(0, r, R):
            total = dot(h_tiles.load([t0, p0]), tl.trans(B_tiles.load([o0, p0])), total, "ieee")
        total *= scale
        for i0 in tl.range(0, k, BK, warp_specialize=not OUTER):
            total = dot(x_tiles.load([t0, i0]), tl.trans(w_tiles.load([o0, i0])), total, "ieee")
        t = t0.to(tl.int64) + tl.arange(0, BT)
        o = o0 + tl.arange(0, BD)
        if g is not None:
            total *= tl.load(g + o, mask=o < d, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            total += tl.load(bias + o, mask=o < d, other=0.0).to(tl.float32)[None, :]
        target = out + t[:, None] * d + o[None, :]
        tl.store(target, narrow(total, out.dtype.element_ty), mask=(t < T)[:, None] & (o < d)[None, :])


def lowrank_matmul(x, weight, h, B, scale: float, g, bias, tiles: Literal["", "shallow", "deep"] = ""):
    if x.dtype == torch.float64:
        return reference("lowrank_matmul")(x, weight, h, B, scale, g, bias)
    (T, k), (d, r) = x.shape, B.shape
    y = x.new_empty(T, d)
    if y.numel() == 0:
        return y
    own = MATMUL_DESCRIBED.get(arch(x)) if x.element_size() == 2 else None
    if own and not tiles and described(x, weight, h, B):  # the tuner's other tiles are of the kernel without them
        BT, BD, BK, R, group, warps, stages = own
        programs = min(cdiv(T, BT) * cdiv(d, BD), processors(x))
        launch = functools.partial(
            described_matmul_kernel[(programs,)],
            x, weight, h, B, y, g, bias, scale, T, d, k, r, x.stride(0), weight.stride(0), h.stride(0), B.stride(0),
            BT=BT, BD=BD, BK=BK, R=R, GROUP=group, OUTER=arch(x) == 90, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        with on_device(x):
            with_workspace(x.device, launch)
        return y
    BT, BD, BK, group, warps, stages = tile(MATMUL, x, tiles)
    even = k % BK == 0
    if not (even and aligned(x, weight, h, B)):
        (BT, BD, BK, group, warps, stages), even = MATMUL_UNALIGNED, False
    programs = min(cdiv(T, BT) * cdiv(d, BD), processors(x))
    with on_device(x):
        matmul_kernel[(programs,)](
            x, weight, h, B, y, g, bias, scale, T, d, k, r,
            *x.stride(), *weight.stride(), *h.stride(), *B.stride(),
            BT=BT, BD=BD, BK=BK, R=power_of_2(r, 16, 32), GROUP=group, EVEN=even,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["T"])
def update_kernel(
    out, h, B, g, shift, scale, T, d, r, out_t, out_o, h_t, h_p, B_o, B_p,
    BT: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(d, BD)
    t = (tl.program_id(0) // tiles).to(tl.int64) * BT + tl.arange(0, BT)
    o = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    target = out + t[:, None] * out_t + o[None, :].to(tl.int64) * out_o
    live = (t < T)[:, None] & (o < d)[None, :]
    base = tl.load(target, mask=live, other=0.0)
    update = tl.zeros([BT, BD], tl.float32)
    for p0 in range(0, r, R):
        p = p0 + tl.arange(0, R)
        a = tl.load(h + t[:, None] * h_t + p[None, :] * h_p, mask=(t < T)[:, None] & (p < r)[None, :], other=0.0)
        b = tl.load(B + o[None, :].to(tl.int64) * B_o + p[:, None] * B_p, mask=(o < d)[None, :] & (p < r)[:, None],
                    other=0.0)  # fmt: skip
        update = dot(a, b, update, "ieee")
    value = base.to(tl.float32) + scale * update
    if g is not None:
        value *= tl.load(g + o, mask=o < d, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        value += tl.load(shift + o, mask=o < d, other=0.0).to(tl.float32)[None, :]
    tl.store(target, narrow(value, out.dtype.element_ty), mask=live)


def lowrank_update_(out, h, B, scale: float, g, shift, tiles: Literal["", "short", "wide"] = "") -> None:
    if out.dtype == torch.float64:
        return reference("lowrank_update_")(out, h, B, scale, g, shift)
    T, (d, r) = out.shape[0], B.shape
    if out.numel() == 0:
        return None
    BT, BD, R, warps = tile(UPDATE, out, tiles) if aligned(out, h, B) else UPDATE_UNALIGNED
    with on_device(out):
        update_kernel[(cdiv(d, BD) * cdiv(T, BT),)](
            out, h, B, g, shift, scale, T, d, r, *out.stride(), *h.stride(), *B.stride(),
            BT=BT, BD=BD, R=power_of_2(r, 16, R), num_warps=warps, num_stages=1,
        )  # fmt: skip
    return None


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dy, h, B, g, y, bias, u, dB, db, dyz, gdy, scale, T, d, r, span,
    dy_t, dy_o, h_t, h_p, B_o, B_p, y_t, y_o,
    BT: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Writes u [ranges, T, r], dB [blocks, d, r], db and dyz [blocks, d], gdy [T, d]; None where nobody needs one."""
    block, part, p0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * R
    t = block.to(tl.int64) * BT + tl.arange(0, BT)
    p = p0 + tl.arange(0, R)
    first = part * span
    last = tl.minimum(first + span, d)
    dtype: tl.constexpr = dy.dtype.element_ty
    if dB is not None:
        tokens = tl.load(h + t[:, None] * h_t + p[None, :] * h_p, mask=(t < T)[:, None] & (p < r)[None, :], other=0.0)
    lifted = tl.zeros([BT, R], tl.float32)
    for o0 in tl.range(first, last, BD, num_stages=STAGES):
        o = o0 + tl.arange(0, BD)
        o_in = o < last
        live = (t < T)[:, None] & o_in[None, :]
        source = dy + t[:, None] * dy_t + o[None, :].to(tl.int64) * dy_o
        step = tl.load(source, mask=live, other=0.0, eviction_policy="evict_first")  # [BT, BD]
        if u is not None:
            b = tl.load(B + o[:, None].to(tl.int64) * B_o + p[None, :] * B_p, mask=o_in[:, None] & (p < r)[None, :],
                        other=0.0)  # fmt: skip
            if g is None:
                lifted = dot(step, b, lifted, "ieee")
            else:  # g B in two terms of the working dtype: g - 1 must not round away
                scaled = b.to(tl.float32) * tl.load(g + o, mask=o_in, other=0.0).to(tl.float32)[:, None]
                high = narrow(scaled, dtype)
                lifted = dot(step, high, lifted, "ieee")
                if dtype != tl.float32:
                    lifted = dot(step, narrow(scaled - high.to(tl.float32), dtype), lifted, "ieee")
        if dB is not None:
            if FLIP:  # where products read registers, both then take dy's tile as it lies in shared memory
                outer = tl.trans(dot(tl.trans(tokens), step, tl.zeros([R, BD], tl.float32), "ieee")) * scale
            else:
                outer = dot(tl.trans(step), tokens, tl.zeros([BD, R], tl.float32), "ieee") * scale
            if g is not None:
                outer *= tl.load(g + o, mask=o_in, other=0.0).to(tl.float32)[:, None]
            target = dB + (block * d + o[:, None]).to(tl.int64) * r + p[None, :]
            tl.store(target, outer, mask=o_in[:, None] & (p < r)[None, :])
        if p0 == 0:
            if db is not None:
                tl.store(db + block * d + o, tl.sum(step.to(tl.float32), 0), mask=o_in)
            if dyz is not None:
                z = tl.load(y + t[:, None] * y_t + o[None, :].to(tl.int64) * y_o, mask=live, other=0.0,
                            eviction_policy="evict_first").to(tl.float32)  # fmt: skip
                if bias is not None:
                    z -= tl.load(bias + o, mask=o_in, other=0.0).to(tl.float32)[None, :]
                tl.store(dyz + block * d + o, tl.sum(step.to(tl.float32) * z, 0), mask=o_in)
            if gdy is not None:
                value = step.to(tl.float32)
                if g is not None:
                    value *= tl.load(g + o, mask=o_in, other=0.0).to(tl.float32)[None, :]
                tl.store(gdy + t[:, None] * d + o[None, :], narrow(value, dtype), mask=live)
    if u is not None:
        target = u + (part * T + t[:, None]) * r + p[None, :]
        tl.store(target, narrow(lifted * scale, u.dtype.element_ty), mask=(t < T)[:, None] & (p < r)[None, :])


@triton.jit(do_not_specialize=["T"])
def outer_kernel(
    dy, h, g, dB, scale, T, d, r, span, dy_t, dy_o, h_t, h_p,
    BT: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dB [ranges, d, r] alone: a program owns its outputs over ``span`` tokens."""
    o = tl.program_id(0) * BD + tl.arange(0, BD)
    part = tl.program_id(1)
    p = tl.program_id(2) * R + tl.arange(0, R)
    last = tl.minimum((part + 1) * span, T)
    total = tl.zeros([BD, R], tl.float32)
    for t0 in tl.range(part * span, last, BT, num_stages=STAGES):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)
        step = tl.load(dy + t[:, None] * dy_t + o[None, :].to(tl.int64) * dy_o,
                       mask=(t < last)[:, None] & (o < d)[None, :], other=0.0)  # fmt: skip
        tokens = tl.load(h + t[:, None] * h_t + p[None, :].to(tl.int64) * h_p,
                         mask=(t < last)[:, None] & (p < r)[None, :], other=0.0)  # fmt: skip
        total = dot(tl.trans(step), tokens, total, "ieee")
    total *= scale
    if g is not None:
        total *= tl.load(g + o, mask=o < d, other=0.0).to(tl.float32)[:, None]
    target = dB + (part * d + o[:, None]).to(tl.int64) * r + p[None, :]
    tl.store(target, total, mask=(o < d)[:, None] & (p < r)[None, :])


def lowrank_backward(
    dy, h, B, scale: float, g, y, bias, need_u, need_dB, need_db, need_gdy, tiles: Literal["", "short", "narrow"] = ""
):
    if dy.dtype == torch.float64:
        return reference("lowrank_backward")(dy, h, B, scale, g, y, bias, need_u, need_dB, need_db, need_gdy)
    (T, d), r = dy.shape, B.shape[1]
    wide = {"dtype": torch.float32, "device": dy.device}
    empty = dy.numel() == 0
    make = torch.zeros if empty else torch.empty
    u = make((T, r) if need_u else 0, dtype=dy.dtype, device=dy.device)
    dB = make((d, r) if need_dB else 0, **wide)
    db = make(d if need_db else 0, **wide)
    dyz = make(0 if y is None else d, **wide)
    gdy = make((T, d) if need_gdy else 0, dtype=dy.dtype, device=dy.device)
    if empty or not (u.numel() or dB.numel() or need_db or need_gdy or y is not None):
        return u, dB, db, dyz, gdy
    heavy = y is not None or need_gdy  # twice the registers per token: half the tokens, two programs per processor
    R = power_of_2(r, 16, 64 if heavy else 128)
    BT, BD, warps, stages = varied(tile(BACKWARD, dy)[R], tiles)
    BT = max(BT // 2, 16) if heavy else BT
    if not aligned(dy, h, B) or (y is not None and not aligned(y)):
        (BT, BD, warps, stages), R = BACKWARD_UNALIGNED[dy.element_size()], min(R, 32)
    blocks = cdiv(T, BT)
    ranges, steps = split(cdiv(d, BD), blocks * cdiv(max(r, 1), R), processors(dy) * (1 + heavy))
    sums = 4 * blocks * dB.numel()  # bytes that one pass writes and reads again
    twice = sums > HELD and 2 * sums >= dy.numel() * dy.element_size()
    jobs = []

    def partial(out: torch.Tensor, wanted: bool, parts: int) -> torch.Tensor | None:
        """Where the kernel writes: out itself where there is one part of it, else float32 [parts, *out.shape]."""
        if not wanted or out.numel() == 0:
            return None
        if parts == 1:
            return out
        jobs.append((torch.empty((parts, *out.shape), **wide), out))
        return jobs[-1][0]

    with on_device(dy):
        if not twice or u.numel() or need_db or need_gdy or y is not None:
            backward_kernel[(blocks, ranges, cdiv(r, R) or 1)](
                dy, h, B, g, y, bias,
                partial(u, need_u, ranges), partial(dB, need_dB and not twice, blocks), partial(db, need_db, blocks),
                partial(dyz, y is not None, blocks), gdy if need_gdy else None,
                scale, T, d, r, steps * BD, *dy.stride(), *h.stride(), *B.stride(), *strides(y),
                BT=BT, BD=BD, R=R, STAGES=stages, FLIP=arch(dy) < 90, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        if twice:
            BT, BD, R, warps, stages = tile(OUTER, dy) if aligned(dy, h) else OUTER_UNALIGNED
            R = power_of_2(r, 16, R)
            columns = cdiv(d, BD), cdiv(r, R)
            ranges, steps = split(cdiv(T, BT), columns[0] * columns[1], 2 * processors(dy))
            outer_kernel[(columns[0], ranges, columns[1])](
                dy, h, g, partial(dB, True, ranges), scale, T, d, r, steps * BT, *dy.stride(), *h.stride(),
                BT=BT, BD=BD, R=R, STAGES=stages, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        if jobs:
            sum_partials(jobs)
    return u, dB, db, dyz, gdy
