"""DoRA's column norm, its device-side reuse, and the magnitude's gradient (METHODS 1.2).

The norm adds the tile of scale B A to the tile of W in registers and sums squares, so no sum cancels and no row needs a
second look. W is read once (2 d k bytes in half precision: 33.5 MB, 11 us at 3 TB/s, for 4096 x 4096); A once per block
of 64 rows, from L2. float32 adapters over a half-precision W stay float32: their product runs as three TF32 products on
NVIDIA (error about 2**-21 of the update), in full float32 elsewhere and for a float32 W.
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
    on_device,
    power_of_2,
    processors,
    reference,
    split,
    tile,
)

VANISHING = tl.constexpr(2.0**-14)  # functional/dora.py's, which says why
MOST_PRINTS = 128  # programs per fingerprinted tensor, at most
BITS = {2: torch.int16, 4: torch.int32}
SAMPLE = 4096  # entries of W that a fingerprint reads, at least where W has them

# inputs and ranks per step are halved where A is float32 or rows are not aligned; rows are doubled for TF32 products,
# whose A is split anew for every block of rows
# element size of W, or (architecture, that): rows, inputs per step, greatest rank per step, warps
NORM = {2: (64, 128, 64, 8), (80, 2): (64, 128, 32, 8), 4: (32, 64, 32, 4)}


@triton.jit
def _row_squares(
    o, begin, end, w, A, B, scale, d, r, w_o, w_i, A_p, A_i, B_o, B_p,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_i (W + scale B A)² [BM] over inputs begin to end of rows o. ONE: r <= R."""
    WIDE: tl.constexpr = PRECISION != "half"
    p = tl.arange(0, R)
    if ONE:
        b = tl.load(B + o[:, None] * B_o + p[None, :] * B_p, mask=(o < d)[:, None] & (p < r)[None, :], other=0.0)
        if WIDE:
            b = b.to(tl.float32)
    squares = tl.zeros([BM, BK], tl.float32)
    for i0 in range(begin, end, BK):
        i = (i0 + tl.arange(0, BK)).to(tl.int64)
        live = (o < d)[:, None] & (i < end)[None, :]
        v = tl.load(w + o[:, None] * w_o + i[None, :] * w_i, mask=live, other=0.0).to(tl.float32)
        update = tl.zeros([BM, BK], tl.float32)
        if ONE:
            a = tl.load(A + p[:, None] * A_p + i[None, :] * A_i, mask=(p < r)[:, None] & (i < end)[None, :], other=0.0)
            if WIDE:
                a = a.to(tl.float32)
            update = dot(b, a, update, "ieee" if PRECISION == "half" else PRECISION)
        else:
            for p0 in range(0, r, R):
                q = p0 + p
                b = tl.load(B + o[:, None] * B_o + q[None, :] * B_p, mask=(o < d)[:, None] & (q < r)[None, :],
                            other=0.0)  # fmt: skip
                a = tl.load(A + q[:, None] * A_p + i[None, :] * A_i, mask=(q < r)[:, None] & (i < end)[None, :],
                            other=0.0)  # fmt: skip
                if WIDE:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                update = dot(b, a, update, "ieee" if PRECISION == "half" else PRECISION)
        v += scale * update
        squares += v * v
    return tl.sum(squares, 1)


@triton.jit(do_not_specialize=["force"])
def norm_kernel(
    partial, changed, prints, stamp, force, w, A, B, scale, d, k, r, span, w_o, w_i, A_p, A_i, B_o, B_p,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
    PRINTS: tl.constexpr,
):  # fmt: skip
    """partial [ranges, d]. With ``stamp`` [2], every program first compares it with the sums of ``prints`` [3, PRINTS]
    (A's; B's and W's), and stops where they are those of the stamp; ``changed`` tells the next kernel."""
    o = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    begin = part * span
    run = True
    if stamp is not None:
        i = tl.arange(0, PRINTS)
        rest = tl.load(prints + PRINTS + i) + tl.load(prints + 2 * PRINTS + i)
        same = (tl.sum(tl.load(prints + i), 0) == tl.load(stamp)) & (tl.sum(rest, 0) == tl.load(stamp + 1))
        run = (force != 0) | (same == 0)
        if (tl.program_id(0) == 0) & (part == 0):
            tl.store(changed, run.to(tl.int32))
    if run:
        squares = _row_squares(
            o, begin, tl.minimum(begin + span, k), w, A, B, scale, d, r, w_o, w_i, A_p, A_i, B_o, B_p,
            BM, BK, R, ONE, PRECISION,
        )  # fmt: skip
        tl.store(partial + part * d + o, squares, mask=o < d)


