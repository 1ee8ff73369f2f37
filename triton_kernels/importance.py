"""AdaLoRA's importance, scores and pruning, each one launch for all layers (METHODS 1.6).

Parameters and gradients are reached through a table of addresses, which is uploaded from pinned memory without waiting.
Bytes moved: p, dp, Ī and Ū once, Ī and Ū written; with scores, Ī and Ū are read once more, from L2 where they fit: a
program per triplet adds up a row of A, a column of B and an entry of E in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral_ops.triton_kernels.common import cdiv, on_device, power_of_2, reference

ELEMENTS = 2048  # per step of moments_kernel
SPAN = 1024  # per step of a sum


def _table(rows: list[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@triton.jit
def moments_kernel(table, exp_avg, uncertainty, beta1, beta2, like, BLOCK: tl.constexpr):
    """Ī and Ū of tensor ``program_id(0)``: its row of the table is (p, dp, place in Ī and Ū, elements)."""
    row = table + tl.program_id(0).to(tl.int64) * 4
    p = tl.load(row).to(tl.pointer_type(like.dtype.element_ty))
    g = tl.load(row + 1).to(tl.pointer_type(like.dtype.element_ty))
    place, n = tl.load(row + 2), tl.load(row + 3)
    for start in range(tl.program_id(1) * BLOCK, n, tl.num_programs(1) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        live = i < n
        value, gradient = tl.load(p + i, mask=live, other=0.0), tl.load(g + i, mask=live, other=0.0)
        size = tl.abs(value.to(tl.float32) * gradient.to(tl.float32))
        m = beta1 * tl.load(exp_avg + place + i, mask=live, other=0.0) + (1 - beta1) * size
        u = beta2 * tl.load(uncertainty + place + i, mask=live, other=0.0) + (1 - beta2) * tl.abs(size - m)
        tl.store(exp_avg + place + i, m, mask=live)
        tl.store(uncertainty + place + i, u, mask=live)


@triton.jit
def _sum_products(exp_avg, uncertainty, first, n, stride, BLOCK: tl.constexpr):
    """Σ Ī Ū over ``n`` elements from ``first`` on, ``stride`` apart."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = first + i * stride
        total += tl.load(exp_avg + place, mask=i < n, other=0.0) * tl.load(uncertainty + place, mask=i < n, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def score_kernel(table, exp_avg, uncertainty, scores, BLOCK: tl.constexpr):
    """The score of triplet ``program_id(1)`` of layer ``program_id(0)``, whose row of the table is (place in Ī and Ū,
    place in scores, rows of A, k, rows of B, r, rows of E, first row of A, first of E, d)."""
    row = table + tl.program_id(0).to(tl.int64) * 10
    i = tl.program_id(1).to(tl.int64)
    place, first, rows_A, k = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    rows_B, r, rows_E = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    own_A, own_E, d = i - tl.load(row + 7), i - tl.load(row + 8), tl.load(row + 9)
    if i < r:
        score = _sum_products(exp_avg, uncertainty, place + rows_A * k + i, rows_B, r, BLOCK) / d.to(tl.float32)
        if (own_A >= 0) & (own_A < rows_A):
            score += _sum_products(exp_avg, uncertainty, place + own_A * k, k, 1, BLOCK) / k.to(tl.float32)
        if (own_E >= 0) & (own_E < rows_E):
            entry = place + rows_A * k + rows_B * r + own_E
            score += tl.load(exp_avg + entry) * tl.load(uncertainty + entry)
        tl.store(scores + first + i, score)


def importance_update_(exp_avg, uncertainty, params, grads, shards, beta1, beta2, score):
    if exp_avg.dtype == torch.float64 or len({t.dtype for t in params}) > 1:
        return reference("importance_update_")(exp_avg, uncertainty, params, grads, shards, beta1, beta2, score)
    params, grads = ([t.contiguous() for t in tensors] for tensors in (params, grads))
    tensors, place, most = [], 0, 0
    for p, g in zip(params, grads, strict=True):
        tensors.append((p.data_ptr(), g.data_ptr(), place, p.numel()))
        place, most = place + p.numel(), max(most, p.numel())
    layers, place, first = [], 0, 0
    for i in range(0, len(params) if score else 0, 3):
        (rows_A, k), (rows_B, r), rows_E = params[i].shape, params[i + 1].shape, params[i + 2].shape[0]
        row_A, row_E, d = shards[i : i + 3] if shards else (0, 0, rows_B)
        layers.append((place, first, rows_A, k, rows_B, r, rows_E, row_A, row_E, d))
        place, first = place + rows_A * k + rows_B * r + rows_E, first + r
    scores = exp_avg.new_empty(first)
    with on_device(exp_avg):
        if most:
            table = _table(tensors, exp_avg.device)
            grid = (len(params), min(cdiv(most, ELEMENTS), 64))
            moments_kernel[grid](table, exp_avg, uncertainty, beta1, beta2, params[0], BLOCK=ELEMENTS, num_warps=4)
        if first:
            grid = (len(layers), max(layer[5] for layer in layers))
            score_kernel[grid](_table(layers, exp_avg.device), exp_avg, uncertainty, scores, BLOCK=SPAN, num_warps=4)
    return scores


@triton.jit
def prune_kernel(table, keep, like, BLOCK: tl.constexpr):
    """E of layer ``program_id(0)``, whose row of the table is (E, place in keep, entries), is 0 where not kept."""
    row = table + tl.program_id(0).to(tl.int64) * 3
    E = tl.load(row).to(tl.pointer_type(like.dtype.element_ty))
    place, n = tl.load(row + 1), tl.load(row + 2)
    i = tl.arange(0, BLOCK)
    pruned = tl.load(keep + place + i, mask=i < n, other=1) == 0
    tl.store(E + i, tl.zeros([BLOCK], like.dtype.element_ty), mask=(i < n) & pruned)


def importance_prune_(scores, lora_E, first, count):
    if any(not E.is_contiguous() for E in lora_E) or len({E.dtype for E in lora_E}) != 1 or count == 0:
        return reference("importance_prune_")(scores, lora_E, first, count)
    keep = ~(scores <= scores.sort().values[count - 1])
    rows = [(E.data_ptr(), i, E.numel()) for E, i in zip(lora_E, first, strict=True)]
    with on_device(scores):
        table, block = _table(rows, scores.device), power_of_2(max(row[2] for row in rows), 16, 1 << 20)
        prune_kernel[(len(rows),)](table, keep.view(torch.uint8), lora_E[0], BLOCK=block, num_warps=1)
    return keep
