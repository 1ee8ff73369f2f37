"""Low-rank update of a convolution: LoRA and DoRA over Conv1d, Conv2d and Conv3d (METHODS 1.14).

    h = A ∗ drop(x)   [N, r, S]     A has the base's kernel, stride and padding; S: places of the result
    y = out + γ B h                 B [d, r] is a 1×1 convolution: a product over the channels
    y = g * (out + γ B h) + b       DoRA: out without the bias, g = m / c, c = column_norm of the flattened kernels
    backward, with G = g * dy:
      u = γ Bᵀ G     dB = γ Σ G hᵀ     dA and dx: A's convolution backward from u     dm = Σ dy * (y - b) / m

The convolutions and the products are the library's. B's product is added to the frozen convolution's result in place,
in either memory format, and the bias joins it as one more column: a pass over y, and for DoRA one that scales it. A
kernel of our own would join these two. Saved for backward: x, which the frozen convolution keeps anyway, h, and for
DoRA y, its own output.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype, calls, define_layer
from spectral_ops.core import checks
from spectral_ops.core.autograd import apply, backward_pass, draw_seed, fresh, overwritable
from spectral_ops.functional.dora import VANISHING
from spectral_ops.functional.dropout import seeded_dropout_op

__all__ = ["conv_update"]

TILE = 2**18  # numbers that are widened to float32 at a time


# --- planes: [N, channels, S], a view of a tensor in either memory format ---------------------------------------------


def channels_last(t: torch.Tensor) -> bool:
    """Whether t [N, C, ...] lies with its channels innermost, and not also in rows."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    return form is not None and not t.is_contiguous() and t.is_contiguous(memory_format=form)


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.is_contiguous() or channels_last(t) else t.contiguous()


