"""Layers that read one x share its projection: the numbers of each alone, whatever comes between them."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import spectral_ops
from spectral_ops.functional import siblings
from spectral_ops.integrations import peft_siblings
from tests.support import peft_tiny as tiny


class Three(torch.nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        for name, d in (("q", 12), ("k", 8), ("v", 8)):
            setattr(self, name, torch.nn.Linear(16, d, dtype=dtype))

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def adapted(dtype=torch.float64, **extra):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 3, "target_modules": ["q", "k", "v"], "init_lora_weights": False, **extra}
    torch.manual_seed(1)
    return get_peft_model(Three(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)


def pair(dtype=torch.float64, seated=True, **extra):
    """The model with its siblings found, and one whose layers work alone."""
    model = adapted(dtype, **extra)
    other = copy.deepcopy(model)
    report = spectral_ops.accelerate(model)
    spectral_ops.accelerate(other, siblings=False)
    if seated:
        for _ in range(2):
            model(torch.randn(2, 5, 16, dtype=dtype))
        assert "h of q, k, v formed once" in str(report)
    return model, other


def layers(model):
    return [getattr(model.base_model.model, name) for name in "qkv"]


def gradients(model, x, run=None):
    x = x.clone().requires_grad_()
    y = (model if run is None else run)(x)
    y.square().sum().backward()
    grads = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad(set_to_none=True)
    return grads


def same(got, wanted, tolerance=1e-12):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def worth_it(monkeypatch):
    """However small x is."""
    monkeypatch.setattr(peft_siblings, "LEAST", {"cpu": 0})


@pytest.fixture
def products(monkeypatch):
    """How many projections were formed for a group."""
    made, real = [], siblings.project
    monkeypatch.setattr(siblings, "project", lambda x, As, box: made.append(len(As)) or real(x, As, box))
    return made


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}])
def test_numbers(dtype, tolerance, extra, products):
    model, other = pair(dtype, **extra)
    x = torch.randn(2, 5, 16, dtype=dtype)
    products.clear()
    same(gradients(model, x), gradients(other, x), tolerance)
    assert products == [3]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_checkpoint(reentrant, calls):
    model, other = pair(seated=False)
    for _ in range(calls):
        model(torch.randn(2, 16, dtype=torch.float64))
    for _ in range(5):
        x = torch.randn(4, 16, dtype=torch.float64)

        def run(x):
            return checkpoint(model, x, use_reentrant=reentrant)

        same(gradients(model, x, run), gradients(other, x))


def test_checkpoint_of_one_sibling_and_of_a_graph_from_before():
    model, other = pair(seated=False)
    x = torch.randn(4, 16, dtype=torch.float64)
    q, k, v = layers(model)

    def run(x):
        return torch.cat([q(x), checkpoint(k, x, use_reentrant=False), checkpoint(v, x, use_reentrant=False)], -1)

    for _ in range(4):
        same(gradients(model, x, run), gradients(other, x))
    model, other = pair(seated=False)
    z = x.clone().requires_grad_()
    early = checkpoint(model, z, use_reentrant=False)
    for _ in range(3):
        model(torch.randn(4, 16, dtype=torch.float64))  # seats the group
    early.square().sum().backward()
    got = [early.detach(), z.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    same(got, gradients(other, x))


def test_changes_between_leader_and_follower():
    x = torch.randn(4, 16, dtype=torch.float64)

    def write(q, k, v, x):
        x.mul_(2)

    def update(q, k, v, x):
        k.lora_A["default"].weight.mul_(3)

    def data(q, k, v, x):
        k.lora_A["default"].weight.data = k.lora_A["default"].weight.data * 3

    for change in (write, update, data):
        model, other = pair()
        results = []
        for m in (model, other):
            q, k, v = layers(m)
            z = x.clone()
            first = q(z)
            with torch.no_grad():
                change(q, k, v, z)
            results.append([first, k(z), v(z)])
        same(*results)


def test_order_modes_and_several_forwards_before_backward():
    model, other = pair()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for m in (model, other):
        q, k, v = layers(m)
        with torch.no_grad():
            first = q(x)
        ys = [first, k(x), v(x), v(x), q(x), q(x), v(x), k(x)]
        with torch.inference_mode():
            ys.append(k(x).clone())
        loss = sum(y.square().sum() for y in ys[1:8])
        params = [p for p in m.parameters() if p.requires_grad]
        for _ in range(2):
            again = torch.autograd.grad(loss, [x, *params], retain_graph=True)
        results.append([*ys, *again])
    same(*results)


def test_backward_one_sibling_after_the_other_and_twice():
    model, other = pair()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for m in (model, other):
        q, k, v = layers(m)
        for y in (q(x), k(x), v(x)):
            y.square().sum().backward()
        found = [p.grad for p in m.parameters() if p.requires_grad]
        ys = [q(x), k(x), v(x)]
        params = [p for p in m.parameters() if p.requires_grad]
        grads = torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *params], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *params])
        results.append([*found, *grads, *second])
    same(*results)


def test_batched_gradients_and_dispatch_modes():
    from torch.utils.flop_counter import FlopCounterMode

    model, other = pair()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    dys = torch.randn(3, 4, 28, dtype=torch.float64)
    results = []
    for m in (model, other):
        params = [p for p in m.parameters() if p.requires_grad]
        with FlopCounterMode(display=False) as flops:
            m(x)
        grads = torch.autograd.grad(m(x), [x, *params], dys, is_grads_batched=True)
        results.append([torch.tensor(float(flops.get_total_flops())), *grads])
    same(*results)


def test_group_is_dropped_after_misses_and_nothing_is_kept(products):
    model, other = pair()
    q, _, _ = layers(model)
    for _ in range(6):
        x = torch.randn(4, 16, dtype=torch.float64)
        q(x)
    assert q._spectral_ops.seat is False
    model, _ = pair()
    x = torch.randn(4, 16, dtype=torch.float64)
    y = model(x)
    gone = weakref.ref(x)
    y.sum().backward()
    del x, y
    assert gone() is None
    gone = weakref.ref(model)
    del model, _
    gc.collect()
    assert gone() is None


def test_copies_hooks_and_switches(products):
    model, other = pair()
    x = torch.randn(4, 16, dtype=torch.float64)
    same(gradients(copy.deepcopy(model), x), gradients(other, x))
    seen = []
    layers(model)[1].lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    for _ in range(5):
        same(gradients(model, x), gradients(other, x))
    assert len(seen) == 5
    model, other = pair(torch.float32)
    products.clear()
    with torch.autocast("cpu", torch.bfloat16):
        same([model(x.float())], [other(x.float())], 0.0)
    assert products == []


def test_model_trains_alike_with_gradient_checkpointing():
    model, other = tiny.pair(tiny.adapted("lora", torch.float64, autocast_dtype=False))
    report = spectral_ops.accelerate(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = tiny.tokens()
    for _ in range(4):
        for m in (model, other):
            m.zero_grad()
            m(input_ids=ids, labels=ids).loss.backward()
    same(*([p.grad for p in m.parameters() if p.requires_grad] for m in (model, other)), 1e-9)
    assert "h of q_proj, k_proj, v_proj formed once" in str(report)
    assert "h of gate_proj, up_proj formed once" in str(report)


def test_small_inputs_and_cpus_are_left_alone(monkeypatch, products):
    """Sharing pays where x is read from a GPU's memory twice for more than the host's time (docs/PERFORMANCE.md)."""
    monkeypatch.undo()
    assert "cpu" not in peft_siblings.LEAST and peft_siblings.LEAST["cuda"] > 1 << 20
    monkeypatch.setattr(peft_siblings, "LEAST", {"cpu": 3 * 5 * 16})
    model, _ = pair(seated=False)
    for _ in range(4):
        model(torch.randn(2, 5, 16, dtype=torch.float64))
    assert not any(layer._spectral_ops.seat for layer in layers(model))
    for _ in range(2):
        model(torch.randn(3, 5, 16, dtype=torch.float64))
    assert all(layer._spectral_ops.seat for layer in layers(model))
