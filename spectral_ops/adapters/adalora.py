"""AdaLoRA: y = x Wᵀ + γ drop(x) Aᵀ diag(E) Bᵀ + b, γ = α/(r + 1e-5) (METHODS 2; arXiv:2303.10512).

Every layer starts with ``init_r`` triplets (row of A, column of B, entry of E); :class:`AdaLoRASchedule` zeroes the E
of those that matter least until ``target_r`` a layer are left on average. A file holds the triplets that are left.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from spectral_ops.adapters.config import TokensConfig
from spectral_ops.adapters.lora import ABSENT, LoRAConfig
from spectral_ops.adapters.lowrank import LowRankLinear, fused_linear, fused_update
from spectral_ops.core import checks

STD = 0.02  # of A and B at the start


@dataclass
class AdaLoRAConfig(TokensConfig):
    """AdaLoRA under PEFT's field names; see :class:`AdapterConfig` and :class:`TokensConfig` for the common ones (``r``
    has no effect).

    init_r, target_r: triplets of a layer at the start, and on average at the end. tinit: optimizer steps before the
    first is pruned; tfinal: steps at the end with the choice frozen; total_step: all of them; deltaT: steps from one
    choice to the next. beta1, beta2: of the running importance and of its variation. orth_reg_weight: what
    ``orthogonality_loss(model)`` is to be multiplied by. lora_alpha: α, divided by init_r whatever is pruned.
    init_lora_weights: True (A, B normal, E zero) or False (all standard normal). rank_pattern: which triplets are left,
    by "path.lora_E", once that is frozen.
    """

    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool = True
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = field(default=None, repr=False)

    peft_type: ClassVar[str] = "ADALORA"
    peft_idle: ClassVar[dict[str, str]] = {
        **LoRAConfig.peft_idle,
        "use_rslora": "PEFT's AdaLoRA does not read it",
        "alpha_pattern": "PEFT's AdaLoRA does not read it",
    }
    peft_refused: ClassVar[dict[str, str]] = {**ABSENT, "use_dora": "PEFT refuses it too"}
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "all", "lora_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.probability(self._field("lora_dropout"), self.lora_dropout)
        for name in ("lora_alpha", "orth_reg_weight", "beta1", "beta2"):
            checks.number(self._field(name), getattr(self, name))
        if self.lora_alpha <= 0:
            self.wrong("lora_alpha", self.lora_alpha, "a positive number")
        if self.orth_reg_weight < 0:
            self.wrong("orth_reg_weight", self.orth_reg_weight, "a number that is not negative")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                self.wrong(name, getattr(self, name), "a number in (0, 1)")
        if not isinstance(self.init_lora_weights, bool):
            self.wrong("init_lora_weights", self.init_lora_weights, "True or False")
        for name, low in (("init_r", 1), ("target_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            checks.integer(self._field(name), getattr(self, name), low, None, "triplets or optimizer steps")
        checks.integer(self._field("total_step"), self.total_step, 1, None, "optimizer steps of the whole run")
        if self.target_r > self.init_r:
            self.wrong("target_r", self.target_r, f"at most init_r ({self.init_r})")
        if self.tinit >= self.total_step - self.tfinal:
            self.wrong("tinit", self.tinit, f"less than total_step - tfinal ({self.total_step - self.tfinal})")
        self._check_pattern()

    def _check_pattern(self) -> None:
        if self.rank_pattern is None:
            return
        wanted = f"None, or a dict from 'path.lora_E' to lists of {self.init_r} booleans"
        if not isinstance(self.rank_pattern, dict):
            self.wrong("rank_pattern", self.rank_pattern, wanted)
        for key, kept in self.rank_pattern.items():
            if not isinstance(kept, list) or not all(isinstance(k, bool) for k in kept) or len(kept) != self.init_r:
                self.wrong("rank_pattern", {key: kept}, wanted)

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def scaling(self) -> float:
        """γ."""
        return self.lora_alpha / (self.init_r + 1e-5)

    @property
    def rank(self) -> int:
        """Triplets of a layer, in a config of that layer."""
        return self.init_r if self.rank_pattern is None else sum(next(iter(self.rank_pattern.values())))

    def for_layer(self, path: str) -> AdaLoRAConfig:
        if self.rank_pattern is None:
            return self
        key = f"{path}.lora_E"
        if key not in self.rank_pattern:
            self.wrong("rank_pattern", list(self.rank_pattern)[:3], f"an entry {key!r} as well")
        return dataclasses.replace(self, rank_pattern={key: self.rank_pattern[key]})

    def for_file(self, plain: bool) -> AdaLoRAConfig:
        return self if plain else dataclasses.replace(self, rank_pattern=None)


class AdaLoRALinear(LowRankLinear):
    """A linear layer with AdaLoRA adapters: ``lora_A`` [r, k], ``lora_B`` [d, r] and ``lora_E`` [r, 1] per adapter."""

    config_type = AdaLoRAConfig
    tensor_keys = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"}

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.left: dict[str, list[bool]] = {}

    @classmethod
    def shapes(cls, config, d, k):
        return {"lora_A": (config.rank, k), "lora_B": (d, config.rank), "lora_E": (config.rank, 1)}

    def remove_adapter(self, name):
        super().remove_adapter(name)
        self.left.pop(name, None)

    def reset(self, name):
        std = STD if self.settings[name].init_lora_weights else 1.0
        nn.init.normal_(self.lora_A[name], std=std)
        nn.init.normal_(self.lora_B[name], std=std)
        if self.settings[name].init_lora_weights:
            nn.init.zeros_(self.lora_E[name])
        else:
            nn.init.normal_(self.lora_E[name])

    def factors(self, name):
        return self.lora_A[name], self.lora_B[name], self.lora_E[name].flatten() * self.settings[name].scaling

    def adapted(self, x, name):
        A, B, E = self.parameter("lora_A", name), self.parameter("lora_B", name), self.parameter("lora_E", name)
        if not A.shape[0]:  # all of its triplets were pruned, and the file had none
            return self.product(x)
        config = self.settings[name]
        return self.fused(
            x, fused_linear, fused_update, A, B, E, config.scaling, config.dropout if self.training else 0.0
        )

    def freeze(self, name: str, config: AdaLoRAConfig, path: str, left: list[bool]) -> None:
        """Take ``config``, which has its rank_pattern now; ``left`` says which of the triplets held here are left."""
        self.configs[name], self.settings[name], self.left[name] = config, config.for_layer(path), left

    def file_tensors(self, name, plain):
        tensors = super().file_tensors(name, plain)
        if not plain or name not in self.left:
            return tensors
        kept = torch.tensor(self.left[name], dtype=torch.bool, device=self.lora_A[name].device)
        rows = {key: tensors[key][kept] for key in ("lora_A", "lora_E")}
        return {**tensors, **rows, "lora_B": tensors["lora_B"][:, kept]}

    def describe_adapter(self, name):
        return f"r={self.lora_A[name].shape[0]}, scaling={self.settings[name].scaling:g}"
