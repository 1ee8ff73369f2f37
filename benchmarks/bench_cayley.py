"""The Cayley transform: forward and backward beside torch.linalg.solve under autograd, for one matrix and for those of
105 layers stacked; each operator of the row; and a rotation layer's whole step, of which ``cayley_share`` is the
transform's."""

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


def clocked(function, *args):
    start = time.perf_counter()
    out = function(*args)
    return out, time.perf_counter() - start


def step(function, inputs, dy):
    torch.autograd.grad(function(inputs[0]), inputs, dy)


@pytest.mark.parametrize("r", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("n", [1, 210])
def test_transform(benchmark, n, r):
    """Medians of interleaved turns, forward and backward apart; a result that differs from the library's fails."""
    X, G = (0.1 * torch.randn(n, r, r)).requires_grad_(), torch.randn(n, r, r)
    times = {function: ([], []) for function in (cayley, solved)}
    for _ in range(12 if n * r > 5000 else 60):
        results = []
        for function, (forward, backward) in times.items():
            Q, seconds = clocked(function, X)
            forward.append(seconds)
            (gradient,), seconds = clocked(torch.autograd.grad, Q, X, G)
            backward.append(seconds)
            results.append((Q.detach(), gradient))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), "red: a result differs from the library's"
    ours, theirs = ([statistics.median(t) for t in times[function]] for function in (cayley, solved))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    names = ("forward", "backward")
    benchmark.extra_info.update({f"{name}_ratio": round(ratio, 2) for name, ratio in zip(names, ratios, strict=True)})
    for name, a, b, ratio in zip(names, ours, theirs, ratios, strict=True):
        print(
            f"\nr {r}, n {n}, {name}: {1e6 * a:.0f} us, torch.linalg.solve {1e6 * b:.0f} us: {ratio:.1f} times", end=""
        )
    benchmark.pedantic(step, (cayley, [X], G), rounds=10, iterations=2, warmup_rounds=1)


@pytest.mark.parametrize("r", [16, 64])
def test_layer(benchmark, r):
    linear = torch.nn.Linear(harness.K, harness.D, bias=False)
    layer = SpectralLinear.from_linear(linear, SpectralConfig(r=r, mode="rotation", niter=1))
    x, dy = torch.randn(harness.T, harness.K, requires_grad=True), torch.randn(harness.T, harness.D)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    benchmark.pedantic(step, (layer, inputs, dy), rounds=5, warmup_rounds=1)
    X, G, whole = layer.spectral_rotation["default"], torch.randn(2, r, r), benchmark.stats.stats.median
    shares = {}
    for name, function in (("cayley_share", cayley), ("solve_share", solved)):
        times = [clocked(step, function, [X], G)[1] for _ in range(100)]
        shares[name] = round(statistics.median(times) / whole, 5)
    benchmark.extra_info.update(shares)
    print(f"\nr {r}: a step of {1e3 * whole:.1f} ms, {shares}", end="")


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("name", harness.operators("cayley"))
def test_operator(benchmark, name, dtype):
    harness.operator(benchmark, name, dtype)
