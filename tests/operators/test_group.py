"""Siblings over one x (METHODS 1.1): lowrank_linear_group. The contract of every function is in test_lowrank.py."""

import pytest
import torch
from budget import check_batched_gradients, evaluate
from instruments import Recorder
from problems import FAMILIES, cotangent
from tensors import TYPICAL, randn, storage

import spectral_ops


def test_group_equals_single_layers(backend):
    problem = FAMILIES["group"].build(TYPICAL)
    v = problem.inputs
    apart = torch.cat(
        [
            spectral_ops.lowrank_linear(
                v["x"], v[f"weight{i}"], v[f"A{i}"], v[f"B{i}"], v.get(f"bias{i}"), scale=0.5 * (i + 1)
            )
            for i in range(3)
        ],
        -1,
    )
    together = problem.call()
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    dy = cotangent(problem, together)
    names = problem.trained()
    ours = torch.autograd.grad(together, [v[n] for n in names], dy)
    theirs = torch.autograd.grad(apart, [v[n] for n in names], dy)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"d{n}: {m}")


def test_group_with_an_output_nobody_uses(backend):
    """A sibling whose gradient never arrives adds nothing to dx, and its own parameters get none."""
    problem = FAMILIES["group"].build(TYPICAL)
    v, (_, _, d, _) = problem.inputs, TYPICAL
    layers = [(v[f"weight{i}"], v[f"A{i}"], v[f"B{i}"], v.get(f"bias{i}"), 0.5 * (i + 1)) for i in range(3)]
    first, _, _ = spectral_ops.lowrank_linear_group(v["x"], layers)
    dy = randn(*first.shape)
    dx, dA1 = torch.autograd.grad(first, [v["x"], v["A1"]], dy, allow_unused=True)
    full = torch.zeros(*first.shape[:-1], problem.out_features, dtype=torch.float64)
    full[..., :d] = dy
    want = evaluate(problem, full)[1]
    torch.testing.assert_close(dx, want["x"], rtol=1e-11, atol=1e-12)
    assert dA1 is None


def test_group_reads_x_once():
    """One product over x projects for all three siblings."""
    problem = FAMILIES["group"].build(((12,), 24, 40, 5))
    with Recorder() as seen, torch.no_grad():
        problem.call()
    x = storage(problem.inputs["x"])
    reads = [a for a in seen.products() if any(isinstance(t, torch.Tensor) and storage(t) == x for t in a)]
    assert len(reads) == 3 + 1, "three base products and one stacked projection"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients_of_a_group(backend):
    check_batched_gradients(FAMILIES["group"].build())
