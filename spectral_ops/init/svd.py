"""PiSSA and MiLoRA: an adapter that starts as r singular triplets of the weight it adapts (METHODS 2).

    W = U S Vᵀ      B = U_r √(S_r / γ)      A = √(S_r / γ) V_rᵀ      so that γ B A = U_r S_r V_rᵀ

The base keeps the rest, W - γBA. PiSSA (arXiv:2404.02948) takes the largest triplets, exactly or by a randomized
decomposition; MiLoRA (arXiv:2406.09044) the smallest or, in its other modes, the middle ones, the largest, or r random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spectral_ops._library import accumulate_dtype
from spectral_ops.functional import checks

MODES = ("max", "min", "mid", "random")
OVERSAMPLING = 8  # extra columns of the randomized range finder: its error then nears that of the exact product
NAMES = '"pissa", "pissa_niter_N" (N >= 0), "milora", "milora_min", "milora_mid", "milora_max" or "milora_random"'


@dataclass(frozen=True)
class SpectralInit:
    """Which triplets an initialisation takes: one of :data:`MODES`; with power iterations (niter) if randomized."""

    mode: str
    niter: int | None = None

    @classmethod
    def parse(cls, name: Any) -> SpectralInit | None:
        """The initialisation PEFT-style ``init_lora_weights`` names, or None where it names no spectral one."""
        if name == "pissa":
            return cls("max")
        if name == "milora":
            return cls("min")
        if isinstance(name, str) and name.startswith("milora_") and name.removeprefix("milora_") in MODES:
            return cls(name.removeprefix("milora_"))
        if isinstance(name, str) and name.startswith("pissa_niter_"):
            count = name.removeprefix("pissa_niter_")
            return cls("max", int(count)) if count.isascii() and count.isdigit() else None
        return None


def truncated_svd(weight, r, *, mode="max", niter=None):
    """r singular triplets of ``weight``: U [d, r], S [r], Vᵀ [r, k], in float32 (float64 for a float64 weight).

    Args:
        weight: [d, k], any floating dtype and strides.
        r: 1 <= r <= min(d, k).
        mode: "max" (largest), "min" (smallest), "mid" (centred), "random" (r drawn from torch's generator).
        niter: None for the exact decomposition, else the number of power iterations of the randomized one (mode "max"
            only; Halko, Martinsson and Tropp, arXiv:0909.4061), which draws from torch's generator for the device.
    """
    checks.tensor("weight", weight, "[out_features, in_features]", 2)
    checks.integer("r", r, 1, min(weight.shape), "at most the smaller side of weight")
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, wanted one of {', '.join(map(repr, MODES))}")
    matrix = weight.detach().to(accumulate_dtype(weight.dtype))
    if niter is not None:
        checks.integer("niter", niter, 0, None, "power iterations")
        if mode != "max":
            raise ValueError(f"niter: got {niter} with mode {mode!r}, wanted None (it finds the largest only)")
        U, S, V = torch.svd_lowrank(matrix, q=min(r + OVERSAMPLING, *matrix.shape), niter=niter)
        return U[:, :r], S[:r], V[:, :r].t()
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    if mode == "random":
        chosen = torch.randperm(len(S), device=S.device)[:r].sort().values
        return U[:, chosen], S[chosen], Vh[chosen]
    start = {"max": 0, "min": len(S) - r, "mid": (len(S) - r) // 2}[mode]
    part = slice(start, start + r)
    return U[:, part], S[part], Vh[part]


def spectral_factors(weight, r, scale, init):
    """A [r, k] and B [d, r] with scale * B A equal to the triplets of ``weight`` that ``init`` chooses.

    ``scale`` is γ > 0; ``init`` is a :class:`SpectralInit`. float32, float64 for a float64 weight. METHODS 2.
    """
    checks.number("scale", scale)
    if scale <= 0:
        raise ValueError(f"scale: got {scale!r}, wanted a positive number (the factors are scaled by its root)")
    U, S, Vh = truncated_svd(weight, r, mode=init.mode, niter=init.niter)
    root = (S / scale).sqrt()
    return root.unsqueeze(1) * Vh, U * root
