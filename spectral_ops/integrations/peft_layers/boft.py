"""PEFT's BOFT layers: x goes through butterfly factors, meets the base layer, and each result is scaled."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import torch
from peft.tuners.boft.layer import Linear, MultiplicativeDropoutLayer
from torch import nn

from spectral_ops.functional import rotation
from spectral_ops.integrations.peft_fused import Fused, base_result, enter, operands
from spectral_ops.integrations.peft_plan import (
    Base,
    Facts,
    Unfit,
    active,
    base_of,
    busy,
    check_input,
    drop_rate,
    read,
)

CALLS_BASE = "x_rotated" in Linear.forward.__code__.co_varnames  # before, it multiplied the base weight itself
WIDEST = 256  # blocks of the factors' product: k times as many numbers, and T k times as many products


class Butterfly(NamedTuple):
    """One active adapter: factors [f, n, b, b] and scales [d, 1]."""

    R: torch.Tensor
    s: torch.Tensor

    def operators(self, tier: str) -> list[str]:
        return ["rotation_linear" if tier == "linear" else "rotate"]


def check_dropout(dropout: nn.Module, facts: Facts) -> None:
    """It puts nothing out in this call."""
    if type(dropout) is not MultiplicativeDropoutLayer:
        drop_rate(dropout, "boft_dropout", facts)
    elif facts.entry(dropout.__dict__, "training"):
        raise Unfit("boft_dropout is active, which puts the identity in some blocks' place")
    elif busy(facts.module(dropout), facts):
        raise Unfit("boft_dropout carries hooks of its own")


def boft_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[Butterfly]]:
    """The tensors of a BOFT layer's call, or Unfit."""
    base = base_of(layer, facts, x)
    if base.split is not None:
        raise Unfit("BOFT over a tensor-parallel base layer")
    if base.weight is None and not CALLS_BASE:
        raise Unfit("this PEFT's BOFT reads the base weight past the base layer")
    Rs, scales, dropouts = (facts.entry(layer._modules, key) for key in ("boft_R", "boft_s", "boft_dropout"))
    k, d = facts.attribute(layer, "in_features"), facts.attribute(layer, "out_features")
    factors = facts.entry(layer._buffers, "boft_P").shape[0]
    adapters = []
    for name in active(layer):
        if facts.entry(Rs._parameters, name) is None and name not in Rs:
            continue
        R, s = read(Rs, name, "boft_R", facts), read(scales, name, "boft_s", facts)
        check_dropout(facts.entry(dropouts._modules, name), facts)
        if R.dim() != 4 or R.shape[1] * R.shape[2] != k or R.shape[2] != R.shape[3] or s.shape != (d, 1):
            raise Unfit(f"boft_R {list(R.shape)} and boft_s {list(s.shape)} do not fit [{d}, {k}]")
        if len(R) != factors or (factors > 1 and len({tuple(p.shape) for p in Rs.values()}) > 1):
            raise Unfit("adapters of other factors or blocks: PEFT permutes all of a layer's as the last one added")
        if (b := rotation.block_size(R)) > WIDEST:
            raise Unfit(f"{factors} butterfly factors mix {b} features, more than {WIDEST}")
        adapters.append(Butterfly(R, s))
    if x is not None:
        check_input(layer, x, base, [t for a in adapters for t in a], facts)
    return base, adapters


def run_boft(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[Butterfly]) -> torch.Tensor:
    dtype = x.dtype  # PEFT's BOFT returns it, also under autocast
    weight, bias = base.weight, base.bias
    if weight is not None:
        x, weight, bias = operands(x, weight, bias)
    for R, _ in adapters[:0:-1]:  # the last rotates x first
        x = rotation.linear(x, None, R, None, None, 0)
    R, s = adapters[0].R, functools.reduce(operator.mul, [a.s for a in adapters]).squeeze(-1)
    if weight is not None:
        out = rotation.linear(x, weight, R, s, bias, 0)
    else:
        out = base_result(base, rotation.linear(x, None, R, None, None, 0))
        out = out * s if bias is None else (out - bias) * s + bias
    return out if out.dtype is dtype else out.to(dtype)


class FusedBOFTLinear(Fused, Linear):
    """``peft.tuners.boft.Linear`` through rotation_linear."""

    _plan, _run, _method = boft_plan, run_boft, "BOFT"


enter(FusedBOFTLinear)
