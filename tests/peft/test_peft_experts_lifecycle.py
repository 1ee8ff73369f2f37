"""What people do with adapters on experts still works after ``accelerate``: switch, merge, save, copy, compile."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

pytest.importorskip("transformers.integrations.moe")  # transformers 5
pytest.importorskip("peft")

from accelerate import dispatch_model  # noqa: E402
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module  # noqa: E402
from experts_tiny import (  # noqa: E402
    adapted_mixture,
    experts_config,
    experts_of,
    mixture,
    with_second,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict  # noqa: E402
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft_tiny import logits_and_gradients, loss_of, pair, perturb, tokens, worst  # noqa: E402

import spectral_ops  # noqa: E402

EXACT = 5e-6
SOME = ["qwen3_moe", "gpt_oss", "llama4"]  # plain; biases, interleaved and transposed; sorted rows, no interface
some = pytest.mark.parametrize("family", SOME)
pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def close(ours, stock) -> None:
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-4, atol=1e-5)


def accelerated(family: str, **extra):
    stock, ours = pair(adapted_mixture(family, **extra))
    return stock, ours, spectral_ops.accelerate(ours, strict=True)


def calls(report) -> set[int]:
    return {row.calls for row in report.rows}


@some
def test_nothing_but_the_class_changes_and_restore_gives_it_back(family):
    stock, ours = pair(adapted_mixture(family))
    parameters = {name: id(p) for name, p in ours.named_parameters()}
    state = {name: t.data_ptr() for name, t in ours.state_dict().items()}
    attributes = {n: set(m.__dict__) for n, m in ours.named_modules()}
    spectral_ops.accelerate(ours, strict=True)
    assert {name: id(p) for name, p in ours.named_parameters()} == parameters
    assert {name: t.data_ptr() for name, t in ours.state_dict().items()} == state
    assert all(isinstance(m, ParamWrapper) and type(m) is not ParamWrapper for m in experts_of(ours, everything=True))
    bound = experts_of(ours)[0].forward  # somebody holds it
    logits_and_gradients(ours, tokens())
    assert spectral_ops.restore(ours) is ours
    assert {n: set(m.__dict__) for n, m in ours.named_modules()} == attributes
    assert {type(m) for m in experts_of(ours, everything=True)} == {ParamWrapper}
    assert worst(logits_and_gradients(stock, tokens()), logits_and_gradients(ours, tokens())) == 0.0
    x, routing = torch.ones(4, 32), (torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    args = (x,) if family == "llama4" else (x, *routing)
    assert torch.equal(bound(*args), experts_of(stock)[0](*args))


@some
def test_adapters_off_and_on(family):
    stock, ours, report = accelerated(family)
    close(ours, stock)
    with stock.disable_adapter(), ours.disable_adapter():
        assert torch.equal(logits(ours), logits(stock))
    close(ours, stock)
    assert not report.fallbacks() and calls(report) == {2}


@pytest.mark.parametrize("safe", [False, True])
@some
def test_merge_and_unmerge(family, safe):
    stock, ours, report = accelerated(family)
    before = logits(ours)
    for _ in range(2):
        for model in (stock, ours):
            model.merge_adapter(safe_merge=safe)
        assert torch.equal(logits(ours), logits(stock))
        torch.testing.assert_close(logits(ours), before, rtol=1e-3, atol=1e-4)
        for model in (stock, ours):
            model.unmerge_adapter()
        close(ours, stock)
    for model in (stock, ours):  # PEFT takes merged ones out again where they are off
        model.merge_adapter()
    with stock.disable_adapter(), ours.disable_adapter():
        assert torch.equal(logits(ours), logits(stock))
    assert not report.fallbacks()


@some
def test_one_wrapper_merged_alone(family):
    """The outermost must notice what becomes of those inside, which it computes for."""
    for place in ("outer", "inner"):
        stock, ours, report = accelerated(family)
        close(ours, stock)
        for model in (stock, ours):
            for outer in experts_of(model):
                (outer if place == "outer" else outer.base_layer).merge()
        close(ours, stock)
        for model in (stock, ours):
            for outer in experts_of(model):
                (outer if place == "outer" else outer.base_layer).unmerge()
        close(ours, stock)
        assert not report.fallbacks()
        assert {row.name.endswith("base_layer"): row.calls for row in report.rows} == {
            False: 3 if place == "inner" else 2, True: 2 if place == "inner" else 3,
        }  # fmt: skip


@some
def test_merge_and_unload(family):
    stock, ours, _ = accelerated(family)
    close(ours, stock)
    expected, got = stock.merge_and_unload(), ours.merge_and_unload()
    assert torch.equal(logits(got), logits(expected))
    assert not [m for m in got.modules() if isinstance(m, BaseTunerLayer)]
    _, ours, _ = accelerated(family)
    assert torch.equal(logits(ours.unload()), logits(mixture(family).train()))


@some
def test_save_and_load(family, tmp_path):
    stock, ours, _ = accelerated(family)
    state = get_peft_model_state_dict(ours)
    assert state.keys() == get_peft_model_state_dict(stock).keys() and len(state) == 8
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixture(family), tmp_path, is_trainable=True).train()
    close(loaded, stock)
    report = spectral_ops.accelerate(loaded, strict=True)
    assert worst(logits_and_gradients(stock, tokens()), logits_and_gradients(loaded, tokens())) < EXACT
    other = spectral_ops.restore(perturb(copy.deepcopy(ours)))
    other.save_pretrained(tmp_path / "other")
    with_second(loaded, experts_config(family))
    loaded.delete_adapter("second")
    loaded.load_adapter(tmp_path / "other", "second")
    loaded.set_adapter("second")
    close(loaded, other)
    assert not report.fallbacks()


def test_adapters_that_come_and_go():
    stock, ours, report = accelerated("qwen3_moe")
    close(ours, stock)
    for model in (stock, ours):
        perturb(with_second(model, experts_config("qwen3_moe", r=2)))
        model.set_adapter("second")
    close(ours, stock)
    for model in (stock, ours):
        model.delete_adapter("second")
        model.set_adapter("default")
    close(ours, stock)
    assert not report.fallbacks() and calls(report) == {3}


def test_an_adapter_of_other_layers_alone():
    """The wrappers have no active adapter then: the experts run alone, and are not counted as fused."""
    model = with_second(adapted_mixture("qwen3_moe", stacks=["down_proj"]), LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    stock, ours = pair(perturb(model))
    report = spectral_ops.accelerate(ours, strict=True)
    close(ours, stock)
    for model in (stock, ours):
        model.base_model.set_adapter(["default", "second"])
    close(ours, stock)
    wrappers = [row for row in report.rows if row.name.endswith("experts")]
    assert [row.calls for row in wrappers] == [1, 1] and not report.fallbacks()


@some
def test_copies_and_pickles(family):
    stock, ours, report = accelerated(family)
    expected = logits(ours)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(logits(other), expected)
        assert [type(m) for m in experts_of(other)] == [type(m) for m in experts_of(ours)]
        perturb(other)
        close(other, spectral_ops.restore(copy.deepcopy(other)))
    assert torch.equal(logits(ours), expected) and not report.fallbacks()


def test_weights_that_are_moved_cast_and_loaded():
    stock, ours, report = accelerated("gpt_oss", implementation="batched_mm")
    state = {n: 0.9 * t for n, t in stock.state_dict().items()}
    for change in (lambda m: m.load_state_dict(state), lambda m: m.double(), lambda m: m.float()):
        close(ours, stock)
        for model in (stock, ours):
            change(model)
    close(ours, stock)
    assert not report.fallbacks()


def test_parameters_trained_after_a_call_without_gradients():
    """The views of the factors belong to the graph of their own call."""
    stock, ours, _ = accelerated("qwen3_moe")
    logits(ours)
    for _ in range(2):
        assert worst(logits_and_gradients(stock, tokens()), logits_and_gradients(ours, tokens())) < EXACT


def test_the_implementation_may_change_between_calls():
    stock, ours, report = accelerated("qwen3_moe", implementation="eager")
    close(ours, stock)
    for implementation in ("batched_mm", "grouped_mm"):
        ours.base_model.model.set_experts_implementation(implementation)
        close(ours, stock)
    assert not report.fallbacks() and calls(report) == {3}


@pytest.mark.parametrize("reentrant", [True, False])
@some
def test_gradient_checkpointing(family, reentrant):
    stock, ours, report = accelerated(family)
    for model in (stock, ours):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    for _ in range(2):
        assert worst(logits_and_gradients(stock, tokens()), logits_and_gradients(ours, tokens())) < EXACT
    assert calls(report) == {4} and not report.fallbacks()  # a checkpoint computes again


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_compiled_in_one_graph(family):
    torch.compiler.reset()
    stock, ours, report = accelerated(family)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for model in (stock, compiled):
        loss_of(model, tokens()).backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (stock, ours)]
    assert worst(*gradients) < EXACT
    assert not report.fallbacks() and "torch.compile" in report.rows[0].reason


def test_generation():
    stock, ours, report = accelerated("qwen3_moe")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected, got = (m.eval().generate(tokens(1, 4), **settings) for m in (stock, ours))
    assert torch.equal(expected, got) and not report.fallbacks() and calls(report) == {5}


def test_auto_takes_them():
    with spectral_ops.auto(strict=True):
        torch.manual_seed(1)
        model = perturb(get_peft_model(mixture("gpt_oss"), experts_config("gpt_oss")))
    close(model.train(), adapted_mixture("gpt_oss"))
    assert spectral_ops.report(model).counts["fused"] == 4


@some
def test_device_map(family):
    """accelerate's hooks on the experts only bring the input to where the stacks are."""
    stock, ours = pair(adapted_mixture(family))
    dispatch_model(ours, {"": "cpu"}, force_hooks=True)
    report = spectral_ops.accelerate(ours, strict=True)
    assert type(experts_of(ours)[0].get_base_layer()._hf_hook) is AlignDevicesHook
    assert worst(logits_and_gradients(stock, tokens()), logits_and_gradients(ours, tokens())) < EXACT
    remove_hook_from_module(ours, recurse=True)
    assert worst(logits_and_gradients(stock, tokens()), logits_and_gradients(ours, tokens())) < EXACT
    assert not report.fallbacks() and calls(report) == {2}


def test_a_report_does_not_keep_the_experts_alive():
    import gc
    import weakref

    _, ours, report = accelerated("qwen3_moe")
    logits_and_gradients(ours, tokens())
    alive = [weakref.ref(m) for m in experts_of(ours, everything=True)]
    del ours
    gc.collect()
    assert [reference() for reference in alive] == [None] * 4 and calls(report) == {1}
