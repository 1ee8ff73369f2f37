"""DoRA: y = m/c ⊙ (x Wᵀ + γ x Aᵀ Bᵀ) + b, c = ‖W + γBA‖ by row, detached (METHODS 1.2, 2; arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.base import why_not_dense
from spectral_ops.adapters.lora import LoRAConfig, LoRALinear
from spectral_ops.functional import NormCache, dora_linear, dora_update

SMALL = 1e-4  # a row scaled by less than this cannot be unmerged by division


@dataclass
class DoRAConfig(LoRAConfig):
    """LoRA's fields, and ``magnitude_only``: the layers (names that end a path) that train their magnitude alone."""

    magnitude_only: list[str] | None = None

    peft_flags: ClassVar[dict[str, Any]] = {"use_dora": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names("magnitude_only")
        if isinstance(self.magnitude_only, str):
            self.magnitude_only = [self.magnitude_only]

    def to_peft(self) -> dict[str, Any]:
        fields = super().to_peft()
        if self.magnitude_only is None:
            del fields["magnitude_only"]
        return fields


class DoRALinear(LoRALinear):
    """A linear layer with DoRA adapters: LoRA's tensors and ``lora_magnitude_vector`` [d], never below float32.

    The column norm is computed once per optimizer step and reused over micro-batches and checkpoint recomputation.
    """

    config_type = DoRAConfig
    tensor_keys = {**LoRALinear.tensor_keys, "lora_magnitude_vector": "lora_magnitude_vector"}

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.norms: dict[str, NormCache] = {}
        self.magnitude_only: set[str] = set()

    @classmethod
    def shapes(cls, config, d, k):
        return {**super().shapes(config, d, k), "lora_magnitude_vector": (d,)}

    def admit(self, config):
        self.dense_matrix("DoRA's column norm")
        super().admit(config)

    def parameter_dtype(self, key, dtype):
        return accumulate_dtype(dtype) if key == "lora_magnitude_vector" else dtype

    def add_adapter(self, name, config, path="", **options):
        super().add_adapter(name, config, path, **options)
        self.norms[name] = NormCache()
        only = config.magnitude_only or []
        if any(path == entry or path.endswith(f".{entry}") for entry in only):
            self.magnitude_only.add(name)

    def remove_adapter(self, name):
        super().remove_adapter(name)
        self.norms.pop(name, None)
        self.magnitude_only.discard(name)

    def reset(self, name):
        super().reset(name)
        weight = self.matrix.to(accumulate_dtype(self.matrix.dtype))
        if not self.settings[name].changes_base:  # a spectral start is W itself: base and product together
            weight = weight + self.product(self.lora_A[name], self.lora_B[name], name)
        self.lora_magnitude_vector[name].copy_(torch.linalg.vector_norm(weight, dim=1))

    def trainable(self, name):
        return ("lora_magnitude_vector",) if name in self.magnitude_only else super().trainable(name)

    def adapted(self, x, name):
        A, B, m = self.lora_A[name], self.lora_B[name], self.lora_magnitude_vector[name]
        base, config = self.base_layer, self.settings[name]
        norm = self.norms[name].get(self.matrix, A, B, config.scaling)
        reason = why_not_dense(base)
        if reason is None:
            return dora_linear(
                x, self.matrix, A, B, m, base.bias,
                scale=config.scaling, norm=norm, dropout_p=config.dropout, training=self.training,
            )  # fmt: skip
        if config.dropout and self.training:
            raise ValueError(f"lora_dropout: got {config.dropout!r}, wanted 0.0 for DoRA where {reason}")
        return dora_update(base(x), x, A, B, m, norm, base.bias, scale=config.scaling)

    @torch.no_grad()
    def delta_weight(self, adapter_name=None):
        return super(LoRALinear, self).delta_weight(adapter_name)

    def merged_weight(self, weight, name):
        direction = super().merged_weight(weight, name)[0]
        g = self.lora_magnitude_vector[name].detach() / torch.linalg.vector_norm(direction, dim=1)
        invertible = bool(torch.isfinite(g).all() and (g.abs() >= SMALL).all())
        return g.unsqueeze(1) * direction, (g,) if invertible else None

    def unmerged_weight(self, weight, name, g):
        return super().unmerged_weight(weight / g.unsqueeze(1), name)
