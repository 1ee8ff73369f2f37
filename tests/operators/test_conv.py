"""The conv row (METHODS 1.12): conv_update against the convolution with the whole kernel, in either memory format."""

import pytest
import torch
import torch.nn.functional as F
from tensors import randn

import spectral_ops
from spectral_ops import column_norm, conv_update

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def problem(places=(6, 5), kernel=(3, 3), N=2, C=4, d=6, r=3, dtype=torch.float64, dora=False, **numbers):
    """Inputs, what is given to conv_update, and the same by the whole kernel W + γ B A."""
    x, W = randn(N, C, *places, dtype=dtype), randn(d, C, *kernel, dtype=dtype, fan=C * 9)
    v = {"x": x, "A": randn(r, C, *kernel, dtype=dtype, fan=C * 9), "B": randn(d, r, dtype=dtype), "bias": randn(d)}
    v["bias"] = v["bias"].to(dtype)
    if dora:
        v["magnitude"] = randn(d, dtype=dtype) + 3
    v = {name: t.requires_grad_() for name, t in v.items()}
    convolve = CONV[len(places)]

    def ours(v, base=lambda y: y, **options):
        out = base(convolve(v["x"], W, None if dora else v["bias"], **numbers))
        if dora:
            norm = column_norm(W.flatten(1), v["A"].flatten(1), v["B"], 0.5)
            options |= {"magnitude": v["magnitude"], "norm": norm, "weight": W, "bias": v["bias"]}
        return conv_update(out, v["x"], v["A"], v["B"], scale=0.5, **numbers, **options)

    def whole(v):
        delta = 0.5 * (v["B"] @ v["A"].flatten(1)).view(W.shape)
        if not dora:
            return convolve(v["x"], W + delta, v["bias"], **numbers)
        g = v["magnitude"] / (W + delta).flatten(1).norm(dim=1).detach()
        return convolve(v["x"], (W + delta) * g.view(-1, *[1] * (len(places) + 1)), v["bias"], **numbers)

    return v, ours, whole


def agree(v, ours, whole, exact=1e-11, **options):
    y, want = ours(v, **options), whole(v)
    dy = randn(*y.shape, dtype=y.dtype)
    torch.testing.assert_close(y, want, rtol=exact, atol=exact)
    trained = [t for t in v.values() if t.requires_grad]
    for got, expected in zip(torch.autograd.grad(y, trained, dy), torch.autograd.grad(want, trained, dy), strict=True):
        torch.testing.assert_close(got, expected, rtol=exact, atol=exact)


