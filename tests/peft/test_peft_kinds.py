"""Kinds of layers beyond one LoRA over an nn.Linear: tensor scalings, torchao, several DoRA adapters, subclasses."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import AdaLoraConfig, LoraConfig, MissConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.aqlm import AqlmLoraLinear  # noqa: E402
from peft.tuners.lora.awq import AwqLoraLinear  # noqa: E402
from peft.tuners.lora.gptq import GPTQLoraLinear  # noqa: E402
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap  # noqa: E402
from peft_tiny import errors, pair, perturb, worst  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from transformers.models.falcon.modeling_falcon import FalconLinear  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from spectral_ops import accelerate  # noqa: E402

EXACT = 5e-6
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two linear layers."""

    def __init__(self, bias=True, k=12, d=20):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(k, d, bias=bias)
        self.second = nn.Linear(d, k, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(base=None, kind=LoraConfig, **settings):
    torch.manual_seed(1)
    settings = {"target_modules": ["first", "second"], **settings}
    settings.setdefault("init_r" if kind is AdaLoraConfig else "r", 4)
    return perturb(get_peft_model(base or Net(), kind(**settings)))


def layers(model):
    return model.base_model.model.first, model.base_model.model.second


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape or (2, 5, 12), generator=torch.Generator().manual_seed(2)).to(dtype)


def results(model, x=None, call=None):
    """The output, and every gradient."""
    x = (inputs() if x is None else x).clone().requires_grad_()
    model.zero_grad()
    y = (model if call is None else call)(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


# --- scalings that are tensors ---------------------------------------------------------------------------------------

ADALORA = {"kind": AdaLoraConfig, "target_r": 2, "tinit": 1, "tfinal": 3, "total_step": 10, "lora_alpha": 3.0}


def tensor_scaled(**settings):
    """A model prepared for compiled hot swapping, its ranks padded; alpha is no power of two times the rank."""
    lora = settings.get("kind", LoraConfig) is LoraConfig
    model = adapted(**{"lora_alpha": 3, **settings})
    prepare_model_for_compiled_hotswap(model, target_rank=7 if lora else None)
    assert isinstance(model.base_model.model.first.scaling["default"], torch.Tensor)
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"lora_bias": True}, ADALORA],
    ids=["lora", "dora", "lora_bias", "adalora"],
)
def test_a_tensor_as_the_scaling(settings):
    plain, ours = pair(tensor_scaled(**settings))
    report = accelerate(ours, strict=True)
    assert report.counts == {"fused": 2, "fused (base-agnostic)": 0, "PEFT": 0}
    for factor in (1.0, 0.7, -3.0):  # written in place, as hot swapping does: the plan must read it in every call
        for model in (plain, ours):
            for layer in layers(model):
                layer.scaling["default"].fill_(factor)
        assert worst(results(plain), results(ours)) < EXACT
    assert not report.fallbacks()


def test_a_tensor_as_the_scaling_of_several_adapters_and_over_a_hooked_base_layer():
    model = tensor_scaled()
    model.add_adapter("other", LoraConfig(r=3, lora_bias=True, target_modules=["first", "second"]))
    model.base_model.set_adapter(["other", "default"])
    model.base_model.model.second.base_layer.register_forward_hook(lambda *a: None)
    plain, ours = pair(perturb(model))
    report = accelerate(ours, strict=True)
    assert report.counts == {"fused": 1, "fused (base-agnostic)": 1, "PEFT": 0}
    assert worst(results(plain), results(ours)) < EXACT
    assert not report.fallbacks()


def test_accelerated_before_it_is_prepared_for_hot_swapping():
    plain, ours = pair(adapted(lora_alpha=3))
    report = accelerate(ours, strict=True)
    results(ours)  # makes a plan, which the padded weights must end
    for model in (plain, ours):
        prepare_model_for_compiled_hotswap(model, target_rank=7)
    assert worst(results(plain), results(ours)) < EXACT
    assert not report.fallbacks()


