"""Block sum: Bone / MiSS, its ``mini`` form, and DiSHA's general shards (METHODS 1.3).

    h[t, p] = sum of drop(x)[t, i] over the inputs i of shard p
    y       = x Wᵀ + b + expand(h D)
    backward: s = dy' Dᵀ, dD = hᵀ dy', dx = dy W + mask * s[:, shard(i)], with dy' = dy summed over output shards

A shard map is *cyclic* (input i belongs to shard i mod r: the residue classes across blocks of length r, not the
blocks themselves) or *blocks*: contiguous runs of given sizes, passed to the operators as their ``offsets`` [r+1].
The same two operators serve the input side and the output side, forward and backward.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, calls, define, define_layer, nbytes
from spectral_ops.core import checks, philox
from spectral_ops.core.autograd import (
    apply,
    apply_op,
    autocast_arguments,
    backward_pass,
    contiguous_copy,
    draw_seed,
    fresh,
    mm,
    overwritable,
    rows,
    shaped,
    tokens,
    wanted,
)
from spectral_ops.functional import dropout, lowrank_routes
from spectral_ops.functional.lowrank import fused, fused_forward

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


def _block_sum_samples(s):
    if s.r <= s.k:
        yield s.x, s.r, None, None, 0.0
        yield s.x, s.r, s.shards(s.k), None, 0.0
        yield s.x, s.r, None, s.key, 0.25
        yield s.rows(s.x), s.r, s.shards(s.k), None, 0.0
    if s.k:
        yield s.x, 1, None, None, 0.0
        yield s.x, s.k, None, None, 0.0
        yield s.randn(1, s.k).expand(s.T, s.k), min(4, s.k), None, s.key, 0.5


@define(
    "block_sum(Tensor x, int r, Tensor? offsets, Tensor? seed, float p) -> Tensor",
    fake=_block_sum_fake,
    cost=_block_sum_cost,
    samples=_block_sum_samples,
)
def block_sum_op(x, r, offsets, seed, p):
    """h [T, r] in x's dtype from x [T, k]: sums of drop(x) over each shard, accumulated in at least float32."""
    acc = accumulate_dtype(x.dtype)
    xd = (x if seed is None else philox.dropout(x, seed, p)).to(acc)
    h = xd.new_zeros(x.shape[0], r)
    return h.index_add_(1, shard_index(x.shape[1], r, offsets, x.device), xd).to(x.dtype)


def _block_tile_fake(out, s, offsets, seed, p, accumulate):
    return None


def _block_tile_cost(out, s, offsets, seed, p, accumulate):
    return Cost(out.numel() if accumulate else 0, nbytes(out) * (2 if accumulate else 1) + nbytes(s))


def _block_tile_samples(s):
    yield s.randn(s.T, s.k), s.h, None, None, 0.0, False
    yield s.randn(s.T, s.k), s.h, None, s.key, 0.25, True
    yield s.randn(s.T, s.k), s.h, None, None, 0.0, True
    if s.r <= s.k:
        yield s.randn(s.T, s.k), s.h, s.shards(s.k), None, 0.0, True
        yield s.rows(s.x), s.h, s.shards(s.k), None, 0.0, True
    if s.r <= s.d:
        yield s.randn(s.T, s.d), s.h, s.shards(s.d), s.key, 0.3, False


@define(
    "block_tile_(Tensor(a!) out, Tensor s, Tensor? offsets, Tensor? seed, float p, bool accumulate) -> ()",
    fake=_block_tile_fake,
    cost=_block_tile_cost,
    samples=_block_tile_samples,
)
def block_tile_op(out, s, offsets, seed, p, accumulate):
    """out [T, n] gets (or is increased by) mask * s[:, shard(i)], s [T, r]; the transpose of block_sum."""
    tiled = s[:, shard_index(out.shape[1], s.shape[1], offsets, out.device)]
    if seed is not None:
        tiled = philox.dropout(tiled, seed, p)
    if accumulate:
        out.copy_(out.to(accumulate_dtype(out.dtype)) + tiled)
    else:
        out.copy_(tiled)


