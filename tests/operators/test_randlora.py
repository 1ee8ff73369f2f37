"""The RandLoRA row (METHODS 1.13): randlora_linear and randlora_update."""

import pytest
import torch
from contract import Contract
from instruments import allocations, saved_tensors
from problems import RANDLORA
from tensors import randn

import spectral_ops
from spectral_ops.functional import randlora


class TestRandlora(Contract):
    families = RANDLORA


def problem_of(T, d, k, r=3, n=4, dtype=torch.float64, bases=torch.float64):
    x, W = randn(T, k, dtype=dtype).requires_grad_(), randn(d, k, dtype=dtype, fan=k)
    m, M = min(d, k), max(d, k)
    A, B = randn(r, m).to(bases), randn(M, r * n + 3).to(bases)[:, : r * n]
    return x, W, A, B, randn(r, n, dtype=dtype).requires_grad_(), randn(n, m, dtype=dtype).requires_grad_()


def definition(x, W, A, B, lambda_, gamma, scale):
    """y from ΔW of METHODS 1.13 read literally, entry by entry of S."""
    (r, n), m = lambda_.shape, A.shape[1]
    S = torch.stack([lambda_[p // n, p % n] * gamma[p % n] * A[p // n].to(W.dtype) for p in range(r * n)])
    change = scale * B.to(W.dtype) @ S
    return x @ (W + (change if m == x.shape[-1] else change.T)).T


@pytest.mark.parametrize("bases", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [0, 1, 4, 5, 30])
@pytest.mark.parametrize(("d", "k"), [(12, 8), (8, 12), (9, 9)])
def test_the_definition(d, k, T, bases, monkeypatch, backend):
    """With few tokens and many, tiles that do not fit the sides, and bases in a dtype of their own, as PEFT's are."""
    monkeypatch.setattr(randlora, "TILE", 5)  # of the layer in Python
    agrees_with_the_definition(T, d, k, bases=bases)


@pytest.mark.slow
@pytest.mark.parametrize("bases", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "d", "k"), [(3, 2100, 2060), (3, 2060, 2100), (1100, 2100, 2060)])
def test_more_than_a_tile(T, d, k, bases):
    agrees_with_the_definition(T, d, k, r=700, n=3, bases=bases, tolerance=1e-9)  # of long sums


def agrees_with_the_definition(T, d, k, tolerance=1e-11, **options):
    x, W, *rest = problem_of(T, d, k, **options)
    trained, dy = [x, *rest[2:]], randn(T, d)
    want = definition(x, W, *rest, 0.7)
    expected = torch.autograd.grad(want, trained, dy)
    for out in (
        spectral_ops.randlora_linear(x, W, *rest, scale=0.7),
        spectral_ops.randlora_update(x @ W.T, x, *rest, scale=0.7),
    ):
        torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
        for a, b in zip(torch.autograd.grad(out, trained, dy), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def test_the_ways_are_chosen_by_the_number_of_tokens():
    weight = randn(12, 8)
    assert [randlora.merges(T, weight, torch.float64) for T in (4, 5)] == [False, True]  # 96 / 20
    assert not randlora.merges(1000, weight.bfloat16(), torch.bfloat16)  # a small change would be rounded away
    assert not randlora.merges(1000, None, torch.float32)


@pytest.mark.parametrize(("d", "k", "shape"), [(64, 32, [4, 32]), (32, 64, [4, 12]), (48, 48, [4, 48])])
def test_one_side_is_kept(d, k, shape):
    """x, or H where k > d, whose side is narrower; nothing without a trained parameter."""
    x, W, *rest = problem_of(4, d, k)
    own = {t.untyped_storage().data_ptr() for t in (W, *rest)}
    for trained in (True, False):
        for t in rest[2:]:
            t.requires_grad_(trained)
        with saved_tensors() as kept:
            spectral_ops.randlora_linear(x, W, *rest)
        assert [list(t.shape) for t in kept if t.untyped_storage().data_ptr() not in own] == [shape][:trained]


def test_nothing_of_the_weights_size_is_made():
    x, W, *rest = problem_of(4, 96, 80, r=20, n=4, dtype=torch.float32, bases=torch.bfloat16)

    def step():
        spectral_ops.randlora_linear(x, W, *rest).sum().backward()

    step()
    assert max(allocations(step)) < 4 * 80 * 80


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (2, randn(3, 9), r"randlora_A: got \[3, 9\].*wanted \[3, 8\]"),
        (3, randn(8, 12), r"randlora_B: got \[8, 12\].*wanted \[12, 12\]"),
        (5, randn(4, 12), r"randlora_gamma: got \[4, 12\].*wanted \[4, 8\]"),
        (4, randn(12), "randlora_lambda: got"),
        (3, randn(12, 12).requires_grad_(), "randlora_B: got requires_grad=True"),
    ],
)
def test_errors_name_the_argument(place, wrong, message):
    args = list(problem_of(6, 12, 8))
    args[place] = wrong
    with pytest.raises((TypeError, ValueError), match=message):
        spectral_ops.randlora_linear(*args)