@triton.jit
def finish_kernel(
    partial, changed, prints, stamp, out, d, ranges,
    BLOCK: tl.constexpr, RANGES: tl.constexpr, PRINTS: tl.constexpr,
):  # fmt: skip
    """out [d] = the root of Σ_s partial [s, d]; where ``changed`` says so, with the stamp updated."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    run = True
    if stamp is not None:
        run = tl.load(changed) != 0
    if run:
        s = tl.arange(0, RANGES)
        live = (s < ranges)[:, None] & (o < d)[None, :]
        total = tl.sum(tl.load(partial + s[:, None] * d + o[None, :], mask=live, other=0.0), 0)
        tl.store(out + o, tl.sqrt_rn(total), mask=o < d)
        if stamp is not None:
            if tl.program_id(0) == 0:
                i = tl.arange(0, PRINTS)
                rest = tl.load(prints + PRINTS + i) + tl.load(prints + 2 * PRINTS + i)
                tl.store(stamp, tl.sum(tl.load(prints + i), 0))
                tl.store(stamp + 1, tl.sum(rest, 0))


@triton.jit
def fingerprint_kernel(
    prints, A, B, w, A_n, A_columns, B_n, B_columns, w_n, w_columns, A_p, A_i, B_o, B_p, w_o, w_i, k, spacing, skew,
    PRINTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """prints [3, PRINTS] int64: sums over the elements of A, of B and of W's sample of a 64-bit mix (SplitMix64) of
    their bits and position. Integer sums wrap and commute, so their order does not matter."""
    which, program = tl.program_id(1), tl.program_id(0)
    if which == 0:
        total = _mix(A, A_n, A_columns, A_p, A_i, A_columns, 1, 0, 0, program, PRINTS, BLOCK)
    elif which == 1:
        total = _mix(B, B_n, B_columns, B_o, B_p, B_columns, 1, 0, 0, program, PRINTS, BLOCK)
    else:
        total = _mix(w, w_n, w_columns, w_o, w_i, k, spacing, skew, B_n, program, PRINTS, BLOCK)
    # the one keeps nothing (r = 0) apart from the zeros that a new stamp holds
    tl.store(prints + which * PRINTS + program, tl.sum(total.to(tl.int64, bitcast=True), 0) + 1)


@triton.jit
def _mix(source, n, columns, s0, s1, k, spacing, skew, first, program, PRINTS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the n elements that :func:`sample` names, ``columns`` from each row, numbered from ``first``."""
    total = tl.zeros([BLOCK], tl.uint64)
    for e0 in range(program * BLOCK, n, PRINTS * BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        row = (e // columns).to(tl.int64)
        column = (row * skew & (spacing - 1)) + (e % columns).to(tl.int64) * spacing
        live = (e < n) & (column < k)
        bits = tl.load(source + row * s0 + column * s1, mask=live, other=0).to(tl.int64).to(tl.uint64, bitcast=True)
        z = bits + (e.to(tl.int64) + 1 + first).to(tl.uint64) * 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        total += tl.where(live, z ^ (z >> 31), 0)
    return total


def sample(d: int, k: int) -> tuple[int, int, int]:
    """What a fingerprint reads of W [d, k], as (spacing, skew, per_row): of row o the columns
    (o * skew & spacing - 1) + u * spacing, u < per_row, as far as there are so many. See csrc/ops/dora.h."""
    spacing = 1 << max(min(d, k, d * k // SAMPLE), 1).bit_length() - 1
    return spacing, spacing * 40503 >> 16 | 1, cdiv(k, spacing)


def _norms(out, weight, A, B, scale, stamp=None, force=False, tiles="") -> None:
    """out [d] float32 = ‖W_o + scale (BA)_o‖."""
    (d, k), r = weight.shape, A.shape[0]
    A, B = (t.to(torch.float32) if t.dtype == torch.float64 else t for t in (A, B))  # over a narrower W
    BM, BK, greatest, warps = tile(NORM, weight, tiles)
    precision = "half"
    if A.dtype != B.dtype or A.dtype == torch.float32:
        precision = "ieee" if weight.dtype == torch.float32 or torch.version.hip else "tf32x3"
        greatest, BK = greatest // 2, BK // 2
        BM = 2 * BM if precision == "tf32x3" and aligned(weight, A, B) else BM
    elif not aligned(weight, A, B):
        greatest, BK = greatest // 2, BK // 2
    R = power_of_2(r, 16, greatest)
    programs = cdiv(d, BM)
    ranges, steps = split(cdiv(k, BK) or 1, programs, min(4 * processors(weight), 64 * programs))
    partial = torch.empty(ranges, d, dtype=torch.float32, device=weight.device)
    with on_device(weight):
        prints, changed, PRINTS = None, None, 1
        if stamp is not None:
            spacing, skew, per_row = sample(d, k)
            PRINTS = power_of_2(cdiv(max(A.numel(), B.numel(), d * per_row), 1024), 1, MOST_PRINTS)
            prints = torch.empty(3 * PRINTS + 1, dtype=torch.int64, device=weight.device)
            changed = prints[3 * PRINTS :]
            fingerprint_kernel[(PRINTS, 3)](
                prints, *(t.view(BITS[t.element_size()]) for t in (A, B, weight)),
                A.numel(), A.shape[1], B.numel(), B.shape[1], d * per_row, per_row,
                *A.stride(), *B.stride(), *weight.stride(), k, spacing, skew,
                PRINTS=PRINTS, BLOCK=1024, num_warps=4,
            )  # fmt: skip
        norm_kernel[(cdiv(d, BM), ranges)](
            partial, changed, prints, stamp, int(force), weight, A, B, scale, d, k, r, steps * BK,
            *weight.stride(), *A.stride(), *B.stride(),
            BM=BM, BK=BK, R=R, ONE=r <= R, PRECISION=precision, PRINTS=PRINTS, num_warps=warps, num_stages=2,
        )  # fmt: skip
        finish_kernel[(cdiv(d, 128),)](
            partial, changed, prints, stamp, out, d, ranges,
            BLOCK=128, RANGES=power_of_2(ranges, 1, 1 << 20), PRINTS=PRINTS, num_warps=4,
        )  # fmt: skip


def column_norm(weight, A, B, scale: float, tiles: Literal["", "short", "wide"] = ""):
    if weight.dtype == torch.float64:
        return reference("column_norm")(weight, A, B, scale)
    out = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    if out.numel():
        _norms(out, weight, A, B, scale, tiles=tiles)
    return out


def column_norm_cached_(
    norm, stamp, weight, A, B, scale: float, force: bool, tiles: Literal["", "short", "wide"] = ""
) -> None:
    if weight.dtype == torch.float64:
        reference("column_norm_cached_")(norm, stamp, weight, A, B, scale, force)
    elif norm.numel():
        _norms(norm, weight, A, B, scale, stamp, force, tiles)


@triton.jit
def _vanishes(o, g, norm, bias, d):
    """Whether m vanishes at outputs ``o``, their g c, and c."""
    live = o < d
    scales = tl.load(g + o, mask=live, other=1.0).to(tl.float32)
    norms = tl.load(norm + o, mask=live, other=1.0)
    vanishing = tl.abs(scales) < VANISHING
    if bias is not None:
        vanishing |= tl.abs(scales) * norms < tl.abs(tl.load(bias + o, mask=live, other=0.0).to(tl.float32)) / 64
    return vanishing & live, scales * norms, norms


@triton.jit(do_not_specialize=["T"])
def vanishing_kernel(
    partial, g, norm, bias, dy, x, h, w, B, scale, T, d, k, r,
    dy_t, dy_o, x_t, x_i, h_t, h_p, w_o, w_i, B_o, B_p,
    SCAN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial [T / BT, d] where m vanishes: Σ_t dy (x·W_o + scale h·B_o) over BT tokens; nothing elsewhere."""
    part = tl.program_id(0).to(tl.int64)
    t = part * BT + tl.arange(0, BT)
    lane = tl.arange(0, SCAN)
    for first in range(0, d, SCAN):
        vanishing, _, _ = _vanishes(first + lane, g, norm, bias, d)
        left = vanishing.to(tl.int32)
        for _ in range(0, tl.sum(left, 0)):
            place = tl.argmax(left, 0)
            left = tl.where(lane == place, 0, left)
            row = (first + place).to(tl.int64)
            z = tl.zeros([BT, BK], tl.float32)
            for i0 in range(0, k, BK):
                i = (i0 + tl.arange(0, BK)).to(tl.int64)
                a = tl.load(x + t[:, None] * x_t + i[None, :] * x_i, mask=(t < T)[:, None] & (i < k)[None, :],
                            other=0.0)  # fmt: skip
                b = tl.load(w + row * w_o + i * w_i, mask=i < k, other=0.0)
                z += a.to(tl.float32) * b.to(tl.float32)[None, :]
            for p0 in range(0, r, BK):
                p = (p0 + tl.arange(0, BK)).to(tl.int64)
                a = tl.load(h + t[:, None] * h_t + p[None, :] * h_p, mask=(t < T)[:, None] & (p < r)[None, :],
                            other=0.0)  # fmt: skip
                b = tl.load(B + row * B_o + p * B_p, mask=p < r, other=0.0)
                z += scale * (a.to(tl.float32) * b.to(tl.float32)[None, :])
            grad = tl.load(dy + t * dy_t + row * dy_o, mask=t < T, other=0.0).to(tl.float32)
            tl.store(partial + part * d + row, tl.sum(grad * tl.sum(z, 1), 0))


@triton.jit(do_not_specialize=["parts"])
def magnitude_kernel(dyz, g, norm, bias, partial, dm, parts, d, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    vanishing, total, norms = _vanishes(o, g, norm, bias, d)
    value = tl.load(dyz + o, mask=o < d, other=0.0) / total
    if tl.sum(vanishing.to(tl.int32), 0) > 0:
        sums = tl.zeros([BLOCK], tl.float32)
        for part in range(0, parts):
            sums += tl.load(partial + tl.cast(part, tl.int64) * d + o, mask=vanishing, other=0.0)
        value = tl.where(vanishing, sums / norms, value)
    tl.store(dm + o, value, mask=o < d)


def magnitude_grad(dyz, dy, x, h, weight, B, scale: float, g, norm, bias):
    if dyz.dtype == torch.float64:
        return reference("magnitude_grad")(dyz, dy, x, h, weight, B, scale, g, norm, bias)
    T, d = dy.shape
    dm, parts = torch.empty_like(dyz), max(cdiv(T, 32), 1)
    if d:
        partial = torch.empty(parts, d, dtype=torch.float32, device=dyz.device)
        with on_device(dyz):
            vanishing_kernel[(parts,)](
                partial, g, norm, bias, dy, x, h, weight, B, scale, T, d, x.shape[1], h.shape[1],
                *dy.stride(), *x.stride(), *h.stride(), *weight.stride(), *B.stride(),
                SCAN=1024, BT=32, BK=128, num_warps=4,
            )  # fmt: skip
            magnitude_kernel[(cdiv(d, 32),)](dyz, g, norm, bias, partial, dm, parts, d, BLOCK=32, num_warps=1)
    return dm
