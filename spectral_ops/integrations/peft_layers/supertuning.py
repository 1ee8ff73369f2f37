"""PEFT's Super-Tuning layers: trained values at the largest entries of W, and with ``r`` a low-rank part (Supra)."""

from __future__ import annotations

import torch
from peft.tuners import supertuning as tuner
from peft.tuners.supertuning import layer as peft_layer
from torch import nn

from spectral_ops.integrations.peft_fused import enter
from spectral_ops.integrations.peft_layers.sparse import FusedSparse, Sparse, run_sparse, weighed, with_supports
from spectral_ops.integrations.peft_plan import (
    Base,
    Facts,
    LowRank,
    Unfit,
    active,
    base_of,
    check_input,
    drop_rate,
    leaf,
    read,
)


def low_rank(layer: nn.Module, name: str, rank: int, facts: Facts) -> LowRank:
    """The low-rank part of Supra; its dropout acts on it alone."""
    A, B, dropout = (
        facts.entry(facts.entry(layer._modules, f"supertuning_lora_{part}")._modules, name)
        for part in ("A", "B", "dropout")
    )
    A, B = leaf(A, nn.Linear, "supertuning_lora_A", facts), leaf(B, nn.Linear, "supertuning_lora_B", facts)
    p = drop_rate(dropout, "supertuning_lora_dropout", facts)
    alpha = facts.entry(facts.attribute(layer, "supertuning_lora_alpha"), name)
    return LowRank(name, A, B, float(alpha / rank), p, None, None)


def supertuning_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[Sparse]]:
    """The tensors of a Super-Tuning layer's call, or Unfit."""
    facts.called = x is not None
    all_values, places = (facts.entry(layer._modules, f"supertuning_{key}") for key in ("values", "indices"))
    ranks = facts.attribute(layer, "supertuning_rank")
    names = []
    for name in active(layer):
        if name in all_values:
            names.append(name)
        else:
            facts.entry(all_values._parameters, name)
    base = weighed(layer, base_of(layer, facts, x), facts, "Super-Tuning", peft_layer)
    adapters, parameters = [], []
    for name in names:
        values = read(all_values, name, "supertuning_values", facts)
        indices, rank = facts.entry(places._buffers, name), facts.entry(ranks, name)
        if indices is None or indices.is_meta:
            raise Unfit("supertuning_indices is missing or on the meta device")
        low = low_rank(layer, name, rank, facts) if rank else None
        parameters += [values, *(() if low is None else (low.A, low.B))]
        adapters.append(Sparse(name, values, 1.0, low))
    if x is not None:
        check_input(layer, x, base, parameters, facts)
        adapters = with_supports(layer, adapters, facts)
    return base, adapters


class FusedSupertuningLinear(FusedSparse, tuner.Linear):
    """``peft.tuners.supertuning.Linear`` through rosa_linear."""

    _plan, _run, _method = supertuning_plan, run_sparse, "Super-Tuning"
    cast_input_dtype_enabled = True  # PEFT casts the values to the weight's dtype, and x for the low-rank part

    def _places(self, name):
        return self.supertuning_indices[name], self.supertuning_values[name]

    def _positions(self, indices):
        return indices.long()


enter(FusedSupertuningLinear)
