"""PEFT's HRA layers: x is reflected r times, then meets the base weight; the base layer itself is never called."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners.hra.layer import HRALinear
from torch import nn

from spectral_ops.functional import householder
from spectral_ops.integrations.peft_fused import Fused, enter, operands
from spectral_ops.integrations.peft_plan import (
    Base,
    Facts,
    Unfit,
    active,
    base_of,
    check_input,
    quantised,
    read,
    weight_of,
)


class Reflections(NamedTuple):
    """One active adapter: a reflection's vector per column of u [k, r]; orthogonal: Gram-Schmidt comes first."""

    u: torch.Tensor
    orthogonal: bool

    def operators(self, tier: str) -> list[str]:
        return ["householder_linear"]


def gram_schmidt(u: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns, one after the other in the order of PEFT's own: where columns repeat, as its start has them,
    what is left of them is rounding, which another order would round otherwise."""
    found: list[torch.Tensor] = []
    for i in range(u.shape[1]):
        v = u[:, i : i + 1]
        for q in found:
            v = v - (q.t() @ v) * q
        found.append(v / v.norm())
    return torch.cat(found, 1)


def hra_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[Reflections]]:
    """The tensors of an HRA layer's call, or Unfit."""
    base = base_of(layer, facts, x)
    us, k = facts.entry(layer._modules, "hra_u"), facts.attribute(layer, "in_features")
    orthogonal = facts.attribute(layer, "hra_apply_GS")
    adapters = []
    for name in active(layer):
        if facts.entry(us._parameters, name) is None and name not in us:
            continue
        u = read(us, name, "hra_u", facts)
        if u.dim() != 2 or u.shape[0] != k:
            raise Unfit(f"hra_u {list(u.shape)} does not fit {k} features")
        adapters.append(Reflections(u, bool(facts.entry(orthogonal, name))))
    if len(adapters) > 1 and any(a.orthogonal for a in adapters):
        raise Unfit("several active HRA adapters, one of them with apply_GS")
    if base.weight is None and adapters:
        if base.split is not None or quantised(base.layer):
            raise Unfit("HRA reads the base weight itself, which the base layer holds quantised or in parts")
        base = base._replace(weight=weight_of(base.layer, facts), bias=facts.parameter(base.layer, "bias"))
    if x is not None:
        check_input(layer, x, base, [a.u for a in adapters], facts)
    return base, adapters


def run_hra(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[Reflections]) -> torch.Tensor:
    dtype = x.dtype  # PEFT's HRA returns it, also under autocast
    x, weight, bias = operands(x, base.weight, base.bias)
    if adapters[0].orthogonal:
        out = householder.linear(x, weight, gram_schmidt(adapters[0].u), bias, True)
    else:
        u = adapters[0].u if len(adapters) == 1 else torch.cat([a.u for a in adapters], 1)
        out = householder.linear(x, weight, u, bias, False)
    return out if out.dtype is dtype else out.to(dtype)


class FusedHRALinear(Fused, HRALinear):
    """``peft.tuners.hra.HRALinear`` through householder_linear."""

    _plan, _run, _method = hra_plan, run_hra, "HRA"


enter(FusedHRALinear)
