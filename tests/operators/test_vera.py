"""The VeRA row (METHODS 1.12): vera_linear and vera_update."""

import pytest
import torch
from contract import Contract
from instruments import saved_tensors
from problems import VERA
from tensors import randn

import spectral_ops


class TestVera(Contract):
    families = VERA


def problem_of(T, d, k, r, dtype=torch.float64):
    x, W = randn(T, k, dtype=dtype).requires_grad_(), randn(d, k, dtype=dtype, fan=k)
    A, B = randn(r, k + 3, dtype=dtype)[:, :k], randn(d + 2, r, dtype=dtype)[:d]
    return x, W, A, B, randn(r, dtype=dtype).requires_grad_(), randn(d, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("T", [0, 1, 3, 4, 5, 7, 8, 9, 12, 13, 40])
@pytest.mark.parametrize(("d", "k"), [(12, 8), (8, 12), (8, 8)])
def test_every_way_by_the_number_of_tokens(T, d, k, backend):
    """Below and above the rank, k, and d k/(d + k): the definition, with and without gradients, and over a result."""
    x, W, A, B, lambda_d, lambda_b = problem_of(T, d, k, 4)
    want = x @ W.T + lambda_b * ((x @ A.T * lambda_d) @ B.T)
    dy, trained = randn(T, d), [x, lambda_d, lambda_b]
    expected = torch.autograd.grad(want, trained, dy)
    y = spectral_ops.vera_linear(x, W, A, B, lambda_d, lambda_b)
    over = spectral_ops.vera_update(x @ W.T, x, A, B, lambda_d, lambda_b)
    for out in (y, over):
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        for a, b in zip(torch.autograd.grad(out, trained, dy), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        y = spectral_ops.vera_linear(x, W, A, B, lambda_d, lambda_b)
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vector", ["lambda_d", "lambda_b"])
@pytest.mark.parametrize("T", [2, 6, 40])
def test_a_vector_that_is_zero_has_a_gradient(vector, T):
    """λ_b starts from zero: its gradient is no quotient by it."""
    x, W, A, B, lambda_d, lambda_b = problem_of(T, 12, 8, 4)
    (lambda_d if vector == "lambda_d" else lambda_b).data.zero_()
    y, want = spectral_ops.vera_linear(x, W, A, B, lambda_d, lambda_b), lambda_b * ((x @ A.T * lambda_d) @ B.T)
    trained, dy = [lambda_d, lambda_b], randn(T, 12)
    for a, b in zip(torch.autograd.grad(y, trained, dy), torch.autograd.grad(want, trained, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_h_alone_is_kept_and_only_for_the_vectors():
    x, W, A, B, lambda_d, lambda_b = problem_of(6, 12, 8, 4)
    for trained, rows in ((True, 6), (False, 0)):
        lambda_d.requires_grad_(trained)
        lambda_b.requires_grad_(trained)
        with saved_tensors() as kept:
            spectral_ops.vera_linear(x, W, A, B, lambda_d, lambda_b)
        own = {t.untyped_storage().data_ptr() for t in (W, A, B, lambda_d, lambda_b)}
        assert [list(t.shape) for t in kept if t.untyped_storage().data_ptr() not in own] == [[rows, 4]][: rows > 0]


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (2, randn(4, 9), "lora_A: got"),
        (4, randn(5), r"lambda_d: got \[5\].*wanted size 4 in dimension 0 \(the rank\)"),
        (5, randn(8), r"lambda_b: got \[8\].*wanted size 12 in dimension 0 \(out_features\)"),
        (2, randn(4, 8).requires_grad_(), "vera_A: got requires_grad=True"),
    ],
)
def test_errors_name_the_argument(place, wrong, message):
    args = list(problem_of(6, 12, 8, 4))
    args[place] = wrong
    with pytest.raises((TypeError, ValueError), match=message):
        spectral_ops.vera_linear(*args)
