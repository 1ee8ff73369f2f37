"""Small models and layers for the tests of adapters, what they train, and values that are nowhere zero."""

import pytest
import torch
from torch import nn


def mlp(k: int, d: int, seed: int) -> nn.Sequential:
    """Two linear layers, "0" [d, k] and "2" [12, d]."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(k, d), nn.GELU(), nn.Linear(d, 12))


class Conv1D(nn.Module):
    """transformers' layer of that name: weight [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def quantised(bits, dtype=torch.float32):
    """bitsandbytes' layer of 4 or 8 bits in a model of its own, where this machine runs it."""
    bnb = pytest.importorskip("bitsandbytes")
    if bits == 4:
        base = bnb.nn.Linear4bit(64, 64, compute_dtype=dtype, quant_type="nf4")
    else:
        base = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    torch.manual_seed(0)
    base.load_state_dict(nn.Linear(64, 64).state_dict())
    net = nn.Sequential(base.to("cpu"))  # this quantises
    try:
        net(torch.randn(2, 64, dtype=dtype))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this bitsandbytes does not run its {bits}-bit layer on the CPU: {error}")
    return net


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
