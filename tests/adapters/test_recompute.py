"""DoRAConfig(recompute=True): no output is saved, so the model may overwrite it; the numbers and files are the same."""

import dataclasses
import json

import pytest
import torch
from instruments import saved_tensors
from models import fill, mlp, trained
from tensors import storage
from torch import nn

import spectral_ops as so

K, D = 16, 24
CONFIGS = {"dora": so.DoRAConfig(r=3, target_modules=["0"]), "dvora": so.DVoRAConfig(r=3, target_modules=["0"])}


class Residual(nn.Module):
    """A block that adds into what its linear layer returned."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.tail = layer, nn.Linear(D, 4)

    def forward(self, x, shift):
        y = self.layer(x)
        y += shift
        return self.tail(y.relu_())


def make(method, **fields):
    model = so.attach(mlp(K, D, 2), dataclasses.replace(CONFIGS[method], **fields))
    return fill(model)


def gradients(layer, x, write):
    return torch.autograd.grad(write(layer(x)).square().sum(), [x, *trained(layer)])


def added(y):
    return y.add_(1).relu_()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hooked", [False, True], ids=["dense", "base-agnostic"])
def test_the_output_may_be_overwritten(method, bias, hooked):
    plain, ours = make(method)[0], make(method, recompute=True)[0]
    for layer in (plain, ours):
        layer.base_layer.bias = layer.base_layer.bias if bias else None
        if hooked:
            layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(5, K).requires_grad_()
    want = gradients(plain, x, lambda y: added(y.clone()))
    if not (hooked and bias):  # which keeps z, a tensor of its own
        with pytest.raises(RuntimeError, match=r"got an output that was overwritten.*DoRAConfig\(recompute=True\)"):
            gradients(plain, x, added)
    for one, other in zip(gradients(ours, x, added), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with saved_tensors() as kept:
        y = ours(x)
    assert storage(y) not in {storage(t) for t in kept}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_block_that_adds_in_place(method):
    model = Residual(make(method, recompute=True)[0])
    x, shift = torch.randn(5, K), torch.randn(5, D)
    model(x, shift).sum().backward()
    assert all(p.grad is not None for p in trained(model.layer))
    broken = Residual(make(method)[0])
    with pytest.raises(RuntimeError, match="recompute=True"):
        broken(x, shift).sum().backward()


@pytest.mark.parametrize("config", [so.DoRAConfig, so.DVoRAConfig])
@pytest.mark.parametrize("value", [1, None, "True"])
def test_it_is_a_truth_value(config, value):
    with pytest.raises(ValueError, match=rf"{config.__name__}.recompute: got {value!r}, wanted True or False"):
        config(recompute=value)


@pytest.mark.parametrize("method", CONFIGS)
def test_no_file_holds_it(method, tmp_path):
    for recompute in (True, False):
        model, folder = make(method, recompute=recompute), tmp_path / str(recompute)
        so.save_adapter(model, folder)
        assert "recompute" not in json.loads((folder / "adapter_config.json").read_text())
    one, other = (json.loads((tmp_path / str(r) / "adapter_config.json").read_text()) for r in (True, False))
    assert one == other
    loaded = so.load_adapter(mlp(K, D, 2), tmp_path / "True")
    x = torch.randn(4, K)
    torch.testing.assert_close(loaded(x), make(method)(x))


def test_peft_loads_it_without_a_warning(tmp_path, recwarn):
    peft = pytest.importorskip("peft")
    model, x = make("dora", recompute=True), torch.randn(4, K)
    so.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(mlp(K, D, 2), tmp_path)
    assert not [w for w in recwarn if "recompute" in str(w.message)]
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
