"""accelerate's device_map: its hooks around an accelerated layer, where they only align and where they offload."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from accelerate import cpu_offload, dispatch_model  # noqa: E402
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module  # noqa: E402
from peft_tiny import adapted, logits_and_gradients, loss_of, pair, tokens, worst  # noqa: E402

import spectral_ops  # noqa: E402

LAYERS = 14
ALL_FUSED = {"fused": LAYERS, "fused (base-agnostic)": 0, "PEFT": 0}


def first(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("method", ["lora", "dora", "miss", "miss_bat"])
def test_fused_with_hooks_that_only_align_and_once_they_are_gone(method, before):
    stock, model = pair(adapted(method, base_bias=True))
    expected = logits_and_gradients(stock, tokens())
    if before:
        spectral_ops.accelerate(model, strict=True)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if not before:
        spectral_ops.accelerate(model, strict=True)
    assert type(first(model).base_layer._hf_hook) is AlignDevicesHook
    assert worst(expected, logits_and_gradients(model, tokens())) < 1e-5
    remove_hook_from_module(model, recurse=True)
    assert worst(expected, logits_and_gradients(model, tokens())) < 1e-5
    report = spectral_ops.report(model)
    assert report.counts == ALL_FUSED and not report.fallbacks()
    assert all(row.calls == 2 for row in report.rows)
    restored = spectral_ops.restore(model)
    assert worst(expected, logits_and_gradients(restored, tokens())) < 1e-5


def test_offloaded_weights_are_left_to_peft_until_they_are_back():
    model = adapted("lora").eval()  # PEFT's MiSS reads its offloaded blocks past accelerate's hooks
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
        spectral_ops.accelerate(model)
        cpu_offload(model, "cpu")
        assert torch.equal(model(input_ids=tokens()).logits, expected)
        grouped = spectral_ops.report(model).grouped()
        assert grouped[0][0] == "the base weight is on the meta device (offloaded)" and grouped[0][2] == LAYERS
        assert set(spectral_ops.accelerate(model).counts) == {*ALL_FUSED, "decided at the first call"}
        remove_hook_from_module(model, recurse=True)
        torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert spectral_ops.report(model).counts == ALL_FUSED


class Doubling(AlignDevicesHook):
    def pre_forward(self, module, x):
        return super().pre_forward(module, 2 * x)


@pytest.mark.parametrize("where", ["lora_A", "base_layer"])
def test_a_hook_that_does_more_is_honoured_whenever_it_comes(where):
    stock, model = pair(adapted("lora"))
    spectral_ops.accelerate(model)
    loss_of(model, tokens())  # leaves a plan that lasts
    for each in (stock, model):
        part = getattr(first(each), where)
        add_hook_to_module(part["default"] if where == "lora_A" else part, Doubling(execution_device="cpu"))
    assert worst(logits_and_gradients(stock, tokens()), logits_and_gradients(model, tokens())) < 1e-5
    row = spectral_ops.report(model).rows[0]
    assert (row.calls, row.peft_calls) == ((1, 1) if where == "lora_A" else (2, 0))
    assert where == "lora_A" or row.path == "fused (base-agnostic)"


def test_a_hook_that_would_move_the_input_is_one():
    model = adapted("lora")
    spectral_ops.accelerate(model)
    hook = AlignDevicesHook(execution_device="cpu")
    part = first(model).lora_A["default"]
    add_hook_to_module(part, hook)
    loss_of(model, tokens())
    assert spectral_ops.report(model).counts == ALL_FUSED
    hook.execution_device = "meta"  # the plan before this must not last
    with pytest.raises((RuntimeError, NotImplementedError)):  # PEFT's own call obeys the hook
        loss_of(model, tokens())
    assert spectral_ops.report(model).fallbacks()[0].reason == "lora_A carries hooks of its own"


def test_an_input_on_another_device_than_the_weights_is_left_to_peft():
    model = adapted("lora")
    spectral_ops.accelerate(model)
    first(model)(torch.zeros(1, 32, device="meta"))
    (fallback,) = spectral_ops.report(model).fallbacks()
    assert fallback.reason == "x is on meta, a weight on cpu"
