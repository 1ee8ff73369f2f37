"""The layers that ``bench`` times: for each method our function and its peers, on the same weight and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import spectral_ops

SCALE = 2.0  # lora_alpha / r
DENSITY = 0.006  # of RoSA's mask
METHODS = {"lora": 16, "dora": 16, "bone": 64, "bat": 64, "rosa": 16}  # the method and its usual rank or block size
OURS = "spectral_ops"


@dataclass
class Layer:
    """A layer to time: its forward, and the parameters it trains."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    parameters: list[torch.Tensor]


def _parameters(weight: torch.Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Parameters with fixed nonzero values, the same for every implementation of a method."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(s, generator=generator) * 0.02).to(weight.device, dtype).requires_grad_() for s in shapes]


def _peft(method: str, weight: torch.Tensor, rank: int, dtype: torch.dtype, fused: bool) -> Layer:
    """PEFT's layer over ``weight`` with parameters in ``dtype``, float32 or weight's, or the same accelerated."""
    import peft

    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    base.weight.data = weight
    if method in ("bone", "bat"):
        config = peft.MissConfig(r=rank, target_modules=["0"], init_weights="bat" if method == "bat" else True)
    else:
        config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["0"], use_dora=method == "dora")
    model = peft.get_peft_model(torch.nn.Sequential(base), config, autocast_adapter_dtype=dtype == torch.float32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    for p, value in zip(matrices, _parameters(weight, dtype, *(p.shape for p in matrices)), strict=True):
        p.data = value.detach().to(p)
    if fused:
        spectral_ops.accelerate(model, strict=True)
    return Layer(model.base_model.model, parameters)


def pattern(d: int, k: int, device: torch.device) -> spectral_ops.CSR:
    """A random mask of RoSA's usual density."""
    generator = torch.Generator().manual_seed(2)
    return spectral_ops.CSR.from_dense((torch.rand(d, k, generator=generator) < DENSITY).to(device))


def clone_and_scatter(x, weight, values, index, A, B, scale):
    """y = x (W + S)ᵀ + scale (x Aᵀ) Bᵀ as plain autograd has it: a copy of W, and a dense [d, k] gradient for S."""
    total = weight.clone().index_put(index, values.to(weight.dtype), accumulate=True)
    return F.linear(x, total) + scale * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def function_layer(method: str, weight: torch.Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Layer:
    """The public function called directly, with parameters in ``dtype``."""
    d, k = weight.shape
    if method == "bone":
        parameters = _parameters(weight, dtype, (rank, d))
        return Layer(lambda x: spectral_ops.bone_linear(x, weight, *parameters), parameters)
    if method == "bat":
        parameters = _parameters(weight, dtype, (d // rank, rank, rank))
        return Layer(lambda x: spectral_ops.bat_linear(x, weight, *parameters), parameters)
    if method == "rosa":
        csr = pattern(d, k, weight.device)
        parameters = A, B, values = _parameters(weight, dtype, (rank, k), (d, rank), (csr.nnz,))
        csr = csr.with_values(values)
        return Layer(lambda x: spectral_ops.rosa_linear(x, weight, csr, A, B, scale=SCALE), parameters)
    parameters = A, B = _parameters(weight, dtype, (rank, k), (d, rank))
    if method == "lora":
        return Layer(lambda x: spectral_ops.lowrank_linear(x, weight, A, B, scale=SCALE), parameters)
    m = weight.float().norm(dim=1).to(dtype).requires_grad_()
    return Layer(lambda x: spectral_ops.dora_linear(x, weight, A, B, m, scale=SCALE), [A, B, m])


def layers(method: str, weight: torch.Tensor, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Layer]:
    """Our function's layer and its peers, parameters in ``dtype``; the others' numbers are compared with the last's."""
    if method != "rosa":
        return {
            OURS: function_layer(method, weight, rank, dtype),
            "PEFT accelerated": _peft(method, weight, rank, dtype, fused=True),
            "PEFT": _peft(method, weight, rank, dtype, fused=False),
        }
    (d, k), csr = weight.shape, pattern(*weight.shape, weight.device)
    rows = torch.repeat_interleave(torch.arange(d, device=weight.device), csr.row_offsets.diff().long())
    index = (rows, csr.col_indices.long())
    A, B, values = _parameters(weight, dtype, (rank, k), (d, rank), (csr.nnz,))
    peer = Layer(lambda x: clone_and_scatter(x, weight, values, index, A, B, SCALE), [A, B, values])
    return {OURS: function_layer(method, weight, rank, dtype), "clone + scatter": peer}
