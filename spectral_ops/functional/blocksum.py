"""Block sum: Bone / MiSS, its ``mini`` form, and DiSHA's general shards (METHODS 1.3).

    h[t, p] = sum of drop(x)[t, i] over the inputs i of shard p
    y       = x Wᵀ + b + expand(h D)
    backward: s = dy' Dᵀ, dD = hᵀ dy', dx = dy W + mask * s[:, shard(i)], with dy' = dy summed over output shards

A shard map is *cyclic* (input i belongs to shard i mod r: the residue classes across blocks of length r, not the
blocks themselves) or *blocks*: contiguous runs of given sizes, passed to the operators as their ``offsets`` [r+1].
The same two operators serve the input side and the output side, forward and backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, define, nbytes
from spectral_ops.functional import checks, random
from spectral_ops.functional.common import (
    apply,
    autocast_arguments,
    backward_pass,
    draw_seed,
    mm,
    overwritable,
    rows,
    shaped,
    tokens,
)

__all__ = ["block_sum", "bone_linear", "bone_update", "disha_linear"]


# --- operators -------------------------------------------------------------------------------------------------------


def shard_index(n: int, r: int, offsets: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The shard [n] of each of n features: i mod r, or the run of ``offsets`` it falls into."""
    i = torch.arange(n, device=device)
    return i % r if offsets is None else torch.searchsorted(offsets[1:].to(i.dtype), i, right=True)


def _block_sum_fake(x, r, offsets, seed, p):
    return x.new_empty(x.shape[0], r)


def _block_sum_cost(x, r, offsets, seed, p):
    return Cost(x.numel(), nbytes(x) + x.shape[0] * r * x.element_size())


@define(
    "block_sum(Tensor x, int r, Tensor? offsets, Tensor? seed, float p) -> Tensor",
    stem="blocksum",
    fake=_block_sum_fake,
    cost=_block_sum_cost,
)
def block_sum_op(x, r, offsets, seed, p):
    """h [T, r] in x's dtype from x [T, k]: sums of drop(x) over each shard, accumulated in at least float32."""
    acc = accumulate_dtype(x.dtype)
    xd = (x if seed is None else random.dropout(x, seed, p)).to(acc)
    h = xd.new_zeros(x.shape[0], r)
    return h.index_add_(1, shard_index(x.shape[1], r, offsets, x.device), xd).to(x.dtype)


def _block_tile_fake(out, s, offsets, seed, p, accumulate):
    return None


def _block_tile_cost(out, s, offsets, seed, p, accumulate):
    return Cost(out.numel() if accumulate else 0, nbytes(out) * (2 if accumulate else 1) + nbytes(s))


@define(
    "block_tile_(Tensor(a!) out, Tensor s, Tensor? offsets, Tensor? seed, float p, bool accumulate) -> ()",
    stem="blocksum",
    fake=_block_tile_fake,
    cost=_block_tile_cost,
)
def block_tile_op(out, s, offsets, seed, p, accumulate):
    """out [T, n] gets (or is increased by) mask * s[:, shard(i)], s [T, r]; the transpose of block_sum."""
    tiled = s[:, shard_index(out.shape[1], s.shape[1], offsets, out.device)]
    if seed is not None:
        tiled = random.dropout(tiled, seed, p)
    if accumulate:
        out.copy_(out.to(accumulate_dtype(out.dtype)) + tiled)
    else:
        out.copy_(tiled)


# --- autograd --------------------------------------------------------------------------------------------------------


class BlockSumFunction(Function):
    """h = block_sum(x, r); backward tiles dh over the shards."""

    @staticmethod
    def forward(ctx, x, r, offsets):
        ctx.shape, ctx.offsets = x.shape, offsets
        return shaped(block_sum_op(rows(x), r, offsets, None, 0.0), x)

    @staticmethod
    @backward_pass
    def backward(ctx, dh):
        dx = dh.new_empty(ctx.shape)
        block_tile_op(tokens(dx), rows(dh), ctx.offsets, None, 0.0, False)
        return dx, None, None


def _expand_(y, h, D, out_offsets):
    """y [T, d] += expand(h D): a plain product where every output has its own column of D, else one tiling pass."""
    if D.shape[1] == y.shape[1] and out_offsets is None:
        y.addmm_(h, D)
    else:
        block_tile_op(y, h @ D, out_offsets, None, 0.0, True)


def _shard_gradients(dy, h, D, out_offsets, need_s, need_D):
    """s = dy' Dᵀ and dD = hᵀ dy' for dy [T, d], each None where nobody needs it."""
    if D.shape[1] != dy.shape[1] or out_offsets is not None:
        dy = block_sum_op(rows(dy), D.shape[1], out_offsets, None, 0.0)
    s = dy @ D.to(dy.dtype).t() if need_s else None
    dD = mm(h.t(), dy, D.dtype) if need_D else None
    return s, dD


