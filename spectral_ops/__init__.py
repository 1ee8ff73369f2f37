"""Fused adapter operators for parameter-efficient fine-tuning. The README is the way in."""

from spectral_ops import _loader, backends, functional
from spectral_ops.backends import BackendUnavailable, explain, use_backend
from spectral_ops.functional import *

_loader.load()
backends.activate()

__version__ = "0.1.0"
__all__ = [*functional.__all__, "BackendUnavailable", "explain", "use_backend"]