def _tiles(planes: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices (channels, places) that cut the planes into tiles, each in one piece where the memory is."""
    N, C, S = planes.shape
    if planes.stride(1) == 1 and S > 1:
        step = max(TILE // max(N * C, 1), 1)
        yield from ((slice(None), slice(i, i + step)) for i in range(0, S, step))
    else:
        step = max(TILE // max(N * S, 1), 1)
        yield from ((slice(i, i + step), slice(None)) for i in range(0, C, step))


def _scale(out: torch.Tensor, planes: torch.Tensor, g: torch.Tensor) -> None:
    """out [N, C, S] = g * planes, rounded once; g [C] in the dtype of sums."""
    g = g.unsqueeze(1)
    if out.dtype == g.dtype:
        torch.mul(planes, g, out=out)
        return
    for channels, places in _tiles(planes):
        out[:, channels, places] = planes[:, channels, places].to(g.dtype) * g[channels]


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Σ a * b over samples and places, [C], in the dtype of sums."""
    acc = accumulate_dtype(a.dtype)
    total = a.new_zeros(a.shape[1], dtype=acc)
    for channels, places in _tiles(a):
        total[channels] += (a[:, channels, places].to(acc) * b[:, channels, places].to(acc)).sum((0, 2))
    return total


def _add_product(planes: torch.Tensor, M: torch.Tensor, h: torch.Tensor, alpha: float = 1.0) -> None:
    """planes [N, d, S] += alpha M h, for M [d, r] and h [N, r, S]."""
    if planes.shape[0] == 1:
        torch.addmm(planes[0], M, h[0], alpha=alpha, out=planes[0])
    else:
        torch.baddbmm(planes, M.expand(planes.shape[0], *M.shape), h, alpha=alpha, out=planes)


def _batched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b of [N, ...] each; one sample without the batched product, which takes its time over thin matrices."""
    return torch.mm(a[0], b[0]).unsqueeze(0) if a.shape[0] == 1 else torch.bmm(a, b)


def _dropped(x: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    return x if seed is None else seeded_dropout_op(x.reshape(1, x.numel()), seed, p).reshape(x.shape)


def _conv(x, kernel, stride, padding, dilation):
    """kernel ∗ x; where that is a product over the channels, as one: faster than the library's convolution."""
    if _is_product(kernel, stride, padding):
        planes, M = _dense(x).flatten(2), kernel.flatten(1)
        return _batched(M.expand(planes.shape[0], *M.shape), planes).reshape(x.shape[0], kernel.shape[0], *x.shape[2:])
    return torch.convolution(x, kernel, None, stride, padding, dilation, False, [0] * len(stride), 1)


def _conv_backward(u, x, kernel, stride, padding, dilation, need_x, need_kernel):
    """The gradients of :func:`_conv`'s x and kernel; what nobody needs is whatever."""
    if not _is_product(kernel, stride, padding):
        mask, none = [need_x, need_kernel, False], [0] * len(stride)
        args = u, x, kernel, None, stride, padding, dilation, False, none, 1, mask
        return torch.ops.aten.convolution_backward.default(*args)[:2]
    planes, M, dx, dkernel = u.flatten(2), kernel.flatten(1).t(), u, u
    if need_x:
        dx = _batched(M.expand(planes.shape[0], *M.shape), planes).reshape(x.shape)
    if need_kernel:
        acc = accumulate_dtype(x.dtype)
        dkernel = _batched(planes, _dense(x).flatten(2).transpose(1, 2)).sum(0, dtype=acc).reshape(kernel.shape)
    return dx, dkernel


def _is_product(kernel, stride, padding) -> bool:
    return kernel.shape[2:].numel() == 1 and not any(padding) and all(s == 1 for s in stride)


# --- layers ----------------------------------------------------------------------------------------------------------

_PIECES = ("seeded_dropout",)
_ARGUMENTS = (
    "Tensor x, Tensor A, Tensor B, Tensor? bias, Tensor? magnitude, Tensor? norm, Tensor? seed, float scale, float p,"
    " SymInt[] stride, SymInt[] padding, SymInt[] dilation"
)


def _kept_fake(out, A, norm):
    h = out.new_empty(out.shape[0], A.shape[0], out.flatten(2).shape[2])
    return h, out.new_empty(0) if norm is None else norm.new_empty(2 * norm.shape[0])


@define_layer(
    f"conv_update_forward_(Tensor(a!) out, {_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=lambda out, x, A, B, bias, magnitude, norm, seed, scale, p, stride, padding, dilation: _kept_fake(
        out, A, norm
    ),
    pieces=_PIECES,
)
def conv_update_forward_op(out, x, A, B, bias, magnitude, norm, seed, scale, p, stride, padding, dilation):
    """out [N, d, ...], in either memory format, becomes out + γ B h or, with a magnitude, g * (out + γ B h) + b.

    x [N, C, ...] in out's dtype; A [r, C, kernel...] and B [d, r] in any; norm [d] float32 (float64 for float64).
    Returns h [N, r, S] and gains [2 d], g followed by c (empty without a magnitude).
    """
    h = _conv(_dropped(x, seed, p), A.to(x.dtype), stride, padding, dilation).flatten(2).contiguous()
    planes = out.flatten(2)
    if magnitude is None:
        _add_product(planes, B.to(x.dtype), h, scale)
        return h, out.new_empty(0)
    g = magnitude.to(norm.dtype) / norm
    _scale(planes, planes, g)
    M, factors = scale * g.unsqueeze(1) * B.to(g.dtype), h
    if bias is not None:
        M = torch.cat((M, bias.to(g.dtype).unsqueeze(1)), 1)
        factors = torch.cat((h, h.new_ones(h.shape[0], 1, h.shape[2])), 1)
    _add_product(planes, M.to(x.dtype), factors)
    return h, torch.cat((g, norm))


@define_layer(
    f"conv_update_forward(Tensor base_out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda base_out, x, A, B, bias, magnitude, norm, seed, scale, p, stride, padding, dilation: (
        torch.empty_like(_dense(base_out)), *_kept_fake(base_out, A, norm),
    ),
    pieces=_PIECES,
)  # fmt: skip
def conv_update_forward_copy_op(base_out, *args):
    """y, h and gains: what :func:`conv_update_forward_op` makes of a copy of base_out [N, d, ...]."""
    y = torch.empty_like(_dense(base_out)).copy_(base_out)
    return y, *conv_update_forward_op.reference(y, *args)


