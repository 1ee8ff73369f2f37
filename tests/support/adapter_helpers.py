"""What the tests of adapters share: a small model, what it trains, and values that are nowhere zero."""

import torch
from torch import nn


def mlp(k: int, d: int, seed: int) -> nn.Sequential:
    """Two linear layers, "0" [d, k] and "2" [12, d]."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(k, d), nn.GELU(), nn.Linear(d, 12))


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def adamw(module: nn.Module, lr: float = 0.02) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained(module), lr=lr)


@torch.no_grad()
def perturb(module: nn.Module, scale: float = 0.1) -> nn.Module:
    """Random numbers on top of every trained parameter."""
    for p in trained(module):
        p += scale * torch.randn(p.shape).to(p.dtype)
    return module


@torch.no_grad()
def fill(module: nn.Module, scale: float = 0.1) -> nn.Module:
    """The same random numbers in place of every trained parameter, whatever was drawn before."""
    generator = torch.Generator().manual_seed(1)
    for p in trained(module):
        p.copy_(scale * torch.randn(p.shape, generator=generator))
    return module