def test_a_scaling_of_several_numbers_is_left_to_peft():
    plain, ours = pair(adapted())
    report = accelerate(ours)
    for model in (plain, ours):
        model.base_model.model.first.scaling["default"] = torch.tensor([2.0])
    assert torch.equal(plain(inputs()), ours(inputs())) or worst(results(plain), results(ours)) < EXACT
    assert {f.reason for f in report.fallbacks()} == {"the scaling is a Tensor, not a number"}


def swap_by_hand(model, other):
    """What hotswap_adapter does, which fails for DoRA in PEFT itself."""
    source = dict(other.named_parameters())
    for name, p in model.named_parameters():
        p.data.copy_(source[name])
    for mine, its in zip(layers(model), layers(other), strict=True):
        mine.scaling["default"].fill_(its.scaling["default"])


@pytest.mark.parametrize("dora", [False, True])
def test_hot_swapping_does_not_recompile(dora, tmp_path):
    """Three adapters of different scalings, and of different ranks where hotswap_adapter pads them, in one graph."""
    for i, (r, alpha) in enumerate(((4, 3), (7, 5), (2, 9))):
        adapted(r=7 if dora else r, lora_alpha=alpha, use_dora=dora).save_pretrained(f"{tmp_path}/{i}")
    model = PeftModel.from_pretrained(Net(), f"{tmp_path}/0", is_trainable=True)
    report = accelerate(model, strict=True)
    prepare_model_for_compiled_hotswap(model, target_rank=7)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend=counter)
    for i in range(3):
        plain = PeftModel.from_pretrained(Net(), f"{tmp_path}/{i}", is_trainable=True)
        if i and dora:
            swap_by_hand(model, plain)
        elif i:
            hotswap_adapter(model, f"{tmp_path}/{i}", adapter_name="default")
        expected, got = results(plain), results(model, call=compiled)
        assert worst(*({key: found[key] for key in "yx"} for found in (expected, got))) < EXACT
        assert worst(results(model), got) < EXACT
    assert counter.frame_count == 1
    assert not report.fallbacks()
    torch._dynamo.reset()


# --- torchao ---------------------------------------------------------------------------------------------------------


def quantised(form, dtype, bias=True):
    quantization = pytest.importorskip("torchao.quantization")
    settings = {
        "int8": (quantization.Int8WeightOnlyConfig, {}),
        "int8_dynamic": (quantization.Int8DynamicActivationInt8WeightConfig, {}),
        "int4": (quantization.IntxWeightOnlyConfig, {"weight_dtype": torch.int4}),
    }
    base, (kind, options) = Net(bias, 32, 48).to(dtype), settings[form]
    quantization.quantize_(base, kind(**options))
    configuration = SimpleNamespace(get_apply_tensor_subclass=lambda: kind(**options))
    base.hf_quantizer = SimpleNamespace(quantization_config=configuration)  # as transformers leaves it, for MiSS
    return base


@pytest.mark.parametrize("form", ["int8", "int8_dynamic", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"kind": MissConfig},
        {"kind": MissConfig, "init_weights": "mini", "mini_r": 4},
        ADALORA,
    ],
    ids=["lora", "dora", "miss", "miss_mini", "adalora"],
)
def test_torchao(form, dtype, settings):
    bases = [quantised(form, dtype, bias=dtype is torch.float32) for _ in range(2)]
    if "use_dora" in settings and type(bases[0].second.weight).__name__ == "LinearActivationQuantizedTensor":
        pytest.skip("torchao before 0.18 cannot dequantise a weight whose activations it quantises, as DoRA must")
    plain, ours = (adapted(base, **settings) for base in bases)
    report = accelerate(ours, strict=True)
    assert report.counts == {"fused": 0, "fused (base-agnostic)": 2, "PEFT": 0}
    x = inputs(2, 5, 32, dtype=dtype)
    if type(bases[0].second.weight).__name__ == "LinearActivationQuantizedTensor":
        with pytest.raises(ValueError, match="wanted a layer that is differentiable in its input"):
            results(ours, x)
        return
    expected, got = results(plain, x), results(ours, x)
    alike = dict(got)
    if form == "int8_dynamic":  # torchao's product has no gradient: PEFT's x and first layer get the adapter's share
        assert (got["x"] - expected["x"]).norm() > 0.1 * got["x"].norm()
        alike, expected = ({n: t for n, t in r.items() if n == "y" or ".second." in n} for r in (got, expected))
    if dtype is torch.float32 and form != "int8_dynamic":
        assert worst(expected, alike) < EXACT
    else:  # x is rounded too, to bfloat16 or int8: a difference in the last place may become one of a step
        off = errors(expected, alike)  # AdaLoRA's ranknum, which PEFT trains here, is one number in which much cancels
        assert max(e / (4.0 if "ranknum" in name else 1.0) for name, e in off.items()) < 4 * 2.0**-8
    assert worst(got, results(ours, x)) == 0.0  # again, the same
    assert not report.fallbacks()