def _backward_fake(dy, x, weight, A, B, bias, magnitude, gains, h, y, seed, scale, p, stride, padding, dilation, needs):
    likes = (x, A, B, magnitude, bias, dy)
    shapes = [None if t is None else torch.empty_like(_dense(t)) if t is x or t is dy else t for t in likes]
    return tuple(
        dy.new_empty(0)
        if not needs >> bit & 1
        else torch.empty_like(like)
        if bit in (0, 5)
        else like.new_empty(like.shape)
        for bit, like in enumerate(shapes)
    )


@define_layer(
    "conv_update_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor A, Tensor B, Tensor? bias, Tensor? magnitude,"
    " Tensor? gains, Tensor? h, Tensor? y, Tensor? seed, float scale, float p, SymInt[] stride, SymInt[] padding,"
    " SymInt[] dilation, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    pieces=_PIECES,
)
def conv_update_backward_op(
    dy, x, weight, A, B, bias, magnitude, gains, h, y, seed, scale, p, stride, padding, dilation, needs
):
    """dx (the update's share), dA, dB, dm, db and dout, in the parameters' dtypes; empty [0] where ``needs`` says.

    dm is made of the output y, or without one of the convolution, computed again. dx and dout have x's and dy's memory
    format.
    """
    need_x, need_A, need_B, need_m, need_bias, need_out = (bool(needs >> bit & 1) for bit in range(6))
    dy4, acc = _dense(dy), accumulate_dtype(dy.dtype)
    planes = dy4.flatten(2)
    N = planes.shape[0]
    g, norm = (None, None) if magnitude is None else gains.chunk(2)
    M = scale * B.to(acc) if g is None else scale * g.unsqueeze(1) * B.to(acc)
    dx = dA = dB = dm = db = dout = dy
    if need_x or need_A:
        u = _batched(M.t().to(dy.dtype).expand(N, *M.t().shape), planes).reshape(N, A.shape[0], *dy.shape[2:])
        dropped = _dropped(x, seed, p) if need_A else x
        dx, dA = _conv_backward(u, dropped, A.to(dy.dtype), stride, padding, dilation, need_x, need_A)
        if need_x:
            dx, like = _dropped(dx, seed, p), torch.empty_like(_dense(x))
            dx = dx if dx.stride() == like.stride() else like.copy_(dx)
        if need_A:
            dA = dA.to(A.dtype).contiguous()
    if need_B:
        dB = scale * _batched(planes, h.transpose(1, 2)).sum(0, dtype=acc)
        dB = (dB if g is None else g.unsqueeze(1) * dB).to(B.dtype)
    if need_bias or (need_m and bias is not None and y is not None):
        db = planes.sum((0, 2), dtype=acc)
    if need_m:
        dm = _magnitude_gradient(planes, x, weight, B, bias, g, norm, h, y, db, scale, stride, padding, dilation)
        dm = dm.to(magnitude.dtype)
    if need_bias:
        db = db.to(bias.dtype)
    if need_out:
        dout = torch.empty_like(dy4)
        _scale(dout.flatten(2), planes, g)
    return fresh(dy, needs, dx, dA, dB, dm, db, dout)


def _magnitude_gradient(planes, x, weight, B, bias, g, norm, h, y, db, scale, stride, padding, dilation):
    """dm [d] = Σ dy * z / c, z = out + γ B h = (y - b) / g. Rows of z that y does not hold, and all of them where there
    is no y, are convolved again."""

    def convolved(kernels, B):
        z = _conv(x, kernels, stride, padding, dilation).flatten(2)
        _add_product(z, B.to(x.dtype), h, scale)
        return z

    if y is None:
        return _inner(planes, convolved(weight, B)) / norm
    product = _inner(planes, _dense(y).flatten(2))
    vanishing = g.abs() < VANISHING
    if bias is not None:
        product -= bias.to(product.dtype) * db
        vanishing |= g.abs() * norm < bias.to(g.dtype).abs() / 64
    dm = product / (g * norm)
    if planes.is_meta:
        return dm
    row = vanishing.nonzero().squeeze(1)
    if row.numel():
        dm[row] = _inner(planes[:, row], convolved(weight[row], B[row])) / norm[row]
    return dm


