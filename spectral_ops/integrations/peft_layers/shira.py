"""PEFT's SHiRA layers: trained values at a mask's places, which PEFT keeps as rows and columns."""

from __future__ import annotations

import torch
from peft.tuners import shira as tuner
from peft.tuners.shira import layer as peft_layer
from torch import nn

from spectral_ops.integrations.peft_fused import enter
from spectral_ops.integrations.peft_hooks import hooked
from spectral_ops.integrations.peft_layers.sparse import (
    FusedSparse,
    Sparse,
    run_sparse,
    warn_of_hooks,
    weighed,
    with_supports,
)
from spectral_ops.integrations.peft_plan import (
    Base,
    Facts,
    Unfit,
    active,
    base_of,
    check_input,
    quantised,
    read,
    scaling,
)


def shira_base(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> Base:
    """The base as PEFT's SHiRA uses it: its weight, dequantised for the call, or its result where PEFT cannot."""
    backend = facts.attribute(layer, "quantization_backend") if hasattr(layer, "quantization_backend") else None
    if backend is None:
        return weighed(layer, base_of(layer, facts, x), facts, "SHiRA", peft_layer)
    facts.lasting = False
    base = layer.get_base_layer()
    if not backend.supports_merge or multiplies(base, x):
        return Base(base, None, None, not quantised(base) or hooked(base))
    if hooked(base):
        warn_of_hooks(layer, facts, peft_layer)
    weight, operators = (None, "rosa_linear") if x is None else (backend.get_base_weight(base), "")
    return Base(base, weight, facts.parameter(base, "bias"), operators=operators)


def multiplies(base: nn.Module, x: torch.Tensor | None) -> bool:
    """Whether the layer's own product is x times its dequantised weight: bitsandbytes' 4 bits, where no dtype is cast.
    Others round x too."""
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if state is None or hooked(base):
        return False
    if x is None:
        return True
    return (
        not torch.is_autocast_enabled(x.device.type)
        and x.dtype is state.dtype
        and base.compute_dtype in (None, x.dtype)
    )


def shira_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[Sparse]]:
    """The tensors of a SHiRA layer's call, or Unfit."""
    facts.called = x is not None
    weights = facts.entry(layer._modules, "shira_weight")
    places, scales = facts.attribute(layer, "shira_indices"), facts.attribute(layer, "scaling")
    names = []
    for name in active(layer):
        if name in weights:
            names.append(name)
        else:
            facts.entry(weights._parameters, name)
    base = shira_base(layer, x, facts)
    adapters = []
    for name in names:
        values, indices = read(weights, name, "shira_weight", facts), facts.entry(places, name)
        if not isinstance(indices, torch.Tensor) or indices.is_meta:
            raise Unfit("shira_indices is missing or on the meta device")
        adapters.append(Sparse(name, values, scaling(facts.entry(scales, name))))
    if x is not None:
        check_input(layer, x, base, [a.values for a in adapters], facts)
        adapters = with_supports(layer, adapters, facts)
    return base, adapters


class FusedShiraLinear(FusedSparse, tuner.Linear):
    """``peft.tuners.shira.Linear`` through rosa_linear."""

    _plan, _run, _method = shira_plan, run_sparse, "SHiRA"
    cast_input_dtype_enabled = True  # the sum with the weight has the weight's dtype, whatever the values'

    def _places(self, name):
        return self.shira_indices[name], self.shira_weight[name]

    def _positions(self, indices):
        rows, columns = indices.long()
        outside = (columns < 0) | (columns >= self.in_features)  # would be a place in another row
        return torch.where(outside, -1, rows * self.in_features + columns)


enter(FusedShiraLinear)
