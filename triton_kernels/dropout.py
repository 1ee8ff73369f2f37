"""Products with a dropped-out factor: the mask is drawn in registers, where the tile already is (METHODS 1.1).

Bytes moved: dropout_project and dropout_outer read x once, dropout_lift_ reads and writes out once, seeded_dropout
reads and writes once; no mask and no drop(x) reach memory. One Philox counter, forty 32-bit products, serves four
elements where 4 divides k: that makes these kernels bound by integer arithmetic, not memory, on an H100. 1 / (1 - p)
multiplies the float32 sum, not the factors.
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
    kept,
    narrow,
    on_device,
    power_of_2,
    processors,
    reference,
    split,
    sum_partials,
    threshold,
    tile,
)  # fmt: skip

# element size, or (architecture, element size): tokens, inputs per step, greatest rank per step, warps
PROJECT = {2: (64, 64, 64, 4), 4: (32, 32, 16, 4)}
# element size, or (architecture, element size): tokens per step, inputs, greatest rank per step, warps
OUTER = {2: (64, 64, 64, 4), 4: (32, 32, 16, 4)}
# element size, or (architecture, element size): tokens, inputs, greatest rank per step, warps
LIFT = {2: (64, 128, 64, 8), 4: (32, 64, 16, 8)}
UNALIGNED = 32  # inputs and ranks per step where rows are not aligned, or 4 does not divide k


@triton.jit(do_not_specialize=["T", "limit"])
def project_kernel(
    x, A, h, seed, limit, factor, T, k, r, span, x_t, x_i, A_p, A_i,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """h [ranges, T, r]: a program sums over one range of inputs."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    part = tl.program_id(1)
    p = tl.program_id(2) * R + tl.arange(0, R)
    key = tl.load(seed)
    total = tl.zeros([BT, R], tl.float32)
    begin = part * span
    end = tl.minimum(begin + span, k)
    for i0 in range(begin, end, BK):
        i = i0 + tl.arange(0, BK)
        i_in = i < end
        live = (t < T)[:, None] & i_in[None, :]
        step = tl.load(x + t[:, None] * x_t + i[None, :].to(tl.int64) * x_i, mask=live, other=0.0)
        keep = kept(key, t[:, None] * k, i0, limit, BK, ALIGNED)
        a = tl.load(A + p[None, :].to(tl.int64) * A_p + i[:, None].to(tl.int64) * A_i,
                    mask=i_in[:, None] & (p < r)[None, :], other=0.0)  # fmt: skip
        total = dot(tl.where(keep, step, tl.zeros_like(step)), a, total, "ieee")
    target = h + (part * T + t[:, None]) * r + p[None, :]
    tl.store(target, narrow(total * factor, h.dtype.element_ty), mask=(t < T)[:, None] & (p < r)[None, :])


def dropout_project(x, A, seed, p: float, tiles: Literal["", "short", "narrow"] = ""):
    if x.dtype == torch.float64:
        return reference("dropout_project")(x, A, seed, p)
    (T, k), r = x.shape, A.shape[0]
    h = x.new_empty(T, r)
    if h.numel() == 0:
        return h
    BT, BK, greatest, warps = tile(PROJECT, x, tiles)
    if k % 4 or not aligned(x, A):
        BK, greatest = min(BK, UNALIGNED), min(greatest, UNALIGNED)
    R = power_of_2(r, 16, greatest)
    programs = cdiv(T, BT) * cdiv(r, R)
    ranges, steps = split(cdiv(k, BK) or 1, programs, 2 * processors(x))
    out = h if ranges == 1 else torch.empty(ranges, T, r, dtype=torch.float32, device=x.device)
    with on_device(x):
        project_kernel[(cdiv(T, BT), ranges, cdiv(r, R))](
            x, A, out, seed, threshold(p), 1.0 / (1.0 - p), T, k, r, steps * BK, *x.stride(), *A.stride(),
            BT=BT, BK=BK, R=R, ALIGNED=k % 4 == 0, num_warps=warps,
        )  # fmt: skip
        if ranges > 1:
            sum_partials([(out, h)])
    return h