class ShardLinearFunction(Function):
    """y = x Wᵀ + b + expand(block_sum(drop(x)) D); saves h [T, r], not x."""

    @staticmethod
    def forward(ctx, x, weight, D, bias, seed, p, in_offsets, out_offsets):
        x2 = rows(x)
        h = block_sum_op(x2, D.shape[0], in_offsets, seed, p)
        y = F.linear(x2, weight, bias)
        _expand_(y, h, D.to(x.dtype), out_offsets)
        ctx.save_for_backward(weight, D, h, seed)
        ctx.p, ctx.in_offsets, ctx.out_offsets, ctx.x_shape = p, in_offsets, out_offsets, x.shape
        return shaped(y, x)

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        weight, D, h, seed = ctx.saved_tensors
        need_x, _, need_D, need_bias = ctx.needs_input_grad[:4]
        dy2 = tokens(dy)
        s, dD = _shard_gradients(dy2, h, D, ctx.out_offsets, need_x, need_D)
        dx = db = None
        if need_x:  # a product onto the tiled s would move as much, and was 6 % slower than a plain one on the CPU
            dx = dy2 @ weight
            block_tile_op(dx, s, ctx.in_offsets, seed, ctx.p, True)
            dx = dx.reshape(ctx.x_shape)
        if need_bias:
            db = dy2.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
        return dx, None, dD, db, None, None, None, None


class ShardUpdateFunction(Function):
    """base_out += expand(block_sum(drop(x)) D), in place; for a base layer somebody else computed."""

    @staticmethod
    def forward(ctx, base_out, x, D, seed, p):
        h = block_sum_op(rows(x), D.shape[0], None, seed, p)
        _expand_(tokens(base_out), h, D.to(x.dtype), None)
        ctx.mark_dirty(base_out)
        ctx.save_for_backward(D, h, seed)
        ctx.p, ctx.x_shape = p, x.shape
        return base_out

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        D, h, seed = ctx.saved_tensors
        _, need_x, need_D = ctx.needs_input_grad[:3]
        s, dD = _shard_gradients(tokens(dy), h, D, None, need_x, need_D)
        dx = None
        if need_x:
            dx = s.new_empty(s.shape[0], ctx.x_shape[-1])
            block_tile_op(dx, s, None, seed, ctx.p, False)
            dx = dx.reshape(ctx.x_shape)
        return dy, dx, dD, None, None


# --- public functions ------------------------------------------------------------------------------------------------


def _check_shards(name: str, shards: str | Sequence[int] | None, features: int, count: int) -> None:
    if shards is None or shards == "cyclic":
        return
    if isinstance(shards, str) or not isinstance(shards, Sequence):
        raise TypeError(f'{name}: got {checks.describe(shards)}, wanted "cyclic", a list of block sizes, or None')
    for size in shards:
        checks.integer(name, size, 1, None, "the size of a block")
    if sum(shards) != features:
        raise ValueError(
            f"{name}: got block sizes that sum to {sum(shards)}, wanted {features} (the features they split)"
        )
    if len(shards) != count:
        raise ValueError(f"{name}: got {len(shards)} blocks, wanted {count} (that dimension of D)")


_device_offsets: dict[tuple, torch.Tensor] = {}


def _offsets(shards: str | Sequence[int] | None, device: torch.device) -> torch.Tensor | None:
    """int32 [r+1] offsets of contiguous blocks on ``device``; None for a cyclic map."""
    if shards is None or isinstance(shards, str):
        return None
    ends = [0, *itertools.accumulate(shards)]
    if torch.compiler.is_compiling() or device.type == "cpu":
        return torch.tensor(ends, dtype=torch.int32, device=device)
    # copied to a GPU once: a copy in every call would wait for the device, and no CUDA graph could capture it
    key = (device, *ends)
    if key not in _device_offsets:
        with torch.inference_mode(False):
            offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        if type(offsets) is not torch.Tensor:  # a fake one, while somebody traces shapes
            return offsets
        _device_offsets[key] = offsets
    return _device_offsets[key]


def _check_bone(bone: torch.Tensor, x: torch.Tensor, out_features: int) -> None:
    checks.tensor("bone", bone, "[r, out_features] or [r, q] with q dividing out_features", 2)
    checks.integer("bone", bone.shape[0], 1, x.shape[-1], "r, its rows: between 1 and in_features")
    if bone.shape[1] < 1 or out_features % bone.shape[1]:
        raise ValueError(
            f"bone: got {checks.describe(bone)}, wanted [r, q] with q dividing out_features ({out_features})"
        )
    checks.device("x", x, bone=bone)
    checks.no_narrowing(x, bone=bone)


