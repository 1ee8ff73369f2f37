"""Initialisers: which part of a weight an adapter starts from, and RoSA's mask."""

from spectral_ops.init.masks import topk_pattern
from spectral_ops.init.start import olora_factors
from spectral_ops.init.svd import SpectralInit, spectral_factors, truncated_svd
from spectral_ops.init.svd_cache import SVDFile, clear_svd_cache

__all__ = [
    "SVDFile",
    "SpectralInit",
    "clear_svd_cache",
    "olora_factors",
    "spectral_factors",
    "topk_pattern",
    "truncated_svd",
]
