"""Base layers in FP8 (real ones, and stand-ins with the attributes of compressed-tensors' modules), and adapters."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import spectral_ops as so
from spectral_ops.adapters import quantised
from spectral_ops.init import topk_pattern

E4M3 = torch.float8_e4m3fn


def spread(scale: torch.Tensor, block: tuple[int, int], d: int, k: int) -> torch.Tensor:
    """The scale of each entry of a weight [d, k], in float64."""
    scale = scale.double()
    return scale.repeat_interleave(block[0], 0)[:d].repeat_interleave(block[1], 1)[:, :k]


def packed(d: int, k: int, block: tuple[int, int], scale_dtype=torch.float32, seed: int = 0):
    """q [d, k], its scales [⌈d/m⌉, ⌈k/n⌉] and what both mean, in float64."""
    generator = torch.Generator().manual_seed(seed)
    grid = math.ceil(d / block[0]), math.ceil(k / block[1])
    scale = torch.rand(grid, generator=generator) * 9e-4 + 1e-4
    scale = (2.0 ** scale.log2().round() if scale_dtype == torch.float8_e8m0fnu else scale).to(scale_dtype)
    q = (150 * torch.randn(d, k, generator=generator)).clamp(-448, 448).to(E4M3)
    return q, scale, q.double() * spread(scale, block, d, k)


def frozen(t: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


def bias_of(d: int, bias: bool, dtype: torch.dtype) -> nn.Parameter | None:
    return frozen(torch.randn(d, generator=torch.Generator().manual_seed(1)).to(dtype)) if bias else None


def transformers_layer(d, k, block=(128, 128), bias=True, dtype=torch.float32, scale_dtype=torch.float32, static=False):
    """transformers' FP8Linear, and its weight in float64."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    scheme = {"activation_scheme": "static" if static else "dynamic"}
    if scale_dtype == torch.float8_e8m0fnu:
        scheme["scale_fmt"] = "ue8m0"
    layer = fp8.FP8Linear(k, d, block, has_bias=bias, **scheme)
    q, scale, W = packed(d, k, block or (d, k), scale_dtype)
    layer.weight = frozen(q)
    layer.weight_scale_inv = frozen(scale if block else scale.reshape(()))
    layer.bias = bias_of(d, bias, dtype)
    return layer.requires_grad_(False), W


def torchao_layer(d, k, per="row", bias=True, dtype=torch.float32, dynamic=False):
    """An nn.Linear over torchao's Float8Tensor, and its weight in float64."""
    quantization = pytest.importorskip("torchao.quantization")
    if not hasattr(quantization, "Float8Tensor"):
        pytest.skip("this torchao has no Float8Tensor")
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    granularity = {"row": quantization.PerRow(), "tensor": quantization.PerTensor()}[per]
    layer = nn.Linear(k, d, bias=bias, dtype=dtype)
    W = torch.randn(d, k, generator=torch.Generator().manual_seed(0)).to(dtype) / k**0.5
    options = {"act_quant_kwargs": QuantizeTensorToFloat8Kwargs(granularity=granularity)} if dynamic else {}
    weight = quantization.Float8Tensor.from_hp(W, granularity=granularity, mm_config=Float8MMConfig(), **options)
    layer.weight, layer.bias = frozen(weight), bias_of(d, bias, dtype)
    return layer, weight.qdata.double() * weight.scale.double().reshape(-1, 1)


def compressed_layer(d, k, strategy="channel", bias=True, dtype=torch.float32, scale_dtype=torch.float32):
    """An nn.Linear with the attributes that compressed-tensors gives one, and its weight in float64."""
    block = {"tensor": (d, k), "channel": (1, k), "block": (128, 128), "group": (1, 32)}[strategy]
    layer = nn.Linear(k, d, bias=bias, dtype=dtype)
    q, scale, W = packed(d, k, block, torch.float8_e8m0fnu if scale_dtype == torch.uint8 else scale_dtype)
    layer.weight, layer.bias = frozen(q), bias_of(d, bias, dtype)
    layer.weight_scale = frozen(
        scale.view(torch.uint8) if scale_dtype == torch.uint8 else scale.reshape(1) if strategy == "tensor" else scale
    )
    structure = {"block_structure": [128, 128] if strategy == "block" else None}
    structure["group_size"] = 32 if strategy == "group" else None
    layer.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(strategy=strategy, **structure))
    return layer, W