SIZES = {
    "3x3": {"padding": 1},
    "one sample": {"N": 1, "padding": 1},
    "1x1": {"kernel": (1, 1)},
    "1x1, one sample": {"kernel": (1, 1), "N": 1},
    "strided 1x1": {"kernel": (1, 1), "stride": 2},
    "strided, dilated": {"places": (9, 8), "kernel": (3, 2), "stride": (2, 1), "dilation": (1, 2), "padding": (0, 1)},
    "1d": {"places": (9,), "kernel": (3,), "padding": 2},
    "3d": {"places": (3, 4, 3), "kernel": (2, 2, 1)},
    "one place": {"places": (3, 3)},
    "no sample": {"N": 0},
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("size", SIZES)
def test_the_whole_kernel(size, dora, backend):
    agree(*problem(**SIZES[size], dora=dora))
    agree(*problem(**SIZES[size], dora=dora), base=lambda y: y.view_as(y))  # a view is not overwritten


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_memory_formats(dora):
    v, ours, whole = problem(padding=1, dora=dora)
    rows = v["x"]
    for x in (rows.to(memory_format=torch.channels_last), rows[:1].expand(2, 4, 6, 5), rows.mT.contiguous().mT):
        v["x"] = x.detach().requires_grad_()
        agree(v, ours, whole)
    v["x"] = rows.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert ours(v).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradcheck_and_a_single_derivative(dora):
    v, ours, _ = problem(places=(3, 3), kernel=(2, 2), dora=dora)
    if dora:
        v["A"], v["B"] = v["A"].detach(), v["B"].detach()  # the norm is held
    names = [name for name, t in v.items() if t.requires_grad]
    inputs = [v[name] for name in names]
    assert torch.autograd.gradcheck(lambda *ts: ours({**v, **dict(zip(names, ts, strict=True))}), inputs)
    (dx,) = torch.autograd.grad(ours(v).square().sum(), v["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_float32_adapters_under_a_narrower_x(dora, dtype):
    """Within a few roundings of float64; and more places than are widened at a time."""
    torch.manual_seed(0)
    v, ours, whole = problem(padding=1, dtype=torch.float32, dora=dora)
    narrow = {n: t.detach().to(dtype if n in ("x", "bias") else torch.float32).requires_grad_() for n, t in v.items()}
    W = randn(6, 4, 3, 3, dtype=dtype, fan=36)
    norm = column_norm(W.flatten(1), narrow["A"].flatten(1), narrow["B"], 0.5)
    extra = {"magnitude": narrow["magnitude"], "norm": norm, "weight": W, "bias": narrow["bias"]} if dora else {}

    def run(x, W, A, B, extra):
        out = F.conv2d(x, W, padding=1)
        y = conv_update(out, x, A, B, scale=0.5, padding=1, **extra)
        return [y, *torch.autograd.grad(y.double().square().sum(), [A, B, *([extra["magnitude"]] if extra else [])])]

    got = run(*(narrow[n] if n != "W" else W for n in ("x", "W", "A", "B")), extra)
    wide = {n: t.detach().double().requires_grad_() for n, t in narrow.items()}
    extra = {n: wide[n] if n in wide else t.double() for n, t in extra.items()}
    want = run(wide["x"], W.double(), wide["A"], wide["B"], extra)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm()
    assert got[0].dtype == dtype and all(g.dtype == torch.float32 for g in got[1:])


def test_tiles(monkeypatch):
    """Sums and scales cut into several tiles are the same."""
    from spectral_ops.functional import conv

    monkeypatch.setattr(conv, "TILE", 40)
    for last in (False, True):
        planes = randn(2, 6, 5, 7).to(memory_format=torch.channels_last if last else torch.contiguous_format).flatten(2)
        g = randn(6)
        assert len(list(conv._tiles(planes))) > 3
        torch.testing.assert_close(conv._inner(planes, planes + 1), (planes * (planes + 1)).sum((0, 2)))
        narrow = planes.bfloat16()
        out = torch.empty_like(narrow)
        conv._scale(out, narrow, g.float())
        assert torch.equal(out, (narrow.float() * g.float().unsqueeze(1)).bfloat16())


def test_recompute_keeps_no_output_and_agrees():
    v, ours, whole = problem(padding=1, dora=True)
    agree(v, ours, whole, recompute=True)
    y = ours(v, recompute=True)
    y.mul_(2).sum().backward()


def test_dropout_masks_x_alone():
    v, ours, _ = problem(padding=1)
    torch.manual_seed(1)
    y = ours(v, dropout_p=0.5, training=True)
    torch.manual_seed(1)
    assert torch.equal(y, ours(v, dropout_p=0.5, training=True)) and not torch.equal(y, ours(v))
    assert torch.equal(ours(v, dropout_p=0.5), ours(v))
    (dA,) = torch.autograd.grad(y.sum(), v["A"], retain_graph=True)
    torch.manual_seed(1)
    (again,) = torch.autograd.grad(ours(v, dropout_p=0.5, training=True).sum(), v["A"])
    assert torch.equal(dA, again)


NORMED = {"magnitude": torch.ones(6), "norm": torch.ones(6)}


def good():
    return {
        "base_out": torch.zeros(2, 6, 4, 4), "x": torch.zeros(2, 3, 4, 4), "lora_A": torch.zeros(2, 3, 3, 3),
        "lora_B": torch.zeros(6, 2), "padding": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, "x: got .* wanted all three"),
        ({"lora_A": torch.zeros(2, 4, 3, 3)}, ValueError, "lora_A: got .* wanted x's 3 channels"),
        ({"lora_B": torch.zeros(6, 3)}, ValueError, r"lora_B: got .* wanted \[6, 2\]"),
        ({"padding": 0}, ValueError, r"base_out: got .* wanted \[2, 6, 2, 2\]"),
        ({"stride": (1, 1, 1)}, ValueError, "stride: got .* wanted a number or 2 of them"),
        ({"norm": torch.ones(6)}, ValueError, "norm: got a tensor, wanted None without a magnitude"),
        ({"magnitude": torch.ones(6)}, TypeError, "norm: got None"),
        (
            {"magnitude": torch.ones(6), "norm": torch.ones(6), "dropout_p": 0.5, "training": True},
            ValueError,
            "dropout_p",
        ),
        ({"magnitude": torch.ones(6), "norm": torch.ones(6)}, TypeError, "weight: got None"),
        ({"lora_B": [1]}, TypeError, "lora_B: got"),
    ],
)
def test_errors(change, error, message):
    spectral_ops.conv_update(**good())
    with pytest.raises(error, match=message):
        spectral_ops.conv_update(**{**good(), **change})
