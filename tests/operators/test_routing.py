"""The routing row (METHODS 1.10): its operators as a sum over tokens, and what they refuse.

test_library.py, test_triton.py and test_gpu.py run them like every other row's.
"""

import pytest
import torch
from tensors import DTYPES, accumulate, randn

from spectral_ops._library import OPERATORS

COMBINE, BACKWARD = OPERATORS["routing_combine"], OPERATORS["routing_combine_backward"]


def routed(T, K, d, end, dtype=torch.float64):
    """y with NaN from row ``end`` on, weights, places and offsets."""
    y, places = randn(T * K, d, dtype=dtype), torch.randperm(T * K).view(T, K)
    y[end:] = torch.nan
    return y, randn(T, K, dtype=torch.float32), places, torch.tensor([0, end // 2, end], dtype=torch.int32)


def explicit(y, weights, places, end):
    """As a dense sum, differentiable in y and weights."""
    live = (places < end).unsqueeze(2)
    return (torch.where(live, y[places], 0) * weights.unsqueeze(2)).sum(1)


@pytest.mark.parametrize(
    "T, K, d, end", [(5, 2, 7, 10), (5, 2, 7, 6), (3, 1, 1, 0), (33, 8, 70, 200), (4, 3, 1030, 12)]
)
def test_values_and_gradients(T, K, d, end, backend):
    y, weights, places, offsets = routed(T, K, d, end)
    clean, wide = y.nan_to_num().requires_grad_(), weights.double().requires_grad_()
    want, dout = explicit(clean, wide, places, end), randn(T, d, dtype=torch.float64)
    torch.testing.assert_close(COMBINE(y, weights, places, offsets), want)
    dy, dweights = torch.autograd.grad(want, (clean, wide), dout)
    got = BACKWARD(dout, y, weights, places, offsets, True)
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[0], dy)
    torch.testing.assert_close(got[1], dweights.float())
    assert not got[0][end:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding(dtype, backend):
    """The sum is of unrounded terms: within half a unit of the last place of the exact one."""
    y, weights, places, offsets = routed(40, 8, 130, 300, dtype)
    got, want = COMBINE(y, weights, places, offsets), explicit(y.double().nan_to_num(), weights.double(), places, 300)
    noise = 32 * torch.finfo(accumulate(dtype)).eps * want.abs().max()
    assert (
        got.dtype == dtype
        and ((got.double() - want).abs() <= 0.5001 * torch.finfo(dtype).eps * want.abs() + noise).all()
    )


def test_nobody_wants_the_weights_gradient(backend):
    """Then y is not read; and weights of None are ones."""
    y, weights, places, offsets = routed(6, 2, 8, 12)
    ones, dout = torch.ones(6, 2, dtype=torch.float64), randn(6, 8, dtype=torch.float64)
    torch.testing.assert_close(COMBINE(y, None, places, offsets), COMBINE(y, ones, places, offsets))
    dy, none = BACKWARD(dout, y.fill_(torch.nan), None, places, offsets, False)
    assert none.shape == (0,)
    torch.testing.assert_close(dy[places], dout.unsqueeze(1).expand(6, 2, 8))


WRONG = {
    "an end past the rows": (lambda places: (places, torch.tensor([0, 13])), "offsets: got 13"),
    "a negative end": (lambda places: (places, torch.tensor([0, -1])), "offsets: got -1"),
    "a negative place": (lambda places: (places - 1, torch.tensor([0, 12])), "places: got -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_places(name, backend):
    change, message = WRONG[name]
    y, weights, places, _ = routed(6, 2, 8, 12)
    places, offsets = change(places)
    for call in (
        lambda: COMBINE(y, weights, places, offsets),
        lambda: BACKWARD(y[:6], y, weights, places, offsets, True),
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        assert message in str(caught.value)
