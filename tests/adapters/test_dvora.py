"""DVoRA beyond what every method is tested for: its formula with dropout, a norm that follows the vectors, files."""

import pytest
import torch
from instruments import Recorder
from models import trained
from torch import nn

import spectral_ops as so
from spectral_ops import DVoRAConfig, DVoRALinear
from spectral_ops.core import autograd, philox


def make(d=9, k=14, dtype=torch.float64, **fields):
    layer = DVoRALinear.from_linear(nn.Linear(k, d).to(dtype), DVoRAConfig(r=21, **fields))
    with torch.no_grad():
        layer.vera_lambda_d["default"].normal_(std=0.5)
        layer.vera_lambda_b["default"].normal_(std=0.5)
        layer.vera_magnitude_vector["default"].mul_(torch.rand(d) + 0.5)
    return layer


def tensors(layer):
    """λ_d, λ_b, m, and the direction W + diag(λ_b) B diag(λ_d) A in float64."""
    d, b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    A, B = layer.vera_A["default"].double(), layer.vera_B["default"].double()
    V = layer.weight.double() + (b.double()[:, None] * B) @ (d.double()[:, None] * A)
    return d, b, layer.vera_magnitude_vector["default"], V


def test_the_magnitude_starts_as_the_norm_of_the_rows():
    linear = nn.Linear(14, 9)
    layer = DVoRALinear.from_linear(linear, DVoRAConfig(r=21))
    m = layer.vera_magnitude_vector["default"]
    assert m.requires_grad and torch.allclose(m, linear.weight.norm(dim=1))
    narrow = DVoRALinear.from_linear(nn.Linear(14, 9).bfloat16(), DVoRAConfig(r=21), autocast_adapter_dtype=False)
    assert narrow.vera_magnitude_vector["default"].dtype == torch.float32
    assert narrow.vera_lambda_b["default"].dtype == torch.bfloat16


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_output_and_gradients_are_those_of_the_dense_formula(p):
    """With dropout in PEFT's form of DoRA: x Wᵀ + b + (g - 1) (x̃ Wᵀ) + g x̃ (V - W)ᵀ, with g = m / c constant in c."""
    layer = make(vera_dropout=p)
    x, dy = torch.randn(2, 5, 14).double().requires_grad_(), torch.randn(2, 5, 9).double()
    d, b, m, V = tensors(layer)
    W, keep = layer.weight, 1.0
    if p:
        torch.manual_seed(4)
        keep = philox.keep_mask(10, 14, autograd.draw_seed(x, p, True), p).double().reshape(x.shape) / (1 - p)
    g, dropped = m / V.norm(dim=1).detach(), keep * x
    want = x @ W.T + layer.bias + (g - 1) * (dropped @ W.T) + g * (dropped @ (V - W).T)
    wanted = torch.autograd.grad(want, [x, d, b, m], dy)
    torch.manual_seed(4)
    got = layer(x)
    gradients = torch.autograd.grad(got, [x, d, b, m], dy)
    for one, other in zip([got, *gradients], [want, *wanted], strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-11)


def test_the_norm_follows_the_vectors():
    layer, x = make(dtype=torch.float32), torch.randn(6, 14)
    optimizer = torch.optim.SGD(trained(layer), lr=0.05)
    for i in range(6):
        _, _, m, V = tensors(layer)
        want = x.double() @ ((m.double() / V.norm(dim=1))[:, None] * V).T + layer.bias.double()
        assert torch.allclose(layer(x), want.float(), atol=1e-5)
        if i % 2:
            layer.vera_lambda_d["default"].data.mul_(1.5)  # which no version counter sees, within a step
        else:
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_no_gradient_of_the_shared_matrices_is_formed():
    layer = make(30, 40, torch.float32)
    y = layer(torch.randn(50, 40, requires_grad=True))
    with Recorder() as backward:
        y.backward(torch.randn(50, 30))
    assert (21, 40) not in backward.shapes()
    assert layer.vera_A["default"].grad is None and layer.vera_B["default"].grad is None


def test_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))

    model, x = so.attach(net(), DVoRAConfig(r=16, target_modules="all-linear")), torch.randn(3, 12)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape) if p.requires_grad else 0
    so.save_adapter(model, tmp_path)
    held = {f"base_model.model.{i}.vera_{s}" for i in (0, 2) for s in ("lambda_b", "lambda_d", "magnitude_vector")}
    found = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    assert set(found) == held | {"base_model.vera_A", "base_model.vera_B"}
    assert torch.equal(so.load_adapter(net(), tmp_path)(x), model(x))
