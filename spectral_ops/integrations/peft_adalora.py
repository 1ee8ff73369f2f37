"""PEFT's AdaLoRA: what a call of one of its layers computes with, its rank allocation and its regulariser.

Like the layers, the tuner (``AdaLoraModel``) only changes its class: ``update_and_allocate`` hands PEFT's parameters to
our allocator, whose choices are PEFT's, and ``forward`` adds the same regulariser in a few products. The running
importance that PEFT had collected is taken over, and given back by :func:`restore`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer, deepspeed_config
from torch import nn

from spectral_ops.adapters.adalora_schedule import RankAllocator, Triple
from spectral_ops.functional import orthogonality_loss
from spectral_ops.integrations.peft_plan import Base, Facts, active, base_of, check_input, drop_rate, read, scaling


class SVD(NamedTuple):
    """One active AdaLoRA adapter: E [r, 1], the number of its triplets in a tensor, and the scaling over that."""

    A: torch.Tensor
    B: torch.Tensor
    E: torch.Tensor
    rank: torch.Tensor
    scale: float | torch.Tensor
    p: float

    def core(self) -> torch.Tensor:
        """E over the number of triplets [r, 1], times a scale that is a tensor; differentiable in E and that number:
        PEFT trains one that it has cast."""
        scale = self.scale if isinstance(self.scale, torch.Tensor) else 1.0
        return (self.E * scale / (self.rank + 1e-5)).to(self.E.dtype)

    def factor(self) -> float:
        """The scale as the operators take it, a number."""
        return 1.0 if isinstance(self.scale, torch.Tensor) else self.scale


def adalora_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[SVD]]:
    """The tensors of an AdaLoRA layer's call, or Unfit. Without x the input is not looked at."""
    base, modules = base_of(layer, facts), layer._modules
    keys = "lora_A", "lora_B", "lora_E", "ranknum"
    held = [facts.entry(modules, key) for key in keys]
    dropouts = facts.entry(modules, "lora_dropout")._modules
    adapters, parameters = [], []
    for name in active(layer):
        if facts.entry(held[0]._parameters, name) is None:
            continue
        A, B, E, rank = (read(module, name, key, facts) for module, key in zip(held, keys, strict=True))
        p = drop_rate(facts.entry(dropouts, name), "lora_dropout", facts)
        scale = scaling(facts.entry(facts.attribute(layer, "scaling"), name))
        if x is None or A.shape[0]:  # no triplet left: the base alone
            adapters.append(SVD(A, B, E, rank, scale, p))
            if not rank.requires_grad:  # then it is a constant of the plan
                facts.version(rank)
            parameters += (A, B, E)
        else:
            facts.lasting = False
    if x is not None:
        check_input(layer, x, base, parameters, facts)
    return base, adapters


class RankPattern(dict):
    """PEFT's rank_pattern, read from the device when somebody looks at it."""

    def __init__(self, content=(), *, allocator: RankAllocator | None = None, names: list[str] | None = None) -> None:
        super().__init__(content)
        self._choice = None if allocator is None else (allocator.keep, allocator.chosen, names)

    def _read(self) -> None:
        if self._choice is not None:
            (keep, ranks, names), self._choice = self._choice, None
            self.update(zip(names, (kept.tolist() for kept in keep.split(ranks)), strict=True))

    def __reduce__(self):
        return dict, (dict(self.items()),)


def _reading(name: str):
    def method(self, *args):
        for pattern in (self, *args):
            if isinstance(pattern, RankPattern):
                pattern._read()
        return getattr(dict, name)(self, *args)

    return method


for _name in ("__getitem__", "__iter__", "__len__", "__contains__", "__eq__", "__ne__", "__repr__", "__or__", "get",
              "keys", "values", "items", "copy"):  # fmt: skip
    setattr(RankPattern, _name, _reading(_name))