# --- autograd --------------------------------------------------------------------------------------------------------


class ConvUpdateFunction(Function):
    """In place on ``base_out`` or on a copy; saves x, h and, for a magnitude's gradient, its own output."""

    @staticmethod
    def forward(ctx, base_out, x, weight, A, B, bias, magnitude, norm, seed, inplace, recompute, *numbers):
        args = x, A, B, bias, magnitude, norm, seed, *numbers
        if inplace:
            y, (h, gains) = base_out, conv_update_forward_op(base_out, *args)
            ctx.mark_dirty(base_out)
        else:
            y, h, gains = conv_update_forward_copy_op(base_out, *args)
        _, need_x, _, need_A, need_B, _, need_m, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_x or need_A or need_m else None, weight if need_m else None, A, B, bias, magnitude,
            None if magnitude is None else gains, h if need_B or need_m else None,
            y if need_m and not recompute else None, seed,
        )  # fmt: skip
        ctx.numbers = numbers
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        *tensors, seed = _saved(ctx)
        out, x, _, A, B, bias, magnitude, *rest = ctx.needs_input_grad
        scaled = out and tensors[5] is not None
        needs = x | A << 1 | B << 2 | magnitude << 3 | bias << 4 | scaled << 5
        dx, dA, dB, dm, db, dout = conv_update_backward_op(dy, *tensors, seed, *ctx.numbers, needs)
        return (
            (dout if scaled else dy) if out else None, dx if x else None, None, dA if A else None, dB if B else None,
            db if bias else None, dm if magnitude else None, *[None] * len(rest),
        )  # fmt: skip


