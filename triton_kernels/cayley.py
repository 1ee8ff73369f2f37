"""The Cayley transform of small matrices (METHODS 1.9): one program each, all in one launch.

A program holds its matrix, padded to a power of two, in registers. X is read once as it is and once turned, Q written
once; backward reads Q and G twice at most and writes dX. Above MOST the references run, as they do in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral_ops.triton_kernels.common import dot, on_device, power_of_2, reference

MOST = 64  # at 128 the backward kernel no longer fits its registers
STEP = 16  # of a product
# padded r -> warps forward and backward: few, since every step of the elimination waits for all of them
WARPS = {16: (1, 1), 32: (2, 2), 64: (4, 8)}


@triton.jit
def cayley_kernel(Q, X, r, x_n, x_i, x_k, R: tl.constexpr):
    """Row p of a = I + K in turn is solved for the open x of its greatest entry, and that x replaced in the other rows;
    then row p gives x[solved[p]], and column k multiplies y[known[k]]."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, R)
    rows, columns = i[:, None], i[None, :]
    live = (rows < r) & (columns < r)
    x = X + n * x_n
    a = tl.load(x + rows * x_i + columns * x_k, mask=live, other=0.0).to(tl.float32)
    turned = tl.load(x + columns * x_i + rows * x_k, mask=live, other=0.0).to(tl.float32)
    a = (a - turned) * 0.5 + tl.where(rows == columns, 1.0, 0.0)
    solved, known, open = i, i, i < r
    for p in range(0, r):
        row = tl.sum(tl.where(rows == p, a, 0.0), 0)
        size = tl.abs(row)
        size = tl.where(size == size, size, 0.0)  # a NaN is open as well
        j = tl.argmax(tl.where(open, size, -1.0), 0)
        here = i == j
        inverse = 1.0 / tl.sum(tl.where(here, row, 0.0), 0)
        row = tl.where(here, inverse, -row * inverse)
        factor = tl.where(i == p, 1.0, tl.sum(tl.where(columns == j, a, 0.0), 1))
        a = tl.where((rows == p) | (columns == j), 0.0, a) + factor[:, None] * row[None, :]
        solved, known, open = tl.where(i == p, j, solved), tl.where(here, p, known), open & (i != j)
    out, of = solved[:, None], known[None, :]
    tl.store(Q + n * r * r + out * r + of, 2.0 * a - tl.where(out == of, 1.0, 0.0), mask=live)


@triton.jit
def cayley_backward_kernel(dX, Q, G, r, q_n, q_i, q_k, g_n, g_i, g_k, R: tl.constexpr, STEP: tl.constexpr):
    """V = M Gᵀ M, whose first product waits in dX: registers hold one matrix, and STEP columns and rows of two."""
    n = tl.program_id(0).to(tl.int64)
    i, s = tl.arange(0, R), tl.arange(0, STEP)
    q, g, d = Q + n * q_n, G + n * g_n, dX + n * r * r
    place = d + i[:, None] * r + i[None, :]
    live = (i[:, None] < r) & (i[None, :] < r)
    GM = tl.zeros([R, R], tl.float32)
    for start in range(0, r, STEP):
        k = start + s
        wide, tall = (k[:, None] < r) & (i[None, :] < r), (i[:, None] < r) & (k[None, :] < r)
        G_k = tl.load(g + i[:, None] * g_k + k[None, :] * g_i, mask=tall, other=0.0)
        M_k = tl.load(q + k[:, None] * q_i + i[None, :] * q_k, mask=wide, other=0.0)
        GM = dot(G_k, M_k + tl.where(k[:, None] == i[None, :], 1.0, 0.0), GM, "ieee")
    tl.store(place, GM, mask=live)
    tl.debug_barrier()
    V = tl.zeros([R, R], tl.float32)
    for start in range(0, r, STEP):
        k = start + s
        wide, tall = (k[:, None] < r) & (i[None, :] < r), (i[:, None] < r) & (k[None, :] < r)
        M_k = tl.load(q + i[:, None] * q_i + k[None, :] * q_k, mask=tall, other=0.0)
        GM_k = tl.load(d + k[:, None] * r + i[None, :], mask=wide, other=0.0)
        V = dot(M_k + tl.where(i[:, None] == k[None, :], 1.0, 0.0), GM_k, V, "ieee")
    tl.debug_barrier()
    tl.store(place, (V - tl.trans(V)) * 0.25, mask=live)


def cayley_forward(X):
    n, r, _ = X.shape
    if X.dtype == torch.float64 or r > MOST:
        return reference("cayley_forward")(X)
    Q = X.new_empty(X.shape, dtype=torch.float32)
    if Q.numel():
        R = power_of_2(r, 16, MOST)
        with on_device(X):
            cayley_kernel[(n,)](Q, X, r, *X.stride(), R=R, num_warps=WARPS[R][0])
    return Q


def cayley_backward(Q, G):
    n, r, _ = Q.shape
    if Q.dtype == torch.float64 or r > MOST:
        return reference("cayley_backward")(Q, G)
    dX = Q.new_empty(Q.shape)
    if dX.numel():
        R = power_of_2(r, 16, MOST)
        with on_device(Q):
            cayley_backward_kernel[(n,)](dX, Q, G, r, *Q.stride(), *G.stride(), R=R, STEP=STEP, num_warps=WARPS[R][1])
    return dX
