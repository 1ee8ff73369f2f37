"""Segmented LoRA: each operator of the row; forward and backward beside one layer call per adapter; and a layer's
forward beside PEFT's mixed batch (``adapter_names``), which does not train. Rows come as sequences of 128."""

import statistics
import time

import pytest
import torch
from torch import nn

from benchmarks import harness
from spectral_ops import LoRAConfig, LoRALinear, lowrank_linear, segmented_lowrank_linear
from spectral_ops.bench.methods import DTYPES

T, D, K, R = harness.T, harness.D, harness.K, harness.R
LENGTH = 128


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("name", harness.operators("segments"))
def test_operator(benchmark, name, dtype):
    harness.operator(benchmark, name, dtype)


def problem(n: int, dtype: str):
    torch.manual_seed(0)
    x = torch.randn(T // LENGTH, LENGTH, K, dtype=DTYPES[dtype], requires_grad=True)
    W = torch.randn(D, K, dtype=x.dtype) / K**0.5
    As = [(torch.randn(R, K) / K**0.5).requires_grad_() for _ in range(n)]
    Bs = [(torch.randn(D, R) / R**0.5).requires_grad_() for _ in range(n)]
    ids = torch.arange(T // LENGTH) % (n + 1) - 1
    return x, W, As, Bs, ids


def looped(x, W, As, Bs, ids):
    """One product with the base per adapter, over its own rows."""
    y = x.new_empty(*x.shape[:-1], W.shape[0])
    for s, (A, B) in enumerate(zip(As, Bs, strict=True)):
        y[ids == s] = lowrank_linear(x[ids == s], W, A, B)
    y[ids == -1] = nn.functional.linear(x[ids == -1], W)
    return y


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("n", [2, 7, 12])
def test_step(benchmark, n, dtype):
    """Forward and backward; in extra_info the ratio to the frozen layer, ours by route and the loop over adapters."""
    x, W, As, Bs, ids = problem(n, dtype)
    dy = torch.randn(*x.shape[:-1], D, dtype=x.dtype)

    def step(forward):
        return lambda: torch.autograd.grad(forward(), [x, *As, *Bs], dy)

    calls = {
        "looped": step(lambda: looped(x, W, As, Bs, ids)),
        "stacked": step(lambda: segmented_lowrank_linear(x, W, As, Bs, ids, route="stacked")),
        "grouped": step(lambda: segmented_lowrank_linear(x, W, As, Bs, ids, route="grouped")),
        "frozen": lambda: torch.autograd.grad(nn.functional.linear(x, W), [x], dy),
    }
    want = calls["looped"]()
    for route in ("stacked", "grouped"):
        for got, w in zip(calls[route](), want, strict=True):
            error = (got.double() - w.double()).norm() / w.double().norm().clamp_min(1e-30)  # no rows: both zero
            assert error < (1e-5 if dtype == "float32" else 2e-2), f"red: {route} differs by {error}"
    record(benchmark, calls, "frozen")
    benchmark.pedantic(step(lambda: segmented_lowrank_linear(x, W, As, Bs, ids)), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("n", [2, 7])
def test_inference_beside_peft(benchmark, n, dtype):
    peft = pytest.importorskip("peft")
    x, W, As, Bs, ids = problem(n, dtype)
    names = [str(s) for s in range(n)]
    base = nn.Linear(K, D, bias=False, dtype=x.dtype)
    base.weight.data.copy_(W)
    config = {"r": R, "lora_alpha": R}
    theirs = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(**config, target_modules=["0"]), names[0])
    ours = LoRALinear.from_linear(nn.Linear(K, D, bias=False, dtype=x.dtype), LoRAConfig(**config), names[0])
    ours.base_layer.weight.data.copy_(W)
    layer = theirs.base_model.model[0]
    for s, name in enumerate(names):
        if s:
            theirs.add_adapter(name, peft.LoraConfig(**config, target_modules=["0"]))
            ours.add_adapter(name, LoRAConfig(**config))
        for own, other, value in ((ours.lora_A, layer.lora_A, As[s]), (ours.lora_B, layer.lora_B, Bs[s])):
            own[name].data.copy_(value.detach())
            other[name].weight.data.copy_(value.detach())
    by_name = [names[s] if s >= 0 else "__base__" for s in ids.tolist()]
    theirs.eval()
    ours.eval()
    ours.mixed = tuple(names), ids
    with torch.no_grad():
        calls = {
            "spectral_ops": lambda: ours(x),
            "PEFT": lambda: theirs(x, adapter_names=by_name),
            "frozen": lambda: base(x),
        }
        got, want = calls["spectral_ops"]().double(), calls["PEFT"]().double()
        error = (got - want).norm() / want.norm()
        assert error < (1e-5 if dtype == "float32" else 2e-2), f"red: {error}"
        record(benchmark, calls, "frozen")
        benchmark.pedantic(calls["spectral_ops"], rounds=5, warmup_rounds=1)


def record(benchmark, calls, reference: str, turns: int = 9) -> None:
    """The median of each call over that of ``reference``, taken in turns: of the clock ("wall") and of the processors'
    time ("cpu"), which other work on the machine disturbs less."""
    seconds = {clock: {name: [] for name in calls} for clock in ("wall", "cpu")}
    for _ in range(turns):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            seconds["wall"][name].append(time.perf_counter() - wall)
            seconds["cpu"][name].append(time.process_time() - cpu)
    ratios = {}
    for clock, found in seconds.items():
        median = {name: statistics.median(times) for name, times in found.items()}
        ratios[clock] = {name: round(value / median[reference], 3) for name, value in median.items()}
    benchmark.extra_info.update(ratios=ratios)
    print(ratios)