def _saved(ctx) -> tuple[torch.Tensor, ...]:
    """What forward saved. Where that is an output which somebody has overwritten, the error says how to save none."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "is at version" not in str(error) or ctx.needs_input_grad[6] is False:
            raise
        raise RuntimeError(
            "conv_update: got an output that was overwritten in place before its backward, which reads it, wanted it"
            " unchanged (accelerate(model, recompute=True) or recompute=True makes backward do without it)"
        ) from error


def update(base_out, x, A, B, scale, p, stride, padding, dilation, bias=None, magnitude=None, norm=None, weight=None,
           recompute=False):  # fmt: skip
    """:func:`conv_update` past its checks. On a GPU z is always computed again: to look for the rows that y does not
    hold would wait for it."""
    seed, recompute = draw_seed(x, p), recompute or x.is_cuda
    inplace = overwritable(base_out, channels_last(base_out))
    return apply(
        ConvUpdateFunction, x, base_out, x, weight, A, B, bias, magnitude, norm, seed, inplace, recompute, scale, p,
        list(stride), list(padding), list(dilation),
    )  # fmt: skip


# --- public functions ------------------------------------------------------------------------------------------------


def _each(name: str, value, n: int) -> list[int]:
    values = [value] * n if isinstance(value, int) else list(value)
    if len(values) != n or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name}: got {value!r}, wanted a number or {n} of them")
    return values


@calls(conv_update_forward_op, conv_update_forward_copy_op, conv_update_backward_op)
def conv_update(
    base_out, x, lora_A, lora_B, *, scale=1.0, stride=1, padding=0, dilation=1, dropout_p=0.0, training=False,
    magnitude=None, norm=None, weight=None, bias=None, recompute=False,
):  # fmt: skip
    """A convolution's low-rank update over its result: base_out becomes base_out + scale B (A ∗ drop(x)).

    Args:
        base_out: [N, d, ...], a fresh result of the frozen convolution, in rows or channels last; it is overwritten and
            returned (a view or a trained leaf is copied first). With a magnitude it has no bias in it.
        x: [N, C, ...] with one, two or three dimensions of places; cast to base_out's dtype.
        lora_A: [r, C, kernel...], a convolution that gives base_out's places; lora_B: [d, r], or [d, r, 1...]. May be
            float32 over a narrower x; gradients come back in their dtype.
        scale: γ. stride, padding, dilation: A's, numbers or one per dimension of places.
        dropout_p, training: inverted dropout on the adapter branch, not with a magnitude.
        magnitude: m [d] makes it DoRA: base_out becomes m / c * (base_out + scale B (A ∗ x)) + bias; then norm c [d] is
            column_norm of the flattened kernels, and weight [d, C, kernel...] the frozen kernels, for m's gradient.
        bias: [d] or None, only with a magnitude. recompute: keep no output for m's gradient, but convolve again.

    Saves x, h [N, r, places] and, with a magnitude, the output itself. Raises TypeError/ValueError that name the
    argument. METHODS 1.14; LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353.
    """
    for name, t in (("base_out", base_out), ("x", x), ("lora_A", lora_A), ("lora_B", lora_B)):
        checks.tensor(
            name, t, "[batch, channels, places...]" if name in ("base_out", "x") else "a convolution's kernel"
        )
    n = x.dim() - 2
    if n not in (1, 2, 3) or base_out.dim() != x.dim() or lora_A.dim() != x.dim():
        raise ValueError(
            f"x: got {checks.describe(x)} with base_out {checks.describe(base_out)} and lora_A"
            f" {checks.describe(lora_A)}, wanted all three with one to three dimensions of places"
        )
    checks.device(
        "x", x, base_out=base_out, lora_A=lora_A, lora_B=lora_B, magnitude=magnitude, norm=norm, weight=weight
    )
    x, d, r = x.to(base_out.dtype), base_out.shape[1], lora_A.shape[0]
    if lora_A.shape[1] != x.shape[1]:
        raise ValueError(f"lora_A: got {checks.describe(lora_A)}, wanted x's {x.shape[1]} channels")
    if lora_B.shape[:2] != (d, r) or lora_B.numel() != d * r:
        raise ValueError(f"lora_B: got {checks.describe(lora_B)}, wanted [{d}, {r}] (base_out's channels, the rank)")
    stride, padding, dilation = (
        _each(name, value, n) for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))
    )
    places = [
        (size + 2 * pad - step * (k - 1) - 1) // by + 1
        for size, pad, step, k, by in zip(x.shape[2:], padding, dilation, lora_A.shape[2:], stride, strict=True)
    ]
    if list(base_out.shape[2:]) != places or base_out.shape[0] != x.shape[0]:
        raise ValueError(
            f"base_out: got {checks.describe(base_out)}, wanted [{x.shape[0]}, {d}, {', '.join(map(str, places))}],"
            " as A's convolution gives it"
        )
    checks.number("scale", scale)
    checks.probability("dropout_p", dropout_p)
    checks.no_narrowing(x, lora_A=lora_A, lora_B=lora_B, magnitude=magnitude)
    p = float(dropout_p) if training else 0.0
    if magnitude is None:
        for name, value in (("norm", norm), ("bias", bias)):
            if value is not None:
                raise ValueError(f"{name}: got a tensor, wanted None without a magnitude")
    else:
        if p:
            raise ValueError(f"dropout_p: got {dropout_p}, wanted 0 with a magnitude")
        for name, value in (("magnitude", magnitude), ("norm", norm)):
            checks.vector(name, value, d, "out_channels")
        if bias is not None:
            checks.vector("bias", bias, d, "out_channels")
        checks.tensor("weight", weight, "[out_channels, in_channels, kernel...]", x.dim())
        checks.frozen(weight=weight)
        checks.same_dtype("base_out", base_out, weight=weight)
        if weight.shape != (d, *lora_A.shape[1:]):
            raise ValueError(f"weight: got {checks.describe(weight)}, wanted {[d, *lora_A.shape[1:]]}")
    return update(
        base_out, x, lora_A, lora_B.reshape(d, r), float(scale), p, stride, padding, dilation, bias, magnitude, norm,
        weight, recompute,
    )  # fmt: skip
