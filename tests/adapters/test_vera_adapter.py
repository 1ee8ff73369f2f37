"""VeRA beyond what every method is tested for: the shared matrices, PEFT's parity, what a step keeps and forms."""

import copy
import json
import pickle

import pytest
import torch
from instruments import Recorder, saved_tensors
from models import fill
from torch import nn

import spectral_ops as so
from spectral_ops import VeRAConfig, VeRALinear
from spectral_ops.core import autograd, philox

pytestmark = pytest.mark.usefixtures("one_thread")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 6))


def attached(**fields):
    config = VeRAConfig(**{"r": 16, "target_modules": "all-linear", **fields})
    return fill(so.attach(net(), config), 0.3)


# --- what is shared --------------------------------------------------------------------------------------------------


def assert_shared(model, name="default", d=20, k=20):
    layers = list(so.adapter_layers(model).values())
    for key, shape in (("vera_A", (16, k)), ("vera_B", (d, 16))):
        held = {id(getattr(layer, key)[name]) for layer in layers}
        assert len(held) == 1 and getattr(layers[0], key)[name].shape == shape
        assert not getattr(layers[0], key)[name].requires_grad


def test_every_layer_reads_the_same_two_matrices():
    model, x = attached(), torch.randn(5, 12)
    assert_shared(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 16 + 20 + 12 + 6
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_shared(other)
        assert torch.equal(other(x), want)
    fresh = so.attach(net(), VeRAConfig(r=16, target_modules="all-linear", projection_prng_key=5))
    assert not torch.allclose(fresh[0].vera_A["default"], model[0].vera_A["default"])
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert_shared(fresh)
    assert torch.equal(fresh(x), want)


def test_an_adapter_of_its_own_size_beside_another():
    model, x = attached(), torch.randn(5, 12)
    want = model(x)
    so.attach(model, VeRAConfig(r=16, target_modules=["0"]), "narrow")
    assert model[0].vera_A["narrow"].shape == (16, 12) and model[0].vera_B["narrow"].shape == (20, 16)
    so.set_adapter(model, "default")
    so.detach(model, "narrow")
    assert_shared(model)
    assert torch.equal(model(x), want)


def test_initialisation():
    layer = VeRALinear.from_linear(nn.Linear(6, 4), VeRAConfig(r=9, d_initial=0.3))
    assert torch.equal(layer.vera_lambda_d["default"], torch.full((9,), 0.3))
    assert not layer.vera_lambda_b["default"].any()
    layer = VeRALinear.from_linear(nn.Linear(6, 4), VeRAConfig(r=9, init_weights=False))
    assert torch.equal(layer.vera_lambda_b["default"], torch.ones(4))
    assert layer.vera_lambda_d["default"].unique().numel() == 9


# --- PEFT ------------------------------------------------------------------------------------------------------------


def theirs_and_ours(tiny, **fields):
    import peft

    base = tiny.llama()
    theirs = peft.get_peft_model(base, peft.VeraConfig(r=24, **fields))
    return theirs, so.attach(tiny.llama(), VeRAConfig(r=24, **fields))


@pytest.mark.parametrize("fields", [{}, {"projection_prng_key": 11, "d_initial": 0.5, "layers_to_transform": [1]}])
def test_the_same_values_outputs_and_gradients_as_peft(tiny, fields):
    theirs, ours = theirs_and_ours(tiny, target_modules=["q_proj", "v_proj", "down_proj"], **fields)
    shared = theirs.base_model
    for layer in so.adapter_layers(ours).values():
        assert torch.equal(layer.vera_A["default"], shared.vera_A["default"])  # from the same key
        assert torch.equal(layer.vera_B["default"], shared.vera_B["default"])
    named = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if p.requires_grad}
    own = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert own.keys() == named.keys() and len(named) == (12 if not fields else 6)
    assert all(torch.equal(p, named[n]) for n, p in own.items())
    tiny.perturb(theirs, 0.3)
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(named[n])
    ids = tiny.tokens()
    expected = tiny.logits_and_gradients(theirs, ids)
    got = tiny.logits_and_gradients(ours, ids)
    assert tiny.worst({n.removeprefix("base_model.model."): g for n, g in expected.items()}, got) < 1e-5


@pytest.mark.parametrize("save_projection", [True, False])
def test_we_read_pefts_files(tiny, save_projection, tmp_path):
    theirs, _ = theirs_and_ours(tiny, target_modules=["q_proj", "up_proj"], save_projection=save_projection)
    tiny.perturb(theirs, 0.3).eval().save_pretrained(tmp_path)
    ours, ids = so.load_adapter(tiny.llama(), tmp_path).eval(), tiny.tokens()
    want = theirs(ids).logits
    assert torch.allclose(ours(ids).logits, want, atol=2e-5)
    assert not torch.allclose(tiny.llama()(ids).logits, want, atol=1e-3)


