"""DVoRA: DoRA whose direction is VeRA's, y = m/c * (x Wᵀ + λ_b * ((x Aᵀ * λ_d) Bᵀ)) + b (METHODS 1.2, 2;
arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from spectral_ops.adapters.dora import MagnitudeLinear, check_recompute
from spectral_ops.adapters.vera import VeRAConfig, VeRALinear


@dataclass
class DVoRAConfig(VeRAConfig):
    """VeRA's fields, and ``recompute`` as in :class:`DoRAConfig`; see :class:`VeRAConfig`. PEFT has no DVoRA."""

    recompute: bool = False

    peft_type: ClassVar[str] = "DVORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_recompute(self)

    def peft_fields(self) -> dict[str, Any]:
        fields = super().peft_fields()
        del fields["recompute"]
        return fields


class DVoRALinear(MagnitudeLinear, VeRALinear):
    """A linear layer with DVoRA adapters: VeRA's tensors and ``vera_magnitude_vector`` [d]."""

    config_type = DVoRAConfig
    tensor_keys = {**VeRALinear.tensor_keys, "vera_magnitude_vector": "vera_magnitude_vector"}
    magnitude_key = "vera_magnitude_vector"

    def reset(self, name):
        super().reset(name)
        weight = self.full_matrix()
        self.vera_magnitude_vector[name].copy_(torch.linalg.vector_norm(weight, dim=1))

    def adapted(self, x, name):
        A, B, core = self.factors(name)
        return self.rescaled(x, A, B * core, 1.0, name)  # in B, λ_d needs no gradient of A, a product with x
