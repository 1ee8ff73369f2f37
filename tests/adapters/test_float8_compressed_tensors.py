"""compressed-tensors' own modules, where the package is installed: compressed, as they are loaded."""

import pytest
import torch
from torch import nn

import spectral_ops as so
from spectral_ops.adapters import float8

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor, compress_module, decompress_module  # noqa: E402
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme  # noqa: E402

D, K = 256, 384
PRESETS = "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8A16"


def compressed(preset):
    """An nn.Linear that the library compressed, and the weight that it decompresses that to, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(K, D, dtype=torch.bfloat16)).requires_grad_(False)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(net, QuantizationConfig(config_groups={"all": scheme}))
    layer = net[0]
    form = {"FP8": (D, K), "FP8_DYNAMIC": (1, K), "FP8_BLOCK": (128, 128), "MXFP8A16": (1, 32)}[preset]
    empty = float8.empty_blocks(D, K, form)
    scale = float8.quantise(layer.weight.float(), empty)[1]
    if preset == "MXFP8A16":
        scale = torch.exp2(scale.log2().ceil())
    layer.weight_scale.data = scale.to(layer.weight_scale.dtype).reshape(layer.weight_scale.shape)
    compress_module(layer)
    assert isinstance(layer.quantization_scheme, QuantizationScheme) and layer.weight.dtype == torch.float8_e4m3fn
    compressor = BaseCompressor.get_value_from_registry(layer.quantization_scheme.format.value)
    dense = compressor.decompress(dict(layer.named_parameters()), layer.quantization_scheme)["weight"]
    return layer, dense.double()


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("preset", PRESETS)
def test_lora_over_a_compressed_layer(preset):
    layer, W = compressed(preset)
    assert relative(float8.dequantised(layer), W) < 2.0**-8
    net = so.attach(nn.Sequential(layer), so.LoRAConfig(r=4, target_modules=["0"]))
    nn.init.normal_(net[0].lora_B["default"], std=0.1)
    x, dy = torch.randn(6, K).bfloat16().requires_grad_(), torch.randn(6, D).bfloat16()
    y = net(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    A, B = (getattr(net[0], key)["default"].detach().double() for key in ("lora_A", "lora_B"))
    whole = float8.dequantised(layer).double() + 2 * B @ A
    assert relative(y.detach(), x.detach().double() @ whole.T + layer.bias.double()) < 1e-2
    assert relative(dx, dy.double() @ whole) < 1e-2
    assert layer.weight.dtype == torch.float8_e4m3fn
    so.merge(net)
    assert relative(float8.dequantised(layer), whole) < 0.04
    so.unmerge(net)
    assert relative(float8.dequantised(layer), W) < 2.0**-8


def test_a_decompressed_layer_that_rounds_its_input_is_an_error():
    """Its rounding of x has no gradient, so neither has its output."""
    layer, _ = compressed("FP8_DYNAMIC")
    decompress_module(layer)
    net = so.attach(nn.Sequential(layer), so.LoRAConfig(r=4, target_modules=["0"]))
    x = torch.randn(6, K).bfloat16().requires_grad_()
    assert not layer(x).requires_grad
    with pytest.raises(
        ValueError, match="base_layer: got Linear .*, wanted a layer that is differentiable in its input"
    ):
        net(x)
