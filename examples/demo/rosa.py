"""RoSA in plain PyTorch, as sparse fine-tuning code has it: the peer of `make demo METHOD=rosa`.

PEFT has no RoSA. This is the same mathematics without an operator of its own: S is scattered into a copy of W, and
autograd makes the dense gradient of that copy, from which S takes its entries. Nothing in this file knows spectral_ops.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class PlainRoSA(nn.Module):
    """y = x (W + S)ᵀ + scale (x Aᵀ) Bᵀ + b, S with ``nnz`` entries at the places ``index`` of the flattened W."""

    def __init__(self, base: nn.Linear, r: int, scale: float, nnz: int):
        super().__init__()
        self.base_layer, self.scale = base, scale
        d, k = base.weight.shape
        wide = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(r, k, **wide)), nn.Parameter(torch.zeros(d, r, **wide))
        self.values = nn.Parameter(torch.zeros(nnz, **wide))  # from the start, so that the optimizer has them
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.index: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None  # while gradients are collected: the sum of their squares

    def forward(self, x):
        weight = self.base_layer.weight
        if self.scores is not None:
            weight = weight.detach().requires_grad_()
            weight.register_post_accumulate_grad_hook(self.collect)
        elif self.index is not None:
            weight = weight.flatten().index_add(0, self.index, self.values.to(weight.dtype)).view_as(weight)
        h = F.linear(x, self.lora_A.to(x.dtype))
        return F.linear(x, weight, self.base_layer.bias) + self.scale * F.linear(h, self.lora_B.to(x.dtype))

    def collect(self, weight: torch.Tensor) -> None:
        self.scores += weight.grad.float().square().flatten()
        weight.grad = None

    def start_collecting(self) -> None:
        self.scores = torch.zeros(self.base_layer.weight.numel(), device=self.values.device)

    def choose_mask(self) -> None:
        """The entries with the largest mean squared gradient."""
        self.index = self.scores.topk(len(self.values)).indices.sort().values
        self.scores = None


def attach(model, projections: list[str], *, r: int, scale: float, density: float):
    """Every projection of a frozen model as a :class:`PlainRoSA`; returns the model."""
    chosen = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in projections]
    for name, linear in chosen:
        parent, _, child = name.rpartition(".")
        d, k = linear.weight.shape
        setattr(model.get_submodule(parent), child, PlainRoSA(linear, r, scale, int(density * d * k)))
    return model


def layers(model) -> list[PlainRoSA]:
    return [m for m in model.modules() if isinstance(m, PlainRoSA)]


class Schedule:
    """LoRA alone for ``warmup`` optimizer steps, gradients for the mask in the next ``batches``, then S and LoRA."""

    def __init__(self, model, warmup: int, batches: int):
        self.layers, self.warmup, self.batches, self.steps = layers(model), warmup, batches, -1
        self.step()

    def step(self) -> None:
        """Called after every optimizer step."""
        self.steps += 1
        for layer in self.layers:
            if self.steps == self.warmup:
                layer.start_collecting()
            if self.steps == self.warmup + self.batches:
                layer.choose_mask()