def _matmul_cost(x, weight, s, bias):
    T, n = x.shape[0], weight.shape[0]
    return Cost(2 * T * n * weight.shape[1] + T * n, nbytes(x, weight, s, bias) + T * n * x.element_size())


def _matmul_samples(s):
    if s.r:
        yield s.x, s.W, s.h, s.bias
        yield s.x, s.W, s.h, None
        yield s.dy, s.W.t(), s.h, None
        yield s.rows(s.x), s.transposed(s.W), s.rows(s.h), s.bias


@define(
    "block_matmul(Tensor x, Tensor weight, Tensor s, Tensor? bias) -> Tensor",
    fake=lambda x, weight, s, bias: x.new_empty(x.shape[0], weight.shape[0]),
    cost=_matmul_cost,
    samples=_matmul_samples,
)
def block_matmul_op(x, weight, s, bias):
    """y [T, n] = x Wᵀ + bias + s[:, j mod r], s [T, r] in x's dtype: one GEMM that rounds once."""
    acc = accumulate_dtype(x.dtype)
    y = x.to(acc) @ weight.to(acc).t() + s[:, shard_index(weight.shape[0], s.shape[1], None, s.device)]
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def library_block_matmul(x, weight, s, bias):
    """block_matmul as the library's product and our tiling pass."""
    y = F.linear(x, weight, bias)
    block_tile_op(y, s, None, None, 0.0, True)
    return y


block_matmul_op.library = library_block_matmul
block_matmul_op.routes = functools.partial(lowrank_routes.describe, "block_matmul")


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

    @staticmethod
    def twice(ctx, dh):
        return dh[..., shard_index(ctx.shape[-1], dh.shape[-1], ctx.offsets, dh.device)], None, None


# --- layers ----------------------------------------------------------------------------------------------------------

_PIECES = ("block_sum", "block_tile_")
_MATMULS = ("lowrank_matmul", "block_matmul")


def tiled_forward(x, weight, s, bias):
    """y [T, n] = x Wᵀ + bias + s[:, j mod r]; the library's products but where ``fused`` says otherwise."""
    run = block_matmul_op if fused(block_matmul_op, x.device) else library_block_matmul
    return run(x, weight, s, bias)


def _expand_(y, h, D, out_offsets):
    """y [T, d] += expand(h D): a plain product where every output has its own column of D, else one tiling pass."""
    if D.shape[1] == y.shape[1] and out_offsets is None:
        y.addmm_(h, D)
    else:
        block_tile_op(y, h @ D, out_offsets, None, 0.0, True)


def _sums(x, D):
    return x.new_empty(math.prod(x.shape[:-1]), D.shape[0])


def _bone_update_(out, x, D, seed, p, in_offsets, out_offsets):
    """out [T, d] += expand(h D); returns h."""
    h = block_sum_op(rows(x), D.shape[0], in_offsets, seed, p)
    _expand_(out, h, D.to(x.dtype), out_offsets)
    return h


@define_layer(
    "bone_linear_forward(Tensor x, Tensor? weight, Tensor? base_out, Tensor D, Tensor? bias, Tensor? seed, float p,"
    " Tensor? in_offsets, Tensor? out_offsets) -> (Tensor, Tensor)",
    fake=lambda x, weight, base_out, D, bias, seed, p, in_offsets, out_offsets: (
        x.new_empty(*x.shape[:-1], base_out.shape[-1] if weight is None else weight.shape[0]), _sums(x, D),
    ),
    pieces=(*_MATMULS, *_PIECES),
)  # fmt: skip
def bone_linear_forward_op(x, weight, base_out, D, bias, seed, p, in_offsets, out_offsets):
    """y [..., d] = x Wᵀ + b + expand(h D) and h [T, r] = block_sum(drop(x)); offsets None: cyclic.

    Without a weight y is a copy of base_out [..., d], somebody else's x Wᵀ + b, with the update added.
    """
    if weight is None:
        y = contiguous_copy(base_out)
        return y, _bone_update_(tokens(y), x, D, seed, p, in_offsets, out_offsets)
    x2, full = rows(x), D.to(x.dtype)
    h = block_sum_op(x2, D.shape[0], in_offsets, seed, p)
    if out_offsets is not None:
        y = F.linear(x2, weight, bias)
        _expand_(y, h, full, out_offsets)
    elif D.shape[1] == weight.shape[0]:
        y = fused_forward(x2, weight, h, full.t(), 1.0, None, bias)
    else:
        y = tiled_forward(x2, weight, h @ full, bias)
    return shaped(y, x), h