@pytest.mark.parametrize("direction", ["ours", "theirs"])
def test_gpt2_both_ways(tiny, direction, tmp_path):
    import peft

    ids, names = tiny.tokens(), ["c_attn", "c_proj"]
    if direction == "ours":
        ours = tiny.perturb(so.attach(tiny.gpt2(), VeRAConfig(r=24, target_modules=names)), 0.3).eval()
        so.save_adapter(ours, tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path).eval()
    else:
        config = peft.VeraConfig(r=24, target_modules=names, fan_in_fan_out=True)
        theirs = tiny.perturb(peft.get_peft_model(tiny.gpt2(), config), 0.3).eval()
        theirs.save_pretrained(tmp_path)
        ours = so.load_adapter(tiny.gpt2(), tmp_path).eval()
    assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=2e-5)
    assert not torch.allclose(tiny.gpt2().eval()(ids).logits, ours(ids).logits, atol=1e-3)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_file_holds_the_projections_once_or_not_at_all(save_projection, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = attached(save_projection=save_projection, projection_prng_key=3), torch.randn(5, 12)
    so.save_adapter(model, tmp_path)
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    vectors = {f"base_model.model.{i}.vera_lambda_{s}" for i in (0, 2, 4) for s in "bd"}
    assert set(tensors) == vectors | ({"base_model.vera_A", "base_model.vera_B"} if save_projection else set())
    again = so.load_adapter(net(), tmp_path)
    assert_shared(again)
    assert torch.equal(again(x), model(x))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "exclude_modules" not in fields and fields["projection_prng_key"] == 3
    if save_projection:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": ["4"]}))
        with pytest.raises(ValueError, match="got base_model.model.0.vera_lambda"):
            so.load_adapter(net(), tmp_path)
        del tensors["base_model.vera_A"]
        safetensors.save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="got no base_model.vera_A"):
            so.load_adapter(net(), tmp_path)


# --- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_output_and_gradients_are_those_of_the_dense_formula(p):
    layer = fill(VeRALinear.from_linear(nn.Linear(14, 9).double(), VeRAConfig(r=21, vera_dropout=p)), 0.3)
    x, dy = torch.randn(2, 5, 14).double().requires_grad_(), torch.randn(2, 5, 9).double()
    A, B = layer.vera_A["default"], layer.vera_B["default"]
    d, b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    keep = 1.0
    if p:
        torch.manual_seed(4)
        keep = philox.keep_mask(10, 14, autograd.draw_seed(x, p, True), p).double().reshape(x.shape) / (1 - p)
    want = x @ layer.weight.T + layer.bias + b * ((((keep * x) @ A.T) * d) @ B.T)
    wanted = torch.autograd.grad(want, [x, d, b], dy)
    torch.manual_seed(4)
    got = layer(x)
    gradients = torch.autograd.grad(got, [x, d, b], dy)
    for g, w in zip([got, *gradients], [want, *wanted], strict=True):
        assert torch.allclose(g, w, rtol=1e-12, atol=1e-12)


def test_what_a_step_saves_and_forms():
    """h [T, r] and λ_b * B [d, r] are kept; neither x, which no gradient reads, nor anything else with T rows."""
    layer = fill(VeRALinear.from_linear(nn.Linear(40, 30), VeRAConfig(r=7)), 0.3)
    x, dy = torch.randn(50, 40, requires_grad=True), torch.randn(50, 30)
    constants = {p.data_ptr() for p in layer.parameters()}
    with saved_tensors() as kept, Recorder() as forward:
        y = layer(x)
    shapes = {tuple(t.shape) for t in kept if t.data_ptr() not in constants}
    assert shapes == {(50, 7), (30, 7)}
    with Recorder() as backward:
        y.backward(dy)
    assert [s for s in forward.shapes() if s == (50, 30)] == [(50, 30)]  # y itself
    assert (50, 30) not in backward.shapes() and (7, 40) not in backward.shapes()  # no dA


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projection_prng_key": -1}, r"VeRAConfig\.projection_prng_key: got -1, wanted at least 0"),
        ({"projection_prng_key": 0.5}, r"projection_prng_key: got 0\.5 \(float\), wanted an integer"),
        ({"vera_dropout": 1.0}, r"vera_dropout: got 1\.0"),
        ({"d_initial": "x"}, "d_initial: got 'x'"),
        ({"save_projection": 1}, "save_projection: got 1, wanted True or False"),
        ({"init_weights": "mini"}, "init_weights: got 'mini', wanted True or False"),
        ({"bias": "lora_only"}, "wanted one of 'none', 'all', 'vera_only'"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        VeRAConfig(**fields)
