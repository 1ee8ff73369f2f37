"""PEFT's tuners beside LoRA, MiSS and AdaLoRA: one layer of each, frozen, as PEFT has it, and accelerated.

One table names the configurations, PEFT's defaults; the benchmark, the tests and the documents read it. A tuner that
the installed PEFT does not have is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import spectral_ops


@dataclass(frozen=True)
class Tuner:
    """One configuration: PEFT's config class, and the fields that differ from its defaults.

    small: fields that a layer of a few dozen features takes in their place. saved: numbers per token that may be held
    for backward beside x.
    """

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    saved: int = 0

    def there(self) -> bool:
        """Whether this PEFT has it."""
        import peft

        return hasattr(peft, self.config)

    def build(self, targets: list[str], **fields):
        """PEFT's config for the modules named."""
        import peft

        return getattr(peft, self.config)(target_modules=targets, **{**self.fields, **fields})


TUNERS: dict[str, Tuner] = {
    "lokr": Tuner("LoKrConfig", small={"r": 2}),
    "loha": Tuner("LoHaConfig", small={"r": 2}),
    "hira": Tuner("HiraConfig", small={"r": 4}),
    "randlora": Tuner("RandLoraConfig", small={"r": 8, "randlora_alpha": 8}),
    "vera": Tuner("VeraConfig", small={"r": 8}, saved=256),
    "shira": Tuner("ShiraConfig", small={"r": 2}),
    "supertuning": Tuner("SupertuningConfig", small={"sparsity": 0.9}),
    "supra": Tuner("SupertuningConfig", {"r": 8}, small={"sparsity": 0.9, "r": 3}, saved=8),
}


@dataclass
class Implementation:
    """The layer's forward, and the parameters it trains."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    parameters: list[torch.Tensor]


def perturb(model: nn.Module, scale: float = 0.02) -> None:
    """Noise on every trainable parameter, so that no gradient is trivially zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += scale * torch.randn(p.shape, generator=generator).to(p)


def layers(tuner: Tuner, weight: torch.Tensor, **fields) -> dict[str, Implementation]:
    """The frozen layer over ``weight`` [d, k], PEFT's over the same memory, and that accelerated, in training mode."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    return over(base, tuner.build(["0"], **fields))


def over(base: nn.Module, config) -> dict[str, Implementation]:
    """The same over any frozen layer, for PEFT's config of the module named "0"."""
    import peft

    shared = {id(p): p for p in base.parameters()}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base, dict(shared))), config).train()
    perturb(theirs)
    frozen = (*shared.values(), *(p for p in theirs.parameters() if not p.requires_grad))
    ours = copy.deepcopy(theirs, {id(t): t for t in frozen})
    spectral_ops.accelerate(ours, strict=True)
    found = {"frozen": Implementation(base, [])}
    for name, model in (("PEFT", theirs), ("accelerated", ours)):
        found[name] = Implementation(model.base_model.model, [p for p in model.parameters() if p.requires_grad])
    return found