@triton.jit(do_not_specialize=["T", "limit"])
def outer_kernel(
    u, x, dA, seed, limit, factor, T, k, r, span, u_t, u_p, x_t, x_i,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dA [ranges, r, k]: a program sums over one range of tokens."""
    i0 = tl.program_id(0) * BK
    i = i0 + tl.arange(0, BK)
    part = tl.program_id(1)
    p = tl.program_id(2) * R + tl.arange(0, R)
    key = tl.load(seed)
    total = tl.zeros([R, BK], tl.float32)
    begin = part * span
    end = tl.minimum(begin + span, T)
    for t0 in range(begin, end, BT):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)
        t_in = t < end
        step = tl.load(x + t[:, None] * x_t + i[None, :].to(tl.int64) * x_i, mask=t_in[:, None] & (i < k)[None, :],
                       other=0.0)  # fmt: skip
        keep = kept(key, t[:, None] * k, i0, limit, BK, ALIGNED)
        a = tl.load(u + t[None, :] * u_t + p[:, None].to(tl.int64) * u_p, mask=t_in[None, :] & (p < r)[:, None],
                    other=0.0)  # fmt: skip
        total = dot(a, tl.where(keep, step, tl.zeros_like(step)), total, "ieee")
    target = dA + (part * r + p[:, None]).to(tl.int64) * k + i[None, :]
    tl.store(target, total * factor, mask=(p < r)[:, None] & (i < k)[None, :])


def dropout_outer(u, x, seed, p: float, tiles: Literal["", "short", "narrow"] = ""):
    if x.dtype == torch.float64:
        return reference("dropout_outer")(u, x, seed, p)
    (T, k), r = x.shape, u.shape[1]
    if T == 0:
        return torch.zeros(r, k, dtype=torch.float32, device=x.device)
    dA = torch.empty(r, k, dtype=torch.float32, device=x.device)
    if dA.numel() == 0:
        return dA
    BT, BK, greatest, warps = tile(OUTER, x, tiles)
    if k % 4 or not aligned(x, u):
        BK, greatest = min(BK, UNALIGNED), min(greatest, UNALIGNED)
    R = power_of_2(r, 16, greatest)
    ranges, steps = split(cdiv(T, BT), cdiv(k, BK) * cdiv(r, R), 4 * processors(x))
    out = dA if ranges == 1 else torch.empty(ranges, r, k, dtype=torch.float32, device=x.device)
    with on_device(x):
        outer_kernel[(cdiv(k, BK), ranges, cdiv(r, R))](
            u, x, out, seed, threshold(p), 1.0 / (1.0 - p), T, k, r, steps * BT, *u.stride(), *x.stride(),
            BT=BT, BK=BK, R=R, ALIGNED=k % 4 == 0, num_warps=warps,
        )  # fmt: skip
        if ranges > 1:
            sum_partials([(out, dA)])
    return dA


@triton.jit(do_not_specialize=["T", "limit"])
def lift_kernel(
    out, u, A, seed, limit, factor, T, k, r, out_t, out_i, u_t, u_p, A_p, A_i,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(k, BK)
    t = (tl.program_id(0) // tiles).to(tl.int64) * BT + tl.arange(0, BT)
    i0 = (tl.program_id(0) % tiles) * BK
    i = i0 + tl.arange(0, BK)
    target = out + t[:, None] * out_t + i[None, :].to(tl.int64) * out_i
    live = (t < T)[:, None] & (i < k)[None, :]
    base = tl.load(target, mask=live, other=0.0)
    lifted = tl.zeros([BT, BK], tl.float32)
    for p0 in range(0, r, R):
        p = p0 + tl.arange(0, R)
        a = tl.load(u + t[:, None] * u_t + p[None, :] * u_p, mask=(t < T)[:, None] & (p < r)[None, :], other=0.0)
        b = tl.load(A + p[:, None].to(tl.int64) * A_p + i[None, :].to(tl.int64) * A_i,
                    mask=(p < r)[:, None] & (i < k)[None, :], other=0.0)  # fmt: skip
        lifted = dot(a, b, lifted, "ieee")
    keep = kept(tl.load(seed), t[:, None] * k, i0, limit, BK, ALIGNED)
    value = base.to(tl.float32) + tl.where(keep, lifted * factor, 0.0)
    tl.store(target, narrow(value, out.dtype.element_ty), mask=live)


def dropout_lift_(out, u, A, seed, p: float, tiles: Literal["", "short", "narrow"] = "") -> None:
    if out.dtype == torch.float64:
        return reference("dropout_lift_")(out, u, A, seed, p)
    (T, k), r = out.shape, A.shape[0]
    if out.numel() == 0:
        return None
    BT, BK, greatest, warps = tile(LIFT, out, tiles)
    if k % 4 or not aligned(out, u, A):
        BK, greatest = min(BK, UNALIGNED), min(greatest, UNALIGNED)
    with on_device(out):
        lift_kernel[(cdiv(k, BK) * cdiv(T, BT),)](
            out, u, A, seed, threshold(p), 1.0 / (1.0 - p), T, k, r, *out.stride(), *u.stride(), *A.stride(),
            BT=BT, BK=BK, R=power_of_2(r, 16, greatest), ALIGNED=k % 4 == 0, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return None


@triton.jit(do_not_specialize=["T", "limit"])
def dropout_kernel(
    x, out, seed, limit, factor, T, k, x_t, x_i, BT: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr
):
    tiles = tl.cdiv(k, BK)
    t = (tl.program_id(0) // tiles).to(tl.int64) * BT + tl.arange(0, BT)
    i0 = (tl.program_id(0) % tiles) * BK
    i = i0 + tl.arange(0, BK)
    live = (t < T)[:, None] & (i < k)[None, :]
    value = tl.load(x + t[:, None] * x_t + i[None, :].to(tl.int64) * x_i, mask=live, other=0.0).to(tl.float32)
    keep = kept(tl.load(seed), t[:, None] * k, i0, limit, BK, ALIGNED)
    value = tl.where(keep, value * factor, 0.0)
    tl.store(out + t[:, None] * k + i[None, :], narrow(value, out.dtype.element_ty), mask=live)


def seeded_dropout(x, seed, p: float):
    if x.dtype == torch.float64:
        return reference("seeded_dropout")(x, seed, p)
    T, k = x.shape
    out = x.new_empty(T, k)
    if out.numel():
        BT, BK = 4, 512
        with on_device(x):
            dropout_kernel[(cdiv(k, BK) * cdiv(T, BT),)](
                x, out, seed, threshold(p), 1.0 / (1.0 - p), T, k, *x.stride(),
                BT=BT, BK=BK, ALIGNED=k % 4 == 0, num_warps=4,
            )  # fmt: skip
    return out
