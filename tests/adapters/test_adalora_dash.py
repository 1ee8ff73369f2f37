"""AdaLoRA with LoRA-Dash's directions: both schedules in one run, files of what is left, resuming."""

import copy

import pytest
import torch
from models import adamw, mlp
from torch import nn

import spectral_ops as so
from spectral_ops import AdaLoRADashConfig, AdaLoRADashLinear, AdaLoRASchedule
from spectral_ops.adapters import dash

D, K, STEPS = 20, 14, 12
FIELDS = {
    "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": STEPS, "lora_alpha": 6, "directions": 3,
    "launch_step": 5, "target_modules": ["0", "2"],
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def attached(**fields):
    torch.manual_seed(3)
    return so.attach(mlp(K, D, 2), AdaLoRADashConfig(**{**FIELDS, **fields}))


def started(model):
    optimizer = adamw(model)
    return optimizer, AdaLoRASchedule(model, optimizer)


def run(model, optimizer, first, last):
    for i in range(first, last):
        x = torch.randn(16, K, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (model(x) - x[:, :12].cos()).square().mean().backward()
        optimizer.step()


def dense(layer):
    """The change of the weight in float64."""
    A, B, E, U, V, delta = (
        getattr(layer, key)["default"].detach().double()
        for key in ("lora_A", "lora_B", "lora_E", "dash_U", "dash_V", "dash_delta")
    )
    return 6 / (4 + 1e-5) * B @ torch.diag(E[:, 0]) @ A + U @ torch.diag(delta) @ V


def test_pruning_and_directions_in_one_run():
    model = attached()
    optimizer, schedule = started(model)
    run(model, optimizer, 0, 4)
    before = copy.deepcopy(model)
    assert not model[0].launched()
    run(model, optimizer, 4, 5)
    assert model[0].launched() and not model[0].dash_delta["default"].any()
    for layer in so.adapter_layers(model).values():  # chosen by what A, E and B have learnt
        U, S, Vh = torch.linalg.svd(layer.weight.double(), full_matrices=False)
        scores = (U.T @ dense(layer) @ Vh.T).diagonal().abs() / (S + 1e-6)
        overlap = (Vh[scores.argsort(descending=True)[:3]] * layer.dash_V["default"]).sum(1).abs()
        assert torch.allclose(overlap, torch.ones(3, dtype=torch.float64), atol=1e-4)
    assert not before[0].dash_U["default"].any()
    run(model, optimizer, 5, STEPS)
    layers = list(so.adapter_layers(model).values())
    assert all(layer.dash_delta["default"].all() for layer in layers)
    assert sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers) == 2 * FIELDS["target_r"]
    assert schedule.keep is not None
    x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, D)
    got, want = model[0](x), x.double() @ (model[0].weight.double() + dense(model[0])).T + model[0].bias
    assert torch.allclose(got.double(), want, atol=1e-5)
    (gradient,) = torch.autograd.grad(got, model[0].dash_delta["default"], dy)
    U, V = model[0].dash_U["default"], model[0].dash_V["default"]
    assert torch.allclose(gradient, ((dy @ U) * (x @ V.T)).sum(0), atol=1e-4)


@pytest.mark.parametrize("at", [3, 7, 10], ids=["before", "launched", "frozen"])
def test_training_goes_on_bit_for_bit(at):
    whole = attached()
    optimizer, keeper = started(whole)
    run(whole, optimizer, 0, STEPS)
    model = attached()
    optimizer, schedule = started(model)
    run(model, optimizer, 0, at)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    again = attached()
    second, schedule = started(again)
    for target, state in zip((again, second, schedule), kept, strict=True):
        target.load_state_dict(state)
    run(again, second, at, STEPS)
    want, got = whole.state_dict(), again.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert keeper.steps == schedule.steps == STEPS


@pytest.mark.parametrize("everything", [False, True], ids=["some", "all of one layer"])
def test_a_file_holds_the_triplets_that_are_left_and_every_direction(everything, tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    model = attached()
    optimizer, schedule = started(model)
    run(model, optimizer, 0, STEPS)
    if everything:  # the second layer has only its directions left
        left = {"0.lora_E": [True] * 4, "2.lora_E": [False] * 4}
        config = AdaLoRADashConfig(**FIELDS, rank_pattern=left)
        for path, layer in so.adapter_layers(model).items():
            layer.freeze("default", config, path, left[f"{path}.lora_E"])
        with torch.no_grad():
            model[2].lora_E["default"].zero_()
    schedule.close()
    x = torch.randn(5, K)
    want = model(x)
    so.save_adapter(model, tmp_path)
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.shape[0] for key, t in tensors.items() if key.endswith("lora_E")) == 4
    assert tensors["base_model.model.2.dash_U"].shape == (12, 3)
    monkeypatch.setattr(dash, "truncated_svd", None)
    again = so.load_adapter(mlp(K, D, 2), tmp_path)
    assert torch.allclose(again(x), want, atol=1e-6) and all(m.launched() for m in so.adapter_layers(again).values())
    again(x).sum().backward()
    assert again[2].dash_delta["default"].grad.any()
    assert type(so.adapter_configs(again)["default"]) is AdaLoRADashConfig
    so.merge(again)
    assert torch.allclose(again(x), want, atol=1e-5)


def test_bad_configs():
    with pytest.raises(ValueError, match=r"AdaLoRADashConfig\.launch_step: got 0, wanted at least 1"):
        AdaLoRADashConfig(**{**FIELDS, "launch_step": 0})
    with pytest.raises(ValueError, match=r"AdaLoRADashConfig\.directions: got 15, wanted at most 14"):
        AdaLoRADashLinear.from_linear(nn.Linear(K, D), AdaLoRADashConfig(**{**FIELDS, "directions": 15}))
