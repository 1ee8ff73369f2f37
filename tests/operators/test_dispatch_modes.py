"""Whoever looks inside a layer or runs it twice gets exact numbers: selective checkpointing under every policy, saved
tensors that are packed and copied, batched gradients, loggers, fake and meta tensors."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from models import fill
from peft import AdaLoraConfig, LoraConfig, MissConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import spectral_ops
from spectral_ops._library import LAYERS
from spectral_ops.bench import methods
from spectral_ops.functional import lowrank

RANKS = {"r": 4, "target_modules": ["0", "2"]}
PEFT = {
    "lora": LoraConfig(**RANKS),
    "lora, dropout": LoraConfig(**RANKS, lora_dropout=0.3),
    "lora, lora_bias": LoraConfig(**RANKS, lora_bias=True),
    "dora": LoraConfig(**RANKS, use_dora=True),
    "dora, dropout": LoraConfig(**RANKS, use_dora=True, lora_dropout=0.3),
    "miss": MissConfig(**RANKS),
    "miss, dropout": MissConfig(**RANKS, miss_dropout=0.3),
    "mini": MissConfig(**RANKS, init_weights="mini", mini_r=4),
    "bat": MissConfig(**RANKS, init_weights="bat"),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=["0", "2"]),
}
SIZES = {"vera": {"r": 8}, "dvora": {"r": 8}, "mini": {"r": 4, "mini_r": 4}, "adalora": {"init_r": 4, "target_r": 2},
         "adalora_dash": {"init_r": 4, "target_r": 2}, "rosa": {"r": 4, "d": 0.1},
         "pica": {"r": 4}, "spectral": {"r": 4}, "pissa": {"init_lora_weights": True}}  # fmt: skip
PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default,
]
POLICIES = {
    "save products": lambda op: op in PRODUCTS,
    "save ours": lambda op: op.namespace == "spectral_ops",
    "save nothing": lambda op: False,
    "save everything": lambda op: True,
}


def mlp(dtype: torch.dtype, bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48, bias=bias), nn.SiLU(), nn.Linear(48, 32, bias=bias)).to(dtype)


def accelerated(method: str, dtype: torch.dtype, bias: bool) -> nn.Module:
    model = get_peft_model(mlp(dtype, bias), copy.deepcopy(PEFT[method])).train()
    fill(model)
    spectral_ops.accelerate(model, strict=True)
    return model.base_model.model


def native(method: str, dtype: torch.dtype, bias: bool) -> nn.Module:
    model = mlp(dtype, bias)
    config = methods.METHODS[method].build(**SIZES.get(method, {"r": 4}), target_modules=["0", "2"])
    spectral_ops.attach(model, config)
    if method == "rosa":
        give_masks(model)
    fill(model)
    return model.train()


def give_masks(model: nn.Module) -> None:
    """A random pattern for every RoSA layer, as its schedule would find one."""
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, spectral_ops.RoSALinear):
            shape, nnz = (layer.out_features, layer.in_features), layer.rosa_values["default"].numel()
            mask = torch.zeros(shape, dtype=torch.bool).flatten()
            mask[torch.randperm(mask.numel(), generator=generator)[:nnz]] = True
            layer.set_mask(mask.reshape(shape))


MODELS = [*((accelerated, name) for name in PEFT), *((native, name) for name in methods.METHODS)]
models = pytest.mark.parametrize(("build", "method"), MODELS, ids=[f"{b.__name__}-{m}" for b, m in MODELS])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def selective(policy: str):
    def choose(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if POLICIES[policy](op) else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, choose)


def gradients(model: nn.Module, x: torch.Tensor, run=lambda model, x: model(x)) -> list[torch.Tensor]:
    """The output, dx and every parameter's gradient, dropout drawn from one state of the generator."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y = run(model, x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]


