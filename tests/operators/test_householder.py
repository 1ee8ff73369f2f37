"""The reflections' row (METHODS 1.17): householder_linear against its reflections, one after the other."""

import pytest
import torch
from instruments import allocations, saved_tensors
from tensors import laid_out, randn
from torch.utils.checkpoint import checkpoint

import spectral_ops

k, d, T, r = 12, 10, 7, 5


def definition(v, W, orthonormal=False):
    H, u = torch.eye(k, dtype=W.dtype), v["u"]
    if orthonormal:
        H = H - 2 * u @ u.T
    else:
        for i in range(u.shape[1]):
            unit = u[:, i : i + 1] / u[:, i].norm()
            H = H @ (torch.eye(k, dtype=W.dtype) - 2 * unit @ unit.T)
    return v["x"] @ (W @ H).T + v.get("bias", 0.0)


def ours(v, W, orthonormal=False):
    return spectral_ops.householder_linear(v["x"], W, v["u"], v.get("bias"), orthonormal=orthonormal)


def problem(dtype=torch.float64, orthonormal=False, columns=r):
    u = randn(k, columns, dtype=torch.float64)
    u = torch.linalg.qr(u)[0] if orthonormal else u
    v = {"x": randn(T, k, dtype=dtype), "u": u.to(dtype), "bias": randn(d, dtype=dtype)}
    return {n: t.requires_grad_() for n, t in v.items()}, randn(d, k, dtype=dtype, fan=k)


def agree(v, y, want, tolerance=1e-10):
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    dy, trained = randn(*y.shape, dtype=y.dtype), [t for t in v.values() if t.requires_grad]
    for got, expected in zip(*(torch.autograd.grad(t, trained, dy) for t in (y, want)), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 5, 12])
def test_the_definition(columns, orthonormal, backend):
    v, W = problem(orthonormal=orthonormal, columns=columns)
    agree(v, ours(v, W, orthonormal), definition(v, W, orthonormal))
    with torch.no_grad():
        torch.testing.assert_close(ours(v, W, orthonormal), definition(v, W, orthonormal), rtol=1e-12, atol=1e-12)


def test_columns_of_any_length_and_columns_that_repeat():
    """Pairs of equal columns, from which PEFT starts: they cancel, and y is the base's; and lengths of 1e-3 to 1e3."""
    v, W = problem(columns=6)
    with torch.no_grad():
        v["u"].copy_(v["u"][:, ::2].repeat_interleave(2, 1) * torch.tensor([1e-3, 1e3, 1, 2, 30, 1e-2]))
    y = ours(v, W)
    torch.testing.assert_close(y, v["x"] @ W.T + v["bias"], rtol=1e-10, atol=1e-10)
    dy = randn(*y.shape)
    for got, expected in zip(*(torch.autograd.grad(t, v["u"], dy) for t in (y, definition(v, W))), strict=True):
        torch.testing.assert_close(got * v["u"].norm(dim=0), expected * v["u"].norm(dim=0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("orthonormal", [False, True])
def test_gradcheck(orthonormal):
    v, W = problem(orthonormal=orthonormal)
    names = list(v)
    assert torch.autograd.gradcheck(
        lambda *ts: ours(dict(zip(names, ts, strict=True)), W, orthonormal), list(v.values())
    )  # fmt: skip


@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("frozen", [("x",), ("u",), ("bias",), ("x", "u"), ("x", "bias"), ("u", "bias")])
def test_frozen_parameters(frozen, orthonormal):
    v, W = problem(orthonormal=orthonormal)
    for name in frozen:
        v[name].requires_grad_(False)
    agree(v, ours(v, W, orthonormal), definition(v, W, orthonormal))


@pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "expanded"])
def test_layouts_and_leading_dimensions(layout):
    v, W = problem()
    v["x"] = laid_out(randn(3, 4, k), layout).requires_grad_()
    agree(v, ours(v, W), definition(v, W))
    v["u"] = laid_out(v["u"].detach(), layout).requires_grad_()
    if layout != "expanded":
        agree(v, ours(v, laid_out(W, layout)), definition(v, W))


@pytest.mark.parametrize("lead", [(0,), (1,), (2, 0, 3), ()], ids=str)
def test_few_tokens_and_none(lead):
    v, W = problem()
    v["x"] = randn(*lead, k).requires_grad_()
    agree(v, ours(v, W), definition(v, W))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype, backend):
    """Also with u in float32: the reflections are then those of u as x's dtype has it."""
    for wide in (False, True):
        v, W = problem(dtype)
        if wide:
            v["u"] = v["u"].detach().float().requires_grad_()
        exact = {n: t.detach().double().requires_grad_() for n, t in v.items()}
        y, want = ours(v, W), definition(exact, W.double())
        dy = randn(T, d, dtype=dtype)
        found = [y, *torch.autograd.grad(y, list(v.values()), dy)]
        expected = [want, *torch.autograd.grad(want, list(exact.values()), dy.double())]
        for t, got, should in zip((v["x"], *v.values()), found, expected, strict=True):
            assert got.dtype is t.dtype
            assert (got - should).norm() <= 16 * torch.finfo(dtype).eps * should.norm()


def test_what_is_saved_and_made():
    v = {"x": randn(5, 256, dtype=torch.float32), "u": randn(256, 4, dtype=torch.float32)}
    W = randn(256, 256, dtype=torch.float32, fan=256)
    for x_trained, u_trained in ((True, True), (False, True), (True, False)):
        v["x"].requires_grad_(x_trained)
        v["u"].requires_grad_(u_trained)
        with saved_tensors() as kept:
            y = ours(v, W)
        known = {t.untyped_storage().data_ptr() for t in (W, *v.values())}
        assert [list(t.shape) for t in kept if t.untyped_storage().data_ptr() not in known] == [[5, 4]] * u_trained
        assert any(t is v["x"] or t.data_ptr() == v["x"].data_ptr() for t in kept) == u_trained
        assert max(allocations(lambda y=y: y.sum().backward())) < 4 * 256 * 256


def test_checkpointing_autocast_and_compile():
    v, W = problem(torch.float32)
    agree(v, checkpoint(lambda x: ours({**v, "x": x}, W), v["x"], use_reentrant=False), ours(v, W), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(v, W)
    assert y.dtype is torch.bfloat16 and (y - definition(v, W)).norm() <= 0.04 * y.norm()
    v, W = problem()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *ts: ours(dict(zip(v, ts, strict=True)), W), backend="aot_eager", fullgraph=True)
    agree(v, compiled(*v.values()), definition(v, W))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"u": randn(11, 3)}, r"u: got \[11, 3\].*wanted size 12 in dimension 0"),
        ({"u": randn(12)}, "u: got .* wanted 2 dimensions"),
        ({"u": randn(12, 0)}, "u: got .*at least one column"),
        ({"u": randn(12, 3).float()}, "u: got torch.float32, wanted float64"),
        ({"weight": randn(d, k).requires_grad_()}, "weight: got requires_grad=True"),
    ],
)
def test_errors_name_the_argument(wrong, message):
    args = {"x": randn(T, k), "weight": randn(d, k), "u": randn(k, r), **wrong}
    with pytest.raises((TypeError, ValueError), match=message):
        spectral_ops.householder_linear(**args)
