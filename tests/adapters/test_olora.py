"""OLoRA: A and B from W = Q R, as PEFT starts them, and its files both ways."""

import json

import pytest
import torch
from torch import nn

import spectral_ops
from spectral_ops import LoRAConfig
from spectral_ops.init import olora_factors

pytestmark = pytest.mark.usefixtures("one_thread")
FIELDS = {"r": 3, "lora_alpha": 12, "init_lora_weights": "olora", "target_modules": ["0", "2"]}


def small(dtype=torch.float32):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7)).to(dtype)


def perturb(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize(("d", "k"), [(20, 12), (7, 20), (9, 9)])
def test_the_factors(d, k):
    weight = torch.randn(d, k, dtype=torch.float64)
    A, B = olora_factors(weight, 4)
    Q, R = torch.linalg.qr(weight)
    assert torch.equal(A, R[:4]) and torch.equal(B, Q[:, :4])
    torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=torch.float64))
    whole_A, whole_B = olora_factors(weight, min(d, k))
    torch.testing.assert_close(whole_B @ whole_A, weight)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_start_is_pefts(dtype, use_rslora):
    """The same A, B and base weight; and the model at the start is the base model."""
    peft = pytest.importorskip("peft")
    x = torch.randn(4, 12, dtype=dtype)
    base = small(dtype)(x)
    theirs = peft.get_peft_model(small(dtype), peft.LoraConfig(use_rslora=use_rslora, **FIELDS)).base_model.model
    ours = spectral_ops.attach(small(dtype), LoRAConfig(use_rslora=use_rslora, **FIELDS))
    for i in (0, 2):
        a, b = ours[i], theirs[i]
        for key in ("lora_A", "lora_B"):  # PEFT's have been in the base's dtype, ours have not
            assert torch.equal(getattr(a, key)["default"].to(dtype), getattr(b, key)["default"].weight.to(dtype))
        torch.testing.assert_close(a.base_layer.weight, b.base_layer.weight, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(ours(x), base, **near)
    spectral_ops.detach(ours)
    torch.testing.assert_close(ours(x), base, **near)


@pytest.mark.parametrize("plain", [True, False])
def test_a_file_of_ours(plain, tmp_path):
    """As plain LoRA PEFT loads it onto the original base; as it trains, so do we, and so does PEFT."""
    peft, x = pytest.importorskip("peft"), torch.randn(4, 12)
    ours = perturb(spectral_ops.attach(small(), LoRAConfig(**FIELDS)))
    spectral_ops.save_adapter(ours, tmp_path, plain=plain)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["init_lora_weights"], written["r"]) == ((True, 6) if plain else ("olora", 3))
    torch.testing.assert_close(spectral_ops.load_adapter(small(), tmp_path)(x), ours(x), rtol=1e-4, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(small(), tmp_path)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("converted", [True, False])
def test_a_file_of_pefts(converted, tmp_path):
    """Converted by PEFT it is plain LoRA; else the start is computed again, as PEFT does when it loads."""
    peft, x = pytest.importorskip("peft"), torch.randn(4, 12)
    theirs = peft.get_peft_model(small(), peft.LoraConfig(**FIELDS))
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's documentation writes the start for a conversion
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "olora"
    perturb(theirs)
    options = {"path_initial_model_for_weight_conversion": tmp_path / "start"} if converted else {}
    theirs.save_pretrained(tmp_path / "adapter", **options)
    ours = spectral_ops.load_adapter(small(), tmp_path / "adapter")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    again = peft.PeftModel.from_pretrained(small(), tmp_path / "adapter")
    torch.testing.assert_close(again(x), ours(x), rtol=1e-4, atol=1e-5)


def test_to_peft_and_a_merge():
    config = LoRAConfig(**FIELDS)
    ours, x = perturb(spectral_ops.attach(small(), config)), torch.randn(4, 12)
    before = ours(x)
    torch.testing.assert_close(spectral_ops.merge(ours)(x), before, rtol=1e-4, atol=1e-5)
    pytest.importorskip("peft")
    assert config.to_peft().init_lora_weights == "olora"


def test_errors():
    with pytest.raises(ValueError, match="r: got 8, wanted at most 7"):
        spectral_ops.attach(small(), LoRAConfig(**{**FIELDS, "r": 8}))
    with pytest.raises(ValueError, match='init_lora_weights: got .olora_2.*"olora"'):
        LoRAConfig(init_lora_weights="olora_2")
    with pytest.raises(ValueError, match="r: got 0, wanted at least 1 and at most 3"):
        olora_factors(torch.randn(3, 4), 0)
