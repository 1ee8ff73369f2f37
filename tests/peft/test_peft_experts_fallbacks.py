"""Where the experts' operators do not fit, PEFT's forward serves all wrappers of a module, and the report says why."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

pytest.importorskip("transformers.integrations.moe")  # transformers 5
pytest.importorskip("peft")

from experts_tiny import adapted_mixture, experts_config, experts_of, mixture, with_second  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from peft_tiny import pair, perturb, tokens  # noqa: E402
from torch import nn  # noqa: E402
from transformers.integrations import moe  # noqa: E402

import spectral_ops  # noqa: E402

UNDER = "the wrapper around this one is served by PEFT's own forward"
pytestmark = pytest.mark.usefixtures("one_thread")


def qwen(**extra) -> nn.Module:
    return adapted_mixture("qwen3_moe", **extra)


def module_of(model: nn.Module) -> nn.Module:
    return experts_of(model)[0].get_base_layer()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def check(model, reason, *, break_it=lambda model: None, during=contextlib.nullcontext, call=logits) -> None:
    """PEFT's numbers; the reason is reported for the outermost wrapper of the first block, for the one inside that the
    other served it; and ``strict`` raises."""
    strict, (stock, ours) = pair(model)[1], pair(model)
    report = spectral_ops.accelerate(ours)
    for m in (stock, ours):
        break_it(m)
    with during(stock):
        expected = call(stock)
    with during(ours):
        got = call(ours)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    found = {f.reason for f in report.fallbacks() if f.name == experts_name(ours)}
    assert found == {reason}, report.fallbacks()
    inner = {f.reason for f in report.fallbacks() if f.name == f"{experts_name(ours)}.base_layer"}
    assert inner == ({UNDER} if hasattr(experts_of(ours)[0].base_layer, "lora_A") else set())
    assert reason in str(report)
    with pytest.raises(RuntimeError, match="strict=True"):
        spectral_ops.accelerate(strict, strict=True)  # at once where it can be known, else at the call
        break_it(strict)
        with during(strict):
            call(strict)


def experts_name(model: nn.Module) -> str:
    outer = experts_of(model)[0]
    return next(name for name, m in model.named_modules() if m is outer)


# --- the experts module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_on_the_experts(hook):
    seen = []

    def break_it(model):
        getattr(module_of(model), hook)(lambda *a: seen.append(1))

    check(qwen(), "the experts module carries hooks of its own", break_it=break_it)
    assert "backward" in hook or len(seen) == 2


def test_a_replaced_forward_of_the_experts():
    def break_it(model):
        module = module_of(model)
        module.forward = functools.partial(type(module).forward, module)

    check(qwen(), "the experts module carries hooks of its own", break_it=break_it)


def test_hooks_on_the_wrapper_inside():
    seen = []

    def break_it(model):
        experts_of(model)[0].base_layer.register_forward_hook(lambda *a: seen.append(1))

    check(qwen(), "a wrapper inside this one carries hooks of its own", break_it=break_it)
    assert len(seen) == 2


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("place", ["outer", "inner"])
def test_hooks_on_a_factor(factor, place):
    """PEFT reads its weight and never calls it; who hooks it finds PEFT's behaviour."""

    def break_it(model):
        wrapper = experts_of(model)[0]
        wrapper = wrapper if place == "outer" else wrapper.base_layer
        getattr(wrapper, factor)["default"].register_forward_hook(lambda *a: None)

    check(qwen(), f"{factor} carries hooks of its own", break_it=break_it)


def test_a_class_whose_forward_is_not_the_interfaces():
    base = type(module_of(qwen()))

    class Doubled(base):
        def forward(self, *args):
            return 2 * super().forward(*args)

    def break_it(model):
        module_of(model).__class__ = Doubled

    reason = "the experts are Doubled, whose forward is not that of transformers' experts interface"
    check(qwen(), reason, break_it=break_it)


def test_an_implementation_of_somebodys_own(monkeypatch):
    """Its kernels were chosen by name; and a known name may have been given to another function."""

    def twice(self, *args):
        return 2 * moe.batched_mm_experts_forward(self, *args)

    for name in ("twice", "grouped_mm"):
        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, name, twice)
        check(qwen(implementation=name), f"experts_implementation={name!r} was chosen, whose kernels are its own")
    stock, ours = pair(qwen(implementation="batched_mm"))
    report = spectral_ops.accelerate(ours)
    for model in (stock, ours):
        logits(model)
        module_of(model).config._experts_implementation = "twice"  # after a plan was made
    assert torch.equal(logits(ours), logits(stock)) and report.fallbacks()


def test_a_parametrized_stack():
    class Scaled(nn.Module):
        def forward(self, weight):
            return 1.5 * weight

    def break_it(model):
        nn.utils.parametrize.register_parametrization(module_of(model), "down_proj", Scaled())

    check(qwen(), "the experts module is parametrized", break_it=break_it)


def test_matrices():
    """PEFT takes a parameter with two dimensions for a linear layer's weight."""
    model = nn.ModuleDict({"experts": nn.Linear(8, 5), "other": nn.Linear(5, 2)})
    model = perturb(get_peft_model(model, LoraConfig(r=2, target_parameters=["experts.weight"], target_modules=[])))
    x = torch.ones(3, 8)
    reason = "weight of Linear is a matrix, not a stack of experts"
    check(model, reason, call=lambda m: m.base_model.model["experts"](x).detach())


# --- its weights -----------------------------------------------------------------------------------------------------


