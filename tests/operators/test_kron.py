"""LoKr's functions beside their dense formulas, and what they refuse."""

import pytest
import torch
from budget import check
from contract import Contract
from instruments import allocations
from problems import FAMILIES
from tensors import randn

import spectral_ops


class TestKron(Contract):
    families = [family for name, family in FAMILIES.items() if name.startswith(("kron",))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["kron", "kron-whole", "kron-both", "kron-update"])
def test_more_rows_than_are_cast_at_a_time(name, dtype, backend):
    check(FAMILIES[name].build(((700,), 96, 80, 3), dtype, torch.float32))


def case(T=4):
    return {"x": randn(T, 12), "weight": randn(10, 12), "w1": randn(2, 3), "w2": randn(5, 4)}


def test_nothing_of_the_weights_size_is_made():
    torch.manual_seed(0)
    x = randn(4, 256).requires_grad_()
    weight, w1 = randn(256, 256), randn(16, 16).requires_grad_()
    w2, w2_b = randn(16, 2).requires_grad_(), randn(2, 16).requires_grad_()

    def step():
        spectral_ops.kron_linear(x, weight, w1, w2, w2_b=w2_b).sum().backward()

    step()
    assert max(allocations(step)) <= 8 * 4 * 256  # x's size


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w1": randn(2, 4)}, r"w1, w2: got \[2, 4\] and \[5, 4\], wanted sides whose products are 10 and 12"),
        ({"w2_b": randn(3, 4)}, "w2_b: got"),
        ({"w2": randn(5, 4, 1)}, "w2: got"),
    ],
)
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        spectral_ops.kron_linear(**(case() | changed))
