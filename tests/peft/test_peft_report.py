"""The report tells what really ran: per layer, counted, in both directions; and class swaps that others hold on to."""

import copy
import functools
import gc
import logging
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.tuners import lora  # noqa: E402
from peft_tiny import adapted, config, pair, perturb, tokens  # noqa: E402

import spectral_ops  # noqa: E402
from spectral_ops import accelerate, report, restore  # noqa: E402
from spectral_ops.integrations import peft_report  # noqa: E402
from spectral_ops.integrations.peft_report import FUSED, NEVER, PEFT  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def hook_a(model, name):
    """One layer whose every call PEFT must serve."""
    layer = model.get_submodule(f"base_model.model.model.layers.0.self_attn.{name}")
    return layer.lora_A["default"].register_forward_hook(lambda *a: None)


def test_every_call_is_counted():
    model = adapted("lora")
    first = accelerate(model)
    assert {row.calls for row in first.rows} == {0} and "planned" in str(first)
    for _ in range(3):
        model(tokens())
    handle = hook_a(model, "q_proj")
    model(tokens())
    handle.remove()
    with model.disable_adapter():
        model(tokens())
    model(tokens())
    again = report(model)
    assert again.rows == first.rows and str(again) == str(first)
    rows = {row.name.rpartition("layers.")[2]: row for row in again.rows}
    hooked = rows.pop("0.self_attn.q_proj")
    assert (hooked.path, hooked.calls, hooked.peft_calls) == (FUSED, 4, 1)
    assert {(row.path, row.calls, row.peft_calls) for row in rows.values()} == {(FUSED, 5, 0)}
    assert again.grouped() == [("lora_A carries hooks of its own", [hooked.name], 1)]
    accelerate(model)
    assert {row.calls for row in again.rows} == {0} and not again.fallbacks()


def test_a_layer_that_only_peft_served_is_not_called_fused():
    model = adapted("lora")
    accelerate(model)
    hook_a(model, "q_proj")
    for _ in range(2):
        model(tokens())
    now = report(model)
    assert now.counts == {"fused": 13, "fused (base-agnostic)": 0, "PEFT": 1}
    (row,) = (row for row in now.rows if row.path == PEFT)
    assert row.name.endswith("0.self_attn.q_proj") and row.reason == "lora_A carries hooks of its own"
    assert (row.calls, row.peft_calls, row.operators) == (0, 2, "")