def test_trained_stacks():
    def thaw(model):
        module_of(model).down_proj.requires_grad_()

    def with_gradient(model):
        return model(tokens()).logits.detach()

    check(qwen(), "the base down_proj is trained", break_it=thaw, call=with_gradient)
    stock, ours = pair(qwen())
    report = spectral_ops.accelerate(ours)
    for model in (stock, ours):
        with_gradient(model)
        thaw(model)  # after a plan was made
        with_gradient(model)
    assert [f.calls for f in report.fallbacks() if f.name == experts_name(ours)] == [1]
    before = len(report.fallbacks())
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-4, atol=1e-5)  # nothing trains here
    assert len(report.fallbacks()) == before and sum(f.calls for f in report.fallbacks()) == 2


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_weights_of_low_precision(name):
    """PEFT adds to a float8 stack in another dtype, and casts it back."""

    def narrow(model):
        parameter = getattr(module_of(model), name)
        parameter.data = parameter.data.to(torch.float8_e4m3fn)

    _, ours = pair(qwen())
    report = spectral_ops.accelerate(ours)
    narrow(ours)
    with contextlib.suppress(NotImplementedError, RuntimeError):  # torch has no such product on the CPU
        logits(ours)
    reason = f"{name} is in torch.float8_e4m3fn, not a dtype that the experts' operators take"
    assert {f.reason for f in report.fallbacks() if f.name == experts_name(ours)} == {reason}
    again = spectral_ops.accelerate(ours)
    assert [row.path for row in again.rows] == ["PEFT", "PEFT", "fused", "fused"]
    assert again.rows[0].reason == again.rows[1].reason == reason


def test_stacks_in_two_dtypes():
    def mix(model):
        parameter = module_of(model).down_proj
        parameter.data = parameter.data.double()

    model = qwen()
    mix(model)
    reason = "down_proj is in torch.float64, not a dtype that the experts' operators take"
    assert spectral_ops.accelerate(model).rows[0].reason == reason


def test_biases_in_another_dtype_than_their_stacks():
    def mix(model):
        parameter = module_of(model).down_proj_bias
        parameter.data = parameter.data.double()

    model = adapted_mixture("gpt_oss", "eager")  # the one that takes it: what it sums up it casts
    check(model, "down_proj_bias is in torch.float64, its stack in torch.float32", break_it=mix)


def test_a_tensor_subclass():
    class Wrapped(torch.Tensor):
        pass

    def wrap(model):
        module = module_of(model)
        module.gate_up_proj = nn.Parameter(module.gate_up_proj.detach().as_subclass(Wrapped), requires_grad=False)

    model = qwen()
    wrap(model)
    assert spectral_ops.accelerate(model).rows[0].reason == "the base gate_up_proj is a Wrapped, not a plain tensor"


# --- the call --------------------------------------------------------------------------------------------------------


def test_global_hooks():
    seen = []

    @contextlib.contextmanager
    def hook(model):
        handle = nn.modules.module.register_module_forward_hook(lambda *a: seen.append(1))
        try:
            yield
        finally:
            handle.remove()

    check(qwen(), "a global module hook is registered, which must see every submodule called", during=hook)


def test_a_mixed_batch():
    """PEFT refuses it, and its error is the one that shows."""
    model = qwen()
    report = spectral_ops.accelerate(model)
    with pytest.raises(ValueError, match="mixed adapter batches"):
        model.eval()(tokens(), adapter_names=["default", "__base__"])
    assert report.fallbacks()[0].reason == "a mixed batch (adapter_names)"


def test_arguments_that_are_not_the_interfaces():
    _, ours = pair(qwen())
    report = spectral_ops.accelerate(ours)
    outer, x, index = experts_of(ours)[0], torch.ones(3, 32), torch.zeros(3, 1, dtype=torch.int64)
    for args in ((x, index), (x, index, torch.ones(3, 1), 1)):
        with pytest.raises(TypeError):  # the experts' own
            outer(*args)
    assert [f.reason for f in report.fallbacks() if not f.reason == UNDER] == [
        "1 arguments to forward beside x, not top_k_index and top_k_weights",
        "3 arguments to forward beside x, not top_k_index and top_k_weights",
    ]


@pytest.mark.parametrize(("index", "weights"), [(torch.int16, torch.float32), (torch.int64, torch.int64)], ids=str)
def test_routing_in_a_dtype_that_the_operators_do_not_take(index, weights):
    stock, ours = pair(qwen())
    report = spectral_ops.accelerate(ours)
    x, experts, ones = torch.randn(6, 32), torch.tensor([[0, 1, 2]] * 6), torch.ones(6, 3)
    got, wanted = (experts_of(m)[0](x, experts.to(index), ones.to(weights)) for m in (ours, stock))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert report.fallbacks()[0].reason == f"top_k_index is in {index} and top_k_weights in {weights}"


def test_rows_that_llama4_cannot_share_out():
    stock, ours = pair(adapted_mixture("llama4"))
    report = spectral_ops.accelerate(ours)
    for model in (stock, ours):
        with pytest.raises(RuntimeError, match="shape"):
            experts_of(model)[0](torch.ones(7, 32))
    assert report.fallbacks()[0].reason == "7 rows are not as many for each of 4 experts"


def test_wrappers_that_came_after_accelerate():
    model = get_peft_model(mixture("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"]))
    spectral_ops.accelerate(model, strict=True)
    model = perturb(with_second(model, experts_config("qwen3_moe")))
    model.base_model.set_adapter(["default", "second"])
    stock, ours = pair(model)
    spectral_ops.restore(stock)
    report = spectral_ops.report(ours)
    reasons = {row.reason for row in report.rows if row.peft_class == "lora.ParamWrapper"}
    assert reasons == {"added after accelerate: call it again"}
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-4, atol=1e-5)
    report = spectral_ops.accelerate(ours, strict=True)
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-4, atol=1e-5)
    assert [row.calls for row in report.rows] == [1] * 6 and not report.fallbacks()
