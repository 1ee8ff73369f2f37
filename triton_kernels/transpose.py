"""xᵀ in memory of its own, tile by tile. Only the CPU's library needs it: on a GPU no layer calls this."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_ops.triton_kernels.common import cdiv, on_device

TILE = 64


@triton.jit(do_not_specialize=["T"])
def transpose_kernel(out, x, T, n, out_j, out_t, x_t, x_j, TILE: tl.constexpr):
    tiles = tl.cdiv(n, TILE)
    t = (tl.program_id(0) // tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    j = (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(x + t[:, None] * x_t + j[None, :] * x_j, mask=(t < T)[:, None] & (j < n)[None, :])
    tl.store(out + j[:, None] * out_j + t[None, :] * out_t, tl.trans(value), mask=(j < n)[:, None] & (t < T)[None, :])


def transpose_(out, x) -> None:
    T, n = x.shape
    if out.numel():
        with on_device(out):
            transpose_kernel[(cdiv(n, TILE) * cdiv(T, TILE),)](
                out, x, T, n, *out.stride(), *x.stride(), TILE=TILE, num_warps=4
            )
