"""The transposed copy, and the tiles of a weight gradient, which are made of it in bfloat16."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, Recorder, ids, laid_out, randn

from spectral_ops.functional import common
from spectral_ops.functional.transpose import transpose_op

# tokens, features: none; less than a square of registers; whole squares; edges on both sides; several tasks
SIZES = [(0, 5), (5, 0), (1, 1), (3, 2), (16, 8), (64, 64), (65, 67), (200, 33)]


def words(x):
    """The bits of x as integers: NaNs compare too."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("layout", ["contiguous", "rows", "transposed"])
def test_bit_for_bit(dtype, layout, backend, two_threads):
    for T, n in SIZES:
        x = randn(T, n).to(dtype)
        if x.numel():
            x.view(-1)[:: max(n, 1)] = float("nan")
        x, whole = laid_out(x, layout), torch.full((n + 2, T + 3), 7.0, dtype=dtype)
        transpose_op(whole[1:-1, 1 : T + 1], x)
        assert torch.equal(words(whole[1:-1, 1 : T + 1]), words(x.t())), (T, n)
        whole[1:-1, 1 : T + 1] = 7
        assert (whole == 7).all(), f"{(T, n)}: something beside it was written"


def test_payloads_of_nan_survive(backend):
    x = torch.tensor([[0x7F81, -1, 0x7FC0], [1, -0x8000, 0]], dtype=torch.int16).view(torch.bfloat16)
    out = torch.empty(3, 2, dtype=torch.bfloat16)
    transpose_op(out, x)
    assert torch.equal(words(out), words(x).t())


def test_what_does_not_fit_is_refused():
    x = randn(4, 6)
    for out in (torch.empty(4, 6), torch.empty(6, 4, dtype=torch.bfloat16), torch.empty(6, 1).expand(6, 4)):
        with pytest.raises(RuntimeError):
            transpose_op(out, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(("T", "d", "k", "multiple"), [(9, 40, 7, 8), (70, 21, 33, 1), (0, 8, 3, 1), (5, 0, 3, 1)])
def test_tiles_add_up_to_the_gradient(dtype, T, d, k, multiple, backend, monkeypatch):
    """Tiles that do not fill d, rows of dy that lie apart; bfloat16 copies several tokens, a tile at a time."""
    monkeypatch.setitem(common.TILE_ROWS, "cpu", 16)
    dy, x = laid_out(randn(T, d).to(dtype), "rows"), laid_out(randn(T, k).to(dtype), "rows")
    with Recorder() as seen:
        tiles = [(start, G.clone()) for start, G in common.gradient_tiles(dy, x, multiple)]
    assert [start for start, _ in tiles] == list(range(0, d, 16))
    G = torch.cat([G for _, G in tiles]) if tiles else x.new_empty(0, k)
    want = dy.double().t() @ x.double()
    assert G.shape == want.shape and G.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(G.double(), want, rtol=tolerance, atol=10 * torch.finfo(torch.float32).eps * T**0.5)
    copies = [args[0].shape for name, args in seen.calls if "transpose_" in name]
    assert copies == ([(min(16, d - s), T) for s in range(0, d, 16)] if dtype == torch.bfloat16 and T > 1 else [])
