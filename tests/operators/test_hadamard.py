"""HiRA's and LoHa's functions beside their dense formulas, and what they refuse."""

import pytest
import torch
from budget import check
from contract import Contract
from instruments import allocations
from problems import FAMILIES
from tensors import randn

import spectral_ops


class TestHadamard(Contract):
    families = [family for name, family in FAMILIES.items() if name.startswith(("hira", "loha"))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["hira", "hira-exact", "loha-tiles", "loha-update"])
def test_more_rows_than_a_tile(name, dtype, backend):
    check(FAMILIES[name].build(((3,), 8, 1100, 2), dtype, torch.float64 if dtype is torch.float64 else torch.float32))


def loha(d=24, k=16, r=3, T=5):
    torch.manual_seed(0)
    sizes = {"w1_a": (d, r), "w1_b": (r, k), "w2_a": (d, r), "w2_b": (r, k)}
    factors = {name: randn(*size).requires_grad_() for name, size in sizes.items()}
    return {"x": randn(T, k).requires_grad_(), "weight": randn(d, k), **factors}


def test_both_routes_of_loha_agree():
    results = []
    for route in ("tiles", "factors", "auto"):
        v = loha()
        spectral_ops.loha_linear(**v, scale=0.5, route=route).square().sum().backward()
        results.append([t.grad for name, t in v.items() if name != "weight"])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[2], results[1], rtol=1e-4, atol=1e-4)


def test_the_route_follows_the_rank():
    from spectral_ops.functional.hadamard import tiles_cost_less

    assert not tiles_cost_less(1024, 2048, 2048, 8)  # rank 64 of 2048
    assert tiles_cost_less(4096, 2048, 2048, 32)  # rank 1024
    assert tiles_cost_less(1, 512, 512, 64)  # rank 4096, wider than the weight


@pytest.mark.parametrize("route", ["tiles", "factors"])
def test_nothing_of_the_weights_size_is_made(route):
    v = loha(1024, 1024, 2, 8)

    def step():
        spectral_ops.loha_linear(**v, route=route).sum().backward()

    step()
    assert max(allocations(step)) < 1024 * 1024 * 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w1_a": randn(24, 4)}, "w1_a: got"),
        ({"w2_b": randn(3, 15)}, "w2_b: got"),
        ({"route": "fast"}, "route: got 'fast', wanted 'auto', 'tiles' or 'factors'"),
    ],
)
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        spectral_ops.loha_linear(**(loha() | changed))


def test_small_updates_survive_tiles_in_bfloat16():
    """The update alone, by least squares over many tokens: beside W in one rounded weight most of it would be lost."""
    torch.manual_seed(0)
    d, k, r, T = 48, 32, 3, 4096
    weight, x = randn(d, k, dtype=torch.bfloat16), randn(T, k, dtype=torch.bfloat16)
    factors = [randn(*size, dtype=torch.float32) * 0.2 for size in ((d, r), (r, k), (d, r), (r, k))]
    y = spectral_ops.loha_linear(x, weight, *factors, route="tiles").double() - x.double() @ weight.double().T
    found = torch.linalg.lstsq(x.double(), y).solution.T
    delta = ((factors[0] @ factors[1]) * (factors[2] @ factors[3])).double()
    assert (found - delta).norm() < 0.15 * delta.norm()
    rounded = (weight.double() + delta).bfloat16().double() - weight.double()  # what one weight would keep of it
    assert (rounded - delta).norm() > 0.2 * delta.norm()
