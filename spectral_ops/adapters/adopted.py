"""A transformers model's class while it has adapters: its own with :class:`Adapted` in front, as fully_shard does it.

pretrained.py stands on what attaches adapters, which calls this: so it leaves its mixin here instead of being imported.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from spectral_ops.adapters.base import AdapterLinear

mixin: type = object


@functools.cache
def adapted_class(original: type) -> type:
    """``original`` with the mixin in front, under the same name; one class for each."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original)(original.__name__, (mixin, original), names)


def original_class(cls: type) -> type | None:
    """The class that :func:`adapted_class` made ``cls`` of; None for any other class."""
    return cls.__bases__[1] if cls.__bases__[0] is mixin and mixin is not object else None


def adopt(root: nn.Module) -> None:
    """Give transformers models that have adapters the mixin's methods: ``root``, or the outermost ones in it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or isinstance(root, mixin):
        return
    if not isinstance(root, modeling.PreTrainedModel):
        for child in root.children():
            adopt(child)
    elif any(isinstance(module, AdapterLinear) for module in root.modules()):
        root.__class__ = adapted_class(type(root))


def release(root: nn.Module) -> None:
    """Give models without adapters their own classes back. One that fully_shard has put over the mixin stays."""
    for module in root.modules():
        if (original := original_class(type(module))) is not None:
            module.__class__ = original


def restored(original: type) -> Any:
    """An empty instance, for copies and pickles: these know the original class by its name."""
    cls = adapted_class(original)
    return cls.__new__(cls)
