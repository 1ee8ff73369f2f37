"""PEFT over bases in FP8: its numbers where it has them, and the whole gradient where it has none or too little."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fp8 import BASES, Blind, compressed_layer, torchao_layer, transformers_layer  # noqa: E402
from peft import LoraConfig, MissConfig, get_peft_model  # noqa: E402
from peft.tuners import miss  # noqa: E402
from peft_tiny import config, errors, llama, pair, perturb, worst  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import spectral_ops as so  # noqa: E402
from spectral_ops import accelerate  # noqa: E402
from spectral_ops.adapters import float8, quantised  # noqa: E402
from spectral_ops.functional import float8 as functional  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
D, K = 150, 288


class Net(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def two(form, dtype=torch.float32):
    return Net(BASES[form](D, K, dtype)[0], BASES[form](K, D, dtype)[0])


def with_adapters(net, kind=LoraConfig, targets=("first", "second"), **settings):
    if torchao := sys.modules.get("torchao.quantization"):  # as transformers leaves it, for MiSS and merging
        configuration = SimpleNamespace(get_apply_tensor_subclass=torchao.Float8WeightOnlyConfig)
        net.hf_quantizer = SimpleNamespace(quantization_config=configuration)
    torch.manual_seed(1)
    return trainable(get_peft_model(net, kind(r=5, target_modules=list(targets), **settings)))


def trainable(model):
    if any(p.dtype in functional.FLOAT8 for p in model.parameters() if p.requires_grad):
        pytest.skip("this PEFT makes its adapters in float8, where they do not train")
    return perturb(model)


@pytest.fixture
def emulated(monkeypatch):
    """transformers' product where its kernels do not exist, so that PEFT runs over it."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "FP8LinearFunction"):
        pytest.skip("this transformers has no gradient for FP8Linear")

    def product(x, weight, scale, block_size, bias=None, *rest):
        W = fp8._dequantize_fp8_weight(weight, scale, block_size, x.dtype)
        return F.linear(x, W, None if bias is None else bias.to(x.dtype))

    monkeypatch.setattr(fp8, "fp8_linear", product)


def results(model, dtype=torch.float32, k=K):
    x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


