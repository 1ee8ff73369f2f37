"""Launches LoRA-Dash's directions after so many optimizer steps: one hook on all torch optimizers counts them."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from spectral_ops.adapters.progress import progressing

_number = itertools.count()
_watched: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # in the order they were made, alike on all ranks
_hook = None


class Counts(nn.Module):
    """An int32 [1] per name that stays on the CPU, where to read it waits for nothing, and is in the state_dict.

    No buffer: DistributedDataParallel writes to buffers before every forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.held[name]

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.held[name] = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()

    def __delitem__(self, name: str) -> None:
        del self.held[name]

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def value(self, name: str) -> int:
        """The count; 0 for a fake tensor, which has none."""
        return int(self.held[name]) if type(self.held[name]) is torch.Tensor else 0

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination.update({prefix + name: tensor for name, tensor in self.held.items()})

    def _load_from_state_dict(self, state_dict, prefix, _metadata, strict, missing_keys, unexpected_keys, _errors):
        for name, tensor in self.held.items():
            if prefix + name in state_dict:
                tensor.copy_(state_dict[prefix + name])
            elif strict:
                missing_keys.append(prefix + name)
        if strict:
            keys = {prefix + name for name in self.held}
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in keys]


def watch(layer) -> None:
    """Count for ``layer`` as long as it lives."""
    global _hook
    _watched[next(_number)] = layer
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer, *_args) -> None:
    """A step counts for a layer's active adapter where the optimizer holds its ``dash_delta``."""
    waiting = [layer for layer in list(_watched.values()) if layer.active in layer.settings and not layer.launched()]
    if not waiting:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    waiting = [layer for layer in waiting if id(layer.dash_delta[layer.active]) in held]
    due = []
    for layer in waiting:
        layer.dash_steps[layer.active].add_(1)
        if layer.launched():
            due.append((f"{layer.out_features}x{layer.in_features}", layer))
    if due:
        for _, layer in progressing(due, "LoRA-Dash", None):
            layer.launch()
