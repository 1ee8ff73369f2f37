"""Linear over a frozen weight in FP8 (METHODS 1.11): the product, and the input's gradient whatever made the product.

    W[o, i] = q[o, i] s[o // m, i // n]      q [d, k] in float8, s one scale for each block of m x n entries
    y = x Wᵀ + b                             dx = dy W      db = Σ dy

W is made tile by tile, in x's dtype: a tile of its rows gives columns of y, a tile of its columns gives columns of dx.
So every number is one sum of the library, rounded once, and no more of W than a tile is ever in memory. Saved for
backward: nothing but q and s, which the layer holds anyway.

Where a layer has an FP8 kernel of its own, that makes y, and only the gradient is ours (:func:`differentiable`). Such a
kernel rounds x to FP8 too; dx passes that rounding by, as if it were the identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, calls, define, define_layer, nbytes
from spectral_ops.core import checks
from spectral_ops.core.autograd import TILE_ROWS, apply, apply_op, backward_pass, fresh, rows, shaped, wanted
from spectral_ops.core.scratch import scratch
from spectral_ops.functional.dora import column_norm_op

__all__ = ["float8_linear"]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
SCALES = (*checks.FLOATS, torch.float8_e8m0fnu)
STRIP = 1 << 16  # entries


# --- operators -------------------------------------------------------------------------------------------------------


def _quantised(weight: torch.Tensor, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in float8 and its scales, by blocks of m x n."""
    d, k = weight.shape
    scale = 2.0 ** torch.arange(-3, math.ceil(d / m) * math.ceil(k / n) - 3, device=weight.device).remainder(5)
    return weight.to(FLOAT8[0]), scale.reshape(math.ceil(d / m), math.ceil(k / n)) / 7


def _dequantise_samples(s):
    for m, n in ((128, 128), (1, s.k), (s.d, s.k), (3, 5)):
        yield s.randn(s.d, s.k), *_quantised(s.W, max(m, 1), max(n, 1)), max(m, 1), max(n, 1)
    weight, scale = _quantised(s.W, 4, 3)
    yield s.randn(s.d, s.k), weight, scale.to(torch.float8_e8m0fnu), 4, 3
    yield s.rows(s.randn(s.d, s.k)), weight.to(torch.float8_e5m2), scale.to(torch.bfloat16), 4, 3


