"""AdaLoRA's importance, scores and pruning for all layers together (METHODS 1.6).

Parameters and gradients are arguments of the kernels, a launch for every GROUP of them: gradients move whenever they
are set to None between steps, and a table of addresses would have to follow them. Sizes and places do not change: they
are uploaded once. Nothing else comes from the host, so calls can be captured in a CUDA graph.
Bytes moved: p, dp, Ī and Ū once, Ī and Ū written; with scores, Ī and Ū are read once more, from L2 where they fit: a
program per triplet adds up a row of A, a column of B and an entry of E in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from spectral_ops.triton_kernels.common import cdiv, on_device, power_of_2, reference

GROUP = 64  # tensors (with their gradients) of one launch; 128 addresses are a quarter of the least room for arguments
ELEMENTS = 2048  # per step of moments_kernel
SPAN = 1024  # per step of a sum


@functools.cache
def _numbers(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """rows on the device. Waits for the copy, the first time; kept for good, since a captured graph may read it."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _groups(*lists: Sequence[torch.Tensor]) -> Iterator[tuple[int, int, list[tuple[torch.Tensor, ...]]]]:
    """(first, how many, GROUP tensors of each list): the last group is filled up, so that one kernel serves all."""
    for first in range(0, len(lists[0]), GROUP):
        parts = [tensors[first : first + GROUP] for tensors in lists]
        count = len(parts[0])
        yield first, count, [(*part, *[part[-1]] * (GROUP - count)) for part in parts]


@triton.jit
def _chosen(tensors, index, N: tl.constexpr):
    """tensors[index] of N tensors of one dtype."""
    address = tensors[0].to(tl.int64)
    for i in tl.static_range(1, N):
        address = tl.where(index == i, tensors[i].to(tl.int64), address)
    return address.to(tensors[0].dtype)


@triton.jit(do_not_specialize_on_alignment=["values", "gradients"])
def moments_kernel(
    values, gradients, numbers, exp_avg, uncertainty, beta1, beta2, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    """Ī and Ū of tensor ``program_id(0)``, whose row of numbers is (place in Ī and Ū, elements)."""
    tensor = tl.program_id(0)
    p, g = _chosen(values, tensor, GROUP), _chosen(gradients, tensor, GROUP)
    place, n = tl.load(numbers + 2 * tensor), tl.load(numbers + 2 * tensor + 1)
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
def score_kernel(numbers, exp_avg, uncertainty, scores, BLOCK: tl.constexpr):
    """The score of triplet ``program_id(1)`` of layer ``program_id(0)``, whose row of numbers is (place in Ī and Ū,
    place in scores, rows of A, k, rows of B, r, rows of E, first row of A, first of E, d)."""
    row = numbers + tl.program_id(0) * 10
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
    tensors, place = [], 0
    for p in params:
        tensors.append((place, p.numel()))
        place += p.numel()
    layers, place, first = [], 0, 0
    for i in range(0, len(params) if score else 0, 3):
        (rows_A, k), (rows_B, r), rows_E = params[i].shape, params[i + 1].shape, params[i + 2].shape[0]
        row_A, row_E, d = shards[i : i + 3] if shards else (0, 0, rows_B)
        layers.append((place, first, rows_A, k, rows_B, r, rows_E, row_A, row_E, d))
        place, first = place + rows_A * k + rows_B * r + rows_E, first + r
    scores = exp_avg.new_empty(first)
    with on_device(exp_avg):
        if place:
            numbers = _numbers(tuple(tensors), exp_avg.device)
            for start, count, group in _groups(params, grads):
                most = max(p.numel() for p in group[0])
                moments_kernel[count, min(max(cdiv(most, ELEMENTS), 1), 64)](
                    *group, numbers[start:], exp_avg, uncertainty, beta1, beta2,
                    BLOCK=ELEMENTS, GROUP=GROUP, num_warps=4,
                )  # fmt: skip
        if first:
            grid = (len(layers), max(layer[5] for layer in layers))
            numbers = _numbers(tuple(layers), exp_avg.device)
            score_kernel[grid](numbers, exp_avg, uncertainty, scores, BLOCK=SPAN, num_warps=4)
    return scores


@triton.jit(do_not_specialize_on_alignment=["lora_E"])
def prune_kernel(lora_E, numbers, keep, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """E of layer ``program_id(0)``, whose row of numbers is (place in keep, entries), is 0 where not kept."""
    layer = tl.program_id(0)
    E = _chosen(lora_E, layer, GROUP)
    place, n = tl.load(numbers + 2 * layer), tl.load(numbers + 2 * layer + 1)
    i = tl.arange(0, BLOCK)
    pruned = tl.load(keep + place + i, mask=i < n, other=1) == 0
    tl.store(E + i, tl.zeros([BLOCK], E.dtype.element_ty), mask=(i < n) & pruned)


def importance_prune_(scores, lora_E, first, count):
    if any(not E.is_contiguous() for E in lora_E) or len({E.dtype for E in lora_E}) != 1 or count == 0:
        return reference("importance_prune_")(scores, lora_E, first, count)
    keep = ~(scores <= scores.sort().values[count - 1])
    rows = tuple((i, E.numel()) for E, i in zip(lora_E, first, strict=True))
    block = power_of_2(max(entries for _, entries in rows), 16, 1 << 20)
    with on_device(scores):
        numbers = _numbers(rows, scores.device)
        for start, layers, (group,) in _groups(lora_E):
            prune_kernel[(layers,)](
                group, numbers[start:], keep.view(torch.uint8), BLOCK=block, GROUP=GROUP, num_warps=1
            )
    return keep
