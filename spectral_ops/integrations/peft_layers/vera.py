"""PEFT's VeRA layers: the frozen factors are slices of one pair that all layers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners import vera as tuner
from torch import nn

from spectral_ops.functional import vera
from spectral_ops.integrations.peft_fused import Fused, base_result, enter, operands
from spectral_ops.integrations.peft_plan import Base, Facts, Unfit, active, base_of, check_input, drop_rate, read


class VeRA(NamedTuple):
    """One active adapter; A [r, k_max] and B [d_max, r] are everybody's."""

    A: torch.Tensor
    B: torch.Tensor
    lambda_d: torch.Tensor
    lambda_b: torch.Tensor
    p: float

    def operators(self, tier: str) -> list[str]:
        return [f"vera_{tier}"]


def shared(layer: nn.Module, key: str, name: str, facts: Facts) -> torch.Tensor:
    """A factor that layers share: a buffer of the BufferDict ``key``."""
    factor = facts.entry(facts.entry(layer._modules, key)._buffers, name)
    if factor is None or factor.is_meta:
        raise Unfit(f"{key} is {'missing' if factor is None else 'on the meta device (offloaded)'}")
    return factor


def vera_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[VeRA]]:
    """The tensors of a VeRA layer's call, or Unfit."""
    base = base_of(layer, facts, x)
    if base.split is not None:
        raise Unfit("VeRA over a tensor-parallel base layer")
    dropouts, ds, bs = (facts.entry(layer._modules, key) for key in ("vera_dropout", "vera_lambda_d", "vera_lambda_b"))
    k, d = facts.attribute(layer, "in_features"), facts.attribute(layer, "out_features")
    adapters = []
    for name in active(layer):
        if (dropout := facts.entry(dropouts._modules, name)) is None:
            continue
        A, B = (shared(layer, key, name, facts) for key in ("vera_A", "vera_B"))
        lambda_d, lambda_b = read(ds, name, "vera_lambda_d", facts), read(bs, name, "vera_lambda_b", facts)
        if A.shape[0] != len(lambda_d) or B.shape[1] != len(lambda_d) or len(lambda_b) != d:
            raise Unfit(f"vera_A {list(A.shape)} and vera_B {list(B.shape)} do not fit {len(lambda_d)} of lambda_d")
        if A.shape[1] < k or B.shape[0] < d:
            raise Unfit(f"vera_A {list(A.shape)} and vera_B {list(B.shape)} are smaller than the layer")
        adapters.append(VeRA(A, B, lambda_d, lambda_b, drop_rate(dropout, "vera_dropout", facts)))
    if x is not None:
        check_input(layer, x, base, [t for a in adapters for t in a[:4]], facts)
    return base, adapters


def run_vera(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[VeRA]) -> torch.Tensor:
    dtype = x.dtype  # PEFT's VeRA returns it, also under autocast
    out, weight, bias = None, base.weight, base.bias
    if weight is None:
        out = base_result(base, x)
    else:
        x, weight, bias = operands(x, weight, bias)
    for A, B, lambda_d, lambda_b, p in adapters:
        A, B = A[:, : x.shape[-1]], B[: len(lambda_b)]
        if out is None:
            out = vera.linear(x, weight, None, A, B, lambda_d, lambda_b, bias, p)
        else:
            out = vera.linear(x.to(out.dtype), None, out, A, B, lambda_d, lambda_b, None, p)
    return out if out.dtype is dtype else out.to(dtype)


class FusedVera(Fused):
    _plan, _run, _method = vera_plan, run_vera, "VeRA"
    cast_input_dtype_enabled = True  # PEFT's VeRA layers say nothing, which means so


class FusedVeraLinear(FusedVera, tuner.Linear):
    """``peft.tuners.vera.Linear`` through vera_linear."""


enter(FusedVeraLinear)
for kind in ("Linear8bitLt", "Linear4bit"):  # before 0.21 a class each, where bitsandbytes is installed
    if hasattr(tuner, kind):
        enter(type(f"FusedVera{kind}", (FusedVera, getattr(tuner, kind)), {"__module__": __name__}))
