"""float8_linear: the product and the input's gradient over a weight in FP8, a tile of it in memory (METHODS 1.11)."""

import math

import pytest
import torch
from fp8 import E4M3, packed, spread
from instruments import allocations, opchecks, saved_tensors
from tensors import DTYPES, ids

import spectral_ops as so
from spectral_ops import _library
from spectral_ops.core.autograd import TILE_ROWS
from spectral_ops.functional import float8

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
SIZES = [(150, 288), (128, 128), (1, 300), (129, 1), (300, 257), (40, 520)]
BLOCKS = [(128, 128), (64, 32), (1, 128), (7, 5), (1000, 1000)]


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item() if want.numel() else 0.0


def check(x, weight, scale, W, block_size, bias, eps):
    x, bias = x.detach().requires_grad_(), None if bias is None else bias.detach().requires_grad_()
    y = so.float8_linear(x, weight, scale, bias, block_size=block_size)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, [x] if bias is None else [x, bias], dy)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], weight.shape[0])
    want = x.detach().double() @ W.T + (0 if bias is None else bias.detach().double())
    assert relative(y.detach(), want) < eps
    assert relative(grads[0], dy.double() @ W) < eps
    if bias is not None:
        assert relative(grads[1], dy.double().flatten(0, -2).sum(0)) < eps


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tile", [32, 1024])
def test_against_the_dequantised_weight(size, block, dtype, tile, monkeypatch):
    monkeypatch.setitem(TILE_ROWS, "cpu", tile)
    (d, k), (weight, scale, W) = size, packed(*size, block)
    x = torch.randn(2, 5, k, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(d, generator=torch.Generator().manual_seed(3)).to(dtype) if tile == 32 else None
    check(x, weight, scale, W, block, bias, EPS[dtype])


@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("weight_dtype", float8.FLOAT8, ids=str)
@pytest.mark.parametrize("per", ["tensor", "number", "row", "vector", "block"])
def test_every_dtype_and_grid(per, weight_dtype, scale_dtype):
    d, k = 70, 90
    block = {"tensor": (d, k), "number": (d, k), "block": (32, 16)}.get(per, (1, k))
    weight, scale, _ = packed(d, k, block, scale_dtype)
    weight = (weight.float() / 4).to(weight_dtype)  # fnuz has no numbers above 240
    W = weight.double() * spread(scale, block, d, k)
    scale = scale.reshape({"number": (), "vector": (d,)}.get(per, scale.shape))
    check(torch.randn(6, k), weight, scale, W, block if per == "block" else None, torch.randn(d).bfloat16(), 4e-3)


@pytest.mark.parametrize("shape", [(0, 90), (3, 0, 90), (90,)])
def test_no_tokens_and_one(shape):
    weight, scale, W = packed(70, 90, (32, 16))
    x = torch.randn(shape, requires_grad=True)
    y = so.float8_linear(x, weight, scale, block_size=(32, 16))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == (*shape[:-1], 70) and relative(y.detach(), x.detach().double() @ W.T) < 1e-6
    assert relative(dx, torch.ones(y.shape).double() @ W) < 1e-6


def test_strides_and_second_derivatives():
    weight, scale, W = packed(70, 90, (32, 16))
    x = torch.randn(90, 8, dtype=torch.float64).t().requires_grad_()
    bias = torch.randn(70, dtype=torch.float64, requires_grad=True)

    def call(x, bias):
        return so.float8_linear(x, weight, scale, bias, block_size=(32, 16))

    assert torch.autograd.gradcheck(call, (x, bias)) and torch.autograd.gradgradcheck(call, (x, bias))
    dy = torch.randn(70, 8, dtype=torch.float64).t()
    assert relative(torch.autograd.grad(call(x, bias), x, dy)[0], dy @ W) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("block", [(128, 128), (1, 1024), (1024, 1024)], ids=str)
def test_no_more_of_the_weight_than_a_tile(dtype, block, monkeypatch):
    """Of a weight [1024, 1024]; on the CPU torch multiplies a bfloat16 tile by its scales in float32."""
    monkeypatch.setitem(TILE_ROWS, "cpu", 128)
    weight, scale, _ = packed(1024, 1024, block)
    x, dy = torch.randn(16, 1024).to(dtype).requires_grad_(), torch.randn(16, 1024).to(dtype)
    A, B = torch.randn(4, 1024), torch.randn(1024, 4)
    form = float8.blocks(weight, scale, block)

    def step():
        y = so.float8_linear(x, weight, scale, block_size=block)
        float8.float8_column_norm_op(weight, form.scale, A, B, 0.5, *form[2:])
        return torch.autograd.grad(y, x, dy)

    so.scratch.release()
    blocks = allocations(step)
    assert max(blocks) <= 128 * 1024 * 4 < 1024 * 1024 * dtype.itemsize / 2
    assert sum(n > 16 * 1024 * 4 for n in blocks) > 0  # a tile was seen


def test_nothing_is_saved_but_what_the_layer_holds():
    weight, scale, _ = packed(150, 288, (128, 128))
    bias = torch.randn(150, requires_grad=True)
    with saved_tensors() as kept:
        so.float8_linear(torch.randn(6, 288, requires_grad=True), weight, scale, bias, block_size=(128, 128))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (weight, scale, bias)}


def test_flops_are_those_of_the_products():
    weight, scale, _ = packed(150, 288, (128, 128))
    x, block = torch.randn(6, 288), (128, 128)
    forward = _library.LAYERS["float8_linear_forward"].flops(x, weight, scale, None, *block)
    backward = _library.LAYERS["float8_linear_backward"].flops(torch.randn(6, 150), weight, scale, None, *block, 1)
    assert forward == backward == 2 * 6 * 150 * 288 + 150 * 288  # and one for each entry dequantised


