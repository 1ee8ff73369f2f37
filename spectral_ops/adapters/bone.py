"""Bone / MiSS: y = x Wᵀ + b + block_sum(drop(x), r) D (METHODS 1.3, 2; arXiv:2409.15371)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.core import checks
from spectral_ops.functional import blocksum, bone_update


@dataclass
class BoneConfig(AdapterConfig):
    """Bone under the field names of PEFT's MissConfig; see :class:`AdapterConfig` for the common ones.

    r: shards of the inputs, the rows of D. miss_dropout: on the adapter branch. init_weights: True (D = 0), False
    (Kaiming), or "mini" (D = 0 and only ``mini_r`` columns, shared by the outputs o mod mini_r).
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True

    peft_type: ClassVar[str] = "MISS"
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "all", "MiSS_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.probability(self._field("miss_dropout"), self.miss_dropout)
        checks.integer(self._field("mini_r"), self.mini_r, 1, None, "columns of a mini adapter")
        if not isinstance(self.init_weights, bool) and self.init_weights != "mini":
            self.wrong("init_weights", self.init_weights, 'True, False or "mini" (Bat is a method of its own)')

    @property
    def dropout(self) -> float:
        return self.miss_dropout


class BoneLinear(AdapterLinear):
    """A linear layer with Bone adapters: ``miss_block`` D [r, d], or [r, mini_r], per adapter."""

    config_type = BoneConfig
    tensor_keys = {"miss_block": "miss_block"}

    @classmethod
    def shapes(cls, config, d, k):
        if config.r > k:
            config.wrong("r", config.r, f"at most in_features ({k})")
        mini = config.init_weights == "mini"
        if mini and d % config.mini_r:
            config.wrong("mini_r", config.mini_r, f"a divisor of out_features ({d})")
        return {"miss_block": (config.r, config.mini_r if mini else d)}

    def reset(self, name):
        if self.settings[name].init_weights is False:
            nn.init.kaiming_uniform_(self.miss_block[name], a=math.sqrt(5))
        else:
            nn.init.zeros_(self.miss_block[name])

    def adapted(self, x, name):
        p = self.settings[name].dropout if self.training else 0.0
        return self.fused(x, _linear, _update, self.parameter("miss_block", name), p)

    def delta(self, name):
        """ΔW[o, i] = D[i mod r, o mod q] [d, k]."""
        D = self.miss_block[name].detach()
        D = D.to(accumulate_dtype(D.dtype))
        rows = torch.arange(self.in_features, device=D.device) % D.shape[0]
        columns = torch.arange(self.out_features, device=D.device) % D.shape[1]
        return D[rows][:, columns].t()


def _linear(x, weight, bias, D, p):
    return blocksum.linear(x, weight, D, bias, p)


def _update(out, x, D, p):
    return bone_update(out, x, D, dropout_p=p, training=True)
