"""Initialisations that start an adapter from a part of the weight it adapts, which the base gives up (METHODS 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spectral_ops._library import accumulate_dtype
from spectral_ops.core import checks
from spectral_ops.init import svd

NAMES = f'{svd.NAMES}, or "olora"'


@dataclass(frozen=True)
class OLoRAInit:
    """The first columns of Q and rows of R in W = Q R (arXiv:2406.01775)."""


def parse(name: Any) -> svd.SpectralInit | OLoRAInit | None:
    """The initialisation that PEFT-style ``init_lora_weights`` names, or None where that leaves W alone."""
    return OLoRAInit() if name == "olora" else svd.SpectralInit.parse(name)


def olora_factors(weight, r):
    """A [r, k] = R[:r] and B [d, r] = Q[:, :r] of the decomposition W = Q R of ``weight`` [d, k].

    1 <= r <= min(d, k); float32, float64 for a float64 weight. They are not divided by γ: the base keeps W - γ B A, as
    PEFT's does, so that W is there as a whole at the start and B has orthonormal columns. Raises TypeError/ValueError.
    """
    checks.tensor("weight", weight, "[out_features, in_features]", 2)
    checks.integer("r", r, 1, min(weight.shape), "at most the smaller side of weight")
    Q, R = torch.linalg.qr(weight.detach().to(accumulate_dtype(weight.dtype)))
    return R[:r], Q[:, :r]


def factors(weight, r, scale, init):
    """A and B that ``init``, as :func:`parse` gives it, starts from; the base gives up scale * B A."""
    if isinstance(init, OLoRAInit):
        return olora_factors(weight, r)
    return svd.spectral_factors(weight, r, scale, init)
