"""PEFT's RandLoRA layers: their random bases are slices of one pair that all layers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners import randlora as tuner
from torch import nn

from spectral_ops.functional import randlora
from spectral_ops.integrations.peft_fused import Fused, base_result, enter, operands
from spectral_ops.integrations.peft_layers.vera import shared
from spectral_ops.integrations.peft_plan import (
    Base,
    Facts,
    Unfit,
    active,
    base_of,
    check_input,
    drop_rate,
    read,
    scaling,
)


class RandLoRA(NamedTuple):
    """One active adapter; A [r, 1, m_max] and B [M_max, n_max, r] are everybody's, in PEFT in bfloat16."""

    A: torch.Tensor
    B: torch.Tensor
    lambda_: torch.Tensor
    gamma: torch.Tensor
    scale: float
    p: float

    def operators(self, tier: str) -> list[str]:
        return [f"randlora_{tier}"]

    def bases(self, d: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, m] and B [M, n r], in the layer's sizes, m = min(d, k) and M = max(d, k)."""
        n = self.lambda_.shape[1]
        return self.A[:, 0, : min(d, k)], self.B[: max(d, k), :n].flatten(1)


def randlora_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[RandLoRA]]:
    """The tensors of a RandLoRA layer's call, or Unfit."""
    base = base_of(layer, facts, x)
    if base.split is not None:
        raise Unfit("RandLoRA over a tensor-parallel base layer")
    dropouts, lambdas, gammas = (
        facts.entry(layer._modules, key) for key in ("randlora_dropout", "randlora_lambda", "randlora_gamma")
    )
    k, d, n = (facts.attribute(layer, key) for key in ("in_features", "out_features", "num_bases"))
    adapters = []
    for name in active(layer):
        if (dropout := facts.entry(dropouts._modules, name)) is None:
            continue
        A, B = (shared(layer, key, name, facts) for key in ("randlora_A", "randlora_B"))
        lambda_, gamma = read(lambdas, name, "randlora_lambda", facts), read(gammas, name, "randlora_gamma", facts)
        r = A.shape[0]
        if lambda_.shape != (r, n) or gamma.shape != (n, min(d, k)) or B.shape[2] != r:
            raise Unfit(f"randlora_lambda {list(lambda_.shape)} does not fit {n} bases of rank {r}")
        if A.shape[2] < min(d, k) or B.shape[0] < max(d, k) or B.shape[1] < n:
            raise Unfit(f"randlora_A {list(A.shape)} and randlora_B {list(B.shape)} are smaller than the layer")
        scale = scaling(facts.entry(facts.attribute(layer, "scaling"), name))
        if isinstance(scale, torch.Tensor):
            raise Unfit("the scaling is a tensor, not a number")
        p = drop_rate(dropout, "randlora_dropout", facts)
        adapters.append(RandLoRA(A, B, lambda_, gamma, float(scale), p))
    if x is not None:
        check_input(layer, x, base, [t for a in adapters for t in a[:4]], facts)
    return base, adapters


def run_randlora(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[RandLoRA]) -> torch.Tensor:
    dtype = x.dtype  # PEFT's RandLoRA returns it, also under autocast
    out, weight, bias = None, base.weight, base.bias
    if weight is None:
        out = base_result(base, x)
    else:
        x, weight, bias = operands(x, weight, bias)
    d = layer.out_features
    for adapter in adapters:
        bases = *adapter.bases(d, x.shape[-1]), adapter.lambda_, adapter.gamma
        if out is None and adapter.p == 0.0:
            out = randlora.linear(x, weight, None, *bases, bias, adapter.scale)
            continue
        out = F.linear(x, weight, bias) if out is None else out
        dropped = F.dropout(x, adapter.p).to(out.dtype)
        out = randlora.linear(dropped, None, out, *bases, None, adapter.scale)
    return out if out.dtype is dtype else out.to(dtype)


class FusedRandLora(Fused):
    _plan, _run, _method = randlora_plan, run_randlora, "RandLoRA"


class FusedRandLoraLinear(FusedRandLora, tuner.Linear):
    """``peft.tuners.randlora.Linear`` through randlora_linear."""


enter(FusedRandLoraLinear)
for kind in ("Linear8bitLt", "Linear4bit"):  # where bitsandbytes is installed
    if hasattr(tuner, kind):
        enter(type(f"FusedRandLora{kind}", (FusedRandLora, getattr(tuner, kind)), {"__module__": __name__}))
