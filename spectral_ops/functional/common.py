"""What the fused linear functions share: token flattening, autocast, dropout seeds, products with a chosen dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch.autograd.function import once_differentiable

from spectral_ops._library import accumulate_dtype
from spectral_ops.functional.scratch import scratch
from spectral_ops.functional.transpose import transpose_op

TILE_ROWS = {"cpu": 1024, "cuda": 2048}  # of a weight gradient at a time: enough for the library's full speed
COPIED = (torch.bfloat16,)  # on the CPU several threads read dyᵀ of these faster from a copy, the copy included


def tokens(x: torch.Tensor) -> torch.Tensor:
    """x [..., k] as [T, k]; a view wherever the strides allow one."""
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., n] as [T, n] with unit stride in the last dimension, as the kernels read it; copies only if needed."""
    x = tokens(x)
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y [T, n] with the leading dimensions of x, as a Function's result: like nn.Linear's it is no view to autograd,
    which would forbid its caller to write into it."""
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1])) if x.dim() != 2 else y


def mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in ``dtype``: on CUDA a float32 result of half-precision factors is not rounded on the way."""
    if dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16) and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def gradient_tiles(dy: torch.Tensor, x: torch.Tensor, multiple: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows [start, start + n) of dyᵀx, tile by tile: (start, G [n, k]), n a multiple of ``multiple``.

    G is good until the next is asked for: all share one buffer, so that no [d, k] gradient exists. It is summed in at
    least float32, and on a GPU kept so; on the CPU the library rounds it to x's dtype, and the buffer also holds a
    copy of the tile's dyᵀ where that pays.
    """
    d, (T, k) = dy.shape[1], x.shape
    rows = min(max(TILE_ROWS.get(x.device.type, 1024) // multiple, 1) * multiple, max(d, 1))
    wide = accumulate_dtype(x.dtype) if x.is_cuda else x.dtype
    turned = x.device.type == "cpu" and x.dtype in COPIED
    with scratch.lease((rows * (k + T * turned),), wide, x.device) as buffer:
        tile, copy = buffer[: rows * k].view(rows, k), buffer[rows * k :].view(rows, T * turned)
        for start in range(0, d, rows):
            part = dy[:, start : start + rows].t()
            G = tile[: part.shape[0]]
            if turned:
                transpose_op(copy[: part.shape[0]], part.t())
                part = copy[: part.shape[0]]
            if wide == x.dtype:
                torch.mm(part, x, out=G)
            else:
                torch.mm(part, x, out_dtype=wide, out=G)
            yield start, G


def draw_seed(x: torch.Tensor, dropout_p: float, training: bool) -> torch.Tensor | None:
    """A seed [1] int64 on x's device, drawn from torch's generator for it; None, and nothing drawn, without dropout."""
    if not training or dropout_p == 0.0:
        return None
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=x.device)


def autocast_arguments(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under autocast, x, weight and bias in autocast's dtype (adapter parameters keep theirs); unchanged otherwise."""
    tensors = (x, *others)
    if not isinstance(x, torch.Tensor) or not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in tensors)


def apply(function: type[torch.autograd.Function], device_type: str, *args):
    """``function.apply(*args)`` with autocast off: its arguments already have the dtypes they are computed in."""
    if not torch.is_autocast_enabled(device_type):
        return function.apply(*args)
    with torch.autocast(device_type, enabled=False):
        return function.apply(*args)


def backward_pass(backward: Callable) -> Callable:
    """Decorates a Function's backward: differentiable once, and run with autocast off, like its forward. A caller may
    well start it inside an autocast block, which would round the float32 factors of some of its products only."""

    @once_differentiable
    @functools.wraps(backward)
    def run(ctx, *grads):
        device_type = next((g.device.type for g in grads if g is not None), "cpu")
        if not torch.is_autocast_enabled(device_type):
            return backward(ctx, *grads)
        with torch.autocast(device_type, enabled=False):
            return backward(ctx, *grads)

    return run


def overwritable(base_out: torch.Tensor) -> torch.Tensor:
    """``base_out`` where autograd lets it be overwritten in place, a copy where it does not: a view, a trained leaf, or
    a tensor of inference mode outside it."""
    if torch.compiler.is_compiling():  # the compiler decides by itself whether the copy is needed
        return base_out.clone(memory_format=torch.contiguous_format)
    frozen = (base_out.requires_grad and base_out.is_leaf) or (
        base_out.is_inference() and not torch.is_inference_mode_enabled()
    )
    if frozen or base_out._is_view() or not base_out.is_contiguous():
        return base_out.clone(memory_format=torch.contiguous_format)
    return base_out