def test_torchao_dropout_and_disabling():
    plain, ours = (adapted(quantised("int8", torch.float32), lora_dropout=0.4) for _ in range(2))
    report, x = accelerate(ours, strict=True), inputs(2, 5, 32)
    torch.manual_seed(3)
    first = results(ours, x)
    torch.manual_seed(3)
    assert worst(first, results(ours, x)) == 0.0
    assert worst(first, results(ours, x)) > 1e-3
    assert worst(results(plain.eval(), x), results(ours.eval(), x)) < EXACT
    with plain.disable_adapter(), ours.disable_adapter():
        assert torch.equal(plain(x), ours(x))
    assert not report.fallbacks()


def test_torchao_dora_with_dropout():
    models = [adapted(quantised("int8", torch.float32), use_dora=True, lora_dropout=0.4) for _ in range(2)]
    report, x, found = accelerate(models[1], strict=True), inputs(2, 5, 32), []
    for model in models:
        torch.manual_seed(3)
        found.append(results(model, x))
    assert worst(*found) < EXACT
    assert not report.fallbacks()


def test_torchao_bat_is_left_to_peft():
    models = [adapted(quantised("int8", torch.float32), kind=MissConfig, init_weights="bat") for _ in range(2)]
    reason = "bat transforms the weight itself, and the base layer holds it quantised"
    assert {(row.path, row.reason) for row in accelerate(models[1]).rows} == {("PEFT", reason)}


# --- layers that call whatever base they are given -------------------------------------------------------------------


class Packed(nn.Module):
    """In the place of GPTQ's, AWQ's and AQLM's layers, which cannot be installed here: integers and a scale."""

    def __init__(self, k, d):
        super().__init__()
        self.infeatures, self.outfeatures = k, d
        generator = torch.Generator().manual_seed(d)
        self.register_buffer("qweight", torch.randint(-8, 8, (d, k), generator=generator, dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.qweight.to(x.dtype) / 16)


@pytest.mark.parametrize("kind", [GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear])
@pytest.mark.parametrize(("dtype", "adapter"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_a_layer_that_calls_its_base_whatever_it_is(kind, dtype, adapter):
    newer = "config" in inspect.signature(kind.__init__).parameters
    settings = {"r": 4, "lora_alpha": 3, **({"config": LoraConfig(r=4, lora_alpha=3)} if newer else {})}
    model = nn.Sequential(kind(Packed(12, 20), "default", **settings), nn.Tanh())
    plain, ours = pair(perturb(model.to(dtype)))
    for m in (plain, ours):
        for p in m.parameters():
            p.data = p.data.to(adapter)
    report = accelerate(ours, strict=True)
    assert report.counts == {"fused": 0, "fused (base-agnostic)": 1, "PEFT": 0}
    x = inputs(dtype=dtype)
    expected, got = results(plain, x), results(ours, x)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in expected.items()}
    assert max(errors(expected, got).values()) < (EXACT if dtype is torch.float32 else 4 * 2.0**-8)
    for m in (plain, ours):
        m[0].enable_adapters(False)
    assert torch.equal(plain(x), ours(x))
    for m in (plain, ours):
        m[0].enable_adapters(True)
    assert not report.fallbacks()
    if kind is not AqlmLoraLinear:  # PEFT calls the second name of the same layer
        ours[0].base_layer = Packed(12, 20)
        with pytest.raises(RuntimeError, match="replaced under one of its two names"):
            ours(x)


# --- several adapters, DoRA among them -------------------------------------------------------------------------------

DORA, LORA, BIAS = {"use_dora": True}, {}, {"lora_bias": True}
SEVERAL = {
    "dora+dora": (DORA, DORA),
    "dora+lora": (DORA, LORA),
    "lora+dora": (BIAS, DORA),
    "dora+lora+dora": (DORA, BIAS, DORA),
}


def several(kinds, base=None, **settings):
    model = adapted(base, **kinds[0], **settings)
    names = ["default"]
    for i, extra in enumerate(kinds[1:]):
        names.append(f"other{i}")
        config = LoraConfig(r=3 + i, lora_alpha=5, target_modules=["first", "second"], **extra, **settings)
        model.add_adapter(names[-1], config)
    model.base_model.set_adapter(names)
    return perturb(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kinds", SEVERAL.values(), ids=SEVERAL)
def test_several_active_adapters_with_dora(kinds, bias):
    plain, ours = pair(several(kinds, Net(bias)))
    report = accelerate(ours, strict=True)
    assert report.counts == {"fused": 2, "fused (base-agnostic)": 0, "PEFT": 0}
    assert "dora_" in report.rows[0].operators
    assert worst(results(plain), results(ours)) < EXACT
    assert worst(results(plain), results(ours)) < EXACT  # by the norms that are kept
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs()), plain(inputs()), rtol=1e-5, atol=1e-5)
    assert not report.fallbacks()


@pytest.mark.parametrize("kinds", SEVERAL.values(), ids=SEVERAL)
def test_several_active_adapters_with_dora_over_a_hooked_base_layer(kinds):
    model = several(kinds)
    seen = []
    for layer in layers(model):
        layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out))
    plain, ours = pair(model)
    report = accelerate(ours, strict=True)
    assert report.counts == {"fused": 0, "fused (base-agnostic)": 2, "PEFT": 0}
    expected, got = results(plain), results(ours)
    assert worst(expected, got) < EXACT
    torch.testing.assert_close(seen[2], seen[0])  # not overwritten
    assert not report.fallbacks()


