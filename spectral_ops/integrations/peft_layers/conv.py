"""PEFT's LoRA and DoRA over Conv1d, Conv2d and Conv3d: added to the frozen convolution's result in place.

A 1×1 convolution whose input lies channels last is a linear layer over its pixels, so the linear operators serve it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora import variants
from torch import nn

from spectral_ops.functional import column_norm, conv, dora, lowrank
from spectral_ops.integrations.peft_fused import Fused, enter, operands
from spectral_ops.integrations.peft_plan import (
    Base,
    Facts,
    Unfit,
    active,
    busy,
    check_input,
    drop_rate,
    leaf,
    scaling,
    variant_name,
    weight_of,
)

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DORA = tuple(  # this PEFT's variant and the layer of its magnitude
    (getattr(variants, f"DoraConv{n}dVariant"), getattr(peft_dora, f"DoraConv{n}dLayer"))
    for n in (1, 2, 3)
    if hasattr(variants, f"DoraConv{n}dVariant")
)


class ConvLowRank(NamedTuple):
    """One active LoRA or DoRA adapter; A [r, C, kernel...] is a convolution with numbers of its own."""

    name: str
    A: torch.Tensor
    B: torch.Tensor
    scale: float | torch.Tensor
    p: float
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None
    groups: int
    numbers: tuple[list[int], list[int], list[int]]  # stride, padding, dilation

    def operators(self, tier: str) -> list[str]:
        return ["conv_update"] if self.magnitude is None else ["column_norm", "conv_update"]

    def matrix(self) -> tuple[torch.Tensor, float]:
        """B as [d, r], with zeros between groups, and the scale as a number."""
        B = self.B.flatten(1)
        if self.groups > 1:
            blocks = B.view(self.groups, -1, 1, B.shape[1])
            own = torch.eye(self.groups, dtype=B.dtype, device=B.device).view(self.groups, 1, self.groups, 1)
            B = (blocks * own).reshape(B.shape[0], -1)
        return (B * self.scale, 1.0) if isinstance(self.scale, torch.Tensor) else (B, self.scale)

    def pointwise(self) -> bool:
        """Whether the convolution multiplies each place by itself."""
        return self.groups == 1 and self.A.numel() == self.A.shape[0] * self.A.shape[1] and not any(self.numbers[1])


def numbers_of(module: nn.Module, facts: Facts) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation of lora_A, as numbers."""
    state = module.__dict__
    stride, padding, dilation, kernel = (
        facts.entry(state, key) for key in ("stride", "padding", "dilation", "kernel_size")
    )
    if facts.entry(state, "groups") != 1 or facts.entry(state, "padding_mode") != "zeros":
        raise Unfit("lora_A has groups or a padding mode of its own")
    if isinstance(padding, str):
        total = (
            [0] * len(kernel) if padding == "valid" else [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        )
        if any(t % 2 for t in total):
            raise Unfit("padding='same' pads one side more than the other")
        padding = [t // 2 for t in total]
    return list(stride), list(padding), list(dilation)


def conv_base(layer: nn.Module, facts: Facts) -> tuple[Base, int]:
    """The frozen convolution, whose class's forward is called with its weight; and its groups."""
    base = facts.entry(layer._modules, "base_layer")
    if type(base) not in KINDS:
        raise Unfit(f"the base layer is a {type(base).__name__}")
    if "parametrizations" in base._modules:
        raise Unfit("the base layer is parametrized")
    if busy(base, facts):
        raise Unfit("the base layer carries hooks of its own")
    facts.module(base)
    weight = weight_of(base, facts)
    facts.frozen = weight
    for key in ("stride", "padding", "dilation", "padding_mode"):
        facts.entry(base.__dict__, key)
    return Base(base, weight, facts.parameter(base, "bias")), facts.entry(base.__dict__, "groups")


def conv_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[ConvLowRank]]:
    """The tensors of a call, or Unfit. Without x the input is not looked at."""
    facts.called = x is not None
    base, groups = conv_base(layer, facts)
    kind = type(base.layer)
    As, Bs, dropouts = (facts.entry(layer._modules, key)._modules for key in ("lora_A", "lora_B", "lora_dropout"))
    adapters, parameters = [], []
    for name in active(layer):
        if (module_A := facts.entry(As, name)) is None:
            continue
        module_B = facts.entry(Bs, name)
        A, B = leaf(module_A, kind, "lora_A", facts), leaf(module_B, kind, "lora_B", facts)
        if facts.entry(module_B.__dict__, "groups") != groups:
            raise Unfit("lora_B has other groups than the base layer")
        p = drop_rate(facts.entry(dropouts, name), "lora_dropout", facts)
        bias = facts.parameter(module_B, "bias")
        scale = scaling(facts.entry(facts.attribute(layer, "scaling"), name))
        variant, magnitude = facts.entry(facts.attribute(layer, "lora_variant"), name), None
        numbers = numbers_of(module_A, facts)
        if variant is not None:
            magnitude_kind = dict(DORA).get(type(variant))
            if magnitude_kind is None:
                raise Unfit(f"the LoRA variant {variant_name(variant)} is left to PEFT")
            vectors = facts.entry(layer._modules, "lora_magnitude_vector")._modules
            magnitude = leaf(facts.entry(vectors, name), magnitude_kind, "the magnitude", facts)
            check_dora(layer, base, A, bias, groups, p if facts.attribute(layer, "training") else 0.0, facts)
            p = 0.0
            parameters.append(magnitude)
        parameters += (A, B)
        adapters.append(ConvLowRank(name, A, B, scale, p, bias, magnitude, groups, numbers))
    if len(adapters) > 1 and any(a.magnitude is not None for a in adapters):
        raise Unfit("DoRA beside another adapter over one convolution")
    if x is not None:
        if x.dim() != base.weight.dim():
            raise Unfit("x has no batch dimension")
        check_input(layer, x, base, parameters, facts)
    return base, adapters


def check_dora(layer, base: Base, A: torch.Tensor, bias, groups: int, p: float, facts: Facts) -> None:
    if bias is not None:
        raise Unfit("DoRA with lora_bias over a convolution")
    if p > 0:
        raise Unfit("DoRA with dropout over a convolution, whose base PEFT then calls a second time")
    if layer.ephemeral_gpu_offload:
        raise Unfit("DoRA with ephemeral_gpu_offload")
    if groups > 1 or base.layer.padding_mode != "zeros" or A.shape[1:] != base.weight.shape[1:]:
        raise Unfit("DoRA over a convolution with groups or a padding mode")
    if isinstance(base.layer.padding, str) and any(d != 1 for d in base.layer.dilation):
        raise Unfit("DoRA over a dilated convolution, whose dilation lora_A does not have")


def flat(kernels: torch.Tensor, last: bool) -> torch.Tensor:
    """Kernels [n, C, ...] as [n, all of it], without a copy where ``last`` says how they lie."""
    return (kernels.movedim(1, -1) if last else kernels).flatten(1)


def norm_of(layer: nn.Module, base: Base, adapter: ConvLowRank, B: torch.Tensor, scale: float) -> torch.Tensor:
    """The norm of W + γ B A per output channel, kept within an optimizer step."""
    last = conv.channels_last(base.weight)
    weight, A = flat(base.weight, last), flat(adapter.A, last)
    if torch.compiler.is_compiling():
        return column_norm(weight, A, B, scale)
    return layer._spectral_ops.norm(adapter.name, weight.detach(), A.detach(), B.detach(), scale)


def run_conv(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[ConvLowRank]) -> torch.Tensor:
    """Each adapter in turn over what those before it have made."""
    first = adapters[0]
    if len(adapters) == 1 and first.bias is None and first.pointwise() and conv.channels_last(x):
        return run_pixels(layer, x, base, first)
    total = base.bias
    for a in adapters:
        if a.bias is not None:
            total = a.scale * a.bias if total is None else total + a.scale * a.bias
    if total is not None and total is not base.bias:
        total = total.to(base.weight.dtype)
    normed = first.magnitude is not None
    out = base.layer._conv_forward(x, base.weight, None if normed else total)
    x = x.to(out.dtype)
    for a in adapters:
        B, scale = a.matrix()
        args = (out, x, a.A, B, scale, a.p, *a.numbers)
        if normed:
            norm, recompute = norm_of(layer, base, a, B, scale), layer._spectral_ops.recompute
            weight = base.weight.to(out.dtype)
            out = conv.update(*args, base.bias, a.magnitude.reshape(-1), norm, weight, recompute)
        else:
            out = conv.update(*args)
    return out


def run_pixels(layer: nn.Module, x: torch.Tensor, base: Base, adapter: ConvLowRank) -> torch.Tensor:
    """A 1×1 convolution over x channels last: a linear layer over views of x and of the kernels."""
    step = adapter.numbers[0]
    x = x.movedim(1, -1)[(slice(None), *(slice(None, None, s) for s in step))]
    B, scale = adapter.matrix()
    A, weight = adapter.A.flatten(1), base.weight.flatten(1)
    if adapter.magnitude is None:
        x, weight, bias = operands(x, weight, base.bias)
        y = lowrank.linear(x, weight, A, B, bias, None, None, scale, adapter.p)
    else:
        norm = norm_of(layer, base, adapter, B, scale)
        x, weight, bias = operands(x, weight, base.bias)
        magnitude, recompute = adapter.magnitude.reshape(-1), layer._spectral_ops.recompute
        y = dora.linear(x, weight, A, B, magnitude, bias, norm, scale, adapter.p, recompute)
    return y.movedim(-1, 1)


class FusedConv(Fused):
    _plan, _run = conv_plan, run_conv


class FusedConv2d(FusedConv, lora.Conv2d):
    """``peft.tuners.lora.Conv2d`` through conv_update, or the linear operators over a 1×1 kernel."""


class FusedConv3d(FusedConv, lora.Conv3d):
    """``peft.tuners.lora.Conv3d`` through conv_update, or the linear operators over a 1×1 kernel."""


enter(FusedConv2d, FusedConv3d)

if hasattr(peft_layer, "Conv1d"):

    class FusedConv1d(FusedConv, peft_layer.Conv1d):
        """``peft.tuners.lora.layer.Conv1d`` through conv_update."""

    enter(FusedConv1d)
