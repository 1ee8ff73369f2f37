"""Tensor parallelism: an adapter over a base layer whose weight is a DTensor in shards, on the shards of this process.

    by columns (Shard(0)):  y_i = base_i(x) + γ h B_iᵀ,  h = x Aᵀ             backward sums dh over the processes
    by rows (Shard(1)):     y = base(x_1, x_2, ...) + γ h Bᵀ,  h = Σ_i x_i A_iᵀ   forward sums h

The base layer is called with its own collectives. The adapter's are of [T, r] elements; of MiSS it is the block sum in
the place of h. So every process computes what one process alone would, also where PEFT's own forward does not sum.
A parameter is what PEFT made of it: this process's part of A or B, a DTensor, or whole on every process; whole ones
must hold the same values everywhere, as after a broadcast, and get the whole gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from spectral_ops.functional import block_sum, lowrank

STYLE = "transformers.distributed.tensor_parallel"


class Split(NamedTuple):
    """How the base weight [d, k] is cut: along dimension 0 (columns of y) or 1 (of x), and this process's part."""

    dim: int
    start: int
    size: int
    whole: int
    group: Any


class Summed(Function):
    """Σ over the processes; each gets the whole gradient, which is the same everywhere."""

    @staticmethod
    def forward(ctx, x, group):
        return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy, None


class GradientSummed(Function):
    """The tensor itself; its gradient is the sum of the processes' parts."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return collectives.wait_tensor(collectives.all_reduce(dy.contiguous(), "sum", ctx.group)), None


def split_of(base: nn.Module) -> Split | None:
    """The cut of a base layer, or None: no DTensor, or one in another form than tensor parallelism's."""
    weight = base._parameters.get("weight")
    if not isinstance(weight, DTensor) or weight.dim() != 2 or weight.device_mesh.ndim != 1:
        return None
    (placement,) = weight.placements
    if type(placement) is not Shard:
        return None
    sizes, offsets = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    dim = placement.dim
    return Split(dim, offsets[dim], sizes[dim], weight.shape[dim], weight.device_mesh.get_group())


def styled(module: nn.Module) -> bool:
    """Whether nothing but transformers' tensor-parallel forward stands before the module's own."""
    forward = module.__dict__.get("forward")
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ) and (forward is None or getattr(forward, "__module__", None) == STYLE)


def part(p: torch.Tensor, dim: int, split: Split) -> torch.Tensor | None:
    """This process's part of a parameter along the cut; None where it has another size than the part or the whole."""
    if isinstance(p, DTensor):
        if p.placements != (Shard(dim),):
            return None
        p = p.to_local()
    if p.shape[dim] == split.size:
        return p
    if p.shape[dim] == split.whole:
        return GradientSummed.apply(p, split.group).narrow(dim, split.start, split.size)
    return None


def whole(p: torch.Tensor) -> torch.Tensor | None:
    """A parameter that every process has whole; None for one in parts."""
    if isinstance(p, DTensor):
        return p.to_local() if p.placements == (Replicate(),) else None
    return p


def low_rank_over(out, x, A, B, scale, split: Split) -> torch.Tensor | None:
    """out + γ (x Aᵀ) Bᵀ on this process's shards; None where the sizes do not fit together."""
    columns, rows = cut(split, x, out)
    A, B = (part(A, 1, split), whole(B)) if rows else (whole(A), part(B, 0, split) if columns else whole(B))
    if A is None or B is None or (A.shape[1], B.shape[0]) != (x.shape[-1], out.shape[-1]):
        return None
    h = F.linear(x, A.to(x.dtype))
    h = GradientSummed.apply(h, split.group) if columns else Summed.apply(h, split.group) if rows else h
    return spread(out, h, B, scale)


def bone_over(out, x, D, split: Split, mini: bool) -> torch.Tensor | None:
    """out + (block sums of x) D on this process's shards, D [r, d] or, for mini, [r, q] over and over; or None."""
    (columns, rows), (r, q), width = cut(split, x, out), D.shape, out.shape[-1]
    parted = columns and not mini and q == width  # D holds this process's columns alone
    if not (mini or q == width or (columns and q == split.whole)):
        return None
    h = block_sum(x, r)
    if rows:  # the first feature here belongs to another block than the first of all
        h = Summed.apply(h.roll(split.start % r, -1), split.group)
    elif columns:
        h = GradientSummed.apply(h, split.group)
    if columns and not parted:
        D = GradientSummed.apply(D, split.group)
    if q != width:
        start = split.start if columns else 0
        D = D[:, torch.arange(start, start + width, device=D.device) % q]
    return spread(out, h, D.t(), 1.0)


def cut(split: Split, x: torch.Tensor, out: torch.Tensor) -> tuple[bool, bool]:
    """Whether this call's output is this process's part of the columns, or its input of the rows."""
    small = split.size < split.whole
    return (
        small and split.dim == 0 and out.shape[-1] == split.size,
        small and split.dim == 1 and x.shape[-1] == split.size,
    )


def spread(out, h, B, scale) -> torch.Tensor:
    """out + γ h Bᵀ, by the operator that makes h itself elsewhere: here of h and the identity, r² a token."""
    identity = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return lowrank.update(out, h, identity, B, None, None, None, scale, 0.0)