def test_several_dora_in_bfloat16_and_under_autocast():
    model = several((DORA, LORA, DORA))
    oracle = results(pair(model)[1].double(), inputs().double())
    plain, ours = pair(pair(model)[1].bfloat16())
    autocast = pair(model)
    accelerate(ours, strict=True), accelerate(autocast[1], strict=True)
    off = [errors(oracle, results(m, inputs(dtype=torch.bfloat16))) for m in (plain, ours)]
    with torch.autocast("cpu", torch.bfloat16):
        off += [errors(oracle, results(m)) for m in autocast]
    for theirs, mine in (off[:2], off[2:]):
        for name, error in mine.items():
            assert error <= 2 * theirs[name] + 2.0**-8, (name, error, theirs[name])


@pytest.mark.parametrize("hooked", [False, True])
def test_dropout_of_several_dora_has_peft_s_law(hooked):
    """Each DoRA adapter takes the base weight's product with an x dropped by a mask of its own."""
    model = several((DORA, DORA), lora_dropout=0.3)
    if hooked:
        layers(model)[0].base_layer.register_forward_hook(lambda *a: None)
    plain, ours = (layers(m)[0] for m in pair(model))
    report = accelerate(ours, strict=True)
    x = inputs(8, 12)
    with torch.no_grad():
        samples = [torch.stack([layer(x) for _ in range(400)]) for layer in (plain, ours)]
    spread = samples[0].std(0)
    assert ((samples[0].mean(0) - samples[1].mean(0)).abs() <= 6 * spread * (2 / 400) ** 0.5 + 1e-6).all()
    assert ((samples[1].std(0) / spread - 1).abs() < 0.3).all()
    assert worst(results(plain.eval(), x), results(ours.eval(), x)) < EXACT
    assert not report.fallbacks()


def test_several_dora_with_dropout_over_a_hooked_base_layer():
    """Nothing of it is seeded by us: torch draws PEFT's masks, so the gradients are PEFT's too."""
    model = several((DORA, DORA), lora_dropout=0.3)
    for layer in layers(model):
        layer.base_layer.register_forward_hook(lambda *a: None)
    plain, ours = pair(model)
    report, found = accelerate(ours, strict=True), []
    for m in (plain, ours):
        torch.manual_seed(5)
        found.append(results(m))
    assert worst(*found) < EXACT
    assert worst(found[0], results(plain)) > 1e-3
    assert not report.fallbacks()