def _table(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """All 256 numbers of a float8 dtype, on the CPU: there a look-up takes a quarter of the time of a conversion."""
    if weight.dtype not in FLOAT8 or weight.device.type != "cpu":
        return None
    return torch.arange(256, dtype=torch.uint8).view(weight.dtype).to(dtype)


@define(
    "float8_dequantise_(Tensor(a!) out, Tensor weight, Tensor scale, int block_rows, int block_columns) -> ()",
    fake=lambda out, weight, scale, block_rows, block_columns: None,
    cost=lambda out, weight, scale, block_rows, block_columns: Cost(out.numel(), nbytes(out, weight, scale)),
    samples=_dequantise_samples,
)
def float8_dequantise_op(out, weight, scale, block_rows, block_columns):
    """out [d, k] becomes weight [d, k] times the scale of each entry's block, computed in float32 (float64 for float64)
    and rounded once. scale [⌈d / block_rows⌉, ⌈k / block_columns⌉]; the last blocks may be ragged."""
    scale = scale.to(accumulate_dtype(out.dtype))
    if scale.shape[0] > 1 and block_rows > 1:
        scale = scale.repeat_interleave(block_rows, 0)[: weight.shape[0]]
    (d, k), n = weight.shape, block_columns
    whole = k // n * n  # columns of blocks that are not ragged
    # on the CPU torch multiplies a narrower out through copies in float32: of a few rows, which stay in the cache
    step = max(STRIP // max(k, 1), 1) if out.device.type == "cpu" else max(d, 1)
    table = _table(weight, out.dtype)
    for start in range(0, d, step):
        part, s = out[start : start + step], scale if scale.shape[0] == 1 else scale[start : start + step]
        q = weight[start : start + step]
        if table is not None:
            q = table.index_select(0, q.view(torch.uint8).int().flatten()).view(q.shape)
        part.copy_(q)
        if whole:
            part[:, :whole].unflatten(1, (-1, n)).mul_(s[:, : whole // n, None])
        if whole < k:
            part[:, whole:].mul_(s[:, -1:])


def _tiles(weight, scale, block_rows, block_columns, dim, dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
    """W in tiles: (start, stop, the rows or columns from start to stop in ``dtype``). A tile is good until the next is
    asked for: all share one buffer. A tile ends where a block does."""
    size, block = weight.shape[dim], (block_rows, block_columns)[dim]
    whole = scale.shape[dim] == 1  # then the block is as long as W, and may be cut anywhere
    step = TILE_ROWS.get(weight.device.type, 1024)
    step = min(step if whole else max(step // block, 1) * block, max(size, 1))
    shape = list(weight.shape)
    shape[dim] = step
    with scratch.lease(tuple(shape), dtype, weight.device) as buffer:
        for start in range(0, size, step):
            n = min(step, size - start)
            first = 0 if whole else start // block
            some = scale.narrow(dim, first, 1 if whole else math.ceil(n / block))
            # columns fill the front of the buffer, so that each tile is contiguous
            tile = buffer.flatten()[: n * weight.shape[1 - dim]].view((n, -1) if dim == 0 else (-1, n))
            float8_dequantise_op(tile, weight.narrow(dim, start, n), some, block_rows, block_columns)
            yield start, start + n, tile


def column_norm_rows(weight, scale, A, B, gamma, block_rows, block_columns):
    """‖W + γBA‖ of each row, from a tile of rows at a time."""
    wide = accumulate_dtype(A.dtype)
    norm = A.new_empty(weight.shape[0], dtype=wide)
    for start, stop, tile in _tiles(weight, scale, block_rows, block_columns, 0, wide):
        norm[start:stop] = column_norm_op(tile, A, B[start:stop], gamma)
    return norm


@define_layer(
    "float8_column_norm(Tensor weight, Tensor scale, Tensor A, Tensor B, float gamma, int block_rows,"
    " int block_columns) -> Tensor",
    fake=lambda weight, scale, A, B, gamma, block_rows, block_columns: A.new_empty(
        weight.shape[0], dtype=accumulate_dtype(A.dtype)
    ),
    pieces=("float8_dequantise_", "column_norm"),
)
def float8_column_norm_op(weight, scale, A, B, gamma, block_rows, block_columns):
    """c [d] = ‖W_o + γ (BA)_o‖ in float32 (float64 for float64 A), as dora.column_norm of the dequantised W."""
    return column_norm_rows(weight, scale, A, B, gamma, block_rows, block_columns)


@define_layer(
    "float8_linear_forward(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int block_rows, int block_columns)"
    " -> Tensor",
    fake=lambda x, weight, scale, bias, block_rows, block_columns: x.new_empty(*x.shape[:-1], weight.shape[0]),
    pieces=("float8_dequantise_",),
)
def float8_linear_forward_op(x, weight, scale, bias, block_rows, block_columns):
    """y [..., d] = x Wᵀ + b in x's dtype."""
    x2 = rows(x)
    y = x.new_empty(x2.shape[0], weight.shape[0])
    for start, stop, tile in _tiles(weight, scale, block_rows, block_columns, 0, x.dtype):
        if bias is not None and bias.dtype == x.dtype:
            torch.addmm(bias[start:stop], x2, tile.t(), out=y[:, start:stop])
        else:
            torch.mm(x2, tile.t(), out=y[:, start:stop])
    if bias is not None and bias.dtype != x.dtype:
        y.add_(bias)
    return shaped(y, x)


@define_layer(
    "float8_linear_backward(Tensor dy, Tensor weight, Tensor scale, Tensor? bias, int block_rows, int block_columns,"
    " int needs) -> (Tensor, Tensor)",
    fake=lambda dy, weight, scale, bias, block_rows, block_columns, needs: wanted(
        dy, needs, (*dy.shape[:-1], weight.shape[1]), bias
    ),
    pieces=("float8_dequantise_",),
)
def float8_linear_backward_op(dy, weight, scale, bias, block_rows, block_columns, needs):
    """dx [..., k] = dy W in dy's dtype and db [d] = Σ dy in bias's; empty [0] where ``needs`` has no bit."""
    dy2, dx, db = rows(dy), dy, dy
    if needs & 1:
        dx = dy.new_empty(dy2.shape[0], weight.shape[1])
        for start, stop, tile in _tiles(weight, scale, block_rows, block_columns, 1, dy.dtype):
            torch.mm(dy2, tile, out=dx[:, start:stop])
        dx = dx.reshape(*dy.shape[:-1], dx.shape[1])
    if needs & 2:
        db = dy2.sum(0, dtype=accumulate_dtype(dy.dtype)).to(bias.dtype)
    return fresh(dy, needs, dx, db)


# --- autograd --------------------------------------------------------------------------------------------------------


def _backward(ctx, dy):
    weight, scale, bias = ctx.saved_tensors
    need_x, need_bias = ctx.needs_input_grad[0], bias is not None and ctx.needs_input_grad[3]
    dx, db = float8_linear_backward_op(dy, weight, scale, bias, *ctx.blocks, need_x | need_bias << 1)
    return (dx if need_x else None, None, None, db if need_bias else None, None, None)


def _twice(ctx, dy):
    """dx and db as a graph of dy, of which they are linear."""
    weight, scale, bias = ctx.saved_tensors
    need_bias = bias is not None and ctx.needs_input_grad[3]
    dx = dy @ dequantised(weight, scale, *ctx.blocks, dy.dtype) if ctx.needs_input_grad[0] else None
    return dx, None, None, dy.flatten(0, -2).sum(0).to(bias.dtype) if need_bias else None, None, None


class Float8LinearFunction(Function):
    """y = x Wᵀ + b; saves q, s and b, which are parameters."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias, block_rows, block_columns):
        ctx.save_for_backward(weight, scale, bias)
        ctx.blocks = block_rows, block_columns
        return float8_linear_forward_op(x, weight, scale, bias, block_rows, block_columns)

    backward, twice = staticmethod(backward_pass(_backward)), staticmethod(_twice)


class Float8GradientFunction(Function):
    """A product that a kernel without gradients has made, with its gradients; y is returned as it is."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias, block_rows, block_columns, y):
        ctx.save_for_backward(weight, scale, bias)
        ctx.blocks = block_rows, block_columns
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        return *_backward(ctx, dy), None

    @staticmethod
    def twice(ctx, dy):
        return *_twice(ctx, dy), None


def linear(x, weight, scale, bias, block_rows, block_columns):
    """:func:`float8_linear` past its checks."""
    arguments = x, weight, scale, bias, block_rows, block_columns
    if torch.is_grad_enabled():
        return apply(Float8LinearFunction, x, *arguments)
    return apply_op(float8_linear_forward_op, x, *arguments)


def differentiable(y, x, weight, scale, bias, block_rows, block_columns):
    """y [..., d], made of x by somebody's kernel under no_grad and nobody else's, with the gradients of x Wᵀ + b."""
    wanting = x.requires_grad or (bias is not None and bias.requires_grad)
    if not (wanting and torch.is_grad_enabled()):
        return y
    if torch.compiler.is_compiling() or y._is_view():  # made without a graph, it could not enter one as it is
        y = torch.ops.aten._unsafe_view.default(y, y.shape)
    return apply(Float8GradientFunction, x, x, weight, scale, bias, block_rows, block_columns, y)


def dequantised(weight, scale, block_rows, block_columns, dtype):
    """W [d, k] in ``dtype``: a new tensor."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    float8_dequantise_op(out, weight, scale, block_rows, block_columns)
    return out


# --- public functions ------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """What a weight [d, k] in FP8 is made of: q, s [⌈d / block_rows⌉, ⌈k / block_columns⌉], and the size of a block."""

    weight: torch.Tensor
    scale: torch.Tensor
    block_rows: int
    block_columns: int


def blocks(weight: torch.Tensor, scale: torch.Tensor, block_size: Sequence[int] | None = None) -> Blocks:
    """The scales of ``weight`` [d, k] as a matrix with one for each block; TypeError or ValueError where they do not
    fit. See :func:`float8_linear`."""
    for name, t, dtypes in (("weight", weight, FLOAT8), ("scale", scale, SCALES)):
        if not isinstance(t, torch.Tensor) or t.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name}: got {checks.describe(t)}, wanted {names}")
    if weight.dim() != 2:
        raise ValueError(f"weight: got {checks.describe(weight)}, wanted 2 dimensions [out_features, in_features]")
    checks.device("weight", weight, scale=scale)
    (d, k), shape = weight.shape, tuple(scale.shape)
    if block_size is None:
        if scale.numel() == 1:
            return Blocks(weight, scale.reshape(1, 1), max(d, 1), max(k, 1))
        if shape in ((d,), (d, 1)):
            return Blocks(weight, scale.reshape(d, 1), 1, max(k, 1))
        raise ValueError(
            f"scale: got {checks.describe(scale)}, wanted one number, one per row [{d}] or [{d}, 1], or a block_size"
        )
    if not isinstance(block_size, Sequence) or len(block_size) != 2:
        raise ValueError(f"block_size: got {block_size!r}, wanted two numbers (rows, columns)")
    for size in block_size:
        checks.integer("block_size", size, 1, None, "rows or columns of a block")
    grid = tuple(math.ceil(n / size) for n, size in zip((d, k), block_size, strict=True))
    if shape != grid and not (scale.numel() == 1 and math.prod(grid) == 1):
        wanted = f"{list(grid)} (blocks of {block_size[0]} x {block_size[1]} in a weight {[d, k]})"
        raise ValueError(f"scale: got {checks.describe(scale)}, wanted {wanted}")
    return Blocks(weight, scale.reshape(grid), *block_size)


@calls(float8_linear_forward_op, float8_linear_backward_op)
def float8_linear(x, weight, scale, bias=None, *, block_size=None):
    """Linear layer over a frozen FP8 weight: y = x Wᵀ + b, W = weight * scale, made a tile at a time.

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: [d, k], float8_e4m3fn, float8_e5m2 or their fnuz forms; frozen.
        scale: what an entry is multiplied by, frozen, in any of x's dtypes or float8_e8m0fnu: one number, one per row
            [d] or [d, 1], or one per block [⌈d / rows⌉, ⌈k / columns⌉], where the last blocks may be ragged.
        bias: [d] or None, any of x's dtypes; may be trainable.
        block_size: (rows, columns) of a block; None for one scale, or one per row.

    Returns y [..., d] in x's dtype. Saves nothing but weight, scale and bias. Dequantised entries are rounded once, to
    x's dtype. Raises TypeError/ValueError that name the argument. METHODS 1.11.
    """
    form = blocks(weight, scale, block_size)
    checks.frozen(weight=weight, scale=scale)
    checks.tensor("x", x, "[..., in_features]")
    if x.dim() < 1:
        raise ValueError(f"x: got {checks.describe(x)}, wanted at least one dimension [..., in_features]")
    checks.size("x", x, -1, weight.shape[1], "in_features of weight")
    if bias is not None:
        checks.vector("bias", bias, weight.shape[0], "out_features of weight")
    checks.device("x", x, weight=weight, bias=bias)
    checks.no_narrowing(x, bias=bias)
    return linear(x, form.weight, form.scale, bias, form.block_rows, form.block_columns)
