"""What people do with a PEFT model still works after ``accelerate``: copy, pickle, merge, save, load, add, restore."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PeftModel, get_peft_model_state_dict  # noqa: E402
from peft.tuners import lora, miss  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft_tiny import (  # noqa: E402
    METHODS,
    adapted,
    config,
    llama,
    logits_and_gradients,
    pair,
    perturb,
    tokens,
    worst,
)

from spectral_ops import accelerate, restore  # noqa: E402

EXACT = 5e-6
pytestmark = pytest.mark.usefixtures("one_thread")
methods = pytest.mark.parametrize("method", METHODS)


def tuner_types(model):
    return {type(m).__name__ for m in model.modules() if isinstance(m, BaseTunerLayer)}


def close(ours, plain):
    torch.testing.assert_close(ours(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_importing_needs_no_peft():
    script = (
        "import sys, spectral_ops; from spectral_ops.integrations import peft_report;"
        "assert not {'peft', 'transformers', 'accelerate', 'bitsandbytes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spectral_ops.integrations.peft_accelerate", None)
    monkeypatch.delattr("spectral_ops.integrations.peft_accelerate", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'spectral_ops\[peft\]'"):
        accelerate(torch.nn.Linear(2, 2))


@methods
def test_nothing_but_the_class_changes(method):
    model = adapted(method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    parameters = {name: id(p) for name, p in model.named_parameters()}
    state = {name: t.data_ptr() for name, t in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    accelerate(model, strict=True)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == state
    assert [name for name, _ in model.named_modules()] == modules
    assert {id(p) for p in optimizer.param_groups[0]["params"]} <= set(parameters.values())
    kind = miss.MissLinear if method.startswith("miss") else lora.Linear
    assert all(isinstance(m, kind) for m in model.modules() if isinstance(m, BaseTunerLayer))
    assert len(tuner_types(model)) == 1 and tuner_types(model) != {kind.__name__}


@methods
def test_restore_is_bit_identical(method):
    plain, ours = pair(adapted(method))
    attributes = {n: set(m.__dict__) for n, m in ours.named_modules()}
    accelerate(ours)
    logits_and_gradients(ours, tokens())
    assert restore(ours) is ours
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) == 0.0
    assert tuner_types(ours) == tuner_types(plain)
    assert {n: set(m.__dict__) for n, m in ours.named_modules()} == attributes
    restore(ours)  # once more changes nothing


def test_accelerating_twice_is_fine():
    plain, ours = pair(adapted("dora"))
    first = accelerate(ours)
    close(ours, plain)
    second = accelerate(ours, strict=True)
    assert first.rows == second.rows and tuner_types(ours) == {"FusedLoraLinear"}
    close(ours, plain)
    restore(ours)
    assert tuner_types(ours) == {"Linear"}


@methods
def test_deepcopy(method):
    original = adapted(method)
    report = accelerate(original)
    original(tokens())
    duplicate = copy.deepcopy(original)
    assert tuner_types(duplicate) == tuner_types(original)
    with torch.no_grad():
        for p in duplicate.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    plain = restore(copy.deepcopy(duplicate))
    close(duplicate, plain)
    assert not torch.allclose(duplicate(tokens()).logits, original(tokens()).logits)
    assert not report.fallbacks()


@pytest.mark.parametrize("method", ["lora", "dora", "miss", "miss_bat"])
def test_pickle_and_torch_save(method):
    model = adapted(method)
    accelerate(model)
    expected = model(tokens()).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for loaded in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loaded(tokens()).logits, expected)
        assert tuner_types(loaded) == tuner_types(model)
        assert accelerate(loaded).counts["PEFT"] == 0


@methods
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(method, safe):
    plain, ours = pair(adapted(method))
    accelerate(ours, strict=True)
    before = ours(tokens()).logits
    for _ in range(2):
        for model in (plain, ours):
            model.merge_adapter(safe_merge=safe)
        assert torch.equal(ours(tokens()).logits, plain(tokens()).logits)
        torch.testing.assert_close(ours(tokens()).logits, before, rtol=1e-3, atol=1e-4)
        for model in (plain, ours):
            model.unmerge_adapter()
        close(ours, plain)


def test_dora_norm_follows_the_base_weight():
    """A merge writes the weight through .data; loading, moving and casting replace it."""
    plain, ours = pair(adapted("dora"))
    accelerate(ours, strict=True)
    close(ours, plain)
    other = {n: 1.3 * t if "base_layer" in n else t for n, t in plain.state_dict().items()}
    for change in (lambda m: m.load_state_dict(other), lambda m: m.half().float(), lambda m: m.double()):
        for model in (plain, ours):
            change(model)
        close(ours, plain)


@methods
def test_merge_and_unload(method):
    plain, ours = pair(adapted(method))
    accelerate(ours)
    expected, got = plain.merge_and_unload(), ours.merge_and_unload()
    assert torch.equal(got(tokens()).logits, expected(tokens()).logits)
    assert not [m for m in got.modules() if isinstance(m, BaseTunerLayer)]
    model = adapted(method)
    accelerate(model)
    base = model.unload()
    assert not [m for m in base.modules() if isinstance(m, BaseTunerLayer)]


@methods
def test_save_and_load(method, tmp_path):
    """An accelerated model's adapter loads into plain PEFT, and PEFT's into an accelerated model."""
    model = adapted(method)
    base = {
        n.replace(".base_layer", ""): t for n, t in model.base_model.model.state_dict().items() if "default" not in n
    }
    plain_state = get_peft_model_state_dict(model)
    accelerate(model, strict=True)
    state = get_peft_model_state_dict(model)
    assert state.keys() == plain_state.keys()
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=None)
    fresh = llama()
    fresh.load_state_dict(base)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    if method == "pissa":  # PEFT initialises again when it loads, which moves the base weight
        loaded.base_model.model.load_state_dict(model.base_model.model.state_dict())
    close(model, loaded)
    report = accelerate(loaded, strict=True)
    close(model, loaded)
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    if method != "pissa":
        close(model, loaded)
    assert not report.fallbacks()


def test_adapters_added_later():
    model = adapted("lora", target_modules=["q_proj"])
    report = accelerate(model, strict=True)
    model.add_adapter("wide", config("dora", target_modules=["q_proj", "up_proj"]))
    model.set_adapter("wide")
    perturb(model)
    plain = restore(copy.deepcopy(model))
    close(model, plain)
    assert {f.name.rpartition(".")[2] for f in report.fallbacks()} == {"up_proj"}
    assert {f.reason for f in report.fallbacks()} == {"added after accelerate: call it again"}
    report = accelerate(model, strict=True)
    assert report.counts["fused"] == 4 and not report.fallbacks()
    close(model, plain)
    model.delete_adapter("wide")
    assert model.base_model.model.model.layers[0].self_attn.q_proj.active_adapters == ["default"]
    logits_and_gradients(model, tokens())
    assert not report.fallbacks()


def test_pissa_added_beside_dora_moves_the_base_weight():
    """Its initialisation writes the residual through .data, under a norm that was taken before."""
    model = adapted("dora")
    accelerate(model, strict=True)
    model(tokens())
    model.add_adapter("pissa", config("pissa"))
    close(model, restore(copy.deepcopy(model)))


def test_a_report_does_not_keep_the_model_alive():
    import gc
    import weakref

    model = adapted("lora")
    report, alive = accelerate(model), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and report.fallbacks() == []
