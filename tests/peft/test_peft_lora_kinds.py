"""LoRA-FA's optimizer over accelerated layers, and every start of PEFT's LoRA that needs no data."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from instruments import Recorder, saved_tensors  # noqa: E402
from peft_tiny import llama, logits_and_gradients, perturb, tokens, worst  # noqa: E402

from spectral_ops import accelerate  # noqa: E402

TARGETS = ["q_proj", "o_proj", "down_proj"]
pytestmark = pytest.mark.usefixtures("one_thread")


def lora_fa(model):
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=5e-3, weight_decay=0.01)


@pytest.mark.parametrize("late", [False, True], ids=["accelerated first", "accelerated last"])
def test_lora_fa_trains_as_pefts(late):
    """The optimizer freezes A, in layers that are accelerated already or after."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    plain = perturb(peft.get_peft_model(llama(), config)).train()
    ours, losses = copy.deepcopy(plain), []
    for model in (plain, ours):
        if model is ours and not late:
            accelerate(model, strict=True)
            logits_and_gradients(model, tokens())  # a plan from before A is frozen
            model.zero_grad()
        optimizer = lora_fa(model)
        if model is ours and late:
            accelerate(model, strict=True)
        losses.append([])
        for seed in range(4):
            loss = model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][0] != losses[0][-1]
    theirs, mine = ({n: p.detach() for n, p in m.named_parameters() if "lora_" in n} for m in (plain, ours))
    frozen = {n for n in theirs if "lora_A" in n}
    assert all(torch.equal(theirs[n], mine[n]) for n in frozen)
    # the optimizer's pseudo-inverse is rounded to bfloat16, which may turn a last bit of a gradient into one of those
    assert worst(*({n: t for n, t in m.items() if n not in frozen} for m in (theirs, mine))) < 1e-3


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_frozen_A_keeps_h_alone(p):
    """[T, r] and not x; and no product for dA."""
    T, k, d, r = 13, 48, 40, 4
    config = peft.LoraConfig(r=r, target_modules=["0"], lora_dropout=p)
    model = perturb(peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(k, d, bias=False)), config)).train()
    lora_fa(model)
    accelerate(model, strict=True)
    x = torch.randn(T, k, requires_grad=True)
    with saved_tensors() as kept:
        y = model(x)
    known = {t.untyped_storage().data_ptr() for t in model.parameters()}
    beside = [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in known and t.dim() > 1]
    assert beside == [(T, r)]
    with Recorder() as seen:
        y.sum().backward()
    assert (r, k) not in seen.shapes() and x.grad is not None


STARTS = [True, False, "gaussian", "olora", "orthogonal", "pissa", "pissa_niter_2"]


@pytest.mark.parametrize("init", STARTS, ids=str)
def test_every_start_without_data_runs_fused(init):
    """A start decides what A, B and the base weight are; the layer after it is LoRA's."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=init)
    plain = peft.get_peft_model(llama(), config).train()
    ours = copy.deepcopy(plain)
    report = accelerate(ours, strict=True)
    assert report.counts["PEFT"] == 0
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < 5e-6
    assert not report.fallbacks() and all(row.calls for row in report.rows), str(report)
