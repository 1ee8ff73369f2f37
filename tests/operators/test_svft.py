"""SVFT's function: svft_linear beside its dense formula, and what it refuses."""

import pytest
import torch
from contract import Contract
from instruments import saved_tensors
from problems import FAMILIES
from tensors import randn

import spectral_ops
from spectral_ops import CSR, svft_linear


class TestSvft(Contract):
    families = [FAMILIES["svft"]]


def case(d=6, k=5, m=4, T=3):
    M = CSR.from_dense((torch.eye(m) + torch.diag(torch.ones(m - 1), 1)).double())
    return {"x": randn(T, k), "weight": randn(d, k), "U": randn(d, m), "Vh": randn(m, k), "csr": M}


@pytest.mark.parametrize("route", ["sampled", "dense", "compact"])
def test_every_gradient_route(route):
    v = case()
    values = v["csr"].values.detach().requires_grad_()
    x, csr = v["x"].requires_grad_(), v["csr"].with_values(values)
    svft_linear(x, v["weight"], v["U"], v["Vh"], csr, gradient_route=route).square().sum().backward()
    got = values.grad, x.grad
    M = v["csr"].to_dense().detach().requires_grad_()
    again = v["x"].detach().requires_grad_()
    (again @ v["weight"].T + again @ v["Vh"].T @ M.T @ v["U"].T).square().sum().backward()
    kept = v["csr"].to_dense() != 0
    torch.testing.assert_close(got, (M.grad[kept], again.grad), rtol=1e-4, atol=1e-4)


def test_x_is_not_held():
    v = case()
    csr = v["csr"].with_values(v["csr"].values.detach().requires_grad_())
    x = v["x"].requires_grad_()
    with saved_tensors() as kept:
        svft_linear(x, v["weight"], v["U"], v["Vh"], csr)
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in kept)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"U": randn(6, 3)}, r"U: got .*, wanted size 4"),
        ({"Vh": randn(4, 7)}, r"Vh: got"),
        ({"csr": CSR.from_dense(torch.eye(3).double())}, r"csr: got shape \[3, 3\], wanted 4 rows"),
        ({"U": randn(6, 4).requires_grad_()}, "U: got requires_grad=True, wanted a frozen tensor"),
    ],
)
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        spectral_ops.svft_linear(**(case() | changed))
