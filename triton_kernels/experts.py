"""The base product of a stack of experts where torch's grouped_mm does not compute it without waiting (METHODS 1.10).

``experts_matmul``: x and y once, and each expert's weight once for every BT of its rows. Programs are as many as fit
the processors. Each takes tiles in turn; which expert a tile belongs to it finds by walking the offsets, of which it
reads E + 1 while they lie in L1. So nothing on the host knows the offsets, and nothing waits for them. Consecutive
tiles share an expert's weight, output by output, in L2.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from spectral_ops.triton_kernels.common import aligned, cdiv, dot, narrow, on_device, processors, reference, tile

# element size, or (architecture, that): rows, outputs, inputs per step, warps, stages
MATMUL = {
    (80, 2): (64, 128, 32, 8, 3),
    (90, 2): (128, 128, 64, 8, 3),
    (100, 2): (128, 128, 64, 8, 3),
    4: (64, 64, 16, 8, 2),
}
MATMUL_UNALIGNED = (64, 64, 32, 8, 2)
RESIDENT = 2  # programs per processor


@triton.jit(do_not_specialize=["S", "E"])
def matmul_kernel(
    x, w, out, bias, offsets, S, E, d, k, x_s, x_i, w_e, w_o, w_i, bias_e, bias_o,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(d, BD)
    index = tl.program_id(0)
    before, first = 0, 0  # tiles of the experts in front, and where this one's rows begin
    for e in range(-1, E + 1):  # -1 and E: the rows that no expert has, which become zero
        end = tl.load(offsets + e + 1, mask=e < E, other=S).to(tl.int32)
        end = tl.minimum(tl.maximum(end, first), S)
        tiles = tl.cdiv(end - first, BT) * columns
        steps = tl.where((e >= 0) & (e < E), k, 0)
        expert = w + tl.maximum(e, 0).to(tl.int64) * w_e
        while index < before + tiles:
            s = first + ((index - before) // columns) * BT + tl.arange(0, BT)
            o = ((index - before) % columns) * BD + tl.arange(0, BD)
            s_in = tl.where(s < end, s, first).to(tl.int64)  # what lies past the end is not stored
            o_in = tl.where(o < d, o, 0).to(tl.int64)
            i = tl.arange(0, BK)
            left = x + s_in[:, None] * x_s + i[None, :].to(tl.int64) * x_i
            right = expert + o_in[None, :] * w_o + i[:, None].to(tl.int64) * w_i
            total = tl.zeros([BT, BD], tl.float32)
            for i0 in range(0, steps, BK):
                if EVEN:
                    a = tl.load(left)
                    b = tl.load(right)
                else:
                    a = tl.load(left, mask=(i0 + i < k)[None, :], other=0.0)
                    b = tl.load(right, mask=(i0 + i < k)[:, None], other=0.0)
                total = dot(a, b, total, "ieee")
                left += BK * x_i
                right += BK * w_i
            if bias is not None:
                own = (o < d) & (e >= 0) & (e < E)
                total += tl.load(bias + tl.maximum(e, 0).to(tl.int64) * bias_e + o_in * bias_o, mask=own, other=0.0).to(
                    tl.float32
                )[None, :]
            target = out + s.to(tl.int64)[:, None] * d + o[None, :]
            tl.store(target, narrow(total, out.dtype.element_ty), mask=(s < end)[:, None] & (o < d)[None, :])
            index += tl.num_programs(0)
        before += tiles
        first = end


def experts_matmul(x, weight, bias, offsets, tiles: Literal["", "short", "narrow"] = ""):
    if x.dtype == torch.float64:
        return reference("experts_matmul")(x, weight, bias, offsets)
    (S, k), (E, d, _) = x.shape, weight.shape
    out = x.new_empty(S, d)
    if out.numel() == 0 or E == 0:
        return out.zero_()
    matrix = weight[0] if weight.stride(2) == 1 else weight[0].t()
    fits = aligned(x, matrix) and weight.stride(0) * x.element_size() % 16 == 0
    BT, BD, BK, warps, stages = tile(MATMUL, x, tiles) if fits else MATMUL_UNALIGNED
    most = (cdiv(S, BT) + E + 1) * cdiv(d, BD)
    with on_device(x):
        matmul_kernel[(min(most, RESIDENT * processors(x)),)](
            x, weight, out, bias, offsets, S, E, d, k, *x.stride(), *weight.stride(),
            *((0, 0) if bias is None else bias.stride()),
            BT=BT, BD=BD, BK=BK, EVEN=k % BK == 0, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
