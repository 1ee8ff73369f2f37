"""Bat: the transformed weight, its product with few tokens, the blocks' gradients, and the mixing of the row form
(METHODS 1.4).

A float32 factor in half precision is multiplied as a sum of bfloat16 numbers (``wide_dot``). Bytes moved, for
elements of s bytes:

* ``bat_weight_``: W once in, W' once out, 2 d k s; a program keeps one block B_o over its tiles. Rows (i, j) of a
  block-row are walked as they lie in memory: each is r contiguous elements.
* ``bat_contract_``: W and G once (r <= 64; 128 x 128 outputs of larger blocks each read their share again, from L2).
  Σ_j G(o,j) is added up beside the product, in float32 and unrounded. r = 64 in bfloat16 with float32 G, 4096 x 4096:
  101 MB, 34 us at 3 TB/s, and two products of 2.1 GFLOP each.
* ``bat_matmul``: W once (once per 64 tokens); x and B come from L2.
* ``bat_mix``: x in and z out. ``bat_mix_backward_``: g in and out, x in, q from L2; r > 64 reads g and x again for dC.

Blocks are padded to powers of two of at least 16: r = 1 to 8 wastes most of each product.
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
    sum_partials,
    tile,
    varied,
    wide_dot,
)  # fmt: skip

# each by element size, or (architecture, element size), then by padded r; the last serves larger blocks, in steps
# rows, outputs, inputs per step, warps, stages
WEIGHT = {
    2: {16: (256, 16, 16, 4, 3), 32: (128, 32, 32, 4, 3), 64: (128, 64, 64, 8, 3), 128: (128, 64, 64, 8, 3)},
    (80, 2): {16: (256, 16, 16, 4, 3), 32: (128, 32, 32, 4, 3), 64: (128, 64, 64, 8, 2), 128: (128, 64, 32, 8, 2)},
    4: {16: (128, 16, 16, 4, 2), 32: (64, 32, 16, 4, 2), 64: (64, 64, 16, 8, 2)},
    (100, 4): {16: (128, 16, 16, 4, 2), 32: (64, 32, 32, 4, 2), 64: (64, 64, 16, 8, 2)},
}
# rows per step, rows and columns of the result (rows per step a multiple of its rows), warps, stages
CONTRACT = {
    (80, 2): {16: (128, 16, 16, 4, 3), 32: (64, 32, 32, 4, 3), 64: (32, 32, 64, 8, 2)},
    (90, 2): {16: (128, 16, 16, 4, 3), 32: (64, 32, 32, 4, 3), 64: (64, 64, 64, 4, 3), 128: (64, 64, 128, 8, 3)},
    (100, 2): {16: (64, 16, 16, 4, 3), 32: (64, 32, 32, 4, 3), 64: (64, 64, 64, 8, 3), 128: (64, 64, 128, 8, 3)},
    4: {16: (16, 16, 16, 4, 2), 32: (32, 32, 32, 4, 2), 64: (32, 32, 64, 8, 2)},
    (100, 4): {16: (16, 16, 16, 4, 2), 32: (32, 32, 32, 4, 2), 64: (32, 32, 64, 4, 2)},
}
# greatest number of tokens, features per step, warps, stages
MATMUL = {
    2: {16: (64, 16, 4, 3), 32: (64, 32, 4, 3), 64: (64, 64, 8, 3)},
    (90, 2): {16: (64, 16, 4, 3), 32: (64, 32, 4, 3), 64: (32, 64, 2, 3)},
    (80, 2): {16: (64, 16, 4, 3), 32: (64, 32, 4, 3), 64: (32, 64, 4, 2)},
    4: {16: (32, 16, 4, 2), 32: (32, 32, 4, 2)},
    (100, 4): {16: (32, 16, 4, 2), 32: (32, 32, 8, 2)},
}
# tokens, outputs, inputs per step, warps, stages
MIX = {
    2: {16: (256, 16, 16, 4, 3), 32: (128, 32, 32, 4, 3), 64: (128, 64, 64, 8, 3), 128: (128, 64, 64, 8, 3)},
    (80, 2): {16: (256, 16, 16, 4, 3), 32: (64, 32, 32, 4, 3), 64: (64, 64, 64, 8, 2), 128: (64, 64, 32, 8, 2)},
    4: {16: (64, 16, 16, 4, 2), 32: (64, 32, 16, 4, 2), 64: (64, 64, 16, 8, 2)},
    (100, 4): {16: (128, 16, 16, 4, 2), 32: (64, 32, 16, 4, 2), 64: (64, 64, 16, 8, 2)},
}
# tokens per step, inputs per step, columns of dC, warps, stages
BACKWARD = {
    (80, 2): {16: (64, 16, 16, 4, 3), 32: (64, 32, 32, 4, 2), 64: (64, 32, 64, 8, 2), 128: (32, 32, 128, 8, 2)},
    (90, 2): {16: (64, 16, 16, 4, 2), 32: (64, 32, 32, 4, 2), 64: (64, 64, 64, 8, 2), 128: (64, 64, 128, 8, 2)},
    (100, 2): {16: (64, 16, 16, 4, 2), 32: (64, 32, 32, 4, 2), 64: (64, 64, 64, 8, 2)},
    4: {16: (32, 16, 16, 4, 2), 32: (32, 32, 32, 4, 2), 64: (32, 16, 64, 4, 2)},
}
GREATEST_UNALIGNED = 32  # entry for blocks whose rows are not aligned, with 8 warps: every element takes an address


def _tile(table, r: int, *tensors: torch.Tensor, tiles: str = "") -> tuple[int, ...]:
    """The table's entry for blocks of r in these matrices; the first is what the kernel reads most."""
    by_size = tile(table, tensors[0])
    size = power_of_2(r, min(by_size), max(by_size))
    if r % 16 == 0 and aligned(*tensors):
        return varied(by_size[size], tiles)
    return *by_size[min(size, GREATEST_UNALIGNED)][:-2], 8, 1


