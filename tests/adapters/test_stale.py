"""A base weight that is written behind autograd's back, through ``.data``: whatever a method keeps of it follows.

The formula is of the weight as it is after the write, formed in float64: ``delta_weight`` keeps nothing between calls.
"""

import copy

import pytest
import torch
from models import adamw, fill, mlp, trained
from torch import nn

import spectral_ops as so

K, D = 256, 192  # more entries than a fingerprint reads
METHODS = {
    "lora": so.LoRAConfig(r=4, target_modules=["0"]),
    "dora": so.DoRAConfig(r=4, target_modules=["0"]),
    "dora_recompute": so.DoRAConfig(r=4, target_modules=["0"], recompute=True),
    "dora_pissa": so.DoRAConfig(r=4, target_modules=["0"], init_lora_weights="pissa"),
    "dvora": so.DVoRAConfig(r=4, target_modules=["0"]),
    "vera": so.VeRAConfig(r=4, target_modules=["0"]),
    "pica": so.PiCaConfig(r=4, target_modules=["0"]),
    "svft": so.SVFTConfig(off_diag=1, target_modules=["0"]),
    "spectral": so.SpectralConfig(r=4, target_modules=["0"]),
    "rotation": so.SpectralConfig(r=4, target_modules=["0"], mode="rotation"),
    "rosa": so.RoSAConfig(r=4, d=0.05, target_modules=["0"]),
    "rosa_resident": so.RoSAConfig(r=4, d=0.05, target_modules=["0"], route="resident"),
    "bone": so.BoneConfig(r=16, target_modules=["0"]),
    "bat": so.BatConfig(r=16, target_modules=["0"]),
    "lora_dash": so.LoRADashConfig(r=4, target_modules=["0"], launch_step=1),
}


def make(method: str) -> nn.Sequential:
    model = so.attach(mlp(K, D, 3), METHODS[method])
    layer = model[0]
    if method.startswith("rosa"):
        layer.set_mask(torch.rand(D, K).view(-1).argsort().argsort().view(D, K) < layer.rosa_values["default"].numel())
    if method == "lora_dash":
        layer.launch()
    return fill(model, 0.05)


def merged(layer, W):
    """ReLoRA: what the adapter adds goes into W, and the low-rank part starts anew from zero."""
    W.data.add_(layer.delta_weight())
    for key in ("lora_B", "vera_lambda_b"):
        if hasattr(layer, key):
            getattr(layer, key)["default"].data.zero_()


def replaced(layer, W):
    W.data = 0.1 * torch.randn(D, K)


def initialised(layer, W):
    with torch.no_grad():
        nn.init.kaiming_uniform_(W)


def loaded(layer, W):
    layer.load_state_dict({key: 1.5 * value for key, value in layer.state_dict().items() if "base_layer" in key}, False)


def of_data(write):
    return lambda layer, W: write(W.data)


WRITES = {
    "add": of_data(lambda W: W.add_(0.1 * torch.randn(D, 2) @ torch.randn(2, K))),
    "noise": of_data(lambda W: W.add_(1e-3 * torch.randn(D, K))),
    "scale": of_data(lambda W: W.mul_(1.5)),
    "copy": of_data(lambda W: W.copy_(0.1 * torch.randn(D, K))),
    "row": of_data(lambda W: W[100].mul_(3)),
    "column": of_data(lambda W: W[:, 7].add_(1)),
    "block": of_data(lambda W: W[64:128, 32:96].add_(0.2)),
    "numpy": of_data(lambda W: W.numpy().__imul__(0.5)),
    "relora": merged,
    "new": replaced,
    "init": initialised,
    "load": loaded,
}


def formula(layer, x: torch.Tensor) -> torch.Tensor:
    W = layer.unmerged().double() + layer.delta_weight().double()
    return x.double() @ W.T + layer.bias.double()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("method", METHODS)
def test_the_output_is_that_of_the_weight_as_it_is(method, write):
    """In eval, and between the micro-batches of one optimizer step, with gradients as of a layer that is new."""
    model, x = make(method), torch.randn(6, K)
    layer = model[0]
    model.eval()
    with torch.no_grad():
        before = layer(x)
        WRITES[write](layer, layer.weight)
        after = layer(x)
    torch.testing.assert_close(after.double(), formula(layer, x).detach(), rtol=1e-4, atol=1e-4)
    if write != "relora":
        assert (after - before).abs().max() > 1e-4

    model.train()
    optimizer = adamw(model)
    layer(x).square().sum().backward()  # a micro-batch
    optimizer.zero_grad()
    WRITES[write](layer, layer.weight)
    y = layer(x)
    torch.testing.assert_close(y.double(), formula(layer, x).detach(), rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    got = [p.grad for p in trained(layer)]
    fresh = copy.deepcopy(layer)
    for p in trained(fresh):
        p.grad = None
    fresh(x).square().sum().backward()
    for one, p in zip(got, trained(fresh), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-3, atol=1e-4)


def test_a_magnitude_norm_is_still_kept_where_nothing_was_written():
    layer, x = make("dora")[0], torch.randn(6, K)
    if so.explain("column_norm_cached_", layer.weight).backend == "reference":
        pytest.skip("the reference always recomputes")
    with torch.no_grad():
        want = layer(x)
        layer.norms["default"]._norm.mul_(2)
        assert torch.allclose(layer(x) - layer.bias, (want - layer.bias) / 2, atol=1e-5)
        layer.weight.data.add_(0.0)
        assert not torch.allclose(layer(x), want)
        layer.weight.data.mul_(1 + 1e-3)
        assert torch.allclose(layer(x).double(), formula(layer, x), atol=1e-4)


def test_a_decomposition_is_of_the_values_that_a_weight_holds():
    weight = torch.randn(30, 20)
    first = so.init.truncated_svd(weight, 3)
    weight.data[29, 19] += 1e-3
    second = so.init.truncated_svd(weight, 3)
    assert not torch.equal(first[1], second[1])
    torch.testing.assert_close(second[1], torch.linalg.svdvals(weight)[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write", ["add", "noise", "init_then_add", "load"])
def test_a_weight_that_holds_rosas_delta(dtype, write):
    """Through the base layer's own parameter, which is W + S at the moment: what is added to it is added to W."""
    layer = make("rosa_resident")[0].to(dtype).eval()
    x, W = torch.randn(6, K).to(dtype), layer.base_layer.weight
    original = layer.weight.detach().clone()
    with torch.no_grad():
        layer(x)
        assert not torch.equal(W, original)  # it does hold S
        change = {
            "add": lambda: (0.1 * torch.randn(D, 2) @ torch.randn(2, K)).to(dtype),
            "noise": lambda: (0.01 * torch.randn(D, K)).to(dtype),
        }.get(write, lambda: torch.zeros(D, K, dtype=dtype))()
        if write == "load":
            other = torch.randn(D, K).to(dtype)
            layer.load_state_dict({"base_layer.weight": other}, strict=False)
            original = other
        elif write == "init_then_add":
            layer.release()
            nn.init.normal_(W)
            original = W.clone()
            layer(x)
        else:
            W.data.add_(change)
        y = layer(x)
        expected = original.double() + change.double()
        eps = torch.finfo(dtype).eps
        want = x.double() @ (expected + layer.delta_weight().double()).T + layer.bias.double()
        size = x.double().abs() @ (expected.abs() + layer.delta_weight().abs()).T + 1
        assert ((y.double() - want).abs() <= 4 * max(eps, 1e-6) * size).all()
        torch.testing.assert_close(layer.weight.double(), expected, rtol=2 * eps, atol=2 * eps)
        assert not layer.weight.isnan().any()
