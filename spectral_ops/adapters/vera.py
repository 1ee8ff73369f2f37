"""VeRA: y = x Wᵀ + λ_b * ((drop(x) Aᵀ * λ_d) Bᵀ) + b, A and B random, frozen, shared by all layers (METHODS 1.1, 2;
arXiv:2310.11454)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.lowrank import LowRankLinear
from spectral_ops.core import checks


@dataclass
class VeRAConfig(AdapterConfig):
    """VeRA under the field names of PEFT's VeraConfig; see :class:`AdapterConfig` for the common ones.

    projection_prng_key: seed of A and B, which are PEFT's, bit for bit. save_projection: whether a file holds them, or
    a loader draws them again. vera_dropout: on the adapter branch. d_initial: what λ_d starts from. init_weights: True
    (λ_b zero), or False (λ_b one, λ_d normal).
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    largest = None  # out_features and in_features at most, of a model's layers; of the layer's own, where None

    peft_type: ClassVar[str] = "VERA"
    peft_idle: ClassVar[dict[str, str]] = {
        **AdapterConfig.peft_idle,
        "fan_in_fan_out": "every layer says that itself",
    }
    ours_only: ClassVar[dict[str, str]] = {"exclude_modules": "a file of VeRA names the layers that are left"}
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "all", "vera_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer(self._field("projection_prng_key"), self.projection_prng_key, 0, 2**64 - 1, "a seed")
        checks.probability(self._field("vera_dropout"), self.vera_dropout)
        checks.number(self._field("d_initial"), self.d_initial)
        for name in ("save_projection", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                self.wrong(name, getattr(self, name), "True or False")

    @property
    def dropout(self) -> float:
        return self.vera_dropout

    @property
    def unsaved(self) -> frozenset[str]:
        return frozenset() if self.save_projection else VeRALinear.tied_keys

    def peft_fields(self) -> dict[str, Any]:
        fields = super().peft_fields()
        del fields["exclude_modules"]  # which PEFT's VeraConfig does not have: the file names the layers instead
        return fields

    def for_model(self, sizes: dict[str, tuple[int, int]]) -> VeRAConfig:
        config = copy.copy(self)
        config.largest = tuple(max(side) for side in zip(*sizes.values(), strict=True))
        return config


def projection(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """A random [rows, columns] float32 matrix as PEFT draws it: Kaiming-uniform by its columns."""
    return torch.empty(rows, columns).uniform_(-math.sqrt(6 / columns), math.sqrt(6 / columns), generator=generator)


class VeRALinear(LowRankLinear):
    """A linear layer with VeRA adapters: ``vera_lambda_d`` [r] and ``vera_lambda_b`` [d] of its own, which train.

    ``vera_A`` [r, k_max] and ``vera_B`` [d_max, r] are those of all layers, as large as the largest asks for; a layer
    reads its first in_features columns of one and its first out_features rows of the other.
    """

    config_type = VeRAConfig
    tensor_keys = {
        "vera_A": "vera_A",
        "vera_B": "vera_B",
        "vera_lambda_d": "vera_lambda_d",
        "vera_lambda_b": "vera_lambda_b",
    }
    tied_keys = frozenset({"vera_A", "vera_B"})

    @classmethod
    def shapes(cls, config, d, k):
        d_max, k_max = config.largest or (d, k)
        r = config.r
        return {"vera_A": (r, k_max), "vera_B": (d_max, r), "vera_lambda_d": (r,), "vera_lambda_b": (d,)}

    @classmethod
    def file_key(cls, path, suffix):
        return f"base_model.{suffix}" if suffix in cls.tied_keys else super().file_key(path, suffix)

    @classmethod
    def link(cls, layers, name):
        first, *others = layers.values()
        generator = torch.Generator().manual_seed(first.settings[name].projection_prng_key)
        for shared in (first.vera_A, first.vera_B):  # in this order
            drawn = projection(*shared[name].shape, generator)
            drawn = drawn.to(first.base_layer.weight.device, shared[name].dtype)
            shared[name] = nn.Parameter(drawn, requires_grad=False)
        for layer in others:
            layer.vera_A.tie(name, first.vera_A)
            layer.vera_B.tie(name, first.vera_B)

    def trainable(self, name):
        return tuple(key for key in self.tensor_keys if key not in self.tied_keys)

    def reset(self, name):
        config, d, b = self.settings[name], self.vera_lambda_d[name], self.vera_lambda_b[name]
        if config.init_weights:
            d.fill_(config.d_initial)
            b.zero_()
        else:
            d.normal_()
            b.fill_(1)

    def factors(self, name):
        A, B = self.vera_A[name][:, : self.in_features], self.vera_B[name][: self.out_features]
        return A, self.vera_lambda_b[name].unsqueeze(1) * B, self.vera_lambda_d[name]
