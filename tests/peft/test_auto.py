"""spectral_ops.auto: every way in which PEFT builds a model, and the way back."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_tiny as tiny  # noqa: E402
from packaging.version import Version  # noqa: E402
from peft import get_peft_model  # noqa: E402  (imported before auto(), as trainers do)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer  # noqa: E402
from transformers.integrations.peft import MIN_PEFT_VERSION  # noqa: E402

import spectral_ops  # noqa: E402
from spectral_ops.integrations.auto import from_environment  # noqa: E402
from spectral_ops.integrations.peft_fused import ORIGINALS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PEFTS_OWN = BaseTuner.inject_adapter


@pytest.fixture(autouse=True)
def off_afterwards():
    yield
    spectral_ops.auto(False)
    assert BaseTuner.inject_adapter is PEFTS_OWN


def fused(model) -> list[bool]:
    return [type(m) in ORIGINALS for m in model.modules() if isinstance(m, BaseTunerLayer)]


def by_get_peft_model(folder):
    return get_peft_model(tiny.llama(), tiny.config("lora"))


def by_from_pretrained(folder):
    tiny.adapted("dora").save_pretrained(folder)
    return peft.PeftModel.from_pretrained(tiny.llama(), folder)


def by_from_pretrained_on_meta(folder):
    tiny.adapted("lora").save_pretrained(folder)
    return peft.PeftModel.from_pretrained(tiny.llama(), folder, low_cpu_mem_usage=True)


def by_add_adapter(folder):
    with spectral_ops.auto(False):
        model = get_peft_model(tiny.llama(), tiny.config("lora", target_modules=["q_proj"]))
    assert not any(fused(model))
    model.add_adapter("other", tiny.config("lora", target_modules=["down_proj"]))
    return model


def by_load_adapter(folder):
    tiny.adapted("lora").save_pretrained(folder)
    with spectral_ops.auto(False):
        model = get_peft_model(tiny.llama(), tiny.config("lora", target_modules=["q_proj"]))
    model.load_adapter(folder, "other")
    return model


def by_weighting(folder):
    with spectral_ops.auto(False):
        model = get_peft_model(tiny.llama(), tiny.config("lora"))
    model.add_weighted_adapter(["default"], [0.5], "joined", combination_type="linear")
    return model


def by_transformers(folder):
    model = tiny.llama()
    model.add_adapter(tiny.config("lora"))
    return model


def by_transformers_from_a_file(folder):
    tiny.adapted("miss").save_pretrained(folder)
    model = tiny.llama()
    model.load_adapter(folder)
    return model


def by_injection(folder):
    return peft.inject_adapter_in_model(tiny.config("miss"), tiny.llama())


def by_mixing(folder):
    model = get_peft_model(tiny.llama(), tiny.config("lora", target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", tiny.config("lora", target_modules=["down_proj"]))
    return model


WAYS = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_that_builds_a_model(way, tmp_path):
    if "transformers" in way.__name__ and Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers wants PEFT ≥ {MIN_PEFT_VERSION}, and this is {peft.__version__}")
    torch.manual_seed(1)
    plain = way(tmp_path)
    assert not any(fused(plain))
    torch.manual_seed(1)
    with spectral_ops.auto():
        model = way(tmp_path)
    assert fused(model) and all(fused(model))
    ids = tiny.tokens()
    for m in (plain, model):
        tiny.perturb(m).eval()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert spectral_ops.report(model).called


def test_switching_nests_and_is_undone_exactly():
    with spectral_ops.auto(strict=True) as outer:
        wrapper = BaseTuner.inject_adapter
        assert wrapper is not PEFTS_OWN and wrapper.__wrapped__ is PEFTS_OWN
        spectral_ops.auto()
        with spectral_ops.auto(False):
            assert BaseTuner.inject_adapter is PEFTS_OWN
            with spectral_ops.auto(recompute=True):
                model = by_get_peft_model(None)
                assert next(m for m in model.modules() if type(m) in ORIGINALS)._spectral_ops.recompute
        assert BaseTuner.inject_adapter.__wrapped__ is PEFTS_OWN
    assert outer.before is None and BaseTuner.inject_adapter is PEFTS_OWN
    with pytest.raises(ZeroDivisionError), spectral_ops.auto():
        1 / 0  # noqa: B018
    assert BaseTuner.inject_adapter is PEFTS_OWN
    with pytest.raises(TypeError, match=r"enabled: got a LlamaForCausalLM, wanted True or False.*accelerate\(model\)"):
        spectral_ops.auto(tiny.llama())


def test_a_model_s_own_options_stay():
    model = tiny.adapted("lora")
    spectral_ops.accelerate(model, recompute=True, exact=True, siblings=False)
    with spectral_ops.auto():
        model.add_adapter("other", tiny.config("lora", target_modules=["q_proj"]))
    states = [m._spectral_ops for m in model.modules() if type(m) in ORIGINALS]
    assert {(s.strict, s.recompute, s.exact, s.siblings) for s in states} == {(False, True, True, False)}


def test_strict_refuses_in_the_call_that_builds():
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with spectral_ops.auto():
        assert not any(fused(get_peft_model(tiny.llama(), config)))
    with spectral_ops.auto(strict=True):
        with pytest.raises(RuntimeError, match="2 layers would be left to PEFT"):
            get_peft_model(tiny.llama(), config)
        get_peft_model(tiny.llama(), prefix)  # injects nothing
        model = by_get_peft_model(None)
    with pytest.raises(RuntimeError, match="strict=True forbids"):
        model.eval()(tiny.tokens(), adapter_names=["default"] * 2)


def test_wrappers_of_others(caplog):
    """One put over ours keeps it in the chain; ours then only calls on, and of two of ours one acts."""
    calls = []
    with spectral_ops.auto():
        ours = BaseTuner.inject_adapter

        def theirs(self, *args, **kwargs):
            calls.append(BaseTuner.inject_adapter)
            return ours(self, *args, **kwargs)

        BaseTuner.inject_adapter = theirs
        assert all(fused(by_get_peft_model(None)))
    assert BaseTuner.inject_adapter is theirs and not any(fused(by_get_peft_model(None)))
    with caplog.at_level(logging.INFO, "spectral_ops"), spectral_ops.auto():
        assert all(fused(by_get_peft_model(None)))
    assert len(caplog.records) == 1
    assert len(calls) == 3 and BaseTuner.inject_adapter is theirs
    BaseTuner.inject_adapter = PEFTS_OWN


def test_a_tuner_that_overrides_the_method():
    class Tuner(peft.LoraModel):
        def inject_adapter(self, *args, **kwargs):
            super().inject_adapter(*args, **kwargs)

    with spectral_ops.auto():
        model = Tuner(tiny.llama(), tiny.config("lora"), "default")
    assert all(fused(model)) and len(fused(model)) == 14


def test_threads():
    models, failed = [], []

    def build():
        try:
            for _ in range(3):
                with spectral_ops.auto(False):
                    pass
                models.append(by_get_peft_model(None))
        except BaseException as error:
            failed.append(error)

    with spectral_ops.auto():
        threads = [threading.Thread(target=build) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed and len(models) == 9
    for model in models:  # each as a whole, whoever had switched it off meanwhile
        assert len(set(fused(model))) == 1


def test_adalora_is_taken_over_when_it_is_complete():
    fields = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 6, "target_modules": tiny.ATTENTION}
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", **fields)

    def run(model):
        tiny.perturb(model.train())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(1, 7):
            loss = tiny.loss_of(model, tiny.tokens(seed=step))
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, model.peft_config["default"].rank_pattern

    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with spectral_ops.auto(enabled):
            model = get_peft_model(tiny.llama(), peft.AdaLoraConfig(**config.to_dict()))
        results.append(run(model))
        assert ("_spectral_ops_allocator" in vars(model.base_model)) == enabled
        assert all(fused(model)) == enabled
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4) and results[1][1] == results[0][1]
    with spectral_ops.auto():
        model = get_peft_model(tiny.llama(), config)
    spectral_ops.restore(model)  # before it was ever called
    assert type(model.base_model) is peft.AdaLoraModel and not any(fused(model))


def test_it_says_what_it_did(caplog):
    with caplog.at_level(logging.INFO, "spectral_ops"), spectral_ops.auto():
        by_get_peft_model(None)
    assert [r.getMessage() for r in caplog.records] == [
        "auto: LoraModel in LlamaForCausalLM: 14 layers fused, 0 fused over their own base layer, 0 left to PEFT"
        " (planned: no call was seen yet)"
    ]


def test_values_of_the_environment_variable(monkeypatch):
    for value, message in (("2", "got '2', wanted 1, strict, or nothing"), ("true", "got 'true'")):
        monkeypatch.setenv("SPECTRAL_OPS_ACCELERATE", value)
        with pytest.raises(ValueError, match=f"SPECTRAL_OPS_ACCELERATE: {message}"):
            from_environment()
    monkeypatch.setenv("SPECTRAL_OPS_ACCELERATE", "")
    from_environment()
    assert BaseTuner.inject_adapter is PEFTS_OWN
    monkeypatch.setenv("SPECTRAL_OPS_ACCELERATE", "strict")
    from_environment()
    with pytest.raises(RuntimeError, match="would be left to PEFT"):
        get_peft_model(tiny.llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