@define_layer(
    "bone_update_forward_(Tensor(a!) out, Tensor x, Tensor D, Tensor? seed, float p) -> Tensor",
    fake=lambda out, x, D, seed, p: _sums(x, D),
    pieces=_PIECES,
)
def bone_update_forward_op(out, x, D, seed, p):
    """out [..., d] += expand(h D), over a base layer somebody else computed; returns h [T, r]."""
    return _bone_update_(tokens(out), x, D, seed, p, None, None)


@define_layer(
    "bone_linear_backward(Tensor dy, Tensor? weight, Tensor D, Tensor h, Tensor? seed, float p, Tensor? in_offsets,"
    " Tensor? out_offsets, int k, int needs) -> (Tensor, Tensor, Tensor)",
    fake=lambda dy, weight, D, h, seed, p, in_offsets, out_offsets, k, needs: wanted(
        dy, needs, (*dy.shape[:-1], k), D, dy.shape[-1:]
    ),
    pieces=("block_matmul", *_PIECES),
)
def bone_linear_backward_op(dy, weight, D, h, seed, p, in_offsets, out_offsets, k, needs):
    """dx [..., k], dD and db; empty [0] where ``needs`` has no bit. Without a weight dx is the update's share alone."""
    dy2, sums = rows(dy), rows(dy)
    if D.shape[1] != dy.shape[-1] or out_offsets is not None:
        sums = block_sum_op(dy2, D.shape[1], out_offsets, None, 0.0)
    dx = dD = db = dy
    if needs & 1:  # a product onto the tiled s would move as much, and was 6 % slower than a plain one on the CPU
        s = sums @ D.to(dy.dtype).t()
        if weight is not None and in_offsets is None and seed is None:
            dx = tiled_forward(dy2, weight.t(), s, None)
        else:
            dx = dy2 @ weight if weight is not None else dy.new_empty(dy2.shape[0], k)
            block_tile_op(dx, s, in_offsets, seed, p, weight is not None)
        dx = dx.reshape(*dy.shape[:-1], k)
    if needs & 2:
        dD = mm(h.t(), sums, D.dtype)
    if needs & 4:
        db = dy2.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
    return fresh(dy, needs, dx, dD, db)


# --- autograd --------------------------------------------------------------------------------------------------------


def _twice(ctx, dy, dh, weight, D, h, seed, k):
    """dx, dD and db in plain torch. h is a result of the same node, so that dD is differentiable in x through it."""
    p, in_offsets, out_offsets = ctx.options

    def tiled(s):
        out = s[:, shard_index(k, D.shape[0], in_offsets, s.device)]
        return dropout.dropped(out, seed, p).reshape(*lead, k)

    dx = dD = db = None
    lead = ctx.lead
    if dy is not None:
        dy2 = tokens(dy)
        sums = dy2
        if D.shape[1] != dy.shape[-1] or out_offsets is not None:
            index = shard_index(dy.shape[-1], D.shape[1], out_offsets, dy.device)
            sums = dy2.new_zeros(dy2.shape[0], D.shape[1]).index_add(1, index, dy2)
        dx = tiled(sums @ D.to(dy.dtype).t())
        if weight is not None:
            dx = dx + dy @ weight
        dD, db = (h.t() @ sums).to(D.dtype), dy2.sum(0)
    if dh is not None:
        dx = tiled(dh) if dx is None else dx + tiled(dh)
    return dx, dD, db


