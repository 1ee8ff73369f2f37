"""AdaLoRA with LoRA-Dash's directions: y = x Wᵀ + γ drop(x) Aᵀ diag(E) Bᵀ + drop(x) V diag(Δσ) Uᵀ + b (METHODS 2).

Two schedules side by side: :class:`AdaLoRASchedule` prunes triplets, and the launch takes what A, E and B have learnt
by then. Directions are not pruned. arXiv:2303.10512, arXiv:2409.01035.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spectral_ops.adapters.adalora import AdaLoRAConfig, AdaLoRALinear
from spectral_ops.adapters.dash import DashLinear, check_dash
from spectral_ops.adapters.lowrank import LowRankLinear


@dataclass
class AdaLoRADashConfig(AdaLoRAConfig):
    """AdaLoRA's fields; launch_step: the optimizer steps of AdaLoRA alone; directions: how many are chosen."""

    launch_step: int = 100
    directions: int = 8

    peft_type: ClassVar[str] = "ADALORA_DASH"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dash(self)


class AdaLoRADashLinear(DashLinear, AdaLoRALinear):
    """A linear layer with AdaLoRA's tensors, and those of :class:`DashLinear`."""

    config_type = AdaLoRADashConfig
    tensor_keys = {**AdaLoRALinear.tensor_keys, **DashLinear.dash_keys}

    def adapted(self, x, name):
        return LowRankLinear.adapted(self, x, name)  # with every triplet pruned there are the directions still
