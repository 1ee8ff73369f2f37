"""ms-swift wraps lora_A and lora_B so that x follows their weight; where it is there already, that is no hook."""

from __future__ import annotations

from types import MethodType

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft_tiny import adapted, logits_and_gradients, pair, tokens, worst  # noqa: E402

from spectral_ops import accelerate, report  # noqa: E402
from spectral_ops.integrations.peft_plan import Facts, Unfit, lora_plan  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def keep_device_forward(self, *args, **kwargs):
    """ms-swift 4.6's, which `make trainers` meets itself."""
    x = args[0]
    weight = self.weight if hasattr(self, "weight") else self.weight0
    if weight.device != x.device:
        return self.forward_origin(x.to(weight.device), *args[1:], **kwargs)
    return self.forward_origin(*args, **kwargs)


def other_forward(self, *args, **kwargs):
    return self.forward_origin(*args, **kwargs)


keep_device_forward.__module__ = other_forward.__module__ = "swift.tuners.peft"


def wrap(module, function=keep_device_forward):
    module.forward_origin = module.forward
    module.forward = MethodType(function, module)


def factors(model):
    return [m for name, m in model.named_modules() if name.endswith((".lora_A.default", ".lora_B.default"))]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_wrapped_factors_run_fused(method):
    stock, fused = pair(adapted(method))
    for model in (stock, fused):
        for module in factors(model):
            wrap(module)
    planned = accelerate(fused, strict=True)
    for _ in range(2):  # the second call takes the first one's plan
        assert worst(logits_and_gradients(stock, tokens()), logits_and_gradients(fused, tokens())) < 1e-5
    assert planned.counts["fused"] == 14 and not planned.fallbacks()


def test_another_wrapper_is_never_bypassed():
    model = adapted("lora")
    accelerate(model)
    model(tokens())
    one, two, three = factors(model)[:6:2]  # the lora_A of q, k and v
    wrap(one, other_forward)
    wrap(two)
    two.forward_origin = three.forward  # not what its class does
    three.forward = MethodType(keep_device_forward, two)  # another module's
    model(tokens())
    reasons = {(reason, calls) for reason, _, calls in report(model).grouped()}
    assert reasons == {("lora_A carries hooks of its own", 3)}


def test_x_that_the_wrapper_would_move_is_left_to_peft():
    model = adapted("lora")
    accelerate(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    wrap(layer.lora_A["default"])
    x, elsewhere, facts = torch.randn(3, 32), torch.empty(3, 32, device="meta"), Facts()
    lora_plan(layer, x, facts)
    assert facts.lasting and facts.hold(layer, x) and not facts.hold(layer, elsewhere)
    with pytest.raises(Unfit, match="x is on meta and an adapter on cpu: ms-swift's keep_device_forward moves x"):
        lora_plan(layer, elsewhere, Facts())
    wrap(layer.lora_B["default"])
    assert not facts.hold(layer, x)  # wrapped since
    lora_plan(layer, x, again := Facts())
    layer.lora_B["default"].forward_origin = None
    assert not again.hold(layer, x)


def test_a_compiled_model_sees_through_it():
    stock, fused = pair(adapted("lora"))
    for module in factors(fused):
        wrap(module)
    accelerate(fused, strict=True)
    layer = fused.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock.base_model.model.model.layers[0].self_attn.q_proj(x))