class ShardLinearFunction(Function):
    """y = x Wᵀ + b + expand(block_sum(drop(x)) D), and h; saves h [T, r], not x."""

    @staticmethod
    def forward(ctx, x, weight, D, bias, seed, p, in_offsets, out_offsets):
        ctx.set_materialize_grads(False)
        y, h = bone_linear_forward_op(x, weight, None, D, bias, seed, p, in_offsets, out_offsets)
        ctx.save_for_backward(weight, D, h, seed)
        ctx.options, ctx.lead = (p, in_offsets, out_offsets), x.shape[:-1]
        return y, h

    @staticmethod
    @backward_pass
    def backward(ctx, dy, dh):
        if dh is not None:  # only a second derivative asks for it
            return ShardLinearFunction.twice(ctx, dy, dh)
        if dy is None:
            return (None,) * 8
        weight, D, h, seed = ctx.saved_tensors
        need_x, _, need_D, need_bias, *_ = ctx.needs_input_grad
        dx, dD, db = bone_linear_backward_op(
            dy, weight, D, h, seed, *ctx.options, weight.shape[1], need_x | need_D << 1 | need_bias << 2
        )
        return (
            dx if need_x else None, None, dD if need_D else None, db if need_bias else None, None, None, None, None,
        )  # fmt: skip

    @staticmethod
    def twice(ctx, dy, dh):
        weight, D, h, seed = ctx.saved_tensors
        dx, dD, db = _twice(ctx, dy, dh, weight, D, h, seed, weight.shape[1])
        need_x, _, need_D, need_bias, *_ = ctx.needs_input_grad
        return (
            dx if need_x else None, None, dD if need_D else None, db if need_bias else None, None, None, None, None,
        )  # fmt: skip


class ShardUpdateFunction(Function):
    """base_out + expand(block_sum(drop(x)) D), in place or on a copy; for a base layer somebody else computed."""

    @staticmethod
    def forward(ctx, base_out, x, D, seed, p, inplace):
        if inplace:
            y, h = base_out, bone_update_forward_op(base_out, x, D, seed, p)
            ctx.mark_dirty(base_out)
        else:
            y, h = bone_linear_forward_op(x, None, base_out, D, None, seed, p, None, None)
        ctx.save_for_backward(D, h, seed)
        ctx.p, ctx.k = p, x.shape[-1]
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        D, h, seed = ctx.saved_tensors
        need_out, need_x, need_D, *_ = ctx.needs_input_grad
        dx, dD, _ = bone_linear_backward_op(dy, None, D, h, seed, ctx.p, None, None, ctx.k, need_x | need_D << 1)
        return dy if need_out else None, dx if need_x else None, dD if need_D else None, None, None, None


def linear(x, weight, D, bias, p, in_offsets=None, out_offsets=None):
    """:func:`disha_linear` past its checks, for layers that know their shapes; p is 0 where nothing is dropped."""
    seed = None if p == 0.0 else draw_seed(x, p)
    if torch.is_grad_enabled():
        return apply(ShardLinearFunction, x, x, weight, D, bias, seed, p, in_offsets, out_offsets)[0]
    return apply_op(bone_linear_forward_op, x, x, weight, None, D, bias, seed, p, in_offsets, out_offsets)[0]


def update(base_out, x, D, p):
    """:func:`bone_update` past its checks."""
    inplace = overwritable(base_out)
    return apply(ShardUpdateFunction, x, base_out, x, D, draw_seed(x, p), p, inplace)


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


@calls(bone_linear_forward_op, bone_linear_backward_op)
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
    return linear(x, weight, bone, bias, dropout_p if training else 0.0)


@calls(bone_update_forward_op, bone_linear_forward_op, bone_linear_backward_op)
def bone_update(base_out, x, bone, *, dropout_p=0.0, training=False):
    """base_out + block_sum(drop(x), r) D, in place on base_out [..., d]: Bone over any base layer (bitsandbytes, GPTQ).

    ``base_out`` = base(x) must be a fresh result nobody else reads: it is overwritten and returned (a view or a trained
    leaf is copied first). ``bone`` [r, d] or mini [r, q]; x [..., k], cast to base_out's dtype. METHODS 1.3.
    """
    checks.base(base_out, x)
    x = x.to(base_out.dtype)
    _check_bone(bone, x, base_out.shape[-1])
    checks.probability("dropout_p", dropout_p)
    return update(base_out, x, bone, dropout_p if training else 0.0)


@calls(bone_linear_forward_op, bone_linear_backward_op)
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
    return linear(x, weight, D, bias, 0.0, _offsets(in_shards, x.device), _offsets(out_shards, x.device))
