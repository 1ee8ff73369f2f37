"""DoRA: y = m/c ⊙ (x Wᵀ + γ x Aᵀ Bᵀ) + b, c = ‖W + γBA‖ by row, detached (METHODS 1.2, 2; arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters import quantised
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.choice.targets import names_path
from spectral_ops.adapters.lora import LoRAConfig, LoRALinear
from spectral_ops.functional import NormCache, dora, dora_update, lowrank_update

SMALL = 1e-4  # a row scaled by less than this cannot be unmerged by division


@dataclass
class DoRAConfig(LoRAConfig):
    """LoRA's fields; see :class:`LoRAConfig`. magnitude_only: the layers (names that end a path) that train their
    magnitude alone. recompute: save no output for backward, compute it again there: needed where the model overwrites a
    layer's output in place. It changes no number, and no file holds it.
    """

    magnitude_only: list[str] | None = None
    recompute: bool = False

    peft_flags: ClassVar[dict[str, Any]] = {"use_dora": True}
    ours_only: ClassVar[dict[str, str]] = {
        "magnitude_only": "written where it is given; PEFT leaves it out and trains A and B there too",
        "recompute": "no file holds it, as it changes no number",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names("magnitude_only")
        if isinstance(self.magnitude_only, str):
            self.magnitude_only = [self.magnitude_only]
        check_recompute(self)

    def peft_fields(self) -> dict[str, Any]:
        fields = super().peft_fields()
        del fields["recompute"]
        if self.magnitude_only is None:
            del fields["magnitude_only"]
        return fields


def check_recompute(config: Any) -> None:
    """Raise where a config's ``recompute`` is no truth value."""
    if not isinstance(config.recompute, bool):
        config.wrong("recompute", config.recompute, "True or False")


class MagnitudeLinear(AdapterLinear):
    """A magnitude [d] for the rows of a direction W + γBA. The direction is that of another method, the second base.

    The magnitude is never below float32. The column norm is computed once per optimizer step. Micro-batches and
    recomputation in a checkpoint use it again.
    """

    magnitude_key: ClassVar[str]

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.norms: dict[str, NormCache] = {}

    @classmethod
    def shapes(cls, config, d, k):
        return {**super().shapes(config, d, k), cls.magnitude_key: (d,)}

    def admit(self, config):
        self.readable("DoRA's column norm")
        super().admit(config)

    def parameter_dtype(self, key, dtype):
        return accumulate_dtype(dtype) if key == self.magnitude_key else super().parameter_dtype(key, dtype)

    def add_adapter(self, name, config, path="", **options):
        super().add_adapter(name, config, path, **options)
        self.norms[name] = NormCache()

    def remove_adapter(self, name):
        super().remove_adapter(name)
        self.norms.pop(name, None)

    def magnitude(self, name: str) -> torch.Tensor:
        """m [d]."""
        return self.parameter(self.magnitude_key, name)

    def rescaled(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, name: str) -> torch.Tensor:
        """The layer's output with the rows of W + scale B A scaled to their magnitudes."""
        p = self.settings[name].dropout if self.training else 0.0
        return self.fused(x, self._linear, self._update, A, B, scale, p, name)

    def _linear(self, x, weight, bias, A, B, scale, p, name):
        norm = self.norms[name].get(self.matrix, A, B, scale)
        recompute = self.settings[name].recompute
        return dora.linear(x, weight, A, B, self.magnitude(name), bias, norm, scale, p, recompute)

    def _update(self, out, x, A, B, scale, p, name):
        """The output over what the base layer returned. With dropout that layer runs a second time, on drop(x)."""
        m = self.magnitude(name)
        if self.is_dense:
            norm = self.norms[name].get(self.matrix, A, B, scale)
        else:  # not cached: only the dequantised weight could tell whether it is stale
            norm = quantised.column_norm(self.base_layer, A, B, scale)
        if not p:
            return dora_update(out, x, A, B, m, norm, self.bias, scale=scale, recompute=self.settings[name].recompute)
        x = F.dropout(x, p)
        plain = self.product(x)
        plain = plain if self.bias is None else plain - self.bias
        z = lowrank_update(plain.clone(), x, A, B, scale=scale)
        return out + ((m / norm).to(x.dtype) * z - plain)

    @torch.no_grad()
    def delta_weight(self, adapter_name=None):
        self.readable("delta_weight")
        weight = self.unmerged()
        return self.merged_weight(weight, self._known(adapter_name))[0] - weight

    def merged_weight(self, weight, name):
        direction = super().merged_weight(weight, name)[0]
        g = self.magnitude(name).detach() / torch.linalg.vector_norm(direction, dim=1)
        invertible = bool(torch.isfinite(g).all() and (g.abs() >= SMALL).all())
        return g.unsqueeze(1) * direction, (g,) if invertible else None

    def unmerged_weight(self, weight, name, g):
        return super().unmerged_weight(weight / g.unsqueeze(1), name)


class DoRALinear(MagnitudeLinear, LoRALinear):
    """A linear layer with DoRA adapters: LoRA's tensors and ``lora_magnitude_vector`` [d]."""

    config_type = DoRAConfig
    tensor_keys = {**LoRALinear.tensor_keys, "lora_magnitude_vector": "lora_magnitude_vector"}
    magnitude_key = "lora_magnitude_vector"

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.magnitude_only: set[str] = set()

    def add_adapter(self, name, config, path="", **options):
        super().add_adapter(name, config, path, **options)
        if names_path(config.magnitude_only or [], path):
            self.magnitude_only.add(name)

    def remove_adapter(self, name):
        super().remove_adapter(name)
        self.magnitude_only.discard(name)

    def reset(self, name):
        super().reset(name)
        weight = self.full_matrix()
        if not self.settings[name].changes_base:  # a start from W itself, which the base has not given up yet
            weight = weight + self.delta(name)
        self.lora_magnitude_vector[name].copy_(torch.linalg.vector_norm(weight, dim=1))

    def trainable(self, name):
        return (self.magnitude_key,) if name in self.magnitude_only else super().trainable(name)

    def adapted(self, x, name):
        A, B = self.parameter("lora_A", name), self.parameter("lora_B", name)
        return self.rescaled(x, A, B, self.settings[name].scaling, name)
