"""The Cayley transform: forward and backward beside torch.linalg.solve under autograd, for the two matrices of a layer
and for those of 32 layers stacked; and a rotation layer's whole step, of which ``cayley_share`` is the transform's."""

import statistics
import time

import pytest
import torch

from benchmarks import harness
from spectral_ops import SpectralConfig, SpectralLinear, cayley


def solved(X):
    """Q as one would write it."""
    K, eye = (X - X.mT) / 2, torch.eye(X.shape[-1])
    return torch.linalg.solve(eye + K, eye - K)


def step(function, inputs, dy):
    torch.autograd.grad(function(inputs[0]), inputs, dy)


@pytest.mark.parametrize("function", [cayley, solved])
@pytest.mark.parametrize("r", [8, 16, 32, 64])
@pytest.mark.parametrize("n", [2, 64])
def test_transform(benchmark, function, n, r):
    X = (0.1 * torch.randn(n, r, r)).requires_grad_()
    benchmark.pedantic(step, (function, [X], torch.randn(n, r, r)), rounds=30, iterations=5, warmup_rounds=3)


@pytest.mark.parametrize("r", [16, 64])
def test_layer(benchmark, r):
    linear = torch.nn.Linear(harness.K, harness.D, bias=False)
    layer = SpectralLinear.from_linear(linear, SpectralConfig(r=r, mode="rotation", niter=1))
    x, dy = torch.randn(harness.T, harness.K, requires_grad=True), torch.randn(harness.T, harness.D)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    benchmark.pedantic(step, (layer, inputs, dy), rounds=5, warmup_rounds=1)
    X, G, times = layer.spectral_rotation["default"], torch.randn(2, r, r), []
    for _ in range(100):
        start = time.perf_counter()
        step(cayley, [X], G)
        times.append(time.perf_counter() - start)
    benchmark.extra_info.update(cayley_share=round(statistics.median(times) / benchmark.stats.stats.median, 5))
