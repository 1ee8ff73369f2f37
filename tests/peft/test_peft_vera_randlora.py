"""What is particular to PEFT's VeRA and RandLoRA: shared factors, and ways chosen by the number of tokens."""

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_tiny import perturb, worst  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from spectral_ops import accelerate  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = {
    "vera": lambda **more: peft.VeraConfig(r=6, **more),
    "randlora": lambda **more: peft.RandLoraConfig(r=6, randlora_alpha=6, **more),
}
BUFFERS = {"vera": ("vera_A", "vera_B"), "randlora": ("randlora_A", "randlora_B")}
EXACT = 5e-6


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*(layers or (nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 24))))


def pair(kind, base=None, **more):
    torch.manual_seed(1)
    base = net() if base is None else base
    targets = [name for name, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D)) or hasattr(m, "state")]
    plain = perturb(peft.get_peft_model(base, CONFIGS[kind](target_modules=targets, **more))).train()
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    return plain, ours


def results(model, T=5, k=24, seed=2):
    x = torch.randn(T, k, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("T", [1, 5, 10, 13, 20, 200])
def test_every_number_of_tokens(kind, T):
    """Below the rank, and on either side of where W + ΔW is formed; also without gradients."""
    plain, ours = pair(kind)
    assert worst(results(plain, T), results(ours, T)) < EXACT
    with torch.no_grad():
        x = torch.randn(T, 24)
        assert worst({"y": plain(x)}, {"y": ours(x)}) < EXACT


def test_conv1d(kind):
    for T in (3, 100):
        plain, ours = pair(kind, net(Conv1D(40, 24), nn.Tanh(), Conv1D(24, 40)), fan_in_fan_out=True)
        assert worst(results(plain, T), results(ours, T)) < EXACT


@pytest.mark.parametrize("how", ["another", "in place", "data", "every layer's"])
def test_new_shared_factors_are_seen(kind, how):
    """A plan holds no slice of what it read before."""
    plain, ours = pair(kind)
    results(ours)
    results(ours)
    for model in (plain, ours):
        generator = torch.Generator().manual_seed(8)
        layers = [m for m in model.modules() if hasattr(m, BUFFERS[kind][0]) and hasattr(m, "base_layer")]
        for key in BUFFERS[kind]:
            shared = getattr(layers[0], key)
            new = torch.randn(shared["default"].shape, generator=generator).to(shared["default"])
            if how == "another":
                shared["default"] = new
            elif how == "in place":
                shared["default"].copy_(new)
            elif how == "data":
                shared["default"].data = new
            else:
                for layer in layers:
                    setattr(layer, key, type(shared)({"default": new}))
    assert worst(results(plain), results(ours)) < EXACT


def test_dropout_of_randlora_is_pefts():
    plain, ours = pair("randlora", net(nn.Linear(24, 40)), randlora_dropout=0.3)
    for model in (plain, ours):
        torch.manual_seed(5)
        model.found = results(model)
    assert worst(plain.found, ours.found) < EXACT


def test_dropout_of_vera():
    """A mask of its own: drawn from torch's generator, right on average, and none in eval mode."""
    plain, ours = pair("vera", net(nn.Linear(24, 40)), vera_dropout=0.3)
    x, drawn = torch.randn(3, 24), []
    with torch.no_grad():
        for seed in range(400):
            torch.manual_seed(seed % 399)
            drawn.append(ours(x))
        assert torch.equal(drawn[0], drawn[399]) and not torch.equal(drawn[0], drawn[1])
        spread, expected = torch.stack(drawn).std(0), plain.eval()(x)
        assert ((torch.stack(drawn).mean(0) - expected).abs() < 5 * spread / 20 + 1e-6).all()
        assert worst({"y": expected}, {"y": ours.eval()(x)}) < EXACT


def test_a_file_without_the_projections(kind, tmp_path):
    plain, ours = pair(kind, save_projection=False)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path)
    accelerate(loaded, strict=True)
    with torch.no_grad():
        x = torch.randn(5, 24)
        assert worst({"y": plain(x)}, {"y": loaded(x)}) < EXACT


def test_an_adapter_that_does_not_fit_is_left_to_peft():
    plain, ours = pair("randlora")
    for model in (plain, ours):
        for module in model.modules():
            if hasattr(module, "num_bases"):
                module.num_bases = 1  # as a later adapter of another rank leaves it
    x = torch.randn(5, 24)
    with pytest.raises(RuntimeError):
        plain(x)
    with pytest.raises(RuntimeError):  # PEFT's own error
        ours(x)


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(kind, bits):
    pytest.importorskip("bitsandbytes")
    from test_peft_bitsandbytes import Net
    from test_peft_bitsandbytes import results as of_net

    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(Net(bits, torch.float32))
        config = CONFIGS[kind](target_modules=["first", "second"])
        models[-1] = perturb(peft.get_peft_model(models[-1], config))
    plain, ours = models
    try:
        expected = of_net(plain, torch.float32)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this bitsandbytes does not run its {bits}-bit layer on the CPU: {error}")
    report = accelerate(ours, strict=True)
    assert report.counts == {"fused": 0, "fused (base-agnostic)": 2, "PEFT": 0}, str(report)
    assert worst(expected, of_net(ours, torch.float32)) < EXACT
    assert not report.fallbacks()
