"""PEFT's LoHa, LoKr and HiRA beyond what test_peft_tuners.py holds all to: their variants, and what falls back."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_tiny import gpt2, llama, logits_and_gradients, perturb, tokens, worst  # noqa: E402

from spectral_ops import accelerate, report  # noqa: E402

TARGETS = ["q_proj", "k_proj", "down_proj"]
EXACT = 5e-6
pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS = {
    "lokr, both decomposed": ("LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 4}),
    "lokr, whole": ("LoKrConfig", {"r": 16}),
    "lokr, first small": ("LoKrConfig", {"r": 2, "decompose_factor": 2, "alpha": 3.0}),
    "loha by tiles": ("LoHaConfig", {"r": 12}),
    "loha by factors": ("LoHaConfig", {"r": 1, "alpha": 3.0}),
}


def model_of(config, dtype=torch.float32, **fields):
    torch.manual_seed(1)
    made = getattr(peft, config)(target_modules=TARGETS, **fields)
    return perturb(peft.get_peft_model(llama(dtype), made)).train()


def needs(config):
    if not hasattr(peft, config):
        pytest.skip(f"this PEFT has no {config}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    config, fields = VARIANTS[variant]
    plain = model_of(config, **fields)
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT
    assert report(ours).counts["fused"] == 6


@pytest.mark.parametrize("config", ["LoKrConfig", "LoHaConfig"])
@pytest.mark.parametrize("kind", ["rank_dropout", "module_dropout"])
def test_what_drops_in_training_is_peft_s(config, kind):
    plain = model_of(config, r=2, **{kind: 0.5})
    ours = copy.deepcopy(plain)
    accelerate(ours)
    for model in (plain, ours):
        torch.manual_seed(3)
        model.train()
    outs = []
    for model in (plain, ours):
        torch.manual_seed(4)
        outs.append(model(tokens()).logits)
    assert torch.equal(*outs)
    (reason, _, calls) = report(ours).grouped()[0]
    assert reason == f"{kind} 0.5 in training" and calls == 6
    with torch.no_grad():
        assert worst({"y": plain.eval()(tokens()).logits}, {"y": ours.eval()(tokens()).logits}) < EXACT
    assert all(row.calls for row in report(ours).rows)


@pytest.mark.parametrize("config", ["LoKrConfig", "LoHaConfig"])
def test_set_scale_is_noticed(config):
    plain = model_of(config, r=2)
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    for factor in (1.0, 2.0):
        for model in (plain, ours):
            for module in model.modules():
                if hasattr(module, "scale_layer"):
                    module.scale_layer(factor)
        with torch.no_grad():
            assert worst({"y": plain(tokens()).logits}, {"y": ours(tokens()).logits}) < EXACT


def test_hira_over_conv1d():
    needs("HiraConfig")
    torch.manual_seed(1)
    config = peft.HiraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    plain = perturb(peft.get_peft_model(gpt2(), config)).train()
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT


def test_hira_s_dropout_and_rounding():
    needs("HiraConfig")
    dropped = model_of("HiraConfig", r=4, hira_dropout=0.5)
    accelerate(dropped)
    dropped(tokens())
    assert "hira_dropout 0.5 in training" in report(dropped).grouped()[0][0]
    narrow = model_of("HiraConfig", torch.bfloat16, r=4)
    rounded, exact = narrow, copy.deepcopy(narrow)
    assert "rounded to torch.bfloat16" in str(accelerate(rounded))
    assert "hira_linear, exact" in str(accelerate(exact, exact=True))
    oracle = logits_and_gradients(copy.deepcopy(exact).double(), tokens())["logits"]
    off = [(logits_and_gradients(m, tokens())["logits"].double() - oracle).norm() for m in (rounded, exact)]
    assert off[1] <= off[0] * 1.2


def test_two_hira_adapters_at_once():
    needs("HiraConfig")
    model = model_of("HiraConfig", r=4)
    model.add_adapter("other", peft.HiraConfig(r=3, target_modules=TARGETS))
    perturb(model)
    plain, ours = model, copy.deepcopy(model)
    accelerate(ours, strict=True)
    for m in (plain, ours):
        m.base_model.set_adapter(["default", "other"])
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT
