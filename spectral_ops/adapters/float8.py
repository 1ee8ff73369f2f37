"""Base layers whose weight is in FP8: reading it, its product with the whole gradient, writing another weight.

Of transformers (FP8Linear, CompressedTensorsFP8Linear), torchao (Float8Tensor) and compressed-tensors, and any other
that holds a float8 weight with its scales under one of their names. A layer's own FP8 kernel makes the product where
there is one. The gradient is ours, from a tile of the dequantised weight at a time (functional/float8.py): those
kernels have none, or make the whole weight for it. A format that is not known is an error, and so is a layer whose
output has no gradient: its adapters would train on what is left of it.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype
from spectral_ops.core import checks
from spectral_ops.core.autograd import autocast_arguments
from spectral_ops.functional import float8
from spectral_ops.functional.float8 import FLOAT8, Blocks

SCALES = "weight_scale_inv", "weight_scale"  # transformers' FP8Linear; compressed-tensors
UNREAD = "weight_zero_point", "weight_global_scale", "weight_g_idx"  # of compressed-tensors, and what may be beside it


def instance(value: Any, module: str, *names: str) -> bool:
    """Whether an object's class is one of ``names`` of a module that need not be installed."""
    loaded = sys.modules.get(module)
    types = tuple(getattr(loaded, name) for name in names if hasattr(loaded, name)) if loaded else ()
    return isinstance(value, types)


def of_torchao(weight: torch.Tensor) -> bool:
    """Whether a weight is torchao's Float8Tensor."""
    return instance(weight, "torchao.quantization", "Float8Tensor")


def rounds_input(weight: torch.Tensor) -> bool:
    """Whether a weight is torchao's int8 one that rounds x to int8 too: its product has no gradient for x either."""
    return (
        instance(weight, "torchao.quantization", "Int8Tensor")
        and weight.act_quant_kwargs is not None
        and getattr(weight, "act_pre_scale", None) is None
    )


def holds(weight: torch.Tensor) -> bool:
    """Whether a weight is in FP8, in a known format or not."""
    if type(weight) in (nn.Parameter, torch.Tensor):
        return weight.dtype in FLOAT8
    return weight.dtype in FLOAT8 or of_torchao(weight)


# --- reading ---------------------------------------------------------------------------------------------------------


def read(base: nn.Module) -> Blocks:
    """The weight [out_features, in_features] of a layer and its scales; ValueError where its format is not known."""
    weight = base.weight
    if rounds_input(weight):
        return Blocks(weight.qdata, weight.scale, *weight.block_size)
    if of_torchao(weight):
        return _read(base, weight.qdata, weight.scale, weight.block_size)
    if hasattr(base, "n_groups"):
        raise ValueError(f"base_layer: got {type(base).__name__}, wanted a layer whose outputs see all of its inputs")
    if getattr(base, "weight_scale_inv", None) is not None:
        return _read(base, weight, base.weight_scale_inv, getattr(base, "block_size", None))
    scale = getattr(base, "weight_scale", None)
    if scale is None:
        raise ValueError(f"base_layer: got {_named(base)} and no scale, wanted one of its own in {', '.join(SCALES)}")
    for name in UNREAD:
        if getattr(base, name, None) is not None:
            raise ValueError(f"base_layer: got {_named(base)} and a {name}, wanted its weight_scale alone")
    if instance(base, "transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear"):
        return _read(base, weight, scale.t())  # [1, out_features] there
    return _read(base, weight, scale, _block_size(base))


def _block_size(base: nn.Module) -> tuple[int, int] | None:
    """The blocks that compressed-tensors' scheme of a layer says; None for one scale, or one per row."""
    weights = getattr(getattr(base, "quantization_scheme", None), "weights", None)
    if getattr(weights, "block_structure", None):
        return tuple(weights.block_structure)
    group = getattr(weights, "group_size", None)
    return (1, group) if group and group > 0 else None


def _read(base: nn.Module, weight: torch.Tensor, scale: torch.Tensor, block_size=None) -> Blocks:
    if scale.dtype == torch.uint8:  # exponents, as compressed-tensors stores those of MXFP8
        scale = scale.view(torch.float8_e8m0fnu)
    if block_size is not None and scale.numel() == 1 and weight.numel():
        block_size = None  # torchao's blocks are as large as the weight then, FP8Linear's perhaps larger
    try:
        return float8.blocks(weight, scale, block_size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"base_layer: got {_named(base)} whose scales do not fit it\n{error}") from error


