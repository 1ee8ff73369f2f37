"""LoRA-Dash: y = x Wᵀ + γ drop(x) Aᵀ Bᵀ + drop(x) V diag(Δσ) Uᵀ + b (METHODS 1.1, 2; arXiv:2409.01035).

LoRA alone at first. After ``launch_step`` optimizer steps the singular directions of W that the adapter has changed the
most, relative to their singular values, are frozen as U and V, and a coordinate Δσ trains along each. Both terms are
one product of rank r + s with the core [1 | Δσ/γ]. Before the launch U and V are zero, so that Δσ has the gradient zero
and nothing about the layer's forward changes when it comes: no new graph, no parameter that the optimizer lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from spectral_ops.adapters import launches
from spectral_ops.adapters.lora import LoRAConfig, LoRALinear
from spectral_ops.adapters.lowrank import LowRankLinear
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


class DashLinear(LowRankLinear):
    """What LoRA-Dash adds to a method of low rank: ``dash_delta`` Δσ [s], which trains, ``dash_U`` [d, s] and
    ``dash_V`` [s, k], which do not, and ``dash_steps`` int32 [1], the optimizer steps up to the launch.

    Every step of a torch.optim.Optimizer that holds ``dash_delta`` counts while its adapter is active, whatever the
    number of backwards before it, and the last one launches; :meth:`launch` does so at once. A state_dict and a file
    hold all of it. A subclass has the method as its second base, and :attr:`dash_keys` in its ``tensor_keys``.
    """

    dash_keys = {"dash_delta": "dash_delta", "dash_U": "dash_U", "dash_V": "dash_V"}
    index_keys = {"dash_steps": "dash_steps"}

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.dash_steps = launches.Counts()
        launches.watch(self)

    def __setstate__(self, state):
        super().__setstate__(state)
        launches.watch(self)

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

    def inner(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A [r, k], B [d, r] and the diagonal core [r] (None: ones) of the method that the directions join."""
        return super().factors(name)

    def factors(self, name):
        """[A; V] [r + s, k], [B | U] [d, r + s], and the diagonal [core | Δσ/γ] [r + s]."""
        A, B, core = self.inner(name)
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
        config, (A, B, core) = self.settings[name], self.inner(name)
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

    def inner(self, name):
        return self.lora_A[name], self.lora_B[name], None

    def scale(self, name):
        return self.settings[name].scaling


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that FSDP2 has sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _write(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy ``value``, or this rank's share of it."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
