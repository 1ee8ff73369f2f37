"""What the fused linear functions share: token flattening, autocast, dropout seeds, products with a chosen dtype."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype, autocast_enabled
from spectral_ops.core.scratch import scratch

TILE_ROWS = {"cpu": 1024, "cuda": 2048}  # of a weight gradient at a time: enough for the library's full speed


def tokens(x: torch.Tensor) -> torch.Tensor:
    """x [..., k] as [T, k]; a view wherever the strides allow one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() != 2 else x


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., n] as [T, n] with unit stride in the last dimension, as the kernels read it; copies only if needed."""
    x = tokens(x)
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y [T, n] with the leading dimensions of x, as a Function's result: like nn.Linear's it is no view to autograd,
    which would forbid its caller to write into it."""
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1])) if x.dim() != 2 else y


def contiguous_copy(t: torch.Tensor) -> torch.Tensor:
    """A copy of t in rows, whatever t's strides."""
    return t.clone(memory_format=torch.contiguous_format)


def mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in ``dtype``: on CUDA a float32 result of half-precision factors is not rounded on the way."""
    if dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16) and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def gradient_tiles(dy: torch.Tensor, x: torch.Tensor, multiple: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows [start, start + n) of dyᵀx, tile by tile: (start, G [n, k]), n a multiple of ``multiple``.

    G is good until the next is asked for: all share one buffer, so that no [d, k] gradient exists. It is summed in at
    least float32, and on a GPU kept so; on the CPU the library rounds it to x's dtype.
    """
    d, k = dy.shape[1], x.shape[1]
    rows = min(max(TILE_ROWS.get(x.device.type, 1024) // multiple, 1) * multiple, max(d, 1))
    wide = accumulate_dtype(x.dtype) if x.is_cuda else x.dtype
    with scratch.lease((rows, k), wide, x.device) as tile:
        for start in range(0, d, rows):
            part = dy[:, start : start + rows].t()
            G = tile[: part.shape[0]]
            if wide == x.dtype:
                torch.mm(part, x, out=G)
            else:
                torch.mm(part, x, out_dtype=wide, out=G)
            yield start, G


def draw_seed(x: torch.Tensor, p: float, training: bool = True) -> torch.Tensor | None:
    """A seed [1] int64 on x's device, drawn from torch's generator for it; None, and nothing drawn, without dropout."""
    if not training or p == 0.0:
        return None
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=x.device)


def autocast_arguments(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under autocast, x, weight and bias in autocast's dtype (adapter parameters keep theirs); unchanged otherwise."""
    tensors = (x, *others)
    if not isinstance(x, torch.Tensor) or not autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in tensors)


def _special() -> bool:
    """Whether torch.compile traces this, autocast is on, or a transform of torch.func is active."""
    return _compiling() or _autocast_anywhere() or _transforms()


_compiling = torch.compiler.is_compiling
_autocast_anywhere, _transforms = torch._C._is_any_autocast_enabled, torch._C._are_functorch_transforms_active


def apply(function: type[Function], like: torch.Tensor, *args):
    """``function.apply(*args)`` with autocast off: its arguments already have the dtypes they are computed in."""
    if not _special():
        return super(Function, function).apply(*args)  # past the Python part, which is there for transforms
    if not autocast_enabled(like.device.type):
        return function.apply(*args)
    with torch.autocast(like.device.type, enabled=False):
        return function.apply(*args)


def apply_op(operator: Callable, like: torch.Tensor, *args):
    """The same for an operator called without autograd."""
    if not _special() or not autocast_enabled(like.device.type):
        return operator(*args)
    with torch.autocast(like.device.type, enabled=False):
        return operator(*args)


def fresh(like: torch.Tensor, needs: int, *results: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A backward operator's results: those whose bit is set in ``needs``, the others each an empty [0] of its own."""
    return tuple(t if needs >> bit & 1 else like.new_empty(0) for bit, t in enumerate(results))


def saved_hidden(h: torch.Tensor | None, read: bool, dy: torch.Tensor, r: int) -> torch.Tensor:
    """h [T, r] that forward saved for dy [T, d]; where it did not, and nobody reads it, memory of that shape."""
    if h is None and read:
        raise ValueError("h: got None, wanted a tensor for what is asked for")
    return dy.new_empty(dy.shape[0], r) if h is None else h


def wanted(dy: torch.Tensor, needs: int, *results: torch.Tensor | tuple[int, ...] | None) -> tuple[torch.Tensor, ...]:
    """The shapes of :func:`fresh`: each result is like a tensor, or has this shape in dy's dtype."""
    return tuple(
        dy.new_empty(0)
        if not needs >> bit & 1
        else dy.new_empty(like.shape, dtype=like.dtype)
        if isinstance(like, torch.Tensor)
        else dy.new_empty(like)
        for bit, like in enumerate(results)
    )


def backward_pass(backward: Callable) -> Callable:
    """Decorates a Function's backward, which runs with autocast off, like its forward: a caller may well start it
    inside an autocast block, which would round the float32 factors of some of its products only.

    With ``create_graph`` the Function's ``twice`` gives the same gradients with a graph of their own, where it has one;
    where it has none they are differentiable once.
    """

    @functools.wraps(backward)
    def run(ctx, *grads):
        if not (_compiling() or torch.is_grad_enabled() or _autocast_anywhere()):
            return backward(ctx, *grads)
        call = backward
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call = getattr(ctx._forward_cls, "twice", None) or functools.partial(_once, backward)
        device_type = next((g.device.type for g in grads if g is not None), "cpu")
        if not autocast_enabled(device_type):
            return call(ctx, *grads)
        with torch.autocast(device_type, enabled=False):
            return call(ctx, *grads)

    return run


def _once(backward, ctx, *grads):
    """Gradients that raise when somebody differentiates them; torch's once_differentiable passes them on as constants
    where the incoming gradient is one."""
    with torch.no_grad():
        results = backward(ctx, *grads)
    results = results if isinstance(results, tuple) else (results,)
    message = f"{ctx._forward_cls.__name__}: got a second derivative, wanted the first alone"
    error = torch._C._functions.DelayedError(message.encode(), len(results))
    return error(*[None if g is None else g.detach().requires_grad_() for g in results])


def through(ctx, y, inputs, dy):
    """The gradients of a Function with a graph of their own, from y as plain torch makes it of ``inputs``, which stand
    where the Function's do."""
    wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
    found = torch.autograd.grad(y, [inputs[i] for i in wanted], dy, create_graph=True, allow_unused=True)
    grads: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def overwritable(base_out: torch.Tensor, dense: bool = False) -> bool:
    """Whether ``base_out`` may be overwritten in place: not a view, a trained leaf, or a tensor of inference mode
    outside it, which autograd forbids; nor while a dispatch mode sees every operator, which may keep it. ``dense``: it
    fills its memory in another order than that of rows, which the caller takes."""
    if torch.compiler.is_compiling():  # the compiler decides by itself whether a copy is needed
        return False
    if torch._C._len_torch_dispatch_stack() or type(base_out) is not torch.Tensor:
        return False
    if not (dense or base_out.is_contiguous()):
        return False
    if base_out._is_view() or (base_out.requires_grad and base_out.is_leaf):
        return False
    return not base_out.is_inference() or torch.is_inference_mode_enabled()
