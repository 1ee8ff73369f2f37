"""PiSSA and MiLoRA: an adapter that starts as r singular triplets of the weight it adapts (METHODS 2).

    W = U S Vᵀ      B = U_r √(S_r / γ)      A = √(S_r / γ) V_rᵀ      so that γ B A = U_r S_r V_rᵀ

The base keeps the rest, W - γBA. PiSSA (arXiv:2404.02948) takes the largest triplets, exactly or by a randomized
decomposition; MiLoRA (arXiv:2406.09044) the smallest or, in its other modes, the middle ones, the largest, or r random.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from spectral_ops._library import accumulate_dtype
from spectral_ops.core import checks
from spectral_ops.init import svd_cache

MODES = ("max", "min", "mid", "random")
OVERSAMPLING = 16  # extra columns of the randomized range finder: twice 8 is a sixth of the error for a third more time
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
            only; Halko, Martinsson and Tropp, arXiv:0909.4061). Its sketch is fixed: the same weight on the same
            device gives the same triplets, and torch's generator is left alone.

    Computed on the weight's device, once: a weight that holds the same values finds the decomposition again, in memory
    (:func:`clear_svd_cache`) or in the file of an :func:`attach` with ``svd_cache_dir``. Raises TypeError/ValueError
    that name the argument.
    """
    checks.tensor("weight", weight, "[out_features, in_features]", 2)
    n = min(weight.shape)
    checks.integer("r", r, 1, n, "at most the smaller side of weight")
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, wanted one of {', '.join(map(repr, MODES))}")
    if niter is not None:
        checks.integer("niter", niter, 0, None, "power iterations")
        if mode != "max":
            raise ValueError(f"niter: got {niter} with mode {mode!r}, wanted None (it finds the largest only)")
    chosen = None
    if mode == "random":
        chosen = torch.randperm(n, device=weight.device)[:r].sort().values
    if not svd_cache.cacheable(weight):
        return _chosen(_decompose(weight, r, niter), r, mode, chosen)
    mark = svd_cache.fingerprint(weight)
    place = svd_cache.current()
    if place is None:
        return _chosen(_cached(weight, r, niter, mark), r, mode, chosen, weight.device)
    drawn = "" if chosen is None else hashlib.sha256(repr(chosen.tolist()).encode()).hexdigest()[:16]
    file, layer = place
    kind = f"{mode}{drawn} r={r} niter={niter}"
    found = file.get(layer, kind, mark)
    if found is not None:
        return tuple(t.to(weight.device) for t in found)
    triplets = _chosen(_cached(weight, r, niter, mark), r, mode, chosen, weight.device)
    file.put(layer, kind, mark, triplets)
    return triplets


def _cached(weight, r, niter, mark):
    """:func:`_decompose`, from memory where it has been asked for before; not to be written to."""
    key = (mark, weight.device.type, None if niter is None else (niter, r))
    triplets = svd_cache.cache.get(key)
    if triplets is None:
        triplets = _decompose(weight, r, niter)
        svd_cache.cache.put(key, triplets)
    return triplets


def _decompose(weight, r, niter):
    """Every triplet of ``weight`` exactly, or its r largest by ``niter`` power iterations."""
    matrix = weight.detach().to(accumulate_dtype(weight.dtype))
    if niter is None:
        return torch.linalg.svd(matrix, full_matrices=False)
    if matrix.shape[0] > matrix.shape[1]:
        V, S, Uh = _randomized(matrix.t(), r, niter)
        return Uh.t(), S, V.t()
    return _randomized(matrix, r, niter)


def _randomized(M, r, niter):
    """The r largest triplets of M [n, k], n <= k, by subspace iteration with M Mᵀ.

    One QR an iteration is enough: M Mᵀ spreads the columns no further than (σ₁/σ_q)². M Mᵀ itself is formed, [n, n],
    where that is faster (a thin product runs at about half the speed of a square one); it is rounded no worse than the
    two products it stands for, and the triplets are read from M.
    """
    (n, k), q = M.shape, min(r + OVERSAMPLING, M.shape[0])
    generator = None if M.is_meta else torch.Generator(M.device).manual_seed(0)
    Y = M @ torch.randn(k, q, generator=generator, dtype=M.dtype, device=M.device)
    gram = M @ M.t() if 2 * niter * q * (2 * k - n) > n * k else None
    for _ in range(niter):
        Q = torch.linalg.qr(Y).Q
        Y = M @ (M.t() @ Q) if gram is None else gram @ Q
    Q = torch.linalg.qr(Y).Q
    V, S, Ph = torch.linalg.svd(M.t() @ Q, full_matrices=False)  # tall: LAPACK takes half the time it does for wide
    return Q @ Ph[:r].t(), S[:r], V[:, :r].t()


def _chosen(triplets, r, mode, chosen, device=None):
    """The part of ``triplets`` that ``mode`` asks for, on ``device`` and nobody else's."""
    U, S, Vh = triplets
    start = {"max": 0, "random": 0, "min": len(S) - r, "mid": (len(S) - r) // 2}[mode]
    part = slice(start, start + r) if chosen is None else chosen.to(S.device)
    return tuple(t.to(device, copy=True) for t in (U[:, part], S[part], Vh[part]))


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