class FusedAdaLoraModel(AdaLoraModel):
    """``peft.tuners.adalora.AdaLoraModel`` with our rank allocation and regulariser."""

    _spectral_ops_layers: dict[str, AdaLoraLayer]  # of the adapter that trains, by path

    def _triples(self) -> list[Triple]:
        name = self.trainable_adapter_name
        return [(m.lora_A[name], m.lora_B[name], m.lora_E[name]) for m in self._spectral_ops_layers.values()]

    def _names(self, key: str) -> list[str]:
        return [f"{path}.{key}.{self.trainable_adapter_name}" for path in self._spectral_ops_layers]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        matrices = [X for A, B, _ in self._triples() for X in (A, B.t())] if self._trains() else []
        if not matrices or any(X.numel() == 0 for X in matrices):
            return super().forward(*args, **kwargs)
        outputs = self.model.forward(*args, **kwargs)
        if isinstance(getattr(outputs, "loss", None), torch.Tensor):
            weight = self.peft_config[self.trainable_adapter_name].orth_reg_weight
            if weight < 0:
                raise ValueError(f"orth_reg_weight: got {weight!r}, wanted a number that is not negative")
            outputs.loss += weight * orthogonality_loss(matrices)
        return outputs

    def _trains(self) -> bool:
        return hasattr(self, "trainable_adapter_name")

    def update_and_allocate(self, global_step: int) -> None:
        """PEFT's: call it after optimizer.step() and before zero_grad(), in every step."""
        config = self.peft_config[self.trainable_adapter_name]
        allocator = self._spectral_ops_allocator
        if deepspeed_config() is not None or (global_step > allocator.last and allocator.scores is None):
            super().update_and_allocate(
                global_step
            )  # the choice is in a file's rank_pattern, or gradients are DeepSpeed's
            return
        if allocator.update(global_step):
            config.rank_pattern = RankPattern(allocator=allocator, names=self._names("lora_E"))

    # accelerate and restore

    def take_over(self) -> None:
        """Go on from what PEFT's allocator has collected."""
        if not self._trains():
            return
        name, theirs = self.trainable_adapter_name, self.rankallocator
        self._spectral_ops_layers = {
            path: module
            for path, module in self.model.named_modules()
            if isinstance(module, AdaLoraLayer) and name in module.lora_A
        }
        self._spectral_ops_allocator = allocator = RankAllocator(theirs.peft_config, self._triples)
        names = self._parameter_names()
        if names and all(name in theirs.exp_avg_ipt for name in names):
            for ours, sums in (("exp_avg", theirs.exp_avg_ipt), ("uncertainty", theirs.exp_avg_unc)):
                flat = torch.cat([sums[name].detach().flatten() for name in names])
                setattr(allocator, ours, flat.to(torch.promote_types(flat.dtype, torch.float32)))
            theirs.reset_ipt()

    def give_back(self) -> None:
        """Hand what our allocator has collected to PEFT's."""
        if not self._trains():
            return
        allocator, theirs = self._spectral_ops_allocator, self.rankallocator
        parameters = [p for layer in self._triples() for p in layer]
        if allocator.exp_avg is not None and not any(hasattr(p, "to_local") for p in parameters):
            sizes = [p.numel() for p in parameters]
            for flat, sums in ((allocator.exp_avg, theirs.exp_avg_ipt), (allocator.uncertainty, theirs.exp_avg_unc)):
                for name, p, part in zip(self._parameter_names(), parameters, flat.split(sizes), strict=True):
                    sums[name] = part.view(p.shape).to(p.dtype, copy=True)
                    theirs.ipt.setdefault(name, torch.zeros_like(p))
        config = self.peft_config[self.trainable_adapter_name]
        if isinstance(config.rank_pattern, RankPattern):
            config.rank_pattern = dict(config.rank_pattern.items())
        del self._spectral_ops_allocator, self._spectral_ops_layers

    def _parameter_names(self) -> list[str]:
        keys = [self._names(key) for key in ("lora_A", "lora_B", "lora_E")]
        return [name for layer in zip(*keys, strict=True) for name in layer]
