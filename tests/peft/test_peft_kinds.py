"""Kinds of layers beyond one LoRA over an nn.Linear: tensor scalings, torchao, several DoRA adapters, subclasses."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import AdaLoraConfig, LoraConfig, get_peft_model  # noqa: E402
from peft.utils.hotswap import prepare_model_for_compiled_hotswap  # noqa: E402
from peft_tiny import pair, perturb, worst  # noqa: E402

from spectral_ops import accelerate  # noqa: E402

EXACT = 5e-6
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two linear layers; 12 features, so that no rank divides them."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 20, bias=bias)
        self.second = nn.Linear(20, 12, bias=bias)

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


HOTSWAP = """
    import sys, tempfile, torch
    sys.path[:0] = [{support!r}, {here!r}]
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from peft_tiny import worst
    from torch._dynamo.testing import CompileCounterWithBackend
    from spectral_ops import accelerate
    from test_peft_kinds import Net, adapted, inputs, layers, results

    torch.set_num_threads(1)

    def swap_by_hand(model, other):  # what hotswap_adapter does, which fails for DoRA in PEFT itself
        source = dict(other.named_parameters())
        for name, p in model.named_parameters():
            p.data.copy_(source[name])
        for mine, its in zip(layers(model), layers(other)):
            mine.scaling["default"].fill_(its.scaling["default"])

    for dora in (False, True):
        settings = [{{"r": 7 if dora else r, "lora_alpha": a, "use_dora": dora}} for r, a in ((4, 3), (7, 5), (2, 9))]
        with tempfile.TemporaryDirectory() as folder:
            for i, setting in enumerate(settings):
                adapted(**setting).save_pretrained(f"{{folder}}/{{i}}")
            model = PeftModel.from_pretrained(Net(), f"{{folder}}/0", is_trainable=True)
            report = accelerate(model, strict=True)
            prepare_model_for_compiled_hotswap(model, target_rank=7)
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            inner = torch.compile(model.base_model.model, fullgraph=True, backend=counter)
            for i in (0, 1, 2):
                plain = PeftModel.from_pretrained(Net(), f"{{folder}}/{{i}}", is_trainable=True)
                if i and dora:
                    swap_by_hand(model, plain)
                elif i:
                    hotswap_adapter(model, f"{{folder}}/{{i}}", adapter_name="default")
                theirs, compiled = results(plain), results(model, call=inner)
                assert worst(results(model), compiled) < {exact}, i
                assert worst(*({{key: r[key] for key in "yx"}} for r in (theirs, compiled))) < {exact}, i
            assert counter.frame_count == 1, counter.frame_count
            assert not report.fallbacks(), report.fallbacks()
    print("swapped")
"""


def test_hot_swapping_does_not_recompile():
    """Three adapters of different ranks and scalings through one graph."""
    here = Path(__file__).parent
    script = textwrap.dedent(HOTSWAP.format(support=str(here.parent / "support"), here=str(here), exact=EXACT))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("swapped\n"), done.stdout + done.stderr
