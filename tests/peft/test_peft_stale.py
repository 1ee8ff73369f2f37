"""Under ``accelerate``: a base weight that is written through ``.data`` is what the next call computes with."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft_tiny import METHODS, adapted, loss_of, perturb, tokens  # noqa: E402

from spectral_ops import accelerate  # noqa: E402
from spectral_ops.integrations import restore  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(model):
    return [m.base_layer.weight for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "active_adapters")]


def renewed(W):
    W.data = W.data * 1.5


def initialised(W):
    with torch.no_grad():
        torch.nn.init.normal_(W, std=0.2)


def replaced_row(W):
    W.data[3] = torch.randn(W.shape[1])


WRITES = {
    "merge": lambda W: W.data.add_(0.1 * torch.randn(len(W), 2) @ torch.randn(2, W.shape[1])),
    "noise": lambda W: W.data.add_(0.02 * torch.randn(W.shape)),
    "copy": lambda W: W.data.copy_(0.2 * torch.randn(W.shape)),
    "row": replaced_row,
    "new": renewed,
    "init": initialised,
    "numpy": lambda W: W.detach().numpy().__imul__(0.7),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("method", METHODS)
def test_the_next_call_is_peft_s_on_the_new_weights(method, write):
    """In eval, then between two micro-batches of one optimizer step, gradients included."""
    ours, ids = adapted(method), tokens()
    accelerate(ours, strict=True)
    for train in (False, True):
        ours.train(train)
        optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.01)
        loss_of(ours, ids).backward()
        before = loss_of(ours, ids).item()
        torch.manual_seed(5 + train)
        for W in weights(ours):
            WRITES[write](W)
        optimizer.zero_grad()
        loss = loss_of(ours, ids)
        loss.backward()
        assert abs(loss.item() - before) > 1e-5
        plain = copy.deepcopy(ours)
        restore(plain)
        plain.zero_grad()
        want = loss_of(plain, ids)
        want.backward()
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
        for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, q.grad, rtol=2e-4, atol=1e-5, msg=name)


def test_relora():
    """DoRA's update goes into W by hand and its factors start anew, without a call of ours."""
    ours, ids = adapted("dora").eval(), tokens()
    accelerate(ours, strict=True)
    with torch.no_grad():
        ours(ids)
        for layer in [m for m in ours.modules() if hasattr(m, "lora_magnitude_vector") and "default" in m.lora_A]:
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            layer.base_layer.weight.data.add_(layer.scaling["default"] * B @ A)
            B.data.zero_()
        perturb(ours)
        got = ours(ids).logits
        restore(ours)
        torch.testing.assert_close(got, ours(ids).logits, rtol=1e-4, atol=1e-4)
