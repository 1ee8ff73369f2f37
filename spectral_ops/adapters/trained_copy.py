"""Modules trained whole (``modules_to_save``): a copy per adapter beside the untouched original."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import nn


class TrainedCopy(nn.Module):
    """Runs the active adapter's copy of a module; the original where it has none, or while adapters are disabled."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.merged: str | None = None
        self._disabled = 0
        self.train(original.training)

    @property
    def adapter_names(self) -> list[str]:
        return list(self.copies)

    def add_adapter(self, name: str, source: nn.Module | None = None) -> None:
        """A copy of the original, trainable once it is active; with the very weight of ``source`` where it is given."""
        new = copy.deepcopy(self.original_module).requires_grad_(False)
        if source is not None:
            new.weight = source.weight
        self.copies[name] = new

    def remove_adapter(self, name: str) -> None:
        if name in self.copies:
            del self.copies[name]
        self.active = None if self.active == name else self.active

    def set_active(self, name: str) -> None:
        self.active = name
        self.train_only([name])

    def train_only(self, names: Collection[str]) -> None:
        """Let the copies of these adapters train, and no other."""
        for owner, module in self.copies.items():
            module.requires_grad_(owner in names)

    def bare(self) -> nn.Module:
        """What stays where the last adapter goes: the original, or the copy that is merged."""
        return self.original_module if self.merged is None else self.copies[self.merged]

    def merge(self, *, keep_base: bool = False) -> None:
        """Let the active copy stand for the original, which stays as it is, until :meth:`unmerge`."""
        self.merged = self.active

    def unmerge(self) -> None:
        self.merged = None

    @property
    def current(self) -> nn.Module:
        """The module that runs now."""
        return self.original_module if self._disabled or self.active not in self.copies else self.copies[self.active]

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the model reads from the module it put here, such as lm_head.weight
            if name in ("original_module", "copies"):
                raise
            return getattr(self.current, name)

    def forward(self, *args, **kwargs):
        return self.current(*args, **kwargs)
