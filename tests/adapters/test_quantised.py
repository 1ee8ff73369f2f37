"""Every method over quantised bases: bitsandbytes nf4 and int8, torchao int8 (METHODS 2)."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spectral_ops as so
from spectral_ops.adapters import quantised
from spectral_ops.init import topk_pattern

FORMATS = ("nf4", "int8", "torchao")
CONFIGS = {
    "lora": so.LoRAConfig(r=4, lora_alpha=6, lora_dropout=0.0),
    "pissa": so.LoRAConfig(r=4, lora_alpha=6, init_lora_weights="pissa"),
    "milora": so.LoRAConfig(r=4, lora_alpha=6, init_lora_weights="milora"),
    "dora": so.DoRAConfig(r=4, lora_alpha=6),
    "dora_pissa": so.DoRAConfig(r=4, lora_alpha=6, init_lora_weights="pissa"),
    "bone": so.BoneConfig(r=5),
    "rosa": so.RoSAConfig(r=4, lora_alpha=6, d=0.05),
    "dash": so.LoRADashConfig(r=4, lora_alpha=6, directions=3),
    "pica": so.PiCaConfig(r=4),
    "vera": so.VeRAConfig(r=20),
    "dvora": so.DVoRAConfig(r=20),
    "svft": so.SVFTConfig(off_diag=1),
    "spectral": so.SpectralConfig(r=4),
    "spectral_rotation": so.SpectralConfig(r=4, mode="rotation"),
}
every = pytest.mark.parametrize("method", CONFIGS)
formats = pytest.mark.parametrize("form", FORMATS)
D, K = 48, 64


def base(form, dtype=torch.float32):
    """A quantised layer, or the reason why this machine has none."""
    torch.manual_seed(0)
    linear = nn.Linear(K, D, dtype=dtype)
    if form == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        layer = nn.Sequential(linear)
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
        layer = layer[0]
    else:
        pytest.importorskip("bitsandbytes")
        layer = quantised.quantise(linear, form)
    try:
        layer(torch.randn(2, K, dtype=dtype))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this {form} layer does not run on the CPU: {error}")
    return layer


def perturb(net):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in so.adapter_layers(net).values():
            if isinstance(layer, so.LoRADashLinear):
                layer.launch()
            if isinstance(layer, so.RoSALinear):
                layer.set_mask(topk_pattern(torch.rand(D, K, generator=generator), int(0.05 * D * K)))
            for p in layer.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


def adapted(form, method, dtype=torch.float32, **options):
    net = nn.Sequential(base(form, dtype))
    so.attach(net, dataclasses.replace(CONFIGS[method], target_modules=["0"], **options))
    return perturb(net)


def packed(layer):
    weight = layer.base_layer.weight
    return (weight.qdata, weight.scale) if quantised.kind(layer.base_layer) == "torchao" else (weight.data,)


@formats
def test_dequantised_is_the_weight_and_writing_it_back_changes_little(form):
    layer = base(form)
    torch.manual_seed(0)
    W = nn.Linear(K, D).weight.detach()
    step = {"nf4": 0.16, "int8": 0.01, "torchao": 0.01}[form]
    got = quantised.dequantised(layer)
    assert got.dtype == torch.float32 and (got - W).abs().max() <= step * W.abs().max()
    before = quantised.held(layer)
    quantised.write(layer, W.t().contiguous().reshape(D, K))
    assert (quantised.dequantised(layer) - W.t().reshape(D, K)).abs().max() <= step * W.abs().max()
    x = torch.randn(5, K)
    assert (layer(x) - F.linear(x, W.t().reshape(D, K), layer.bias)).norm() <= 0.2 * layer(x).norm()
    quantised.put_back(layer, before)
    assert torch.equal(quantised.dequantised(layer), got)


@formats
@pytest.mark.parametrize(
    "method", [name for name in CONFIGS if name not in ("pica", "spectral", "spectral_rotation", "svft")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_output_and_gradients(form, method, dtype):
    """The base layer's own product, and everything else by the dense formula in float64; test_pica and test_spectral
    compare theirs."""
    net = adapted(form, method, dtype)
    layer = net[0]
    x, dy = torch.randn(6, K).to(dtype).requires_grad_(), torch.randn(6, D).to(dtype)
    trained = [p for p in net.parameters() if p.requires_grad]
    y = net(x)
    grads = torch.autograd.grad(y, [x, *trained], dy)

    product = layer.base_layer(x)
    W = quantised.dequantised(layer.base_layer).double()
    bias = layer.bias.double()
    leaves = [p.detach().double().requires_grad_() for p in trained]
    x64 = x.detach().double().requires_grad_()
    R = product.detach().double() + x64 @ W.T - (x64 @ W.T).detach()  # its value, and W's gradient
    if method == "bone":
        y64 = R + F.pad(x64, (0, -K % 5)).reshape(6, -1, 5).sum(1) @ leaves[0]
    else:
        if method in ("vera", "dvora"):
            A, B = layer.vera_A["default"].double(), layer.vera_B["default"].double()
            A, B, rest, scale = leaves[0][:, None] * A, leaves[1][:, None] * B, leaves[2:], 1.0
        else:
            A, B, *rest = leaves
            scale = layer.settings["default"].scaling
        z = R + scale * x64 @ A.T @ B.T
        if method == "rosa":
            csr = layer.csr()
            rows = torch.repeat_interleave(torch.arange(D), csr.row_offsets.diff().long())
            S = torch.zeros(D, K, dtype=torch.float64).index_put((rows, csr.col_indices.long()), rest[0])
            z = z + x64 @ S.T
        if method == "dash":
            z = z + x64 @ layer.dash_V["default"].double().T @ (layer.dash_U["default"].double() * rest[0]).T
        if method.startswith(("dora", "dvora")):
            norm = (W + scale * B @ A).norm(dim=1).detach()
            z = rest[0] / norm * (z - bias) + bias
        y64 = z
    want = torch.autograd.grad(y64, [x64, *leaves], dy.double())
    eps = 2e-5 if dtype == torch.float32 else 3e-2
    for got, expected in zip([y, *grads], [y64, *want], strict=True):
        rounded = 0.02 if form == "int8" and got is grads[0] else 0.0  # bitsandbytes multiplies dy with a rounded W
        assert (got.double() - expected).norm() <= max(eps, rounded) * expected.norm()


@formats
@every
def test_merge_and_unmerge(form, method):
    net = adapted(form, method)
    layer, x = net[0], torch.randn(5, K)
    before, stored = net(x), [t.clone() for t in packed(layer)]
    delta = layer.delta_weight()
    full = layer.full_matrix()
    so.merge(net)
    grid = {"nf4": 0.16, "int8": 0.01, "torchao": 0.01}[form]
    assert (layer.full_matrix() - full - delta).abs().max() <= grid * (full + delta).abs().max()
    assert not torch.equal(layer.full_matrix(), full)
    assert (net(x) - before).norm() <= 0.2 * before.norm()
    so.unmerge(net)
    assert all(torch.equal(a, b) for a, b in zip(packed(layer), stored, strict=True))
    assert torch.allclose(net(x), before)


@formats
@every
def test_files_and_detach(form, method, tmp_path):
    net = adapted(form, method)
    x = torch.randn(5, K)
    so.save_adapter(net, tmp_path, plain=False) if "pissa" in method or method == "milora" else so.save_adapter(
        net, tmp_path
    )
    again = so.load_adapter(nn.Sequential(base(form)), tmp_path)
    assert (again(x) - net(x)).norm() <= (1e-5 if CONFIGS[method].changes_base is False else 0.05) * net(x).norm()
    plain = base(form)(x)
    with so.disabled(net):
        assert (net(x) - plain).norm() <= (0.2 if CONFIGS[method].changes_base else 0) * plain.norm()
    so.detach(net)
    assert quantised.kind(net[0]) is not None
    assert (net(x) - plain).norm() <= (0.2 if CONFIGS[method].changes_base else 0) * plain.norm()


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_quantising_what_pissa_leaves_loses_less_than_quantising_the_weight(form):
    """QPiSSA: the residual has a narrower spread than W."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(D, K), full_matrices=False)
    W = U * torch.logspace(1, -1, D) @ Vh  # a decaying spectrum, as trained weights have
    linear = nn.Linear(K, D)
    linear.weight.data.copy_(W)
    plain = (quantised.dequantised(quantised.quantise(linear, form)) - W).norm()
    net = so.attach(
        nn.Sequential(linear), so.LoRAConfig(r=8, lora_alpha=8, init_lora_weights="pissa", target_modules=["0"])
    )
    so.quantize_base(net, form)
    layer = net[0]
    assert quantised.kind(layer.base_layer) == {"nf4": "bnb4", "int8": "bnb8"}[form]
    assert (layer.full_matrix() + layer.delta_weight() - W).norm() < 0.7 * plain
    net(torch.randn(3, K)).sum().backward()
    assert layer.lora_A["default"].grad.abs().max() > 0