def _narrowed(bat: torch.Tensor) -> torch.Tensor:
    """float64 blocks over a narrower weight, as the reference takes them."""
    return bat.to(torch.float32) if bat.dtype == torch.float64 else bat


@triton.jit
def weight_kernel(
    out, w, B, n, r, row_length, tiles, span, out_o, out_i, w_o, w_i, B_n, B_c, B_e,
    ROW: tl.constexpr, DELTA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, ONE: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Tiles of rows (i, j) of block-row ``block``, row_length = k / r of them for each i; ROW: of rows (o, i) of a
    block-column, row_length = d."""
    block = (tl.program_id(0) % n).to(tl.int64)
    first = (tl.program_id(0) // n) * span
    rows = row_length if ROW else row_length * r
    blocks = B + block * B_n
    c = tl.arange(0, BC)
    e = tl.arange(0, BN)
    if ONE:
        b = tl.load(blocks + c[:, None] * B_c + e[None, :] * B_e, mask=(c < r)[:, None] & (e < r)[None, :], other=0.0)
    for step in range(first, tl.minimum(first + span, tiles)):
        m = step * BM + tl.arange(0, BM)
        live = (m < rows)[:, None]
        if ROW:
            i, o, start = m % r, m.to(tl.int64), tl.zeros([BM], tl.int64) + block * r
        else:
            i = m // row_length
            o, start = block * r + i, (m % row_length).to(tl.int64) * r
        source = w + o[:, None] * w_o + start[:, None] * w_i
        target = out + o[:, None] * out_o + start[:, None] * out_i
        if ONE:
            inside = live & (e < r)[None, :]
            value = tl.load(source + e[None, :] * w_i, mask=inside, other=0.0)
            change = wide_dot(value, b, tl.zeros([BM, BN], tl.float32), w.dtype.element_ty, PARTS)
            change += tl.load(blocks + i[:, None] * B_c + e[None, :] * B_e, mask=inside, other=0.0).to(tl.float32)
            if not DELTA:
                change += value.to(tl.float32)
            tl.store(target + e[None, :] * out_i, narrow(change, out.dtype.element_ty), mask=inside)
        else:
            for e0 in range(0, r, BN):
                p = e0 + e
                change = tl.zeros([BM, BN], tl.float32)
                for c0 in range(0, r, BC):
                    q = c0 + c
                    a = tl.load(source + q[None, :] * w_i, mask=live & (q < r)[None, :], other=0.0)
                    b = tl.load(blocks + q[:, None] * B_c + p[None, :] * B_e,
                                mask=(q < r)[:, None] & (p < r)[None, :], other=0.0)  # fmt: skip
                    change = wide_dot(a, b, change, w.dtype.element_ty, PARTS)
                inside = live & (p < r)[None, :]
                change += tl.load(blocks + i[:, None] * B_c + p[None, :] * B_e, mask=inside, other=0.0).to(tl.float32)
                if not DELTA:
                    change += tl.load(source + p[None, :] * w_i, mask=inside, other=0.0).to(tl.float32)
                tl.store(target + p[None, :] * out_i, narrow(change, out.dtype.element_ty), mask=inside)


def bat_weight_(out, weight, bat, row: bool, delta: bool, tiles: Literal["", "short", "shallow"] = "") -> None:
    if weight.dtype == torch.float64:
        return reference("bat_weight_")(out, weight, bat, row, delta)
    if weight.numel() == 0:
        return None
    (d, k), (n, r, _), bat = weight.shape, bat.shape, _narrowed(bat)
    BM, BN, BC, warps, stages = _tile(WEIGHT, r, weight, out, tiles=tiles)
    rows, row_length = (d, d) if row else (k, k // r)
    tiles = cdiv(rows, BM)
    ranges, span = split(tiles, n, 8 * processors(weight))
    with on_device(weight):
        weight_kernel[(n * ranges,)](
            out, weight, bat, n, r, row_length, tiles, span, *out.stride(), *weight.stride(), *bat.stride(),
            ROW=row, DELTA=delta, BM=BM, BN=BN, BC=BC, ONE=r <= min(BN, BC),
            PARTS=2 if out.element_size() < 4 else 3,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return None


@triton.jit
def contract_kernel(
    dB, w, G, n, r, turns, span, w_o, w_i, G_o, G_i,
    BM: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dB [ranges, n, r, r]: a program owns one tile [BC, BE] of block-row ``block`` over ``span`` block-columns. A step
    takes BC rows of BM / BC blocks side by side."""
    block, part = (tl.program_id(0) % n).to(tl.int64), tl.program_id(0) // n
    tiles = tl.cdiv(r, BE)
    c0 = (tl.program_id(1) // tiles) * BC
    c = c0 + tl.arange(0, BC)
    e = (tl.program_id(1) % tiles) * BE + tl.arange(0, BE)
    m = tl.arange(0, BM)
    TURNS: tl.constexpr = BM // BC
    last = tl.minimum((part + 1) * span, turns)
    product = tl.zeros([BC, BE], tl.float32)
    direct = tl.zeros([BM, BE], tl.float32)
    for step in range(0, tl.cdiv(last - part * span, TURNS) * CHUNKS):
        j = part * span + (step // CHUNKS) * TURNS + m // BC
        i0 = (step % CHUNKS) * BC
        i = i0 + m % BC
        o, start = block * r + i, tl.cast(j, tl.int64) * r
        live = ((i < r) & (j < last))[:, None]
        a = tl.load(w + o[:, None] * w_o + (start[:, None] + c[None, :]) * w_i, mask=live & (c < r)[None, :], other=0.0)
        g = tl.load(G + o[:, None] * G_o + (start[:, None] + e[None, :]) * G_i, mask=live & (e < r)[None, :], other=0.0)
        product = wide_dot(tl.trans(a), g, product, w.dtype.element_ty, 3 if w.dtype.element_ty == tl.float16 else 2)
        if CHUNKS == 1:
            direct += g.to(tl.float32)
        else:
            direct += tl.where(i0 == c0, g.to(tl.float32), 0.0)
    product += direct if TURNS == 1 else tl.sum(tl.reshape(direct, [TURNS, BC, BE]), 0)
    target = dB + ((part * n + block) * r + c[:, None]) * r + e[None, :]
    tl.store(target, product, mask=(c < r)[:, None] & (e < r)[None, :])


def bat_contract_(dB, weight, G) -> None:
    if weight.dtype == torch.float64:
        return reference("bat_contract_")(dB, weight, G)
    (n, r, _), k = dB.shape, weight.shape[1]
    if dB.numel() == 0:
        return None
    if k == 0:
        dB.zero_()
        return None
    BM, BC, BE, warps, stages = _tile(CONTRACT, r, weight, G)
    tiles = cdiv(r, BC) * cdiv(r, BE)
    ranges, steps = split(cdiv(k // r, BM // BC), n * tiles, 2 * processors(weight))
    direct = ranges == 1 and dB.is_contiguous()
    out = dB if direct else torch.empty(ranges, n, r, r, dtype=torch.float32, device=dB.device)
    with on_device(weight):
        contract_kernel[(n * ranges, tiles)](
            out, weight, G, n, r, k // r, steps * (BM // BC), *weight.stride(), *G.stride(),
            BM=BM, BC=BC, BE=BE, CHUNKS=cdiv(r, BC),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if not direct:
            _summed(out, dB)
    return None


def _summed(partial: torch.Tensor, out: torch.Tensor) -> None:
    """out = Σ_s partial[s], whatever out's strides."""
    total = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    sum_partials([(partial, total)])
    if total is not out:
        out.copy_(total)


@triton.jit(do_not_specialize=["T"])
def matmul_kernel(
    x, w, B, out, T, r, n, width, blocks, span, x_t, x_i, w_o, w_i, B_n, B_c, B_e,
    TRANSPOSE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out [ranges, T, width]: tokens by BC outputs of one block, summed over ``span`` blocks of x. Both directions are
    out = Σ (x + m) M + m with m = x L: forward L = B_oᵀ, M = W(o,j)ᵀ; transposed L = W(o,j), M = B_o."""
    chunk, part = tl.program_id(0) % CHUNKS, tl.program_id(1)
    owner = (tl.program_id(0) // CHUNKS).to(tl.int64)
    t = tl.program_id(2).to(tl.int64) * BT + tl.arange(0, BT)
    lane = tl.arange(0, BC)
    f = chunk * BC + lane  # outputs
    base: tl.constexpr = w.dtype.element_ty
    rows = x + t[:, None] * x_t
    t_in = (t < T)[:, None]
    total = tl.zeros([BT, BC], tl.float32)
    HELD: tl.constexpr = CHUNKS == 1 and not TRANSPOSE  # one block serves the whole loop
    if HELD:
        block = tl.load(B + owner * B_n + lane[:, None] * B_e + lane[None, :] * B_c,
                        mask=(lane < r)[:, None] & (lane < r)[None, :], other=0.0)  # fmt: skip
    for other in range(part * span, tl.minimum((part + 1) * span, blocks)):
        o, j = (other, owner) if TRANSPOSE else (owner, other)
        tokens = rows + tl.cast(other, tl.int64) * r * x_i
        W = w + tl.cast(o, tl.int64) * r * w_o + tl.cast(j, tl.int64) * r * w_i
        blocks_o = B + tl.cast(o, tl.int64) * B_n
        for c0 in range(0, CHUNKS * BC, BC):
            c = c0 + lane
            middle = tl.zeros([BT, BC], tl.float32)
            for s0 in range(0, CHUNKS * BC, BC):
                s = s0 + lane
                a = tl.load(tokens + s[None, :] * x_i, mask=t_in & (s < r)[None, :], other=0.0)
                inside = (s < r)[:, None] & (c < r)[None, :]
                if HELD:
                    left = block
                elif TRANSPOSE:
                    left = tl.load(W + s[:, None] * w_o + c[None, :] * w_i, mask=inside, other=0.0)
                else:
                    left = tl.load(blocks_o + s[:, None] * B_e + c[None, :] * B_c, mask=inside, other=0.0)
                middle = wide_dot(a, left, middle, base, 2)
            mixed = middle + tl.load(tokens + c[None, :] * x_i, mask=t_in & (c < r)[None, :], other=0.0).to(tl.float32)
            inside = (c < r)[:, None] & (f < r)[None, :]
            if TRANSPOSE:
                right = tl.load(blocks_o + c[:, None] * B_c + f[None, :] * B_e, mask=inside, other=0.0)
            else:
                right = tl.load(W + c[:, None] * w_i + f[None, :] * w_o, mask=inside, other=0.0)
            total = wide_dot(mixed, right, total, base, 2)
            total += middle if CHUNKS == 1 else tl.where(c0 == chunk * BC, middle, 0.0)
    target = out + (part * T + t[:, None]) * width + owner * r + f[None, :]
    tl.store(target, narrow(total, out.dtype.element_ty), mask=t_in & (f < r)[None, :])


def bat_matmul(x, weight, bat, transpose: bool):
    if x.dtype == torch.float64:
        return reference("bat_matmul")(x, weight, bat, transpose)
    T, (d, k), (n, r, _), bat = x.shape[0], weight.shape, bat.shape, _narrowed(bat)
    owners, others = (k // max(r, 1), n) if transpose else (n, k // max(r, 1))
    out = x.new_empty(T, k if transpose else d)
    if out.numel() == 0 or x.numel() == 0:
        return out.zero_()
    most, BC, warps, stages = _tile(MATMUL, r, weight, x)
    BT = power_of_2(T, 16, most)
    chunks, blocks_t = cdiv(r, BC), cdiv(T, BT)
    ranges, span = split(others, owners * chunks * blocks_t, 4 * processors(x))
    partial = out if ranges == 1 else torch.empty(ranges, *out.shape, dtype=torch.float32, device=x.device)
    with on_device(x):
        matmul_kernel[(owners * chunks, ranges, blocks_t)](
            x, weight, bat, partial, T, r, n, out.shape[1], others, span, *x.stride(), *weight.stride(), *bat.stride(),
            TRANSPOSE=transpose, BT=BT, BC=BC, CHUNKS=chunks,
            num_warps=warps, num_stages=stages if chunks == 1 else 1,
        )  # fmt: skip
        if ranges > 1:
            sum_partials([(partial, out)])
    return out


@triton.jit(do_not_specialize=["T"])
def mix_kernel(
    x, C, z, s, T, k, r, turns, span, x_t, x_i, C_j, C_e, C_c,
    BT: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """z [T, k] and s [ranges, T, r]: a program owns BE columns of every block in its range."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    part = tl.program_id(2)
    t_in = (t < T)[:, None]
    inside = t_in & (e < r)[None, :]
    total = tl.zeros([BT, BE], tl.float32)
    for j in range(part * span, tl.minimum((part + 1) * span, turns)):
        tokens = x + t[:, None] * x_t + tl.cast(j, tl.int64) * r * x_i
        change = tl.zeros([BT, BE], tl.float32)
        a = tl.zeros([BT, BC], x.dtype.element_ty)
        for c0 in range(0, CHUNKS * BC, BC):
            c = c0 + tl.arange(0, BC)
            a = tl.load(tokens + c[None, :] * x_i, mask=t_in & (c < r)[None, :], other=0.0)
            b = tl.load(C + tl.cast(j, tl.int64) * C_j + c[:, None] * C_c + e[None, :] * C_e,
                        mask=(c < r)[:, None] & (e < r)[None, :], other=0.0)  # fmt: skip
            change = wide_dot(a, b, change, x.dtype.element_ty, 2)
        total += change
        if CHUNKS > 1 or BE != BC:
            a = tl.load(tokens + e[None, :] * x_i, mask=inside, other=0.0)
        change += a.to(tl.float32)
        tl.store(
            z + t[:, None] * k + tl.cast(j, tl.int64) * r + e[None, :], narrow(change, z.dtype.element_ty), mask=inside
        )
    target = s + (part * T + t[:, None]) * r + e[None, :]
    tl.store(target, narrow(total, s.dtype.element_ty), mask=inside)


def bat_mix(x, bat, tiles: Literal["", "shallow"] = ""):
    if x.dtype == torch.float64:
        return reference("bat_mix")(x, bat)
    (T, k), (n, r, _), bat = x.shape, bat.shape, _narrowed(bat)
    z, s = x.new_empty(T, k), x.new_empty(T, r)
    if z.numel() == 0:
        return z, s.zero_()
    BT, BE, BC, warps, stages = _tile(MIX, r, x, tiles=tiles)
    BT = power_of_2(T, 16, BT)
    tiles = cdiv(T, BT) * cdiv(r, BE)
    ranges, span = split(n, tiles, 4 * processors(x))
    sums = s if ranges == 1 else torch.empty(ranges, T, r, dtype=torch.float32, device=x.device)
    with on_device(x):
        mix_kernel[(cdiv(T, BT), cdiv(r, BE), ranges)](
            x, bat, z, sums, T, k, r, n, span, *x.stride(), *bat.stride(),
            BT=BT, BE=BE, BC=BC, CHUNKS=cdiv(r, BC),
            num_warps=warps, num_stages=stages if r <= BC else 1,
        )  # fmt: skip
        if ranges > 1:
            sum_partials([(sums, s)])
    return z, s


@triton.jit(do_not_specialize=["T"])
def mix_backward_kernel(
    g, q, x, C, dC, T, n, r, span, g_t, g_i, q_t, q_p, x_t, x_i, C_j, C_c, C_e,
    BT: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """dC [ranges, n, r, r] from g as it was, and g; None where nobody needs one. A program owns all columns of block j
    for its tokens, so that g can be overwritten; both in one launch where r <= BC."""
    j, part = (tl.program_id(0) % n).to(tl.int64), tl.program_id(0) // n
    base: tl.constexpr = g.dtype.element_ty
    tiles = tl.cdiv(r, BE)
    lane = tl.arange(0, BC)
    c = (tl.program_id(1) // tiles) * BC + lane
    e = (tl.program_id(1) % tiles) * BE + tl.arange(0, BE)
    p = tl.arange(0, R)
    if dC is not None and C is not None:
        factor = tl.load(C + j * C_j + c[:, None] * C_c + p[None, :] * C_e, mask=(c < r)[:, None] & (p < r)[None, :],
                         other=0.0)  # fmt: skip
    outer = tl.zeros([BC, BE], tl.float32)
    for t0 in range(part * span, tl.minimum((part + 1) * span, T), BT):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)
        t_in = (t < T)[:, None]
        block = g + t[:, None] * g_t + j * r * g_i
        shift = q + t[:, None] * q_t
        inside = t_in & (p < r)[None, :]
        if dC is not None:
            live = t_in & (c < r)[None, :]
            a = tl.load(block + c[None, :] * g_i, mask=live, other=0.0)
            a_q = tl.load(shift + c[None, :] * q_p, mask=live, other=0.0)
            v = a.to(tl.float32) + a_q.to(tl.float32)
            b = tl.load(x + t[:, None] * x_t + (j * r + e[None, :]) * x_i, mask=t_in & (e < r)[None, :], other=0.0)
            if base == tl.float32:
                outer = dot(tl.trans(v), b, outer, "ieee")
            else:  # g and q are exact where their sum is not
                outer = dot(tl.trans(a), b, outer, "ieee")
                outer = dot(tl.trans(a_q), b, outer, "ieee")
            if C is not None:
                update = a.to(tl.float32) + wide_dot(v, factor, tl.zeros([BT, R], tl.float32), base, 2)
                tl.debug_barrier()  # every column of g was read before any is overwritten
                tl.store(block + p[None, :] * g_i, narrow(update, base), mask=inside)
        elif C is not None:
            update = tl.zeros([BT, R], tl.float32)
            for c0 in range(0, r, BC):
                s = c0 + lane
                live = t_in & (s < r)[None, :]
                v = tl.load(block + s[None, :] * g_i, mask=live, other=0.0).to(tl.float32)
                v += tl.load(shift + s[None, :] * q_p, mask=live, other=0.0).to(tl.float32)
                b = tl.load(C + j * C_j + s[:, None] * C_c + p[None, :] * C_e,
                            mask=(s < r)[:, None] & (p < r)[None, :], other=0.0)  # fmt: skip
                update = wide_dot(v, b, update, base, 2)
            update += tl.load(block + p[None, :] * g_i, mask=inside, other=0.0).to(tl.float32)
            tl.debug_barrier()
            tl.store(block + p[None, :] * g_i, narrow(update, base), mask=inside)
    if dC is not None:
        target = dC + ((part * n + j) * r + c[:, None]) * r + e[None, :]
        tl.store(target, outer, mask=(c < r)[:, None] & (e < r)[None, :])


def bat_mix_backward_(g, q, x, bat, need_g: bool, need_dC: bool):
    if g.dtype == torch.float64:
        return reference("bat_mix_backward_")(g, q, x, bat, need_g, need_dC)
    T, (n, r, _), bat = g.shape[0], bat.shape, _narrowed(bat)
    dC = torch.empty(bat.shape if need_dC else 0, dtype=torch.float32, device=g.device)
    if g.numel() == 0 or not (need_g or need_dC):
        return dC.zero_()
    BT, BC, BE, warps, stages = _tile(BACKWARD, r, g, x)
    R = power_of_2(r, 16, 1 << 30)
    BT = power_of_2(T, 16, BT)

    def launch(gradient: torch.Tensor | None, blocks: torch.Tensor | None) -> None:
        tiles = 1 if gradient is None else cdiv(r, BC) * cdiv(r, BE)
        step = BT if blocks is None else min(BT, max(8192 // R, 16))
        ranges, steps = split(cdiv(T, step), n * tiles, 2 * processors(g))
        partial = gradient
        if gradient is not None and ranges > 1:
            partial = torch.empty(ranges, n, r, r, dtype=torch.float32, device=g.device)
        mix_backward_kernel[(n * ranges, tiles)](
            g, q, x, blocks, partial, T, n, r, steps * step, *g.stride(), *q.stride(), *x.stride(), *bat.stride(),
            BT=step, BC=BC, BE=BE, R=R, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if partial is not gradient:
            sum_partials([(partial, gradient)])

    with on_device(g):
        if need_g and need_dC and r <= BC:
            launch(dC, bat)
        else:
            if need_dC:
                launch(dC, None)
            if need_g:
                launch(None, bat)
    return dC
