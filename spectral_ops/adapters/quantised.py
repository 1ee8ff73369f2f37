"""Quantised base layers: their weight in floating point, and another weight in their format.

bitsandbytes' 4-bit (nf4, fp4) and 8-bit layers, torchao's weight-only integer tensors, and FP8 (float8.py). Their
products stay theirs; what a method computes from W itself (DoRA's norm, a spectral start, a merge) reads the
dequantised weight, which lives no longer than that. A merge keeps what it replaces as it was packed, so that it comes
back bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from spectral_ops.adapters import float8
from spectral_ops.adapters.float8 import instance as _is
from spectral_ops.functional import column_norm as dense_column_norm

OPTIONS = ("blocksize", "compress_statistics", "quant_type", "quant_storage")  # of a 4-bit weight


def kind(base: nn.Module) -> str | None:
    """The format of a layer's weight: "float8", "bnb4", "bnb8" or "torchao"; None for any other."""
    weight = base.weight
    if float8.holds(weight):
        return "float8"
    if type(weight) in (nn.Parameter, torch.Tensor):
        return None
    if _is(weight, "bitsandbytes.nn", "Params4bit") and weight.quant_state is not None:
        return "bnb4"
    if _is(weight, "bitsandbytes.nn", "Int8Params") and weight.dtype == torch.int8:
        return "bnb8"
    if _is(weight, "torchao.utils", "TorchAOBaseTensor"):
        return "torchao"
    return None


def scales(base: nn.Module) -> torch.Tensor:
    """The scale [out] of an 8-bit weight: with the parameter until the layer first runs, with its state since."""
    return base.state.SCB if base.state.SCB is not None else base.weight.SCB


@torch.no_grad()
def dequantised(base: nn.Module) -> torch.Tensor:
    """The weight [out_features, in_features] of a quantised layer in float32: a new tensor."""
    weight, form = base.weight, kind(base)
    if form == "float8":
        return float8.dequantised(base)
    if form == "torchao":
        return weight.dequantize().float()
    import bitsandbytes.functional as bnb

    if form == "bnb4":
        return bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.data * (scales(base).float().to(weight.device) / 127).unsqueeze(1)


def column_norm(base: nn.Module, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """‖W + scale B A‖ of each row [out_features] of a quantised layer, in float32."""
    if kind(base) == "float8":
        return float8.column_norm(base, A, B, scale)
    return dense_column_norm(dequantised(base), A, B, scale)


def product(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer, quantised or not, returns for x [..., in_features]; ValueError where x would get no gradient."""
    weight = getattr(base, "weight", None)  # GPTQ's layers have none
    if isinstance(weight, torch.Tensor) and (float8.holds(weight) or float8.rounds_input(weight)):
        return float8.product(base, x)
    return float8.whole(base, x)


def held(base: nn.Module) -> tuple[Any, ...]:
    """What :func:`write` replaces, to be given to :func:`put_back`."""
    if kind(base) == "float8":
        return float8.held(base)
    return base.weight, getattr(base, "state", None)


def put_back(base: nn.Module, packed: tuple[Any, ...]) -> None:
    """Give the layer the weight again that :func:`held` took note of."""
    if kind(base) == "float8":
        return float8.put_back(base, packed)
    base.weight, state = packed
    if state is not None:
        base.state = state


@torch.no_grad()
def write(base: nn.Module, weight: torch.Tensor) -> None:
    """Quantise ``weight`` [out_features, in_features] in the layer's own format; the packed tensors are new."""
    old, form, device = base.weight, kind(base), base.weight.device
    if form == "float8":
        float8.write(base, weight)
    elif form == "torchao":
        base.weight = nn.Parameter(_like_torchao(old, weight), requires_grad=False)
    elif form == "bnb4":
        plain = weight.to("cpu", old.quant_state.dtype).contiguous()
        options = {name: getattr(old, name) for name in OPTIONS}
        base.weight = type(old)(plain, requires_grad=False, **options).to(device)
    else:
        plain = weight.to("cpu", torch.float16).contiguous()
        base.state = copy.copy(base.state)  # else the next forward would find the old weight's scales there
        base.state.CB = base.state.SCB = None
        base.weight = type(old)(plain, requires_grad=False, has_fp16_weights=False).to(device)


def _like_torchao(old: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` as a torchao tensor of the kind of ``old``."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if type(old).__name__ != "Int8Tensor":
        raise ValueError(f"base_layer: got a weight {type(old).__name__}, wanted torchao's Int8Tensor to write to")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=old.dtype)
    linear.weight.copy_(weight)
    quantize_(linear, Int8WeightOnlyConfig(granularity=_granularity(old)))
    return linear.weight.detach()


def _granularity(old: torch.Tensor) -> Any:
    from torchao.quantization import PerRow, PerTensor

    return PerTensor() if old.scale.numel() == 1 else PerRow()


FORMATS = ("nf4", "fp4", "int8")


@torch.no_grad()
def quantise(linear: nn.Linear, format: str, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """A bitsandbytes layer with the weight and bias of ``linear``, on its device, frozen."""
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}, wanted one of {', '.join(map(repr, FORMATS))}")
    import bitsandbytes as bnb

    d, k = linear.weight.shape
    has_bias, device = linear.bias is not None, linear.weight.device
    if format == "int8":
        layer = bnb.nn.Linear8bitLt(k, d, has_bias, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(k, d, has_bias, compute_dtype=compute_dtype or linear.weight.dtype, quant_type=format)
    layer.load_state_dict({name: value.cpu() for name, value in linear.state_dict().items()})
    if has_bias:
        layer.bias.data = linear.bias.data.clone()
    layer.requires_grad_(False)
    layer.train(linear.training)
    return layer.to(device)