def the_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def inputs(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


# --- checkpointing ---------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@models
def test_checkpointed_is_plain_bit_for_bit(build, method, bias, dtype):
    model, x = build(method, dtype, bias), inputs(dtype)
    want = gradients(model, x)
    for policy in POLICIES:
        whole = functools.partial(checkpoint, use_reentrant=False, context_fn=selective(policy))
        assert the_same(gradients(model, x, whole), want), policy
    for early in (True, False):
        with torch.utils.checkpoint.set_checkpoint_early_stop(early):
            whole = functools.partial(checkpoint, use_reentrant=False)
            assert the_same(gradients(model, x, whole), want), f"early stop {early}"


@models
def test_reentrant_checkpoint(build, method):
    model, x = build(method, torch.float32, True), inputs(torch.float32)
    torch.manual_seed(5)
    leaf = x.clone().requires_grad_()
    y = checkpoint(model, leaf, use_reentrant=True)
    y.float().square().sum().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert the_same([y.detach(), leaf.grad, *(p.grad for p in parameters)], gradients(model, x))


@pytest.mark.parametrize("fault", ["product overwritten in place", "shared buffer"])
def test_the_faults_of_old_are_caught(monkeypatch, fault):
    """Several visible operators, of which one overwrites another's result: checkpointing notices, or is wrong."""
    buffer = torch.empty(15, 48)

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, A, B, *rest):
            h = x @ A.t()
            y = F.linear(x, weight)
            if fault == "shared buffer" and y.shape[-1] == 48:
                buffer.copy_(y.reshape(15, 48))
                y = buffer.view(y.shape)
            y.data.add_(h @ B.t())  # unseen by autograd, as a kernel is that bumps no version
            ctx.save_for_backward(x, weight, A, B, h)
            return y.clone() if fault == "shared buffer" else y

        @staticmethod
        def backward(ctx, dy):
            x, weight, A, B, h = ctx.saved_tensors
            u, lead = dy @ B, (0, 1)
            dA, dB = torch.tensordot(u, x, (lead, lead)), torch.tensordot(dy, h, (lead, lead))
            return dy @ weight + u @ A, None, dA, dB, *[None] * 6

    model, x = accelerated("lora", torch.float32, False), inputs(torch.float32)
    monkeypatch.setattr(lowrank, "LowRankFunction", Overwriting)
    want = gradients(model, x)
    caught = []
    for policy in POLICIES:
        whole = functools.partial(checkpoint, use_reentrant=False, context_fn=selective(policy))
        try:
            caught.append(not the_same(gradients(model, x, whole), want))
        except RuntimeError as error:
            caught.append("mutated" in str(error))
    assert any(caught)


# --- what else looks inside ------------------------------------------------------------------------------------------


@models
def test_saved_tensors_that_are_copied(build, method):
    """Hooks that pack a copy (offloading): nothing is kept past them that backward then reads."""
    model, x = build(method, torch.float32, True), inputs(torch.float32)
    want = gradients(model, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        assert the_same(gradients(model, x), want)
    with torch.autograd.graph.save_on_cpu():
        assert the_same(gradients(model, x), want)


@models
def test_batched_gradients(build, method):
    model, x = build(method, torch.float64 if build is native else torch.float32, False), inputs(torch.float64)
    x = x.to(next(model.parameters()).dtype).requires_grad_()
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]
    torch.manual_seed(5)
    y = model(x)
    dys = torch.randn(4, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, parameters, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for got, want in zip(batched, torch.autograd.grad(y, parameters, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-6)


class Logger(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@models
def test_a_logger_sees_one_operator_per_layer_and_direction(build, method):
    model, x = build(method, torch.float32, True), inputs(torch.float32)
    want = gradients(model, x)
    with Logger() as log:
        assert the_same(gradients(model, x), want)
    names = [op._schema.name.removeprefix("spectral_ops::") for op in log.seen]
    assert sum(name in LAYERS and name.endswith("_forward") for name in names) == 2
    assert sum(name in LAYERS and name.endswith("_backward") for name in names) == 2
    assert not any(op._schema.is_mutable for op in log.seen if op.namespace == "spectral_ops")


@models
@dtypes
def test_fake_and_meta_tensors(build, method, dtype):
    """Shapes and dtypes come out, and nothing is computed."""
    model, x = build(method, dtype, True), inputs(dtype)
    want = gradients(model, x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = gradients(model, torch.empty(x.shape, dtype=x.dtype))
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in want]
    assert all(type(t) is not torch.Tensor for t in fake)


def test_functions_on_the_meta_device():
    x, weight = torch.empty(2, 3, 8, device="meta"), torch.empty(6, 8, device="meta")
    A, B = torch.empty(2, 8, device="meta"), torch.empty(6, 2, device="meta")
    assert spectral_ops.lowrank_linear(x, weight, A, B).shape == (2, 3, 6)
    assert spectral_ops.lowrank_linear(x, weight, A, B, dropout_p=0.5, training=True).shape == (2, 3, 6)
    assert spectral_ops.lowrank_update(torch.empty(2, 3, 6, device="meta"), x, A, B).shape == (2, 3, 6)
    assert spectral_ops.dora_linear(x, weight, A, B, torch.empty(6, device="meta")).shape == (2, 3, 6)
    assert spectral_ops.bone_linear(x, weight, torch.empty(4, 6, device="meta")).shape == (2, 3, 6)
    assert spectral_ops.bat_linear(x, weight, torch.empty(3, 2, 2, device="meta")).shape == (2, 3, 6)