def test_equal_fallbacks_are_one_line():
    model = adapted("lora")
    accelerate(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        model(tokens())
    finally:
        handle.remove()
    lines = [line for line in str(report(model)).splitlines() if line.startswith("fell back")]
    assert len(lines) == 1 and "14 layers (self_attn.q_proj, " in lines[0] and lines[0].endswith("(14 calls)")


def test_weights_read_past_the_forward():
    """In eval torch's TransformerEncoderLayer hands the weights of its Linear layers to one operator."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    plain, ours = pair(get_peft_model(block, LoraConfig(r=4, target_modules=["linear1", "linear2"])))
    accelerate(ours)
    x = torch.randn(2, 5, 16)
    for model in (plain, ours):
        model.train()
        model(x)
    assert report(ours).counts[FUSED] == 2
    accelerate(ours)
    outside = nn.Sequential(ours, get_peft_model(nn.Sequential(nn.Linear(16, 16)), LoraConfig(target_modules=["0"])))
    accelerate(outside)
    with torch.no_grad():
        outside.eval()(x)
    now = report(outside)
    assert {row.name.rpartition(".")[2]: row.path for row in now.rows} == {
        "linear1": NEVER,
        "linear2": NEVER,
        "0": FUSED,
    }
    assert now.counts == {"fused": 1, "fused (base-agnostic)": 0, "PEFT": 0, "never called": 2}
    assert "2 never called" in now.headline()


def test_idle_layers_say_so():
    model = adapted("lora")
    accelerate(model)
    with model.disable_adapter():
        model(tokens())
    assert {(row.path, row.calls) for row in report(model).rows} == {(FUSED, 0)}
    assert {row.reason for row in report(model).rows} == {"no adapter was active in its calls: the base layer alone"}


@pytest.mark.slow
def test_compiled_calls_are_not_said_to_be_missing():
    model = adapted("lora", target_modules=["q_proj", "v_proj"])
    accelerate(model)
    torch.compile(model, backend="eager", fullgraph=True)(tokens())
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")(torch.randn(1, 2, 32))
    now = report(model)
    assert now.counts[FUSED] == 4 and NEVER not in now.counts
    assert sum("not counted" in row.reason for row in now.rows) == 3


def test_one_warning_per_process(monkeypatch, caplog):
    monkeypatch.setattr(peft_report, "told", False)
    model = adapted("lora")
    accelerate(model)
    handle = hook_a(model, "q_proj")
    with caplog.at_level(logging.INFO, "spectral_ops"):
        for _ in range(3):
            model(tokens())
    handle.remove()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "q_proj" in record.getMessage() and "lora_A carries" in record.getMessage()


def test_report_wants_an_accelerated_model():
    with pytest.raises(TypeError, match="wanted a PEFT model"):
        report("model")
    model = adapted("lora")
    with pytest.raises(ValueError, match="spectral_ops.accelerate"):
        report(model)
    accelerate(model)
    assert report(nn.Sequential(model)).counts[FUSED] == 14
    assert report(model.base_model.model.model.layers[0]).counts[FUSED] == 7
    restore(model)
    with pytest.raises(ValueError):
        report(model)


def test_layers_added_later_are_in_the_report():
    model = adapted("lora", target_modules=["q_proj"])
    accelerate(model)
    model.add_adapter("wide", config("lora", target_modules=["q_proj", "up_proj"]))
    now = report(model)
    assert {row.reason for row in now.rows if "up_proj" in row.name} == {"added after accelerate: call it again"}
    assert now.counts[PEFT] == 2


# --- what outlives a swap --------------------------------------------------------------------------------------------


class Passing(ModelHook):
    pass


def layers(model):
    return [m for m in model.modules() if isinstance(m, lora.LoraLayer)]


def agree(plain, ours):
    torch.testing.assert_close(ours(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_hooks_put_on_before_accelerate(method):
    plain, ours = pair(adapted(method))
    for layer in layers(ours):
        add_hook_to_module(layer, Passing())
    now = accelerate(ours, strict=True)
    agree(plain, ours)
    assert {row.calls for row in now.rows} == {1} and now.counts[FUSED] == 14
    for layer in layers(ours):
        remove_hook_from_module(layer)
    agree(plain, ours)
    assert {row.calls for row in now.rows} == {2}
    restore(ours)
    assert torch.equal(ours(tokens()).logits, plain(tokens()).logits)


@pytest.mark.parametrize("removed", [False, True])
def test_restore_under_hooks(removed):
    plain, ours = pair(adapted("lora"))
    now = accelerate(ours)
    for layer in layers(ours):
        add_hook_to_module(layer, Passing())
        if removed:
            remove_hook_from_module(layer)
    agree(plain, ours)
    assert {row.calls for row in now.rows} == {1}
    restore(ours)
    assert torch.equal(ours(tokens()).logits, plain(tokens()).logits)
    now = accelerate(ours, strict=True)
    agree(plain, ours)
    assert {row.calls for row in now.rows} == {1}


def test_hooks_that_came_and_went_leave_a_layer_fused():
    """The accelerate library leaves the class's own forward bound on every module that it has unhooked."""
    plain, ours = pair(adapted("dora"))
    for module in list(ours.modules()):
        add_hook_to_module(module, Passing())
        remove_hook_from_module(module)
    assert "forward" in layers(ours)[0].__dict__ and "forward" in layers(ours)[0].base_layer.__dict__
    now = accelerate(ours, strict=True)
    for _ in range(2):
        agree(plain, ours)
    assert now.counts[FUSED] == 14 and {row.calls for row in now.rows} == {2}
    assert all(layer._spectral_ops.plan is not None for layer in layers(ours))  # and planned once


def test_bound_methods_outlive_restore():
    """Whatever was bound before a swap works after it: as the class does then."""
    plain, ours = pair(adapted("lora"))
    layer, twin = layers(ours)[0], layers(plain)[0]
    x = torch.randn(3, 32)
    before = layer.forward
    accelerate(ours)
    held = {name: getattr(layer, name) for name in ("forward", "merge", "unmerge", "update_layer", "_apply")}
    torch.testing.assert_close(before(x), layer(x))
    restore(ours)
    assert torch.equal(held["forward"](x), twin(x)) and torch.equal(before(x), twin(x))
    held["merge"]()
    twin.merge()
    assert torch.equal(layer(x), twin(x))
    held["unmerge"]()
    twin.unmerge()
    assert torch.equal(held["forward"](x), twin(x))
    held["_apply"](lambda t: t.double())
    assert layer.base_layer.weight.dtype is torch.float64
    before_0_19 = {"lora_dropout": 0.0, "init_lora_weights": True, "use_rslora": False}  # then one by one
    held["update_layer"]("more", r=2, lora_alpha=2, config=LoraConfig(r=2), **before_0_19)
    assert "more" in layer.lora_A
    accelerate(ours)
    assert torch.equal(held["forward"](x.double()), layer(x.double()))


def test_a_wrapper_of_ones_own():
    """A closure over the bound forward: left to PEFT when it was there first, served by PEFT after restore."""
    plain, ours = pair(adapted("lora"))

    def wrap(layer):
        layer.forward = functools.partial(lambda inner, *args: inner(*args), layer.forward)

    wrap(layers(ours)[0])
    now = accelerate(ours)
    assert now.counts[PEFT] == 1 and "its own forward was replaced" in now.rows[0].reason
    agree(plain, ours)
    for layer in layers(ours)[1:]:
        wrap(layer)
    agree(plain, ours)
    assert [row.calls for row in now.rows] == [0] + 13 * [2]
    restore(ours)
    assert torch.equal(ours(tokens()).logits, plain(tokens()).logits)


def test_a_copy_of_a_hooked_layer_is_its_own():
    ours = adapted("lora")
    for layer in layers(ours):
        add_hook_to_module(layer, Passing())
        remove_hook_from_module(layer)
    accelerate(ours)
    twin = perturb(copy.deepcopy(ours))
    assert not torch.allclose(twin(tokens()).logits, ours(tokens()).logits)
    assert {row.calls for row in report(twin).rows} == {1} == {row.calls for row in report(ours).rows}


def test_the_public_name():
    assert spectral_ops.report is report and "report" in spectral_ops.__all__


def test_counting_anew_while_a_plan_lasts():
    model = adapted("lora")
    accelerate(model)
    model(tokens())  # an evaluation before training
    again = accelerate(model)
    model(tokens())
    assert {(row.path, row.operators, row.calls) for row in again.rows} == {(FUSED, "lowrank_linear", 1)}


def test_a_report_is_live_whatever_another_calls_its_layers():
    model = adapted("lora")
    mine = accelerate(model)
    hook_a(model, "q_proj")
    wrapped = report(nn.Sequential(model))
    model(tokens())
    hooked = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {row.calls for row in mine.rows if row.name != hooked} == {1}
    assert [f.name for f in mine.fallbacks()] == [hooked] and [f.name for f in wrapped.fallbacks()] == ["0." + hooked]
    assert [row.path for row in mine.rows] == [row.path for row in wrapped.rows]


def test_a_bound_forward_outlives_restore_in_a_graph():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"]))
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    accelerate(model)
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    restore(model)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), lora.Linear.forward(layer, x))


@pytest.mark.parametrize("restored", [False, True])
def test_a_report_keeps_no_weights(restored):
    model = adapted("dora")
    rows = accelerate(model)
    model(tokens())
    weight = weakref.ref(layers(model)[0].base_layer.weight)
    if restored:
        restore(model)
    del model
    gc.collect()
    assert weight() is None and {row.calls for row in rows.rows} == {1}


def test_layers_whose_adapters_were_off_are_remarked_on():
    model = adapted("lora")
    now = accelerate(model)
    with model.disable_adapter():
        model(tokens())
    (line,) = now.remarks()
    assert line.startswith("fused: 14 layers") and "no adapter was active" in line
    model(tokens())
    assert not now.remarks()
