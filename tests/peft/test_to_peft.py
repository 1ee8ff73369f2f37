"""config.to_peft(): PEFT's config of the same adapter, or what stands in the way."""

from __future__ import annotations

import sys

import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from models import perturb  # noqa: E402

import spectral_ops as so  # noqa: E402

ON = {"target_modules": ["q_proj", "v_proj"]}
CONFIGS = {
    "lora": so.LoRAConfig(r=3, lora_alpha=5, lora_dropout=0.1, rank_pattern={"q_proj": 2}, **ON),
    "rslora": so.LoRAConfig(r=3, use_rslora=True, bias="lora_only", **ON),
    "pissa": so.LoRAConfig(r=3, init_lora_weights="pissa", **ON),
    "tokens": so.LoRAConfig(r=3, trainable_token_indices=[3, 4], modules_to_save=["lm_head"], **ON),
    "dora": so.DoRAConfig(r=3, task_type="CAUSAL_LM", **ON),
    "bone": so.BoneConfig(r=4, miss_dropout=0.1, **ON),
    "mini": so.BoneConfig(r=4, init_weights="mini", mini_r=8, **ON),
    "bat": so.BatConfig(r=4, **ON),
    "vera": so.VeRAConfig(r=9, **ON),
    "adalora": so.AdaLoRAConfig(init_r=3, target_r=2, total_step=9, **ON),
}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_attaches_the_same(name, tmp_path):
    config = CONFIGS[name].to_peft()
    assert isinstance(config, peft.PeftConfig)
    model = perturb(peft.get_peft_model(llama(), config), 0.1).eval()
    model.save_pretrained(tmp_path)
    ours = so.load_adapter(llama(), tmp_path).eval()
    ids = torch.arange(3, 13).unsqueeze(0)
    assert torch.allclose(ours(ids).logits, model(ids).logits, atol=2e-5)
    read = so.adapter_configs(ours)["default"]
    for field in ("r", "lora_alpha", "lora_dropout", "miss_dropout", "rank_pattern", "use_rslora", "bias", "task_type"):
        if field not in ("rank_pattern",) or name != "adalora":
            assert getattr(read, field, None) == getattr(CONFIGS[name], field, None), field


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (so.PiCaConfig(**ON), "PiCaConfig: got PICA, wanted a method that PEFT"),
        (so.RoSAConfig(**ON), "RoSAConfig: got ROSA, wanted a method"),
        (so.SpectralConfig(**ON), "SpectralConfig: got SPECTRAL, wanted a method"),
        (so.LoRADashConfig(**ON), "LoRADashConfig: got LORA_DASH, wanted a method"),
        (so.DVoRAConfig(**ON), "DVoRAConfig: got DVORA, wanted a method"),
        (so.BatConfig(mode="row", **ON), "BatConfig: got BAT_ROW, wanted a method"),
        (so.BatConfig(exact=True, **ON), "BatConfig.exact: got True, wanted False"),
        (so.DoRAConfig(magnitude_only=["q_proj"], **ON), r"DoRAConfig.magnitude_only: got \['q_proj'\]"),
        (so.LoRAConfig(init_lora_weights="milora", **ON), "LoRAConfig.init_lora_weights: got 'milora'"),
        (so.VeRAConfig(exclude_modules=["v_proj"], **ON), r"VeRAConfig.exclude_modules: got \['v_proj'\]"),
    ],
    ids=str,
)
def test_what_peft_lacks(config, message):
    with pytest.raises(ValueError, match=f"{message}.*spectral_ops.attach"):
        config.to_peft()


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="LoRAConfig.to_peft: needs PEFT"):
        CONFIGS["lora"].to_peft()
