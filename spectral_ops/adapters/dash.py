"""LoRA-Dash: y = x Wᵀ + γ drop(x) Aᵀ Bᵀ + drop(x) V diag(Δσ) Uᵀ + b (METHODS 1.1, 2; arXiv:2409.01035).

LoRA alone at first. After ``launch_step`` optimizer steps the singular directions of W that the adapter has changed the
most, relative to their singular values, are frozen as U and V, and a coordinate Δσ trains along each. Both terms are
one product of rank r + s with the core [1 | Δσ/γ]. Before the launch U and V are zero, so that Δσ has the gradient zero
and nothing about the layer's forward changes when it comes: no new graph, no parameter that the optimizer lacks.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from spectral_ops.adapters.lora import LoRAConfig, LoRALinear
from spectral_ops.adapters.lowrank import LowRankLinear
from spectral_ops.adapters.progress import progressing
from spectral_ops.core import checks
from spectral_ops.functional import task_direction_scores
from spectral_ops.init import truncated_svd


@dataclass
class LoRADashConfig(LoRAConfig):
    """LoRA's fields; launch_step: t, the optimizer steps of LoRA alone; directions: s, how many are chosen."""

    launch_step: int = 100
    directions: int = 8

    peft_type: ClassVar[str] = "LORA_DASH"
    peft_flags: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.changes_base:
            wanted = 'True, False or "gaussian" (the directions are those of the whole weight)'
            self.wrong("init_lora_weights", self.init_lora_weights, wanted)
        check_dash(self)


def check_dash(config: Any) -> None:
    """Raise TypeError/ValueError where the fields of LoRA-Dash make no sense."""
    for field, why in (("launch_step", "optimizer steps before the launch"), ("directions", "singular directions")):
        checks.integer(f"{type(config).__name__}.{field}", getattr(config, field), 1, None, why)


class StepCounts(nn.Module):
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


class DashLinear(LowRankLinear):
    """LoRA-Dash's directions beside a method of low rank, which a subclass has as its second base.

    ``dash_delta`` Δσ [s] trains. ``dash_U`` [d, s] and ``dash_V`` [s, k] do not. ``dash_steps`` int32 [1] counts the
    optimizer steps up to the launch. A state_dict and a file hold all four.

    A step counts where the torch.optim.Optimizer holds ``dash_delta`` and the adapter is active, whatever the number of
    backwards before it. The last one launches; :meth:`launch` does so at once. A subclass has :attr:`dash_keys` in its
    ``tensor_keys``.
    """

    dash_keys = {"dash_delta": "dash_delta", "dash_U": "dash_U", "dash_V": "dash_V"}
    index_keys = {"dash_steps": "dash_steps"}

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.dash_steps = StepCounts()
        _watch(self)

    def __setstate__(self, state):
        super().__setstate__(state)
        _watch(self)

    @classmethod
    def shapes(cls, config, d, k):
        s = config.directions
        if s > min(d, k):
            config.wrong("directions", s, f"at most {min(d, k)} (a weight [{d}, {k}] has no more)")
        return {**super().shapes(config, d, k), "dash_delta": (s,), "dash_U": (d, s), "dash_V": (s, k)}

    @classmethod
    def index_shapes(cls, config, d, k):
        return {**super().index_shapes(config, d, k), "dash_steps": (1,)}

    def admit(self, config):
        self.readable("LoRA-Dash's decomposition")
        super().admit(config)

    def reset(self, name):
        super().reset(name)
        for key in self.dash_keys:
            nn.init.zeros_(getattr(self, key)[name])

    def trainable(self, name):
        return tuple(key for key in super().trainable(name) if key not in ("dash_U", "dash_V"))

    # the product

    def factors(self, name):
        """[A; V] [r + s, k], [B | U] [d, r + s], and the diagonal [core | Δσ/γ] [r + s]."""
        A, B, core = super().factors(name)
        delta = self.dash_delta[name] / self.scale(name)
        core = F.pad(delta, (A.shape[0], 0), value=1.0) if core is None else torch.cat([core, delta])
        return torch.cat([A, self.dash_V[name]]), torch.cat([B, self.dash_U[name]], 1), core

    # the launch

    def launched(self, adapter_name: str | None = None) -> bool:
        """Whether an adapter (default: the active one) has its directions."""
        name = self._known(adapter_name)
        return self.dash_steps.value(name) >= self.settings[name].launch_step

    @torch.no_grad()
    def launch(self, adapter_name: str | None = None) -> None:
        """Choose the directions of an adapter (default: the active one) now, by what it has learnt so far.

        Decomposes the base weight exactly (dequantised, where it is quantised), without what is merged into it.
        """
        name = self._known(adapter_name)
        config, (A, B, core) = self.settings[name], super().factors(name)
        weight = self.unmerged() if self.merged is not None else self.decomposable("a launch")
        weight, A, B = (_whole(t) for t in (weight, A, B if core is None else B * core))
        U, S, Vh = truncated_svd(weight, min(weight.shape))
        chosen = task_direction_scores(A, B, U, S, Vh, self.scale(name)).topk(config.directions).indices
        _write(self.dash_U[name], U[:, chosen])
        _write(self.dash_V[name], Vh[chosen])
        self.dash_delta[name].zero_()
        self.dash_steps[name].fill_(config.launch_step)

    def describe_adapter(self, name):
        config = self.settings[name]
        state = "launched" if self.launched(name) else f"launch after {config.launch_step} steps"
        return f"{super().describe_adapter(name)}, directions={config.directions} ({state})"


class LoRADashLinear(DashLinear, LoRALinear):
    """A linear layer with LoRA-Dash adapters: LoRA's tensors, and those of :class:`DashLinear`."""

    config_type = LoRADashConfig
    tensor_keys = {**LoRALinear.tensor_keys, **DashLinear.dash_keys}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that FSDP2 has sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _write(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy ``value``, or this rank's share of it."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


# One hook on all torch optimizers counts their steps.

_number = itertools.count()
_watched: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # in the order they were made, alike on all ranks
_hook = None


def _watch(layer) -> None:
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