def test_column_norm():
    weight, scale, W = packed(300, 257, (128, 128))
    A, B = torch.randn(4, 257), 0.1 * torch.randn(300, 4)
    got = float8.float8_column_norm_op(weight, scale, A, B, 0.5, 128, 128)
    assert relative(got, (W + 0.5 * B.double() @ A.double()).norm(dim=1)) < 1e-6


@pytest.mark.parametrize("backend", ["reference"])
def test_layer_operators(backend):
    weight, scale, _ = packed(150, 288, (64, 64))
    x, dy, bias = torch.randn(6, 288), torch.randn(6, 150), torch.randn(150)
    for op, args in (
        (float8.float8_linear_forward_op, (x, weight, scale, bias, 64, 64)),
        (float8.float8_linear_forward_op, (x, weight, scale, None, 64, 64)),
        (float8.float8_linear_backward_op, (dy, weight, scale, bias, 64, 64, 3)),
        (float8.float8_linear_backward_op, (dy, weight, scale, None, 64, 64, 1)),
        (float8.float8_column_norm_op, (weight, scale, torch.randn(4, 288), torch.randn(150, 4), 0.5, 64, 64)),
    ):
        torch.library.opcheck(op.default, args, test_utils=opchecks(args))
        with so.use_backend(backend):
            forced = op(*args)
        for a, b in zip(*((o if isinstance(o, tuple) else (o,)) for o in (forced, op(*args))), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def wrong():
    weight, scale, _ = packed(150, 288, (128, 128))
    x, block = torch.randn(4, 288), (128, 128)
    yield (x.to(E4M3), weight, scale), block, TypeError, "x: got .*float8_e4m3fn.*, wanted float64, float32"
    yield (x.int(), weight, scale), block, TypeError, "x: got .*int32"
    yield (x[:, 1:], weight, scale), block, ValueError, r"x: got \[4, 287\].*wanted size 288 .*in_features of weight"
    yield (torch.tensor(1.0), weight, scale), block, ValueError, "x: got .*wanted at least one dimension"
    yield (x, weight.float(), scale), block, TypeError, "weight: got .*float32.*, wanted float8_e4m3fn"
    yield (x, weight[0], scale), block, ValueError, "weight: got .*wanted 2 dimensions"
    yield (x, None, scale), block, TypeError, "weight: got None"
    yield (x, weight, scale.int()), block, TypeError, "scale: got .*int32.*, wanted float64"
    yield (x, weight, scale), None, ValueError, r"scale: got \[2, 3\].*wanted one number, one per row \[150\]"
    yield (x, weight, scale), (128, 64), ValueError, r"scale: got \[2, 3\].*wanted \[2, 5\] \(blocks of 128 x 64"
    yield (x, weight, scale[0]), block, ValueError, r"scale: got \[3\].*wanted \[2, 3\]"
    yield (x, weight, scale.t()), block, ValueError, r"scale: got \[3, 2\].*wanted \[2, 3\]"
    yield (
        (x, weight, scale.clone().requires_grad_()),
        block,
        ValueError,
        "scale: got requires_grad=True, wanted a frozen",
    )
    yield (x, weight, scale), 128, ValueError, r"block_size: got 128, wanted two numbers \(rows, columns\)"
    yield (x, weight, scale), (128, 0), ValueError, "block_size: got 0, wanted at least 1"
    yield (x, weight, scale), (128, 128.0), TypeError, "block_size: got 128.0 .*wanted an integer"
    yield (x, weight, scale, torch.ones(151)), block, ValueError, r"bias: got \[151\].*wanted size 150"
    yield (x.double(), weight, scale, torch.ones(150)), block, TypeError, "bias: got torch.float32, wanted float64"
    yield (x, weight, scale.to("meta")), block, ValueError, "scale: got a tensor on meta, wanted cpu as weight"
    yield (x.to("meta"), weight, scale), block, ValueError, "weight: got a tensor on cpu, wanted meta as x"


@pytest.mark.parametrize("arguments, block, error, message", list(wrong()))
def test_errors(arguments, block, error, message):
    with pytest.raises(error, match=message):
        so.float8_linear(*arguments, block_size=block)


def test_scales_of_any_other_shape_are_an_error():
    """Every shape of up to two dimensions near the right one: no crash, and no broadcast that says nothing."""
    weight, _, _ = packed(6, 9, (4, 4))
    x, accepted = torch.randn(2, 9), []
    shapes = [(), *[(n,) for n in range(11)], *[(p, q) for p in range(8) for q in range(11)]]
    for shape in shapes:
        for block in (None, (4, 4), (1, 3), (6, 9)):
            try:
                y = so.float8_linear(x, weight, torch.ones(shape), block_size=block)
            except ValueError as error:
                assert str(error).startswith("scale: got")
            else:
                accepted.append((shape, block))
                assert relative(y, x.double() @ weight.double().T) < 1e-6
    grids = {(4, 4): (2, 3), (1, 3): (6, 3), (6, 9): (1, 1)}
    single = [(), (1,), (1, 1)]
    assert sorted(map(str, accepted)) == sorted(
        map(
            str,
            [(s, None) for s in [*single, (6,), (6, 1)]]
            + [(g, b) for b, g in grids.items()]
            + [(s, (6, 9)) for s in single[:2]],
        )
    )
    assert math.prod(grids[4, 4]) == 6  # a vector of as many scales as there are blocks is not read as theirs