def _named(base: nn.Module) -> str:
    weight = getattr(base, "weight", None)
    return type(base).__name__ + ("" if weight is None else f" with a weight {checks.describe(weight)}")


def dequantised(base: nn.Module) -> torch.Tensor:
    """The weight [out_features, in_features] in float32: a new tensor."""
    return float8.dequantised(*read(base), torch.float32)


def column_norm(base: nn.Module, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """‖W + scale B A‖ of each row [out_features] in float32, without a graph; a tile of W in memory at a time."""
    weight, scales, *block = read(base)
    with torch.no_grad():
        return float8.float8_column_norm_op(weight, scales, A.detach(), B.detach(), scale, *block)


# --- the product -----------------------------------------------------------------------------------------------------


def has_kernel(base: nn.Module, x: torch.Tensor) -> bool:
    """Whether the layer's forward multiplies in FP8 by itself here, rather than by a dequantised weight or not at all:
    the kernels of FP8Linear are for accelerators, and compressed-tensors' layers are nn.Linear with another forward."""
    if of_torchao(base.weight) or rounds_input(base.weight):
        return base.weight.act_quant_kwargs is not None
    if instance(base, "transformers.integrations.finegrained_fp8", "FP8Linear"):
        return x.device.type != "cpu"
    return type(base).forward is not nn.Linear.forward


def _foreign(base: nn.Module) -> bool:
    """Whether a layer with a forward of its own is of a library that is not known here."""
    return not (
        of_torchao(base.weight)
        or rounds_input(base.weight)
        or instance(base, "transformers.integrations.finegrained_fp8", "FP8Linear")
        or instance(base, "transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear")
    )


def _bare(base: nn.Module) -> bool:
    """Whether calling the layer does no more than its forward."""
    return not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)


def product(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the layer returns for x [..., in_features], with the gradient of all of it: a fresh tensor.

    Its own FP8 kernel makes it where there is one, else x Wᵀ, W dequantised a tile at a time. Where hooks or another
    forward may do more than that, the layer is called, and must be differentiable by itself.
    """
    form = read(base)
    checks.frozen(weight=form.weight, scale=form.scale)
    replaced = "forward" in base.__dict__ and not hasattr(base, "quantization_scheme")
    if replaced or not _bare(base):
        return whole(base, x)
    if has_kernel(base, x):
        # a foreign forward may do more than multiply, and have the gradient of that
        if _foreign(base) and x.requires_grad and torch.is_grad_enabled():
            y, found = _called(base, x)
            if found:
                return y
            y = y.detach()
        else:
            with torch.no_grad():
                y = base(x)
        return float8.differentiable(y, x, form.weight, form.scale, base.bias, *form[2:])
    if of_torchao(base.weight):  # its product is torch's, which autocast casts for
        (x,) = autocast_arguments(x)
    if not isinstance(x, torch.Tensor) or x.dim() < 1 or x.shape[-1] != form.weight.shape[1]:
        checks.tensor("x", x, "[..., in_features]")
        raise ValueError(f"x: got {checks.describe(x)}, wanted [..., {form.weight.shape[1]}] (in_features)")
    return float8.linear(x, form.weight, form.scale, base.bias, *form[2:])


def dropped_product(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x Wᵀ of the dequantised weight, without bias, whatever kernel the layer has."""
    weight, scale, *block = read(base)
    return float8.linear(x, weight, scale, None, *block)


def whole(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What any layer returns for x; ValueError where x takes a gradient and the layer has none to give it: at once
    where its output has no path to x, in backward where a node on that path leaves x out."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return base(x)
    if _known(base):
        return base(x)
    out, found = _called(base, x)
    if not found:
        raise _blind(base)
    return out


def _called(base: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """What a layer returns for x, and whether that has a path to x."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        out = base(x)
        found = not isinstance(out, torch.Tensor) or out.requires_grad
    else:
        reached = _Reached.apply(x, base)
        out = base(reached)
        found = not isinstance(out, torch.Tensor) or _leads(out.grad_fn, reached.grad_fn)
    return out, found


def _known(base: nn.Module) -> bool:
    """Whether a layer is torch's own over a plain weight, or bitsandbytes', which are differentiable."""
    if "forward" in base.__dict__ or not _bare(base):
        return False
    module = type(base).__module__
    plain = type(getattr(base, "weight", None)) in (nn.Parameter, torch.Tensor)
    return module.startswith("bitsandbytes.") or (module.startswith("torch.nn.") and plain)


def _leads(node: Any, target: Any) -> bool:
    """Whether the graph below a node meets ``target``. Nothing of x's own graph is walked: ``target`` stands before."""
    seen, ahead = set(), [node]
    while ahead:
        node = ahead.pop()
        if node is target:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [further for further, _ in node.next_functions]
    return False


class _Reached(Function):
    """x itself on its way into a layer, whose backward must return a gradient for it."""

    @staticmethod
    def forward(ctx, x, base):
        ctx.set_materialize_grads(False)
        ctx.base = base
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        if dx is None:
            raise _blind(ctx.base)
        return dx, None


def _blind(base: nn.Module) -> ValueError:
    return ValueError(
        "the base layer has no gradient for its input, which would get the adapter's share alone\n"
        f"base_layer: got {_named(base)}, wanted a layer that is differentiable in its input"
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def held(base: nn.Module) -> tuple[Any, ...]:
    """What :func:`write` replaces: the weight, and the name and value of its scales where they are apart."""
    name = next((name for name in SCALES if getattr(base, name, None) is not None), None)
    return (base.weight, None, None) if of_torchao(base.weight) else (base.weight, name, getattr(base, name))


def put_back(base: nn.Module, packed: tuple[Any, ...]) -> None:
    """Give the layer what :func:`held` took note of."""
    base.weight, name, scale = packed
    if name is not None:
        setattr(base, name, scale)


@torch.no_grad()
def write(base: nn.Module, weight: torch.Tensor) -> None:
    """Quantise ``weight`` [out_features, in_features] by the layer's own blocks, with new scales; the tensors are
    new."""
    old, form = base.weight, read(base)
    data, scale = quantise(weight.to(form.weight.device), form)
    if of_torchao(old):
        options = (old.block_size, old.mm_config, old.act_quant_kwargs, old.kernel_preference, old.dtype)
        new = type(old)(data, scale.reshape(old.scale.shape), *options)
        base.weight = nn.Parameter(new, requires_grad=False)
        return
    _, name, stored = held(base)
    base.weight = nn.Parameter(data, requires_grad=False)
    scale = scale.view(stored.dtype) if stored.dtype == torch.uint8 else scale
    setattr(base, name, nn.Parameter(scale.reshape(stored.shape), requires_grad=False))


def quantise(weight: torch.Tensor, form: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [d, k] in the dtypes and blocks of ``form``: its largest entry in a block becomes the largest number
    that float8 has. A scale is rounded to its dtype first (a power of two up), so what is lost is lost once."""
    (d, k), (p, q), (_, _, m, n) = weight.shape, form.scale.shape, form
    wide = weight.to(accumulate_dtype(weight.dtype))
    largest = torch.finfo(form.weight.dtype).max
    padded = F.pad(wide.abs(), (0, q * n - k, 0, p * m - d))
    scale = padded.unflatten(1, (q, n)).unflatten(0, (p, m)).amax((1, 3)) / largest
    # float16 has few bits, or none, for the scale of a block of small numbers; its least normal one serves them better
    scale = torch.where(scale > 0, scale.clamp_min(torch.finfo(form.scale.dtype).smallest_normal), 1)
    if form.scale.dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(scale.log2().ceil().clamp(-127, 127))
    scale = scale.to(form.scale.dtype)
    spread = scale.to(wide.dtype).repeat_interleave(m, 0)[:d].repeat_interleave(n, 1)[:, :k]
    return (wide / spread).clamp_(-largest, largest).to(form.weight.dtype), scale


def empty_blocks(d: int, k: int, block_size: tuple[int, int] | None, scale_dtype=torch.float32) -> Blocks:
    """Blocks without memory, for :func:`quantise`: of ``block_size``, or one scale for all."""
    grid = (1, 1) if block_size is None else (math.ceil(d / block_size[0]), math.ceil(k / block_size[1]))
    weight = torch.empty(d, k, dtype=FLOAT8[0], device="meta")
    return float8.blocks(weight, torch.empty(grid, dtype=scale_dtype, device="meta"), block_size)
