"""LoRA-Dash beside LoRA of its rank before and after the launch, in one interleaved run; and its scores.

``rank16`` is LoRA alone, what the layer could be before the launch; ``rank24`` LoRA with as many ranks as the layer;
``cat`` the layer as it is; ``separate`` the same mathematics as a second low-rank product over the first one's result.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from spectral_ops import LoRADashConfig, LoRADashLinear, lowrank_linear, lowrank_update, task_direction_scores
from spectral_ops.bench.clock import interleave
from spectral_ops.bench.judge import LAYER, largest_error
from spectral_ops.bench.layers import step
from spectral_ops.bench.methods import DTYPES
from spectral_ops.bench.peers import Layer

S = 8


def candidates(weight):
    """The layers, by name, and what each trains."""
    torch.manual_seed(0)
    base = torch.nn.Linear(harness.K, harness.D, bias=False, dtype=weight.dtype)
    base.weight.data = weight
    dash = LoRADashLinear.from_linear(base, LoRADashConfig(r=harness.R, lora_alpha=2 * harness.R, directions=S))
    with torch.no_grad():
        for key in dash.held("default"):
            if key != "dash_steps":
                getattr(dash, key)["default"].normal_(std=0.02)
    A, B, delta, U, V = (
        getattr(dash, key)["default"] for key in ("lora_A", "lora_B", "dash_delta", "dash_U", "dash_V")
    )

    def separate(x):
        return lowrank_update(lowrank_linear(x, weight, A, B, scale=2.0), x, V, U, core=delta)

    A24 = torch.randn(harness.R + S, harness.K, requires_grad=True)
    B24 = torch.zeros(harness.D, harness.R + S, requires_grad=True)
    return {
        "frozen": Layer(lambda x: F.linear(x, weight), []),
        "rank16": Layer(lambda x: lowrank_linear(x, weight, A, B, scale=2.0), [A, B]),
        "rank24": Layer(lambda x: lowrank_linear(x, weight, A24, B24, scale=2.0), [A24, B24]),
        "cat": Layer(dash, [A, B, delta]),
        "separate": Layer(separate, [A, B, delta]),
    }


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_tax(benchmark, dtype):
    dtype = DTYPES[dtype]
    weight = (torch.randn(harness.D, harness.K) * harness.K**-0.5).to(dtype)
    x = torch.randn(harness.T, harness.K, dtype=dtype, requires_grad=True)
    dy = torch.randn(harness.T, harness.D, dtype=dtype)
    layers = candidates(weight)
    got, want = (step(layers[name], x, dy) for name in ("cat", "separate"))
    assert largest_error(got, want) < LAYER[dtype]
    calls = {name: (lambda layer=layer: step(layer, x, dy)) for name, layer in layers.items()}
    times = interleave(calls, lambda _: None, 9, torch.device("cpu"))
    ratios = {
        name: round(statistics.median(a / b for a, b in zip(times[name], times["frozen"], strict=True)), 4)
        for name in layers
    }
    benchmark.extra_info.update(ratios=ratios)
    print("\n", dtype, ratios)
    benchmark.pedantic(step, (layers["cat"], x, dy), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_scores(benchmark, form):
    """δ from the factors, beside the same through ΔW [d, k]."""
    n = min(harness.D, harness.K)
    A, B = torch.randn(harness.R, harness.K), torch.randn(harness.D, harness.R)
    U, S, Vh = torch.randn(harness.D, n), torch.rand(n) + 0.1, torch.randn(n, harness.K)

    def dense():
        return ((U.t() @ (2.0 * B @ A)) * Vh).sum(1).abs() / (S + 1e-6)

    calls = {"factored": lambda: task_direction_scores(A, B, U, S, Vh, 2.0), "dense": dense}
    assert largest_error([calls["factored"]()], [dense()]) < 1e-4
    benchmark.pedantic(calls[form], rounds=5, warmup_rounds=1)
