"""PEFT's AdaLoRA: what a call of one of its layers computes with, its rank allocation and its regulariser.

Like the layers, the tuner (``AdaLoraModel``) only changes its class: ``update_and_allocate`` hands PEFT's parameters to
our allocator, whose choices are PEFT's, and ``forward`` adds the same regulariser in a few products. The running
importance that PEFT had collected is taken over, and given back by :func:`restore`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora import RankAllocator as PeftAllocator
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

    def operators(self, tier: str) -> list[str]:
        return [f"lowrank_{tier}"]

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


reading = threading.Lock()
READS_ALL = ("rank_pattern", "__dict__", "__reduce_ex__", "__getstate__")


class PendingConfig(AdaLoraConfig):
    """PEFT's config of an adapter whose last choice is still on the device: no step waits for it, only a reader.

    Whoever reads the pattern, or the fields all at once, gets a plain dict, and the config is PEFT's own class again.
    """

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":  # also what isinstance() asks, in every step: nothing is read for it
            return AdaLoraConfig
        if name in READS_ALL:
            settle(self)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rank_pattern":
            drop(self)
        object.__setattr__(self, name, value)


def contents(config: AdaLoraConfig) -> dict[str, Any]:
    return object.__getattribute__(config, "__dict__")


def postpone(config: AdaLoraConfig, allocator: RankAllocator, names: list[str]) -> None:
    """Let the config's rank_pattern be the allocator's last choice."""
    if type(config) not in (AdaLoraConfig, PendingConfig):  # a class of somebody's: the device is waited for
        config.rank_pattern = allocator.pattern(names)
        return
    with reading:
        contents(config)["_spectral_ops_choice"] = allocator.keep, list(allocator.chosen), names
        object.__setattr__(config, "__class__", PendingConfig)


def settle(config: AdaLoraConfig) -> None:
    with reading:
        fields = contents(config)
        if "_spectral_ops_choice" in fields:
            keep, ranks, names = fields["_spectral_ops_choice"]
            kept = zip(names, keep.split(ranks), strict=True)
            fields["rank_pattern"] = {name: k.tolist() for name, k in kept}
            del fields["_spectral_ops_choice"]
            object.__setattr__(config, "__class__", AdaLoraConfig)


def drop(config: AdaLoraConfig) -> None:
    """Somebody has set a pattern of his own."""
    with reading:
        contents(config).pop("_spectral_ops_choice", None)
        object.__setattr__(config, "__class__", AdaLoraConfig)


class FusedRankAllocator(PeftAllocator):
    """PEFT's allocator while ours works: for a ``update_and_allocate`` of PEFT's that somebody has held bound."""

    _spectral_ops: FusedAdaLoraModel

    def update_and_allocate(self, model: nn.Module, global_step: int, force_mask: bool = False) -> tuple:
        tuner = self._spectral_ops
        if deepspeed_config() is not None:
            return super().update_and_allocate(model, global_step, force_mask)
        allocator, names = tuner._spectral_ops_allocator, tuner._names("lora_E")
        return self.budget_schedule(global_step)[0], allocator.pattern(names) if allocator.update(global_step) else None


def outliving(method: Callable) -> Callable:
    """The method, also where somebody holds it bound to a tuner that :func:`restore` gave its class back; and a tuner
    that was not complete when its class was swapped, in the midst of its ``__init__``, is taken over now."""
    name = method.__name__

    @functools.wraps(method)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, FusedAdaLoraModel):
            return getattr(type(self), name)(self, *args, **kwargs)
        if "_spectral_ops_allocator" not in self.__dict__:
            self.take_over()
        return method(self, *args, **kwargs)

    return call


class FusedAdaLoraModel(AdaLoraModel):
    """``peft.tuners.adalora.AdaLoraModel`` with our rank allocation and regulariser."""

    _spectral_ops_layers: dict[str, AdaLoraLayer]  # of the adapter that trains, by path

    def _triples(self) -> list[Triple]:
        name = self.trainable_adapter_name
        return [(m.lora_A[name], m.lora_B[name], m.lora_E[name]) for m in self._spectral_ops_layers.values()]

    def _names(self, key: str) -> list[str]:
        return [f"{path}.{key}.{self.trainable_adapter_name}" for path in self._spectral_ops_layers]

    @outliving
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
        return "rankallocator" in self.__dict__

    @outliving
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
            postpone(config, allocator, self._names("lora_E"))

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
        if type(theirs) is PeftAllocator:
            theirs.__class__, theirs._spectral_ops = FusedRankAllocator, self

    def give_back(self) -> None:
        """Hand what our allocator has collected to PEFT's."""
        if "_spectral_ops_allocator" not in self.__dict__:
            return
        allocator, theirs = self._spectral_ops_allocator, self.rankallocator
        if type(theirs) is FusedRankAllocator:
            theirs.__class__ = PeftAllocator
            del theirs._spectral_ops
        parameters = [p for layer in self._triples() for p in layer]
        if allocator.exp_avg is not None and not any(hasattr(p, "to_local") for p in parameters):
            sizes = [p.numel() for p in parameters]
            for flat, sums in ((allocator.exp_avg, theirs.exp_avg_ipt), (allocator.uncertainty, theirs.exp_avg_unc)):
                for name, p, part in zip(self._parameter_names(), parameters, flat.split(sizes), strict=True):
                    sums[name] = part.view(p.shape).to(p.dtype, copy=True)
                    theirs.ipt.setdefault(name, torch.zeros_like(p))
        settle(self.peft_config[self.trainable_adapter_name])
        del self._spectral_ops_allocator, self._spectral_ops_layers

    def _parameter_names(self) -> list[str]:
        keys = [self._names(key) for key in ("lora_A", "lora_B", "lora_E")]
        return [name for layer in zip(*keys, strict=True) for name in layer]