def test_dora_with_dropout_runs_the_base_twice():
    net = adapted("nf4", "dora", lora_dropout=0.4)
    layer, x = net[0], torch.randn(4000, K)
    torch.manual_seed(1)
    y = net(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.4)
    W = quantised.dequantised(layer.base_layer)
    A, B, m = (getattr(layer, key)["default"].detach() for key in layer.tensor_keys)
    scale = layer.settings["default"].scaling
    g = m / (W + scale * B @ A).norm(dim=1)
    want = layer.base_layer(x) + (g - 1) * F.linear(dropped, W) + g * scale * (dropped @ A.T @ B.T)
    assert (y - want).norm() <= 1e-4 * want.norm()
    y.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters() if p.requires_grad)


def test_what_cannot_be_done_is_said():
    net = nn.Sequential(base("nf4"))
    with pytest.raises(ValueError, match="0: base_layer: got Linear4bit.*Bat's W' reads it"):
        so.attach(net, so.BatConfig(r=8, target_modules=["0"]))
    with pytest.raises(ValueError, match="format: got 'int3', wanted one of 'nf4', 'fp4', 'int8'"):
        so.quantize_base(so.attach(nn.Sequential(nn.Linear(K, D)), so.LoRAConfig(r=2, target_modules=["0"])), "int3")
    merged = so.merge(adapted("nf4", "lora"))
    with pytest.raises(ValueError, match="'default' merged, wanted unmerged layers"):
        so.quantize_base(merged, "nf4")
