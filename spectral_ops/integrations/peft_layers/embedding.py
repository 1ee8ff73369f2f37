"""PEFT's LoRA and DoRA over an embedding: rows of A gathered by the ids, added to the frozen lookup's result."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from spectral_ops.functional import column_norm, embedding
from spectral_ops.integrations.peft_fused import Fused, enter
from spectral_ops.integrations.peft_plan import (
    FLOATS,
    PLAIN,
    Base,
    Facts,
    Unfit,
    active,
    busy,
    check_tracing,
    leaf,
    read,
    scaling,
    variant_name,
)


class EmbeddingLowRank(NamedTuple):
    """One active LoRA or DoRA adapter, with what the base layer multiplies its rows by."""

    name: str
    A: torch.Tensor
    B: torch.Tensor
    scale: float | torch.Tensor
    magnitude: torch.Tensor | None
    factor: torch.Tensor | None
    padding_idx: int | None

    def operators(self, tier: str) -> list[str]:
        return ["embedding_update"] if self.magnitude is None else ["column_norm", "embedding_update"]


def embedding_base(layer: nn.Module, facts: Facts) -> tuple[Base, torch.Tensor | None, int | None]:
    """The frozen embedding, which is called; the factor in its forward, and its padding index."""
    base = facts.entry(layer._modules, "base_layer")
    if isinstance(base, BaseTunerLayer) or not isinstance(base, nn.Embedding):
        raise Unfit(f"the base layer is a {type(base).__name__}")
    for option, default in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
        if facts.entry(base.__dict__, option) is not default:
            raise Unfit(f"an embedding with {option}")
    if getattr(layer, "input_fns", None):
        raise Unfit("a tensor-parallel embedding")
    factor = facts.entry(base._buffers, "embed_scale")
    if factor is None and (factor := facts.entry(base.__dict__, "embed_scale")) is not None:
        factor = torch.as_tensor(factor) if isinstance(factor, (int, float)) else factor
    observed = busy(base, facts) or bool(base._forward_hooks)
    if not observed:
        facts.module(base)
    return Base(base, None, None, observed), factor, facts.entry(base.__dict__, "padding_idx")


def embedding_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[EmbeddingLowRank]]:
    """The tensors of a call, or Unfit. Without x, which holds the ids, it is not looked at."""
    facts.called = x is not None
    base, factor, padding_idx = embedding_base(layer, facts)
    adapters, parameters = [], []
    for name in active(layer):
        if name not in facts.entry(layer._modules, "lora_embedding_A")._parameters:
            continue
        A = read(layer.lora_embedding_A, name, "lora_embedding_A", facts)
        B = read(layer.lora_embedding_B, name, "lora_embedding_B", facts)
        scale = scaling(facts.entry(facts.attribute(layer, "scaling"), name))
        variant, magnitude = facts.entry(facts.attribute(layer, "lora_variant"), name), None
        if variant is not None:
            if type(variant) is not variants.DoraEmbeddingVariant:
                raise Unfit(f"the LoRA variant {variant_name(variant)} is left to PEFT")
            vectors = facts.entry(layer._modules, "lora_magnitude_vector")._modules
            magnitude = leaf(facts.entry(vectors, name), DoraEmbeddingLayer, "the magnitude", facts)
            base = dora_base(base, factor, facts)
            parameters.append(magnitude)
        parameters += (A, B)
        adapters.append(EmbeddingLowRank(name, A, B, scale, magnitude, factor, padding_idx))
    if len(adapters) > 1 and any(a.magnitude is not None for a in adapters):
        raise Unfit("DoRA beside another adapter over one embedding")
    if x is not None:
        check_ids(layer, x, base, parameters, facts)
    return base, adapters


def dora_base(base: Base, factor: Any, facts: Facts) -> Base:
    """The same with its weight, which the norm and the magnitude's gradient read."""
    kind = type(base.layer)
    scaled = factor is not None and kind.__name__.endswith("ScaledWordEmbedding")
    if kind.forward is not nn.Embedding.forward and not scaled:
        raise Unfit(f"DoRA over a {kind.__name__}, whose lookup may do more")
    if base.observed:
        raise Unfit("DoRA over an embedding that carries hooks of its own")
    weight = read(base.layer, "weight", "the base weight", facts)
    if weight.requires_grad and torch.is_grad_enabled():
        raise Unfit("the base weight is trained")
    facts.frozen = weight
    return base._replace(weight=weight)


def check_ids(layer: nn.Module, x: torch.Tensor, base: Base, parameters: list[torch.Tensor], facts: Facts) -> None:
    if type(x) not in PLAIN or x.dtype not in (torch.int64, torch.int32):
        raise Unfit("the ids are no plain tensor of integers")
    check_tracing()
    if _has_any_global_hook():
        raise Unfit("a global module hook is registered, which must see every submodule called")
    tensors = [*parameters, base.layer.weight]
    for t in tensors:
        if t.device != x.device:
            raise Unfit(f"the ids are on {x.device}, a weight on {t.device}")
    if any(p.dtype not in FLOATS for p in parameters):
        raise Unfit("an adapter that is not in floating point")
    if base.weight is not None and base.weight.dtype not in FLOATS:
        raise Unfit(f"DoRA reads the base weight, which is in {base.weight.dtype}")
    facts.settle(layer, x, tensors)


def run_embedding(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[EmbeddingLowRank]) -> torch.Tensor:
    """Each adapter in turn over what those before it have made."""
    out = base.layer(x)
    out = out.clone() if base.observed else out
    for a in adapters:
        B, scale = (a.B * a.scale, 1.0) if isinstance(a.scale, torch.Tensor) else (a.B, a.scale)
        dora = ()
        if a.magnitude is not None:
            weight = base.weight.t()
            if torch.compiler.is_compiling():
                norm = column_norm(weight, a.A, B, scale)
            else:
                norm = layer._spectral_ops.norm(a.name, weight, a.A, B, scale)
            dora = a.magnitude, norm, base.weight, a.factor
        B = B if a.factor is None else B * a.factor.to(B.dtype)
        out = embedding.update(out, x, a.A, B, scale, a.padding_idx, *dora)
    return out


class FusedEmbedding(Fused, lora.Embedding):
    """``peft.tuners.lora.Embedding`` through embedding_update."""

    _plan, _run = embedding_plan, run_embedding


enter(FusedEmbedding)
