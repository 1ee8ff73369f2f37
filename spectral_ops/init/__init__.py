"""Spectral initialisers: which part of a weight's singular value decomposition an adapter starts from."""

from spectral_ops.init.svd import SpectralInit, spectral_factors, truncated_svd

__all__ = ["SpectralInit", "spectral_factors", "truncated_svd"]
