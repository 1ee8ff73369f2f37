"""PEFT's LoHa and LoKr layers: the factors of one call, and their operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners import loha, lokr
from torch import nn

from spectral_ops.functional import hadamard, kron
from spectral_ops.integrations.peft_fused import Fused, base_result, enter, operands
from spectral_ops.integrations.peft_plan import (
    Base,
    Facts,
    Unfit,
    active,
    base_of,
    check_input,
    read,
    scaling,
)


class LoHa(NamedTuple):
    """One active LoHa adapter: scale (w1_a w1_b) * (w2_a w2_b)."""

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    scale: float

    def operators(self, tier: str) -> list[str]:
        return [f"loha_{tier}"]


class LoKr(NamedTuple):
    """One active LoKr adapter: scale w1 ⊗ w2; a side is one tensor or the product of two."""

    w1: torch.Tensor
    w1_b: torch.Tensor | None
    w2: torch.Tensor
    w2_b: torch.Tensor | None
    scale: float

    def operators(self, tier: str) -> list[str]:
        return [f"kron_{tier}"]


def settings(layer: nn.Module, name: str, facts: Facts) -> float:
    """The scaling; Unfit where something is dropped in this call."""
    training = facts.attribute(layer, "training")
    for kind in ("rank_dropout", "module_dropout"):
        p = facts.entry(facts.attribute(layer, kind), name)
        if training and p:
            raise Unfit(f"{kind} {p} in training")
    scale = scaling(facts.entry(facts.attribute(layer, "scaling"), name))
    if isinstance(scale, torch.Tensor):
        raise Unfit("the scaling is a tensor")
    return scale


def base_for(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> Base:
    base = base_of(layer, facts, x)
    if base.split is not None:
        raise Unfit("a tensor-parallel base layer")
    return base


def loha_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[LoHa]]:
    """The tensors of a LoHa layer's call, or Unfit."""
    base, adapters = base_for(layer, x, facts), []
    keys = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
    held = [facts.entry(layer._modules, key) for key in keys]
    for name in active(layer):
        if facts.entry(held[0]._parameters, name) is None:
            continue
        factors = [read(holder, name, key, facts) for holder, key in zip(held, keys, strict=True)]
        adapters.append(LoHa(*factors, settings(layer, name, facts)))
    if x is not None:
        check_input(layer, x, base, [t for a in adapters for t in a[:4]], facts)
    return base, adapters


def lokr_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[LoKr]]:
    """The tensors of a LoKr layer's call, or Unfit."""
    base, adapters = base_for(layer, x, facts), []
    keys = "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"
    held = {key: facts.entry(layer._modules, key) for key in keys}

    def tensor(key: str, name: str) -> torch.Tensor | None:
        if facts.entry(held[key]._parameters, name) is None:
            return None
        return read(held[key], name, key, facts)

    for name in active(layer):
        if name not in layer._available_adapters:
            for key in ("lokr_w1", "lokr_w1_a"):  # by which another call would find it
                facts.entry(held[key]._parameters, name)
            continue
        sides = []
        for side in ("lokr_w1", "lokr_w2"):
            whole, a, b = (tensor(side + end, name) for end in ("", "_a", "_b"))
            sides += [whole, None] if whole is not None else [a, b]
        adapters.append(LoKr(*sides, settings(layer, name, facts)))
    if x is not None:
        parameters = [t for a in adapters for t in a[:4] if t is not None]
        check_input(layer, x, base, parameters, facts)
    return base, adapters


def run_loha(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[LoHa]) -> torch.Tensor:
    return run(x, base, adapters, loha_call)


def run_lokr(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[LoKr]) -> torch.Tensor:
    return run(x, base, adapters, lokr_call)


def loha_call(x, weight, out, adapter: LoHa, bias) -> torch.Tensor:
    w1_a, w1_b, w2_a, w2_b, scale = adapter
    tiles = hadamard.tiles_cost_less(x.numel() // x.shape[-1], len(w1_a), x.shape[-1], len(w1_b))
    return hadamard.linear(x, weight, out, w1_b, w1_a, w2_b, w2_a, bias, scale, tiles)


def lokr_call(x, weight, out, adapter: LoKr, bias) -> torch.Tensor:
    return kron.linear(x, weight, out, *adapter[:4], bias, adapter.scale)


def run(x: torch.Tensor, base: Base, adapters: list, call) -> torch.Tensor:
    """The first adapter with the base's product where its weight is read, each other one over the result."""
    dtype, rest, out = x.dtype, adapters, None  # PEFT returns x's dtype, also under autocast
    if base.weight is None:
        out = base_result(base, x)
    else:
        x, weight, bias = operands(x, base.weight, base.bias)
        out, rest = call(x, weight, None, adapters[0], bias), adapters[1:]
    for a in rest:
        out = call(x.to(out.dtype), None, out, a, None)
    return out if out.dtype is dtype else out.to(dtype)


class FusedLohaLinear(Fused, loha.Linear):
    """``peft.tuners.loha.Linear`` through loha_linear."""

    _plan, _run, _method = loha_plan, run_loha, "LoHa"
    cast_input_dtype_enabled = True  # PEFT's layers say nothing, which means so


class FusedLokrLinear(Fused, lokr.Linear):
    """``peft.tuners.lokr.Linear`` through kron_linear."""

    _plan, _run, _method = lokr_plan, run_lokr, "LoKr"
    cast_input_dtype_enabled = True


enter(FusedLohaLinear, FusedLokrLinear)
