"""A sparse matrix in CSR: its pattern written and read, the sparse product, and the sampled product (METHODS 1.5).

Work is cut by entries, so that one dense row and 128,000 rows are alike; an entry's row is found by binary search in
the offsets, which stay in cache. Only csr_spmm_ walks rows, some side by side. Bytes moved: csr_scatter_ and
csr_gather_ touch a sector (32 bytes) per entry. An entry of csr_spmm_ or csr_sddmm meets one column of x, whose
elements lie a token apart: read as they are, each costs a sector of L2 traffic. So x (and dy) are first turned, TURNED
bytes at a time, which L2 holds: nnz T elements then cross L2 once, in whole sectors. Few tokens are read as they are.
The product with slabs in shared memory is csrc/cuda/csr_spmm.cu's and csr_sddmm.cu's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral_ops.triton_kernels.common import (
    cdiv,
    narrow,
    on_device,
    power_of_2,
    processors,
    reference,
    split,
    sum_partials,
    turned,
)

ENTRIES = 256  # per program of csr_scatter_ and csr_gather_
SPMM = (32, 64, 4)  # greatest number of tokens, entries per step, warps: of few tokens
SDDMM = (16, 128, 4)  # tokens per step, entries, warps: of few tokens
FEW = 64  # tokens below which x is read as it is
TURNED = 1 << 24  # bytes turned at a time, about: tokens of all columns
TURNED_SPMM = (16, 128, 4)  # rows, tokens, warps
TURNED_SDDMM = (16, 128, 4)  # entries, tokens per step, warps


@triton.jit
def _row_of(p, row_offsets, n, STEPS: tl.constexpr):
    """The row o of entries p, row_offsets[o] <= p < row_offsets[o + 1], and whether it is one of the n."""
    inside = (p >= tl.load(row_offsets)) & (p < tl.load(row_offsets + n))
    low = tl.zeros(p.shape, tl.int32)
    high = low + n
    for _ in range(STEPS):
        middle = (low + high) // 2
        right = tl.load(row_offsets + middle) <= p
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low.to(tl.int64), inside


@triton.jit(do_not_specialize=["nnz", "n"])
def scatter_kernel(
    out, values, row_offsets, columns, nnz, n, out_o, out_i,
    ACCUMULATE: tl.constexpr, STEPS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BE + tl.arange(0, BE)
    o, inside = _row_of(p, row_offsets, n, STEPS)
    live = inside & (p < nnz)
    value = tl.load(values + p, mask=live, other=0.0).to(tl.float32)
    target = out + o * out_o + tl.load(columns + p, mask=live, other=0).to(tl.int64) * out_i
    if ACCUMULATE:
        value += tl.load(target, mask=live, other=0.0).to(tl.float32)
    tl.store(target, narrow(value, out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["nnz", "n"])
def gather_kernel(
    out, dense, row_offsets, columns, nnz, n, dense_o, dense_i, STEPS: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    p = tl.program_id(0) * BE + tl.arange(0, BE)
    o, inside = _row_of(p, row_offsets, n, STEPS)
    live = inside & (p < nnz)
    source = dense + o * dense_o + tl.load(columns + p, mask=live, other=0).to(tl.int64) * dense_i
    value = tl.load(source, mask=live, other=0.0).to(tl.float32)
    tl.store(out + p, narrow(value, out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["T"])
def spmm_kernel(
    out, x, values, row_offsets, columns, permutation, T, out_t, out_o, x_t, x_i, BT: tl.constexpr, BE: tl.constexpr
):
    """out [T, d] at one row o of S: tokens by the entries of that row."""
    o = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    first, last = tl.load(row_offsets + o), tl.load(row_offsets + o + 1)
    if first < last:
        total = tl.zeros([BT], tl.float32)
        for start in range(first, last, BE):
            p = start + tl.arange(0, BE)
            live = p < last
            i = tl.load(columns + p, mask=live, other=0).to(tl.int64)
            place = p
            if permutation is not None:
                place = tl.load(permutation + p, mask=live, other=0)
            value = tl.load(values + place, mask=live, other=0.0).to(tl.float32)
            inside = (t < T)[:, None] & live[None, :]
            a = tl.load(x + t[:, None] * x_t + i[None, :] * x_i, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(a * value[None, :], 1)
        target = out + t * out_t + o * out_o
        total += tl.load(target, mask=t < T, other=0.0).to(tl.float32)
        tl.store(target, narrow(total, out.dtype.element_ty), mask=t < T)


@triton.jit(do_not_specialize=["T", "nnz", "n"])
def sddmm_kernel(
    out, dy, x, row_offsets, columns, T, nnz, n, span, dy_t, dy_o, x_t, x_i,
    STEPS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """out [ranges, nnz]: BE entries, over ``span`` tokens."""
    p = tl.program_id(0) * BE + tl.arange(0, BE)
    part = tl.program_id(1)
    o, inside = _row_of(p, row_offsets, n, STEPS)
    live = inside & (p < nnz)
    i = tl.load(columns + p, mask=live, other=0).to(tl.int64)
    total = tl.zeros([BE], tl.float32)
    for t0 in range(part * span, tl.minimum((part + 1) * span, T), BT):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)[:, None]
        valid = (t < T) & live[None, :]
        a = tl.load(dy + t * dy_t + (o * dy_o)[None, :], mask=valid, other=0.0).to(tl.float32)
        b = tl.load(x + t * x_t + (i * x_i)[None, :], mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 0)
    tl.store(out + part.to(tl.int64) * nnz + p, total, mask=p < nnz)


@triton.jit(do_not_specialize=["T", "n"])
def turned_spmm_kernel(
    out, turned, values, row_offsets, columns, permutation, T, n, length, out_t, out_o,
    BO: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out [T, d] at BO rows of S, which walk their entries side by side."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    begin = tl.load(row_offsets + o, mask=o < n, other=0)
    end = tl.load(row_offsets + o + 1, mask=o < n, other=0)
    total = tl.zeros([BO, BT], tl.float32)
    for e in range(0, tl.max(end - begin, 0)):
        p = begin + e
        inside = p < end
        i = tl.load(columns + p, mask=inside, other=0).to(tl.int64)
        place = p
        if permutation is not None:
            place = tl.load(permutation + p, mask=inside, other=0)
        value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(turned + i[:, None] * length + t[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        total += a * value[:, None]
    target = out + t[:, None] * out_t + o[None, :].to(tl.int64) * out_o
    live = (t < T)[:, None] & (o < n)[None, :]
    value = tl.load(target, mask=live, other=0.0).to(tl.float32) + tl.trans(total)
    tl.store(target, narrow(value, out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["nnz", "n"])
def turned_sddmm_kernel(
    out, dy, x, row_offsets, columns, nnz, n, length,
    ADD: tl.constexpr, STEPS: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BE + tl.arange(0, BE)
    o, inside = _row_of(p, row_offsets, n, STEPS)
    live = inside & (p < nnz)
    i = tl.load(columns + p, mask=live, other=0).to(tl.int64)
    t = tl.arange(0, BT)
    left = dy + o[:, None] * length + t[None, :]
    right = x + i[:, None] * length + t[None, :]
    total = tl.zeros([BE, BT], tl.float32)
    for t0 in range(0, length, BT):
        a = tl.load(left + t0, mask=live[:, None], other=0.0).to(tl.float32)
        b = tl.load(right + t0, mask=live[:, None], other=0.0).to(tl.float32)
        total += a * b
    value = tl.sum(total, 1)
    if ADD:
        value += tl.load(out + p, mask=p < nnz, other=0.0)
    tl.store(out + p, value, mask=p < nnz)


def csr_scatter_(out, values, row_offsets, columns, accumulate: bool) -> None:
    if torch.float64 in (out.dtype, values.dtype):
        return reference("csr_scatter_")(out, values, row_offsets, columns, accumulate)
    nnz, n = columns.numel(), out.shape[0]
    if nnz and n:
        with on_device(out):
            scatter_kernel[(cdiv(nnz, ENTRIES),)](
                out, values, row_offsets, columns, nnz, n, *out.stride(),
                ACCUMULATE=accumulate, STEPS=n.bit_length(), BE=ENTRIES, num_warps=4,
            )  # fmt: skip
    return None


def csr_gather_(out, dense, row_offsets, columns) -> None:
    if torch.float64 in (out.dtype, dense.dtype):
        return reference("csr_gather_")(out, dense, row_offsets, columns)
    nnz, n = columns.numel(), dense.shape[0]
    if nnz and n:
        with on_device(dense):
            gather_kernel[(cdiv(nnz, ENTRIES),)](
                out, dense, row_offsets, columns, nnz, n, *dense.stride(),
                STEPS=n.bit_length(), BE=ENTRIES, num_warps=4,
            )  # fmt: skip
    return None


def _chunk(x: torch.Tensor, BT: int) -> int:
    """Tokens to turn at a time."""
    return max(TURNED // (x.shape[1] * x.element_size() * BT), 1) * BT


def csr_spmm_(out, x, values, row_offsets, columns, permutation) -> None:
    if torch.float64 in (x.dtype, values.dtype):
        return reference("csr_spmm_")(out, x, values, row_offsets, columns, permutation)
    T, n = x.shape[0], row_offsets.numel() - 1
    if T >= FEW and n and columns.numel():
        BO, BT, warps = TURNED_SPMM
        chunk = _chunk(x, BT)
        with on_device(x):
            for start in range(0, T, chunk):
                part, place = x[start : start + chunk], out[start : start + chunk]
                tokens = part.shape[0]
                length = cdiv(tokens, BT) * BT
                turned_spmm_kernel[(cdiv(n, BO), length // BT)](
                    place, turned(part, length), values, row_offsets, columns, permutation, tokens, n, length,
                    *place.stride(), BO=BO, BT=BT, num_warps=warps,
                )  # fmt: skip
    elif T and n and columns.numel():
        most, BE, warps = SPMM
        BT = power_of_2(T, 1, most)
        with on_device(x):
            spmm_kernel[(n, cdiv(T, BT))](
                out, x, values, row_offsets, columns, permutation, T, *out.stride(), *x.stride(),
                BT=BT, BE=BE, num_warps=warps,
            )  # fmt: skip
    return None


def csr_sddmm(dy, x, row_offsets, columns):
    if x.dtype == torch.float64:
        return reference("csr_sddmm")(dy, x, row_offsets, columns)
    T, nnz, n = x.shape[0], columns.numel(), row_offsets.numel() - 1
    out = x.new_empty(nnz, dtype=torch.float32)
    if nnz == 0 or T == 0 or n == 0:
        return out.zero_()
    if T >= FEW:
        BE, BT, warps = TURNED_SDDMM
        chunk = min(_chunk(x, BT), _chunk(dy, BT))
        with on_device(x):
            for start in range(0, T, chunk):
                part = x[start : start + chunk]
                length = cdiv(part.shape[0], BT) * BT
                turned_sddmm_kernel[(cdiv(nnz, BE),)](
                    out, turned(dy[start : start + chunk], length), turned(part, length), row_offsets, columns,
                    nnz, n, length, ADD=start > 0, STEPS=n.bit_length(), BE=BE, BT=BT, num_warps=warps,
                )  # fmt: skip
        return out
    BT, BE, warps = SDDMM
    programs = cdiv(nnz, BE)
    ranges, steps = split(cdiv(T, BT), programs, 8 * processors(x))
    partial = out if ranges == 1 else out.new_empty(ranges, nnz)
    with on_device(x):
        sddmm_kernel[(programs, ranges)](
            partial, dy, x, row_offsets, columns, T, nnz, n, steps * BT, *dy.stride(), *x.stride(),
            STEPS=n.bit_length(), BT=BT, BE=BE, num_warps=warps,
        )  # fmt: skip
        if ranges > 1:
            sum_partials([(partial, out)])
    return out