SETTINGS = {
    "lora": {},
    "rslora_dropout_off": {"use_rslora": True, "lora_dropout": 0.0},
    "miss": {"kind": MissConfig},
    "miss_random": {"kind": MissConfig, "init_weights": False},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", ["transformers", "torchao_row", "torchao_tensor"])
def test_same_as_peft(form, settings, dtype, emulated):
    if settings == "dora" and form == "transformers":
        pytest.skip("PEFT cannot start DoRA over FP8Linear: it takes the norm of the float8 numbers")
    plain, ours = (with_adapters(two(form, dtype), **SETTINGS[settings]) for _ in range(2))
    report = accelerate(ours, strict=True)
    assert report.counts == {"fused": 0, "fused (base-agnostic)": 2, "PEFT": 0}
    expected, got = results(plain, dtype), results(ours, dtype)
    if dtype == torch.float32:
        assert worst(expected, got) < 5e-6
    else:
        assert max(errors(expected, got).values()) < 4 * 2.0**-8
    assert worst(got, results(ours, dtype)) == 0.0
    assert not report.fallbacks()


@pytest.mark.parametrize("settings", ["lora", "miss"])
def test_over_the_layer_s_own_kernel(settings, emulated, monkeypatch):
    """As on an accelerator: FP8Linear makes the product, under no_grad, and the gradient is ours."""
    monkeypatch.setattr(float8, "has_kernel", lambda base, x: True)
    plain, ours = (with_adapters(two("transformers"), **SETTINGS[settings]) for _ in range(2))
    report = accelerate(ours, strict=True)
    called = []
    forward = type(ours.base_model.model.first.base_layer).forward
    monkeypatch.setattr(
        type(ours.base_model.model.first.base_layer),
        "forward",
        lambda self, x: called.append(torch.is_grad_enabled()) or forward(self, x),
    )
    got = results(ours)
    assert called == [False, False]
    assert worst(results(plain), got) < 5e-6 and not report.fallbacks()


def formula(model, x, dy):
    """y, dx and the adapter's own share of dx over one adapted layer, in float64: those of its merged weight."""
    layer = model.base_model.model.layer
    W = quantised.dequantised(layer.base_layer).double()
    if isinstance(layer, miss.MissLinear):
        block = layer.miss_block["default"].detach().double()
        delta = block[torch.arange(K) % len(block)].T
    else:
        A, B = (getattr(layer, key)["default"].weight.detach().double() for key in ("lora_A", "lora_B"))
        delta = layer.scaling["default"] * B @ A
        if layer.lora_magnitude_vector:
            m = layer.lora_magnitude_vector["default"].weight.detach().double()
            delta = (m / (W + delta).norm(dim=1))[:, None] * (W + delta) - W
    bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.double()
    return x.double() @ (W + delta).T + bias, dy.double() @ (W + delta), dy.double() @ delta


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("kind", ["lora", "dora", "miss"])
@pytest.mark.parametrize(
    "form", ["torchao_row_dynamic", "torchao_tensor_dynamic", "compressed_kernel", "compressed_block"]
)
def test_where_peft_has_no_gradient(form, kind):
    """torch's FP8 product has no derivative, and nn.Linear none over a float8 weight."""
    if kind == "dora" and form.startswith("compressed"):
        pytest.skip("PEFT cannot start DoRA over a float8 weight")
    settings = {"miss": {"kind": MissConfig}, "dora": {"use_dora": True}}.get(kind, {})
    model = with_adapters(One(BASES[form](D, K, torch.float32)[0]), targets=["layer"], **settings)
    x, dy = torch.randn(6, K, requires_grad=True), torch.randn(6, D)
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(x).backward(dy)
    report = accelerate(model, strict=True)
    assert report.counts["fused (base-agnostic)"] == 1
    y = model(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    want_y, want_dx, share = formula(model, x.detach(), dy)
    assert relative(y.detach(), want_y) < (1e-5 if form == "compressed_block" else 0.06)
    assert relative(dx, want_dx) < 1e-5 and relative(share, want_dx) > 0.1
    assert not report.fallbacks()


def test_where_the_gradient_is_quietly_too_small():
    """A kernel that autograd does not see (transformers' FP8Linear until version 5): PEFT's x gets u A alone."""
    model = with_adapters(One(Blind(D, K)), targets=["layer"])
    x, dy = torch.randn(6, K, requires_grad=True), torch.randn(6, D)
    _, whole, share = formula(model, x.detach(), dy)
    assert relative(torch.autograd.grad(model(x), x, dy)[0], share) < 1e-5
    report = accelerate(model, strict=True)
    assert relative(torch.autograd.grad(model(x), x, dy)[0], whole) < 1e-5
    assert relative(share, whole) > 0.1 and not report.fallbacks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_torchao_s_int8_that_rounds_its_input_gets_the_whole_gradient(dtype):
    quantization = pytest.importorskip("torchao.quantization")
    if not hasattr(quantization, "Int8Tensor"):
        pytest.skip("this torchao has no Int8Tensor")
    net = nn.Sequential(nn.Linear(K, D, dtype=dtype))
    quantization.quantize_(net, quantization.Int8DynamicActivationInt8WeightConfig())
    base = net[0]
    if not isinstance(base.weight, quantization.Int8Tensor):
        pytest.skip("torchao before 0.18 has another tensor for it, which is an error")
    product = base(torch.ones(1, K, dtype=dtype))
    model = with_adapters(One(base), targets=["layer"])
    x, dy = torch.randn(6, K).to(dtype).requires_grad_(), torch.randn(6, D).to(dtype)
    want_y, whole, share = formula(model, x.detach(), dy)
    eps = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative(torch.autograd.grad(model(x), x, dy)[0], share) < eps  # PEFT's
    report = accelerate(model, strict=True)
    y = model(x)
    assert relative(torch.autograd.grad(y, x, dy)[0], whole) < eps and relative(y.detach(), want_y) < 0.02
    assert torch.equal(base(torch.ones(1, K, dtype=dtype)), product) and not report.fallbacks()


def test_a_base_without_a_gradient_is_an_error():
    class Opaque(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    for settings in ({}, {"kind": MissConfig}):
        model = with_adapters(One(Opaque(K, D)), targets=["layer"], **settings)
        accelerate(model)
        with pytest.raises(ValueError, match="base_layer: got Opaque .*, wanted a layer that is differentiable"):
            model(torch.randn(2, K, requires_grad=True))
        model(torch.randn(2, K))


def test_a_format_that_cannot_be_read_is_an_error():
    layer = compressed_layer(D, K)[0]
    layer.weight_scale = None
    model = with_adapters(One(layer), targets=["layer"])
    with pytest.raises(ValueError, match="base_layer: got Linear .*and no scale, wanted one of its own in"):
        accelerate(model)


def test_merging_says_what_it_cannot_do():
    model = with_adapters(One(transformers_layer(D, K)[0]), targets=["layer"])
    accelerate(model, strict=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="merge: got a base weight in torch.float8_e4m3fn, whose scales PEFT does not"):
        model.merge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model(torch.randn(2, K)).isfinite().all()


def quantised_llama():
    """A tiny Llama whose linear layers are FP8Linear, by blocks of 16."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    model = llama().requires_grad_(False)
    for name, linear in list(model.model.named_modules()):
        if type(linear) is nn.Linear:
            d, k = linear.weight.shape
            layer = fp8.FP8Linear(k, d, (16, 16))
            weight, scale = float8.quantise(linear.weight, float8.empty_blocks(d, k, (16, 16)))
            layer.weight, layer.weight_scale_inv = nn.Parameter(weight, False), nn.Parameter(scale, False)
            model.model.set_submodule(name, layer)
    return model


def losses(model, steps=20):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(parameters, lr=5e-3), []
    tokens = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(5))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", ["lora", "miss"])
def test_a_model_trains_as_under_peft(kind, emulated):
    plain, ours = (get_peft_model(quantised_llama(), config(kind)) for _ in range(2))
    torch.manual_seed(1)
    ours.load_state_dict(trainable(plain).state_dict())
    report = accelerate(ours, strict=True)
    expected, got = losses(plain), losses(ours)
    assert got == pytest.approx(expected, rel=2e-5) and got[-1] < got[0] - 0.5
    assert report.counts == {"fused": 0, "fused (base-agnostic)": 14, "PEFT": 0} and not report.fallbacks()


@pytest.mark.parametrize("method", [so.LoRAConfig(r=4), so.DoRAConfig(r=4), so.BoneConfig(r=4)], ids=type)
def test_a_model_trains_natively(method):
    """No emulation of anything: what runs is ours, also with the adapters off."""
    model, tokens = quantised_llama(), torch.randint(0, 64, (2, 12))
    so.attach(model, dataclasses.replace(method, target_modules="all-linear"))
    found = losses(model)
    assert found[-1] < found[0] - 0.5
    with so.disabled(model), torch.no_grad():
        plain = model(input_ids=tokens).logits
    so.merge(model)
    assert not torch.equal(model(input_ids=tokens).logits, plain)
    so.unmerge(model)
    with so.disabled(model), torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, plain)


@pytest.mark.parametrize("kind", [LoraConfig, MissConfig])
def test_merging_over_torchao_is_peft_s(kind):
    plain, ours = (with_adapters(two("torchao_row"), kind=kind) for _ in range(2))
    accelerate(ours, strict=True)
    x, apart = torch.randn(3, K), results(ours)["y"]
    try:
        plain.merge_adapter()
    except (NotImplementedError, AssertionError) as error:
        pytest.skip(f"this PEFT does not merge into torchao's float8: {error}")
    ours.merge_adapter()
    assert torch.equal(plain(x), ours(x))
    assert relative(results(ours)["y"], apart.double()) < 0.2
    for model in (plain, ours):
        model.unmerge_adapter()
    assert worst(results(plain), results(ours)) < 5e-6


def test_several_adapters_dropout_and_disabling(emulated):
    plain, ours = (with_adapters(two("transformers"), lora_dropout=0.3) for _ in range(2))
    for model in (plain, ours):
        torch.manual_seed(4)
        model.add_adapter("other", LoraConfig(r=3, target_modules=["first", "second"]))
        model.base_model.set_adapter(["default", "other"])
        perturb(model).eval()
    report = accelerate(ours, strict=True)
    assert worst(results(plain), results(ours)) < 5e-6
    with plain.disable_adapter(), ours.disable_adapter():
        x = torch.randn(3, K)
        assert torch.equal(plain(x), ours(x))
    ours.train()
    torch.manual_seed(3)
    first = results(ours)
    torch.manual_seed(3)
    assert worst(first, results(ours)) == 0.0
    assert worst(first, results(ours)) > 1e-3
    assert not report.fallbacks()


def test_dora_with_dropout():
    """PEFT multiplies the dropped x by the dequantised weight."""
    plain, ours = (with_adapters(two("torchao_row"), use_dora=True, lora_dropout=0.4) for _ in range(2))
    report, got = accelerate(ours, strict=True), []
    for model in (plain, ours):
        torch.manual_seed(3)
        got.append(results(model))
    assert worst(*got) < 5e-6
    assert not report.fallbacks()


def test_checkpointed_copied_and_without_grad():
    model = with_adapters(One(torchao_layer(D, K, dynamic=True)[0]), targets=["layer"])
    accelerate(model, strict=True)
    x = torch.randn(6, K, requires_grad=True)
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert torch.equal(torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)[0], want)
    again = pair(model)[1]
    assert torch.equal(torch.autograd.grad(again(x).square().sum(), x)[0], want)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("form", ["transformers", "torchao_row_dynamic"])
def test_compiled(form):
    torch._dynamo.reset()
    model = with_adapters(One(BASES[form](D, K, torch.float32)[0]), targets=["layer"])
    accelerate(model, strict=True)
    want = results(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(2)).requires_grad_()
    model.zero_grad()
    y = compiled(x)
    y.square().sum().backward()
    got = {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}
    assert worst(want, got) < 2e-6