def block_sum(x: torch.Tensor, r: int) -> torch.Tensor:
    """Sum of x over the residue classes of its last dimension: out[..., p] = sum of x[..., i] over i = p mod r.

    x [..., k] float64/float32/bfloat16/float16; 1 <= r <= k. Returns [..., r] in x's dtype, accumulated in at least
    float32. Differentiable in x. METHODS 1.3; Bone, arXiv:2409.15371.
    """
    checks.tensor("x", x, "[..., k]")
    if x.dim() < 1:
        raise ValueError(f"x: got {checks.describe(x)}, wanted at least one dimension [..., k]")
    checks.integer("r", r, 1, x.shape[-1], "between 1 and the last dimension of x")
    return BlockSumFunction.apply(x, r, None)


def bone_linear(x, weight, bone, bias=None, *, dropout_p=0.0, training=False):
    """Bone / MiSS linear layer: y = x Wᵀ + b + block_sum(drop(x), r) D.

    Args:
        x: [..., k].
        weight: [d, k], frozen, in x's dtype (autocast casts both).
        bone: D [r, d], or ``mini`` [r, q] with q dividing d, where output o uses column o mod q. 1 <= r <= k; k need
            not be a multiple of r. float32 is allowed over a narrower x; the gradient comes back in D's dtype.
        bias: [d] or None; may be trainable.
        dropout_p, training: inverted dropout on the adapter branch, active only while training.

    Returns y [..., d] in x's dtype. Saves h = block_sum(x) [T, r] for backward, neither x nor anything of size [T, d].
    Raises TypeError/ValueError naming the argument. METHODS 1.3; Bone arXiv:2409.15371, MiSS arXiv:2409.15371v2.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    _check_bone(bone, x, weight.shape[0])
    checks.probability("dropout_p", dropout_p)
    seed = draw_seed(x, dropout_p, training)
    return apply(ShardLinearFunction, x.device.type, x, weight, bone, bias, seed, dropout_p, None, None)


def bone_update(base_out, x, bone, *, dropout_p=0.0, training=False):
    """base_out + block_sum(drop(x), r) D, in place on base_out [..., d]: Bone over any base layer (bitsandbytes, GPTQ).

    ``base_out`` = base(x) must be a fresh result nobody else reads: it is overwritten and returned (a view or a trained
    leaf is copied first). ``bone`` [r, d] or mini [r, q]; x [..., k], cast to base_out's dtype. METHODS 1.3.
    """
    checks.base(base_out, x)
    x = x.to(base_out.dtype)
    _check_bone(bone, x, base_out.shape[-1])
    checks.probability("dropout_p", dropout_p)
    seed = draw_seed(x, dropout_p, training)
    return apply(ShardUpdateFunction, x.device.type, overwritable(base_out), x, bone, seed, dropout_p)


def disha_linear(x, weight, D, in_shards, out_shards=None, bias=None):
    """DiSHA linear layer: the delta of W is ΔW[o, i] = D[shard(i), shard'(o)] for a shard map on either side.

    Args:
        x: [..., k]; weight: [d, k], frozen; bias: [d] or None.
        D: [r1, r2], trained.
        in_shards: how inputs map to rows of D: ``"cyclic"`` (i mod r1) or a list of r1 block sizes that sum to k.
        out_shards: how outputs map to columns of D: ``"cyclic"``, r2 block sizes that sum to d, or None (r2 = d).

    Returns y [..., d] in x's dtype. Bone is ``("cyclic", None)``, mini is ``("cyclic", "cyclic")``. METHODS 1.3;
    DiSHA arXiv:2409.15371.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    checks.tensor("D", D, "[in shards, out shards]", 2)
    checks.device("x", x, D=D)
    checks.no_narrowing(x, D=D)
    out_features, in_features = weight.shape
    if in_shards is None:
        raise TypeError('in_shards: got None, wanted "cyclic" or a list of block sizes')
    checks.integer("D", D.shape[0], 1, in_features, "its rows: shards of the inputs")
    checks.integer("D", D.shape[1], 1, out_features, "its columns: shards of the outputs")
    _check_shards("in_shards", in_shards, in_features, D.shape[0])
    _check_shards("out_shards", out_shards, out_features, D.shape[1])
    if out_shards is None:
        checks.size("D", D, 1, out_features, "out_features, as out_shards is None")
    in_offsets, out_offsets = _offsets(in_shards, x.device), _offsets(out_shards, x.device)
    return apply(ShardLinearFunction, x.device.type, x, weight, D, bias, None, 0.0, in_offsets, out_offsets)
