"""PEFT's HiRA layers: the tensors of one call, and their operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners import hira
from torch import nn
from transformers.pytorch_utils import Conv1D

from spectral_ops.functional import hadamard
from spectral_ops.integrations.peft_fused import NARROW, Fused, enter, operands
from spectral_ops.integrations.peft_plan import Base, Facts, Unfit, active, base_of, check_input, drop_rate, read


class HiRA(NamedTuple):
    """One active HiRA adapter."""

    A: torch.Tensor
    B: torch.Tensor

    def operators(self, tier: str) -> list[str]:
        return ["hira_linear"]


def hira_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[HiRA]]:
    """The tensors of a HiRA layer's call, or Unfit."""
    base = base_of(layer, facts, x)
    As, Bs, dropouts = (facts.entry(layer._modules, key) for key in ("hira_A", "hira_B", "hira_dropout"))
    adapters = []
    for name in active(layer):
        if facts.entry(As._parameters, name) is None:
            continue
        A, B = read(As, name, "hira_A", facts), read(Bs, name, "hira_B", facts)
        if p := drop_rate(facts.entry(dropouts._modules, name), "hira_dropout", facts):
            raise Unfit(f"hira_dropout {p} in training: the base's x is not dropped, so it would take two products")
        adapters.append(HiRA(A, B))
    if adapters and base.weight is None:
        raise Unfit("HiRA multiplies the base weight itself, which the layer does not give")
    if facts.attribute(layer, "fan_in_fan_out") is not (type(base.layer) is Conv1D):
        raise Unfit("fan_in_fan_out does not say how the base weight lies")
    if x is not None:
        check_input(layer, x, base, [t for a in adapters for t in a], facts)
    return base, adapters


def run_hira(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[HiRA]) -> torch.Tensor:
    """Their updates add up before they meet the weight."""
    A, B = (
        adapters[0]
        if len(adapters) == 1
        else (torch.cat([a.A for a in adapters]), torch.cat([a.B for a in adapters], 1))
    )
    x, weight, bias = operands(x, base.weight, base.bias)
    return hadamard.linear(x, weight, None, A, B, None, None, bias, 1.0, True, layer._spectral_ops.exact)


class FusedHiraLinear(Fused, hira.Linear):
    """``peft.tuners.hira.Linear`` through hira_linear."""

    _plan, _run, _method = hira_plan, run_hira, "HiRA"

    @classmethod
    def _service(cls, base, adapters, exact):
        path, operators = super()._service(base, adapters, exact)
        return path, f"{operators}, exact" if exact and base.weight.dtype in NARROW else operators

    @classmethod
    def _remark(cls, base, adapters, exact):
        if exact or base.weight.dtype not in NARROW:
            return ""
        return f"the changed weight is rounded to {base.weight.dtype}; accelerate(model, exact=True) does not"


enter(FusedHiraLinear)