# --- subclasses of nn.Linear -----------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def of(kind):
    base = Net()
    base.first.__class__ = base.second.__class__ = kind
    return base


METHODS = {
    "lora": {},
    "dora": {"use_dora": True},
    "adalora": ADALORA,
    "miss": {"kind": MissConfig},
    "bat": {"kind": MissConfig, "init_weights": "bat"},
}


@pytest.mark.parametrize("kind", [FalconLinear, nn.modules.linear.NonDynamicallyQuantizableLinear])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_subclass_whose_forward_is_that_of_linear(kind, settings):
    plain, ours = pair(adapted(of(kind), **settings))
    report = accelerate(ours, strict=True)
    assert report.counts == {"fused": 2, "fused (base-agnostic)": 0, "PEFT": 0}
    assert worst(results(plain), results(ours)) < EXACT
    assert not report.fallbacks()


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_subclass_with_a_forward_of_its_own(settings):
    plain, ours = pair(adapted(of(Doubled), **settings))
    report = accelerate(ours, strict=True)
    path = "fused" if settings.get("init_weights") == "bat" else "fused (base-agnostic)"  # PEFT's bat never calls it
    assert {row.path for row in report.rows} == {path}
    assert worst(results(plain), results(ours)) < EXACT
    assert not report.fallbacks()


def test_a_subclass_that_makes_its_weight_or_its_call_itself():
    class Made(nn.Linear):
        @property
        def weight(self):
            return 2 * self._parameters["weight"]

    class Called(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    for kind in (Made, Called):
        plain, ours = pair(adapted(of(kind)))
        report = accelerate(ours, strict=True)
        assert report.counts["fused (base-agnostic)"] == 2
        assert worst(results(plain), results(ours)) < EXACT


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_over_a_hooked_conv1d(dropout):
    """Its weight is stored transposed."""
    base = nn.Sequential(Conv1D(20, 12))
    model = adapted(base, target_modules=["0"], fan_in_fan_out=True, use_dora=True, lora_dropout=dropout)
    model.base_model.model[0].base_layer.register_forward_hook(lambda *a: None)
    plain, ours = pair(model)
    report, found = accelerate(ours, strict=True), []
    assert report.rows[0].path == "fused (base-agnostic)"
    for m in (plain, ours):
        torch.manual_seed(5)
        found.append(results(m))
    assert worst(*found) < EXACT
    assert not report.fallbacks()


def test_dora_over_a_weight_that_is_not_floating():
    class Bytes(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.float() / 16, self.bias)

    models = []
    for _ in range(2):
        base = of(Bytes)
        models.append(adapted(base, use_dora=True))
        for layer in layers(models[-1]):
            packed = (16 * layer.base_layer.weight).round().to(torch.int8)
            layer.base_layer.weight = nn.Parameter(packed, requires_grad=False)
    report = accelerate(models[1])
    assert {row.reason for row in report.rows} == {"DoRA reads the base weight, which is in torch.int8"}
    assert worst(*(results(m) for m in models)) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: of(FalconLinear), lambda: quantised("int8", torch.float32)])
@pytest.mark.parametrize("dora", [False, True])
def test_compiles_without_a_graph_break(make, dora):
    model = adapted(make(), use_dora=dora)
    report, x = accelerate(model, strict=True), inputs(2, 5, model.base_model.model.first.in_features)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    assert worst(results(model, x), results(model, x, compiled)) < EXACT
    assert not report.fallbacks()
    torch._dynamo.reset()


def test_bat_over_a_hooked_base_layer():
    """PEFT's bat reads the weight and never calls the layer, so its hooks stay silent in both."""
    plain, ours = pair(adapted(kind=MissConfig, init_weights="bat"))
    report, seen = accelerate(ours, strict=True), []
    for model in (plain, ours):
        layers(model)[0].base_layer.register_forward_hook(lambda *a: seen.append(1))
    assert worst(results(plain), results(ours)) < EXACT
    assert not seen and not report.fallbacks()
    layers(ours)[0].base_layer.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="the base weight is trained"):
        ours(inputs())
