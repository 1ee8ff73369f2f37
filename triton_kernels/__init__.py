"""Triton implementations, one module per operator stem; installed as ``spectral_ops.triton_kernels``.

Nothing here imports triton until an operator runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

# operator -> the module that holds its launcher, a function of the operator's name and arguments
OPERATORS: dict[str, str] = {}


def launcher(stem: str, name: str) -> Callable:
    """The launcher of operator ``name`` in ``triton_kernels/<stem>.py``."""
    return getattr(importlib.import_module(f"{__name__}.{stem}"), name)
