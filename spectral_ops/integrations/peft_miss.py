"""PEFT's MiSS: what a call of one of its layers computes with, in its kinds Bone, mini and bat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spectral_ops.integrations.peft_plan import (
    Base,
    Facts,
    Unfit,
    active,
    base_of,
    check_input,
    check_split,
    drop_rate,
    quantised,
    read,
    weight_of,
)


class Bone(NamedTuple):
    """One active MiSS adapter."""

    D: torch.Tensor
    p: float

    def operators(self, tier: str) -> list[str]:
        return [f"bone_{tier}"]


class Bat(NamedTuple):
    """The one active bat adapter of a MiSS layer; PEFT applies no dropout to it."""

    B: torch.Tensor

    def operators(self, tier: str) -> list[str]:
        return ["bat_linear"]


def miss_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[Bone] | list[Bat]]:
    """The tensors of a MiSS layer's call, or Unfit."""
    base, kind = base_of(layer, facts, x), facts.attribute(layer, "miss_fn")
    dropouts = facts.entry(layer._modules, "miss_dropout")._modules
    names = [name for name in active(layer) if facts.entry(dropouts, name) is not None]
    blocks = facts.entry(layer._modules, "miss_block")
    if kind == "bat":
        check_split(base, 0.0, "bat")
        return bat_plan(layer, x, base, blocks, names, facts)
    adapters = []
    for name in names:
        D = read(blocks, name, "miss_block", facts)
        p = drop_rate(dropouts[name], "miss_dropout", facts)
        check_split(base, p, None)
        columns = layer.miss_mini_r[name] if kind == "mini" else layer.out_features
        if D.dim() != 2 or D.shape[1] != columns:
            raise Unfit(f"miss_block {list(D.shape)} does not fit the layer's kind ({kind})")
        adapters.append(Bone(D, p))
    if x is not None:
        check_input(layer, x, base, [a.D for a in adapters], facts)
    return base, adapters


def bat_plan(layer, x, base: Base, blocks: nn.Module, names: list[str], facts: Facts) -> tuple[Base, list[Bat]]:
    if len(names) > 1:
        raise Unfit("several active bat adapters: each transforms the weight that the one before it made")
    base = bat_base(base, facts) if names else base
    adapters = [Bat(read(blocks, name, "miss_block", facts)) for name in names]
    for (B,) in adapters:
        if B.dim() != 3 or B.shape[1] != B.shape[2] or B.shape[0] * B.shape[1] != layer.out_features:
            raise Unfit(f"miss_block {list(B.shape)} does not fit the layer's kind (bat)")
    if x is not None:
        check_input(layer, x, base, [a.B for a in adapters], facts, any_weight=True)
    return base, adapters


def bat_base(base: Base, facts: Facts) -> Base:
    """The base with its weight, which PEFT's bat reads and transforms; it never calls the layer, nor its hooks."""
    if quantised(base.layer):
        raise Unfit("bat transforms the weight itself, and the base layer holds it quantised")
    if type(base.layer) is Conv1D:
        raise Unfit("PEFT's bat takes the weight of a Conv1D as it is stored, transposed")
    return base if base.weight is not None else base._replace(weight=weight_of(base.layer, facts))