def kernel_layer(d, k, bias=True, dtype=torch.float32):
    """transformers' layer over compressed-tensors weights, whose kernel runs on the CPU and has no gradient."""
    integration = pytest.importorskip("transformers.integrations.compressed_tensors")
    if not hasattr(integration, "CompressedTensorsFP8Linear"):
        pytest.skip("this transformers has no CompressedTensorsFP8Linear")
    layer = integration.CompressedTensorsFP8Linear(k, d, bias)
    q, scale, W = packed(d, k, (1, k))
    layer.weight, layer.weight_scale = frozen(q), frozen(scale.t().contiguous())
    layer.bias = bias_of(d, bias, dtype)
    try:
        with torch.no_grad():
            layer(torch.zeros(2, k, dtype=dtype))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch has no FP8 product here: {error}")
    return layer, W


class Blind(nn.Linear):
    """An FP8 layer of another library, in transformers' format, whose kernel autograd does not see (as FP8Linear's own
    until transformers 5)."""

    def __init__(self, d, k, block=(128, 128)):
        super().__init__(k, d, bias=False)
        self.block_size = block
        q, scale, self.W = packed(d, k, block)
        self.weight, self.weight_scale_inv = frozen(q), frozen(scale)

    def forward(self, x):
        with torch.no_grad():
            return x @ self.W.to(x.dtype).t()


BASES = {
    "transformers": lambda d, k, dtype: transformers_layer(d, k, dtype=dtype),
    "transformers_ue8m0_static": lambda d, k, dtype: transformers_layer(
        d, k, (64, 32), dtype=dtype, scale_dtype=torch.float8_e8m0fnu, static=True
    ),
    "transformers_tensor": lambda d, k, dtype: transformers_layer(d, k, None, bias=False, dtype=dtype),
    "torchao_row": lambda d, k, dtype: torchao_layer(d, k, "row", dtype=dtype),
    "torchao_tensor": lambda d, k, dtype: torchao_layer(d, k, "tensor", bias=False, dtype=dtype),
    "torchao_row_dynamic": lambda d, k, dtype: torchao_layer(d, k, "row", dtype=dtype, dynamic=True),
    "torchao_tensor_dynamic": lambda d, k, dtype: torchao_layer(d, k, "tensor", dtype=dtype, dynamic=True),
    "compressed_tensor": lambda d, k, dtype: compressed_layer(d, k, "tensor", dtype=dtype),
    "compressed_channel": lambda d, k, dtype: compressed_layer(
        d, k, "channel", dtype=dtype, scale_dtype=torch.bfloat16
    ),
    "compressed_block": lambda d, k, dtype: compressed_layer(d, k, "block", dtype=dtype),
    "compressed_mxfp8": lambda d, k, dtype: compressed_layer(d, k, "group", dtype=dtype, scale_dtype=torch.uint8),
    "compressed_kernel": lambda d, k, dtype: kernel_layer(d, k, dtype=dtype),
}
KERNELS = "torchao_row_dynamic", "torchao_tensor_dynamic", "compressed_kernel"  # products in FP8, also on the CPU


# --- adapters over them ----------------------------------------------------------------------------------------------

D, K = 150, 288  # 150 = 128 + 22, 288 = 2 * 128 + 32
CONFIGS = {
    "lora": so.LoRAConfig(r=4, lora_alpha=6),
    "dora": so.DoRAConfig(r=4, lora_alpha=6),
    "bone": so.BoneConfig(r=5),
    "rosa": so.RoSAConfig(r=4, lora_alpha=6, d=0.02),
}


def perturb(net, d=D, k=K):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in so.adapter_layers(net).values():
            if isinstance(layer, so.RoSALinear):
                layer.set_mask(topk_pattern(torch.rand(d, k, generator=generator), int(0.02 * d * k)))
            for p in layer.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


def adapted(base, method, **options):
    net = nn.Sequential(base)
    so.attach(net, dataclasses.replace(CONFIGS[method], target_modules=["0"], **options))
    return perturb(net, *quantised.dequantised(base).shape)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()
