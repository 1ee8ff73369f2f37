"""Experts' rows summed over their tokens, and the gradient of that (METHODS 1.10). No host knows how many have one.

* ``routing_combine``: every row of y once, every row of out once. A program has some columns of one token, and asks for
  all of its rows before it adds the first.
* ``routing_combine_backward``: dout and y once in, dy once out. A program has one token; its rows are a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral_ops._library import accumulate_dtype
from spectral_ops.triton_kernels.common import cdiv, narrow, on_device, power_of_2, reference, strides

COLUMNS = 1024  # of a program of routing_combine, at most
TILE = 4096  # elements of a step of routing_combine_backward


@triton.jit
def _end(offsets, n, S):
    """Where the rows are nobody's: a row, whatever the memory holds."""
    return tl.minimum(tl.maximum(tl.load(offsets + n), 0), S)


@triton.jit(do_not_specialize=["S", "n"])
def combine_kernel(
    y, weights, places, offsets, out, S, n, d, y_s, y_c, w_t, w_j, p_t, p_j, K: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    t, end = tl.program_id(0).to(tl.int64), _end(offsets, n, S)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    for j in tl.static_range(K):
        place = tl.load(places + t * p_t + j * p_j)
        live = (place >= 0) & (place < end)
        term = tl.load(y + place * y_s + c.to(tl.int64) * y_c, mask=live & (c < d), other=0.0).to(tl.float32)
        if weights is not None:
            term *= tl.load(weights + t * w_t + j * w_j, mask=live, other=0.0).to(tl.float32)
        total += term
    tl.store(out + t * d + c, narrow(total, out.dtype.element_ty), mask=c < d)


def routing_combine(y, weights, places, offsets):
    if y.dtype == torch.float64:
        return reference("routing_combine")(y, weights, places, offsets)
    (S, d), (T, K) = y.shape, places.shape
    out = y.new_empty(T, d)
    if out.numel() == 0:
        return out
    BD = power_of_2(d, 16, COLUMNS)
    with on_device(y):
        combine_kernel[(T, cdiv(d, BD))](
            y, weights, places, offsets, out, S, offsets.shape[0] - 1, d, *y.stride(),
            *strides(weights), *places.stride(), K=K, BD=BD, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["S", "n"])
def combine_backward_kernel(
    dout, y, weights, places, offsets, dy, dweights, S, n, d, d_t, d_c, y_s, y_c, w_t, w_j, p_t, p_j,
    K: tl.constexpr, KS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    t, j, end = tl.program_id(0).to(tl.int64), tl.arange(0, KS), _end(offsets, n, S)
    place = tl.load(places + t * p_t + j * p_j, mask=j < K, other=-1)
    own, written = (place >= 0) & (place < end), (place >= 0) & (place < S)
    weight = tl.full([KS], 1.0, tl.float32)
    if weights is not None:
        weight = tl.load(weights + t * w_t + j * w_j, mask=own, other=0.0).to(tl.float32)
    total = tl.zeros([KS, BD], tl.float32)
    for c0 in range(0, d, BD):
        c = c0 + tl.arange(0, BD)
        g = tl.load(dout + t * d_t + c.to(tl.int64) * d_c, mask=c < d, other=0.0).to(tl.float32)[None, :]
        live = own[:, None] & (c < d)[None, :]
        if dweights is not None:
            source = y + place[:, None] * y_s + c[None, :].to(tl.int64) * y_c
            total += tl.where(live, g * tl.load(source, mask=live, other=0.0).to(tl.float32), 0.0)
        value = narrow(tl.where(live, weight[:, None] * g, 0.0), dy.dtype.element_ty)
        tl.store(dy + place[:, None] * d + c[None, :], value, mask=written[:, None] & (c < d)[None, :])
    if dweights is not None:
        tl.store(dweights + t * K + j, narrow(tl.sum(total, 1), dweights.dtype.element_ty), mask=j < K)


def routing_combine_backward(dout, y, weights, places, offsets, need_weights: bool):
    if dout.dtype == torch.float64:
        return reference("routing_combine_backward")(dout, y, weights, places, offsets, need_weights)
    (S, d), (T, K) = y.shape, places.shape
    full = S == T * K and d > 0  # else there are rows without a pair, or none at all
    dy = (torch.empty if full else torch.zeros)((S, d), dtype=dout.dtype, device=dout.device)
    dtype = accumulate_dtype(y.dtype) if weights is None else weights.dtype
    dweights = torch.zeros((T, K) if need_weights else 0, dtype=dtype, device=dout.device)
    if T * K == 0 or d == 0:
        return dy, dweights
    KS = power_of_2(K, 1, 1 << 30)
    with on_device(dout):
        combine_backward_kernel[(T,)](
            dout, y, weights, places, offsets, dy, dweights if need_weights else None, S, offsets.shape[0] - 1, d,
            *dout.stride(), *y.stride(), *strides(weights), *places.stride(),
            K=K, KS=KS, BD=power_of_2(d, 16, max(TILE // KS, 16)), num_warps=4,
        )  # fmt: skip
    return dy, dweights
