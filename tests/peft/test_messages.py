"""What accelerate() and attach() say to a model that is not theirs: what it is, and what to do."""

from __future__ import annotations

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_tiny as tiny  # noqa: E402

import spectral_ops  # noqa: E402


def native():
    return spectral_ops.attach(tiny.llama(), spectral_ops.LoRAConfig(r=2, target_modules="all-linear"))


def prompted(kind):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(tiny.llama(), config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: prompted("PrefixTuningConfig"), r"a PeftModelForCausalLM whose adapter \(PREFIX_TUNING\) has no"
         r" layers.*use the model as it is"),
        (lambda: prompted("PromptTuningConfig"), r"whose adapter \(PROMPT_TUNING\) has no layers"),
        (native, r"a LlamaForCausalLM with spectral_ops' own adapter layers.*fused already: leave accelerate out"),
        (tiny.llama, r"a LlamaForCausalLM without any PEFT adapter layer.*on what get_peft_model returns"),
    ],
    ids=["prefix tuning", "prompt tuning", "attached", "before get_peft_model"],
)  # fmt: skip
def test_accelerate(build, message):
    with pytest.raises(ValueError, match=message):
        spectral_ops.accelerate(build())


@pytest.mark.parametrize("accelerated", [False, True])
def test_attach_on_a_peft_model(accelerated):
    model = tiny.adapted("lora")
    if accelerated:
        spectral_ops.accelerate(model)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"PEFT's adapter layers \('.*q_proj': .*accelerate\(model\) makes.*unload"):
        spectral_ops.attach(model, spectral_ops.LoRAConfig(r=2, target_modules=["lm_head"]))
    assert [name for name, _ in model.named_modules()] == names
    spectral_ops.attach(model.unload(), spectral_ops.LoRAConfig(r=2, target_modules=["lm_head"]))
