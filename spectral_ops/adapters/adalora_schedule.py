"""Which triplets AdaLoRA keeps, step by step (METHODS 1.6, 2; arXiv:2303.10512).

The budget of kept triplets starts at b₀, all there are, and falls to b_T = target_r a layer:

    b(t) = b_T + (b₀ - b_T) (1 - (t - tinit) / (total_step - tfinal - tinit))³,  tinit < t <= total_step - tfinal

Every deltaT optimizer steps the b₀ - b(t) triplets of lowest importance get E = 0. They may come back until step
total_step - tfinal. From then on the last choice is applied after every step. Importance is read from the gradients
that the optimizer has just used: after step(), before zero_grad(). Under FSDP2 each rank keeps its share of the
running sums, and all of them add the scores up in one order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.adalora import AdaLoRALinear
from spectral_ops.adapters.tree import adapter_configs, adapter_layers, layers_of, unwrap
from spectral_ops.functional.importance import importance_prune_op, importance_update_op

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Part:
    """What this process holds of the layers' parameters: all of them, or its rows of each under FSDP2."""

    def __init__(self, params: Sequence[Triple]) -> None:
        self.whole = [p for layer in params for p in layer]
        self.group, self.shards, self.first = None, [], []
        self.local, start = self.whole, 0
        sharded = [hasattr(p, "to_local") for p in self.whole]
        if any(sharded):
            if not all(sharded):
                raise ValueError("model: got AdaLoRA parameters of which some are sharded, wanted all or none")
            self._split()
        for i in range(0, len(self.whole), 3):
            self.first.append(start + (self.shards[i + 1] if self.shards else 0))
            start += self.whole[i + 1].shape[1]
        self.E = self.local[2::3]

    def _split(self) -> None:
        from torch.distributed.tensor import Replicate, Shard

        mesh, placements = self.whole[0].device_mesh, self.whole[0].placements
        split = [i for i, placement in enumerate(placements) if type(placement) is Shard]
        if any(p.placements != placements or p.device_mesh != mesh for p in self.whole) or any(
            placement not in (Shard(0), Replicate()) for placement in placements
        ):
            raise ValueError(f"model: got AdaLoRA parameters placed as {placements}, wanted one mesh, split by rows")
        self.local = [p.to_local() for p in self.whole]
        if len(split) > 1:
            raise ValueError(f"model: got AdaLoRA parameters placed as {placements}, wanted one split by rows")
        if not split:
            return
        self.group, size, rank = mesh.get_group(split[0]), mesh.size(split[0]), mesh.get_local_rank(split[0])
        for i in range(0, len(self.whole), 3):
            A, B, E = self.whole[i : i + 3]
            self.shards += [min(rank * -(-t.shape[0] // size), t.shape[0]) for t in (A, E)] + [B.shape[0]]

    def grads(self) -> list[torch.Tensor]:
        """The gradients, zero where there is none."""
        grads = [p.grad for p in self.whole]
        if all(g is None for g in grads):
            raise ValueError("model: got no gradient, wanted this called after optimizer.step() and before zero_grad()")
        grads = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.local, grads, strict=True)]

    def total(self, scores: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's scores. All ranks add in the same order, so all get the same bits."""
        if self.group is None:
            return scores
        parts = [torch.empty_like(scores) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, scores, group=self.group)
        return torch.stack(parts).sum(0)


class RankAllocator:
    """The running importance of a model's triplets, and the choice made of it.

    config: AdaLoRAConfig or PEFT's; params: returns (lora_A, lora_B, lora_E) of every layer.
    """

    def __init__(self, config: Any, params: Callable[[], Sequence[Triple]]) -> None:
        self.config, self._params = config, params
        self.forget()
        self.scores: torch.Tensor | None = None  # [R], of the last choice
        self.count = 0  # how many it pruned
        self.chosen: list[int] = []  # of how many triplets a layer

    def forget(self) -> None:
        """Start the running importance anew."""
        self.exp_avg: torch.Tensor | None = None
        self.uncertainty: torch.Tensor | None = None

    @property
    def last(self) -> int:
        """The step whose choice stays."""
        return self.config.total_step - self.config.tfinal

    def ranks(self) -> list[int]:
        """Triplets of each layer."""
        return [B.shape[1] for _, B, _ in self._params()]

    def budget(self, step: int, ranks: Sequence[int] | None = None) -> int:
        """How many triplets are kept after ``step``."""
        c, ranks = self.config, self.ranks() if ranks is None else ranks
        start, target = sum(ranks), min(c.target_r * len(ranks), sum(ranks))
        if step <= c.tinit:
            return start
        left = max(1 - (step - c.tinit) / (self.last - c.tinit), 0.0)
        return int((start - target) * left**3 + target)

    def allocates(self, step: int) -> bool:
        """Whether a choice is made after ``step``."""
        return step == self.last or (self.config.tinit < step < self.last and step % self.config.deltaT == 0)

    @property
    def keep(self) -> torch.Tensor | None:
        """Which triplets the last choice kept [R] bool, on the device; None before the first."""
        return None if self.scores is None else importance_prune_op(self.scores, [], [], self.count)

    @torch.no_grad()
    def update(self, step: int) -> bool:
        """Take in the gradients of optimizer step ``step``, and choose where it is time to; whether it did."""
        part, chooses = Part(self._params()), self.allocates(step)
        if step < self.last:
            scores = self._importance(part, part.grads(), self.config.beta1, self.config.beta2, chooses)
        elif step == self.last:
            if self.exp_avg is None:
                raise ValueError(f"step: got {step}, the last choice, and no step before it, wanted every step in turn")
            none = [torch.zeros_like(p) for p in part.local]
            scores = self._importance(part, none, 1.0, 1.0, True)  # changes nothing
            self.forget()
        elif self.scores is None:
            raise ValueError(f"step: got {step} and no choice at {self.last}, wanted every step in turn")
        if chooses:
            self.chosen = [B.shape[1] for B in part.whole[1::3]]
            self.scores, self.count = part.total(scores), max(scores.numel() - self.budget(step, self.chosen), 0)
        if chooses or step > self.last:
            importance_prune_op(self.scores, part.E, part.first, self.count)
        return chooses

    def _importance(self, part: Part, grads, beta1: float, beta2: float, score: bool) -> torch.Tensor:
        if self.exp_avg is None:
            like = part.local[0]
            n, wide = sum(p.numel() for p in part.local), accumulate_dtype(like.dtype)
            self.exp_avg = torch.zeros(n, dtype=wide, device=like.device)
            self.uncertainty = torch.zeros_like(self.exp_avg)
        return importance_update_op(self.exp_avg, self.uncertainty, part.local, grads, part.shards, beta1, beta2, score)

    def pattern(self, names: Sequence[str]) -> dict[str, list[bool]]:
        """The last choice by layer; waits for the device."""
        kept = self.keep.split(self.ranks())
        return {name: k.tolist() for name, k in zip(names, kept, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The running importance (of this process's share under FSDP2) and the last choice."""
        names = ("exp_avg", "uncertainty", "scores")
        return {name: None if (t := getattr(self, name)) is None else t.clone() for name in names} | {
            "count": self.count
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        device = Part(self._params()).local[0].device
        for name in ("exp_avg", "uncertainty", "scores"):
            setattr(self, name, None if state[name] is None else state[name].to(device, copy=True))
        self.count = int(state["count"])


class AdaLoRASchedule:
    """Prunes the triplets of an AdaLoRA adapter by their importance while it trains.

    Args:
        model: with an AdaLoRA adapter attached; its config says when and how many.
        optimizer: a torch.optim.Optimizer whose steps are counted from now on; None: call :meth:`update` after each
            step, before zero_grad.
        adapter_name: default, the active adapter.

    Nothing waits for the device but the last choice, which becomes the config's ``rank_pattern``; from there on a file
    holds the triplets that are left. Under FSDP2 every rank must make and step it.
    """

    def __init__(self, model, optimizer=None, adapter_name=None):
        self.model = unwrap(model)
        self.adapter_name, self._layers = layers_of(self.model, AdaLoRALinear, adapter_name, "an AdaLoRA")
        self.config = adapter_configs(self.model)[self.adapter_name]
        self.steps = 0
        self.allocator = RankAllocator(self.config, self._params)
        self._handle = None
        if optimizer is not None:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"optimizer: got {type(optimizer).__name__}, wanted a torch.optim.Optimizer or None")
            self._handle = optimizer.register_step_post_hook(lambda *_: self.update())

    def _params(self) -> list[Triple]:
        keys = ("lora_A", "lora_B", "lora_E")
        return [tuple(getattr(layer, key)[self.adapter_name] for key in keys) for layer in self._layers.values()]

    @property
    def budget(self) -> int:
        """How many triplets of all layers the step taken last may keep."""
        return self.allocator.budget(self.steps)

    @property
    def keep(self) -> dict[str, torch.Tensor] | None:
        """Which triplets of each layer [r] bool the last choice kept, on the device; None before the first."""
        kept = self.allocator.keep
        split = () if kept is None else kept.split(self.allocator.ranks())
        return None if kept is None else dict(zip(self._layers, split, strict=True))

    def update(self, step: int | None = None) -> None:
        """Say that the optimizer has taken a step, number ``step`` (one more than the last), counted from 1."""
        self.steps = self.steps + 1 if step is None else step
        self.allocator.update(self.steps)
        if self.steps == self.allocator.last:
            self._freeze()

    def _freeze(self) -> None:
        left = self.allocator.pattern(list(self._layers))
        whole = {f"{path}.lora_E": kept for path, kept in left.items()}
        for key, held in (self.allocator.config.rank_pattern or {}).items():  # of a file, which held some of them only
            kept = iter(whole.get(key, []))
            whole[key] = [h and next(kept, False) for h in held]
        self.config = dataclasses.replace(self.config, rank_pattern=whole)
        for path, layer in adapter_layers(self.model).items():
            if self.adapter_name in layer.settings:
                layer.freeze(self.adapter_name, self.config, path, left.get(path, []))

    def close(self) -> None:
        """Stop counting."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """How far the schedule is, the running importance (under FSDP2, this rank's) and the last choice."""
        return {"steps": self.steps, **self.allocator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; load the model's state first."""
        self.allocator.load_state_dict(state)
        self.steps = int(state["steps"])
        if self.steps >= self.allocator.last:
            self._freeze()
