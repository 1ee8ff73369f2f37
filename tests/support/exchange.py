"""An adapter from us to PEFT and back, and from PEFT to us and back: the same logits, trained parameters and file."""

from __future__ import annotations

import peft
import torch
from architectures import ARCHITECTURES, answer, build
from safetensors.torch import load_file

import spectral_ops as so
from spectral_ops import AdaLoRAConfig, BatConfig, BoneConfig, DoRAConfig, LoRAConfig, VeRAConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA, PATTERNS = {"r": 5, "lora_alpha": 8}, {"rank_pattern": {"0.*q.*": 3, "v_proj": 2}, "alpha_pattern": {".*1.*": 20}}

# method -> our config, PEFT's, the fields of both, PEFT's other fields
METHODS = {
    "lora": (LoRAConfig, "LoraConfig", LORA, {}),
    "rslora": (LoRAConfig, "LoraConfig", {**LORA, "use_rslora": True}, {}),
    "patterns": (LoRAConfig, "LoraConfig", {**LORA, **PATTERNS}, {}),
    "dora": (DoRAConfig, "LoraConfig", LORA, {"use_dora": True}),
    "pissa": (LoRAConfig, "LoraConfig", {**LORA, "r": 2, "init_lora_weights": "pissa"}, {}),
    "miss": (BoneConfig, "MissConfig", {"r": 5}, {}),
    "miss_mini": (BoneConfig, "MissConfig", {"r": 5, "init_weights": "mini", "mini_r": 8}, {}),
    "bat": (BatConfig, "MissConfig", {"r": 8}, {"init_weights": "bat"}),
    "vera": (VeRAConfig, "VeraConfig", {"r": 12}, {}),
    "adalora": (AdaLoRAConfig, "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 8}, {}),
}


def target_modules(name, method):
    """None where PEFT knows the architecture, so that both have to find the layers by themselves."""
    if ARCHITECTURES[name].targets:
        return list(ARCHITECTURES[name].targets)
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[their_config(name, method, target_modules=["x"]).peft_type]
    kind = getattr(getattr(build(name), "config", None), "model_type", None)
    return None if kind in tuner.target_module_mapping else "all-linear"


def their_config(name, method, **fields):
    _, theirs, both, more = METHODS[method]
    return getattr(peft, theirs)(**{"task_type": ARCHITECTURES[name].task_type, **both, **more, **fields})


def our_config(name, method, **fields):
    ours, _, both, _ = METHODS[method]
    return ours(**{"task_type": ARCHITECTURES[name].task_type, **both, **fields})


def perturb(model, seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def our_model(name, method, **fields):
    return perturb(so.attach(build(name), our_config(name, method, **fields)))


def their_model(name, method, **fields):
    return perturb(peft.get_peft_model(build(name), their_config(name, method, **fields)))


def ours_from(name, directory):
    return so.load_adapter(build(name), directory).eval()


def theirs_from(name, directory):
    return peft.PeftModel.from_pretrained(build(name), directory, is_trainable=True).eval()


def save_ours(model, directory):
    so.save_adapter(model, directory)
    return load_file(directory / WEIGHTS)


def save_theirs(model, directory):
    """PEFT's file, without the biases that bias="all" puts there once more from inside the modules trained whole."""
    model.save_pretrained(directory)
    file = load_file(directory / WEIGHTS)
    return {key: t for key, t in file.items() if ".modules_to_save." not in key and ".original_module." not in key}


def trained(model):
    """Names of the parameters that train, PEFT's as we call them."""
    names = set()
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.", ".copies.")
            names.add(name if ".copies." in name else name.replace(".default.weight", ".default"))
    return names


def assert_agree(name, first, second):
    """The same logits, far from the bare model's, by the same trained parameters."""
    want, got, bare = answer(name, first), answer(name, second), answer(name, build(name))
    scale = want.abs().max()
    assert torch.isfinite(want).all()
    assert (got - want).abs().max() <= 2e-5 * max(1, scale)
    assert (want - bare).abs().max() > 1e-3 * scale
    assert trained(second) == trained(first)
    assert trained(first)


def assert_same_file(first, second):
    assert first.keys() == second.keys()
    assert not [key for key, tensor in first.items() if not torch.equal(tensor, second[key])]


def ours_to_theirs_and_back(name, tmp_path, first, plain):
    """``plain``: our file holds the trained parameters as they are."""
    file = save_ours(first, tmp_path / "ours")
    theirs = theirs_from(name, tmp_path / "ours")
    again = save_theirs(theirs, tmp_path / "theirs")
    assert_same_file(file, again)
    second = ours_from(name, tmp_path / "theirs")
    assert_agree(name, theirs, second)
    assert_agree(name, first, theirs)
    assert_same_file(file, save_ours(second, tmp_path / "ours again"))


def theirs_to_ours_and_back(name, tmp_path, first, plain):
    file = save_theirs(first, tmp_path / "theirs")
    ours = ours_from(name, tmp_path / "theirs")
    assert_agree(name, first, ours)
    again = save_ours(ours, tmp_path / "ours")
    second = theirs_from(name, tmp_path / "ours")
    if plain:
        assert_same_file(file, again)
        assert_agree(name, ours, second)
        assert_same_file(file, save_theirs(second, tmp_path / "theirs again"))
    else:  # our file is plain LoRA of twice the rank
        assert (answer(name, ours) - answer(name, second)).abs().max() <= 2e-5 * answer(name, ours).abs().max()
