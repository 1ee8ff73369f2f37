"""PEFT's OFT layers: x is rotated block by block, then meets the base layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners.oft.layer import Linear, OFTRotationModule
from torch import nn

from spectral_ops.functional import rotation
from spectral_ops.integrations.peft_fused import Fused, base_result, enter, operands
from spectral_ops.integrations.peft_plan import Base, Facts, Unfit, active, base_of, check_input, leaf


class Rotation(NamedTuple):
    """One active adapter: PEFT's module, whose settings are read in every call, and its triangles [n, b(b-1)/2]."""

    module: nn.Module
    blocks: torch.Tensor

    def operators(self, tier: str) -> list[str]:
        return ["rotation_linear" if tier == "linear" else "rotate"]

    def settings(self) -> tuple[torch.Tensor, int]:
        """The triangles and the terms of their series; COFT first projects them, in place, as PEFT does."""
        module, blocks = self
        if module.coft:
            with torch.no_grad():
                blocks.copy_(module._project_batch(blocks, eps=module.eps))
            blocks = blocks.clone()  # the next call writes over what this one's backward reads
        return blocks, module.num_cayley_neumann_terms if module.use_cayley_neumann else 0


def oft_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[Rotation]]:
    """The tensors of an OFT layer's call, or Unfit. PEFT's linear layer never applies its module_dropout."""
    base = base_of(layer, facts, x)
    if base.split is not None:
        raise Unfit("OFT over a tensor-parallel base layer")
    modules, k = facts.entry(layer._modules, "oft_R")._modules, facts.attribute(layer, "in_features")
    adapters = []
    for name in active(layer):
        if (module := facts.entry(modules, name)) is None:
            continue
        blocks = leaf(module, OFTRotationModule, "oft_R", facts)
        if (b := rotation.block_size(blocks)) != module.block_size or (
            k % b if len(blocks) == 1 else k != b * len(blocks)
        ):
            raise Unfit(f"oft_R {list(blocks.shape)} does not fit {k} features in blocks of {module.block_size}")
        series, terms = (
            facts.entry(module.__dict__, key) for key in ("use_cayley_neumann", "num_cayley_neumann_terms")
        )
        if series and terms < 2:
            raise Unfit(f"num_cayley_neumann_terms is {terms}: PEFT's rotation is then the identity and trains nothing")
        adapters.append(Rotation(module, blocks))
    if x is not None:
        check_input(layer, x, base, [a.blocks for a in adapters], facts)
    return base, adapters


def run_oft(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[Rotation]) -> torch.Tensor:
    dtype = x.dtype  # PEFT's OFT returns it, also under autocast
    weight, bias = base.weight, base.bias
    if weight is not None:
        x, weight, bias = operands(x, weight, bias)
    *first, last = adapters
    for adapter in first:
        blocks, terms = adapter.settings()
        x = rotation.linear(x, None, blocks, None, None, terms)
    blocks, terms = last.settings()
    if weight is None:
        out = base_result(base, rotation.linear(x, None, blocks, None, None, terms))
    else:
        out = rotation.linear(x, weight, blocks, None, bias, terms)
    return out if out.dtype is dtype else out.to(dtype)


class FusedOFTLinear(Fused, Linear):
    """``peft.tuners.oft.Linear`` through rotation_linear."""

    _plan, _run, _method = oft_plan, run_oft, "OFT"


enter(FusedOFTLinear)
