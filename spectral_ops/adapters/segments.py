"""Several LoRA adapters in one forward: each row of a batch has its own, over one base product (METHODS 1.7)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.lora import LoRALinear
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.tree import Unit, adapter_configs, adapter_layers, units, unwrap
from spectral_ops.core import checks

BASE = "__base__"  # PEFT's name for no adapter
CHECKPOINT = "_gradient_checkpointing_func"  # where transformers keeps the function that checkpoints a block


class Segments:
    """What :func:`segments` returns: a block in which every LoRA layer of the model reads ids by row."""

    def __init__(self, model: nn.Module, mixed: list[tuple[LoRALinear, tuple[tuple[str, ...], torch.Tensor]]]) -> None:
        self.model = model
        self.mixed = mixed
        self._open: list[Any] = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The ids on every layer; what was there comes back at the end, after an exception too."""
        before = [layer.mixed for layer, _ in self.mixed]
        try:
            for layer, mixed in self.mixed:
                layer.mixed = mixed
            yield
        finally:
            for (layer, _), mixed in zip(self.mixed, before, strict=True):
                layer.mixed = mixed

    def bind(self, function: Callable) -> Callable:
        """``function`` under these ids whenever it is called: what to give to torch.utils.checkpoint, so that the
        recomputation in backward reads the ids of its own forward."""

        @functools.wraps(function, updated=())
        def bound(*args, **options):
            with self.applied():
                return function(*args, **options)

        return bound

    def _checkpoint(self, checkpoint: Callable, function: Callable, *args, **options):
        return checkpoint(self.bind(function), *args, **options)

    @contextmanager
    def _checkpoints(self) -> Iterator[None]:
        """Blocks that transformers checkpoints keep the ids for their recomputation."""
        found = [
            (module, module.__dict__[CHECKPOINT]) for module in self.model.modules() if CHECKPOINT in module.__dict__
        ]
        try:
            for module, checkpoint in found:
                module.__dict__[CHECKPOINT] = functools.partial(self._checkpoint, checkpoint)
            yield
        finally:
            for module, checkpoint in found:
                module.__dict__[CHECKPOINT] = checkpoint

    @contextmanager
    def _block(self) -> Iterator[Segments]:
        with self._checkpoints(), self.applied():
            yield self
        if torch.is_grad_enabled():
            for layer, _ in self.mixed:
                layer.was_mixed = True

    def __enter__(self) -> Segments:
        self._open.append(self._block())
        return self._open[-1].__enter__()

    def __exit__(self, *error) -> bool | None:
        return self._open.pop().__exit__(*error)


def segments(model, segment_ids, adapter_names: Sequence[str] | None = None) -> Segments:
    """Run each row of a batch under an adapter of its own inside the ``with`` block, over one product with the base.

    Args:
        model: with LoRA adapters attached (LoRA, rsLoRA); layers that lack one of them run their base for its rows.
        segment_ids: int32 or int64, one id per sequence [batch] or per token [batch, tokens]: the adapter's index in
            ``adapter_names``, -1 for none. Or a name for each sequence, "__base__" for none, as PEFT writes it.
        adapter_names: which adapters; None where ``segment_ids`` are names.

    Gradients reach every adapter whose parameters require them: see :func:`train_adapters`. Under gradient
    checkpointing, blocks that transformers checkpoints are recomputed with their own ids; give torch.utils.checkpoint
    ``bind(function)`` of what this returns, or run backward inside the block (a recomputation after it raises
    RuntimeError). Raises TypeError/ValueError that name the argument, and for layers of other methods, layers whose
    initialisation changed their base, merged adapters, modules_to_save and unlike dropouts. METHODS 1.7.
    """
    root = unwrap(model)
    device = next((layer.weight.device for layer in adapter_layers(root).values()), torch.device("cpu"))
    ids, names = _ids(segment_ids, adapter_names, device)
    known = adapter_configs(root)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"adapter_names: got {unknown[0]!r}, wanted one of {sorted(known)}")
    for path, unit in units(root).items():
        _check(path, unit, names)
    lookup = functools.cache(functools.partial(_for_layer, ids, names))
    layers = adapter_layers(root).values()
    return Segments(root, [(m, lookup(tuple(n for n in names if n in m.settings), m.weight.device)) for m in layers])


def _ids(segment_ids, adapter_names, device) -> tuple[torch.Tensor, list[str]]:
    """The ids as a tensor, and the names they index."""
    if isinstance(segment_ids, (list, tuple)) and all(isinstance(name, str) for name in segment_ids):
        if adapter_names is not None:
            raise ValueError(f"adapter_names: got {adapter_names!r}, wanted None beside segment_ids that are names")
        names = [name for name in dict.fromkeys(segment_ids) if name != BASE]
        places = {BASE: -1} | {name: s for s, name in enumerate(names)}
        return torch.tensor([places[name] for name in segment_ids], dtype=torch.int32, device=device), names
    if not isinstance(segment_ids, torch.Tensor) or segment_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"segment_ids: got {checks.describe(segment_ids)}, wanted an int32 or int64 tensor, or a list of names"
        )
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names: got {adapter_names!r}, wanted a list of names for the ids to index")
    if len(set(adapter_names)) < len(adapter_names):
        raise ValueError(f"adapter_names: got {adapter_names!r}, wanted each name once")
    if segment_ids.device.type == "cpu" and segment_ids.numel():
        low, high = (int(end) for end in segment_ids.aminmax())
        if low < -1 or high >= len(adapter_names):
            wanted = f"-1 (no adapter) to {len(adapter_names) - 1}"
            raise ValueError(f"segment_ids: got values from {low} to {high}, wanted {wanted}")
    return segment_ids, list(adapter_names)


def _check(path: str, unit: Unit, names: Sequence[str]) -> None:
    """Raise ValueError where a layer cannot run rows under different adapters."""
    if not isinstance(unit, AdapterLinear):
        if any(name in unit.adapter_names for name in names):
            how = "trained whole (modules_to_save)" if isinstance(unit, TrainedCopy) else "whose rows train"
            raise ValueError(f"model: got {path!r}, {how}, wanted LoRA layers alone")
        return
    if type(unit) is not LoRALinear or unit.initial_A:
        kind = "whose initialisation changed its base" if type(unit) is LoRALinear else f"a {type(unit).__name__}"
        raise ValueError(f"model: got {path!r}, {kind}, wanted LoRA layers over their original base")
    if unit.merged is not None:
        raise ValueError(f"model: got {path!r} with {unit.merged!r} merged, wanted unmerged layers")
    dropouts = {unit.settings[name].dropout for name in names if name in unit.settings}
    if len(dropouts) > 1:
        raise ValueError(f"adapter_names: got lora_dropout {sorted(dropouts)} at {path!r}, wanted one for all of them")


def _for_layer(ids, names, held: tuple[str, ...], device) -> tuple[tuple[str, ...], torch.Tensor]:
    """(held, ids): ids on ``device`` that index ``held`` in place of ``names``; -1 for an adapter that it lacks."""
    ids = ids.to(device)
    if len(held) < len(names):
        places = [held.index(name) if name in held else -1 for name in names]
        table = torch.tensor([*places, -1], dtype=ids.dtype, device=device)
        ids = table[torch.where((ids >= 0) & (ids < len(names)), ids, len(names))]
    return held, ids


def train_adapters(model, adapter_names: Sequence[str]):
    """Let the parameters of several adapters train, and of no other; the active adapter stays what it is.

    :func:`set_adapter` trains the one it makes active: call this after it. Returns the model.
    """
    root = unwrap(model)
    known = adapter_configs(root)
    if unknown := [name for name in adapter_names if name not in known]:
        raise ValueError(f"adapter_names: got {unknown[0]!r}, wanted one of {sorted(known)}")
    for unit in units(root).values():
        unit.train_only(adapter_names)
    return model
