"""The rotation row (METHODS 1.16): rotation_linear and rotate against R as a whole matrix."""

import math

import pytest
import torch
from instruments import allocations, saved_tensors
from tensors import laid_out, randn
from torch.utils.checkpoint import checkpoint

import spectral_ops
from spectral_ops.functional import rotation

k, d, T = 24, 10, 7
FORMS = {  # shape of the parameters, and terms of the series
    "Cayley": ((6, 6), 0),
    "series": ((6, 6), 5),
    "shared": ((1, 3), 6),
    "large": ((2, 66), 4),
    "numbers": ((24, 0), 5),
    "squares": ((1, 6, 4, 4), 0),
    "odd": ((1, 8, 3, 3), 0),
    "two factors": ((2, 6, 4, 4), 0),
    "three factors": ((3, 12, 2, 2), 0),
}


def transform(K, terms):
    """Cayley's transform, or PEFT's series term by term."""
    eye = torch.eye(len(K), dtype=K.dtype)
    if terms == 0:
        return (eye - K) @ torch.linalg.inv(eye + K)
    R = eye + 0 * K  # K takes part in every graph
    if terms > 1:
        R = R + 2 * K
    if terms > 2:
        power = K @ K
        R = R + 2 * power
        for _ in range(3, terms - 1):
            power = power @ K
            R = R + 2 * power
        R = R + power @ K
    return R


def whole(blocks, terms):
    """R [k, k], from one block after the other; a factor's places are those of butterfly permutations."""
    if blocks.dim() == 2:
        b = rotation.block_size(blocks)
        upper = torch.triu_indices(b, b, 1)
        made = []
        for triangle in blocks:
            K = torch.zeros(b, b, dtype=blocks.dtype).index_put((upper[0], upper[1]), triangle)
            made.append(transform(K - K.T, terms))
        return torch.block_diag(*(made * (k // b // len(made))))
    R = torch.eye(k, dtype=blocks.dtype)
    for i, factor in enumerate(blocks):
        b = factor.shape[-1]
        h, segment = b // 2, b << i
        F = torch.block_diag(*[transform((X - X.T) / 2, 0) for X in factor])
        if i:
            order = []
            for start in range(0, k, segment):
                units = [*range(0, segment // h, 2), *range(1, segment // h, 2)]
                order += [start + u * h + c for u in units for c in range(h)]
            P = torch.eye(k, dtype=blocks.dtype)[order]
            F = P @ F @ P.T
        R = F @ R
    return R


def problem(form, dtype=torch.float64, scale=True):
    shape, terms = FORMS[form]
    v = {
        "x": randn(T, k, dtype=dtype),
        "blocks": 0.3 * randn(*shape, dtype=dtype),
        "bias": randn(d, dtype=dtype),
        "scale": 1 + 0.3 * randn(d, dtype=dtype) if scale else None,
    }
    return {n: t.requires_grad_() for n, t in v.items() if t is not None}, randn(d, k, dtype=dtype, fan=k), terms


def ours(v, W, terms):
    return spectral_ops.rotation_linear(v["x"], W, v["blocks"], v.get("bias"), scale=v.get("scale"), terms=terms)


def definition(v, W, terms):
    y = v["x"] @ whole(v["blocks"], terms) @ W.T
    return y * v.get("scale", 1.0) + v.get("bias", 0.0)


def agree(v, y, want, tolerance=1e-10):
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    dy, trained = randn(*y.shape, dtype=y.dtype), [t for t in v.values() if t.requires_grad]
    for got, expected in zip(*(torch.autograd.grad(t, trained, dy) for t in (y, want)), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("form", FORMS)
def test_the_definition(form, scale, backend):
    v, W, terms = problem(form, scale=scale)
    agree(v, ours(v, W, terms), definition(v, W, terms))
    with torch.no_grad():
        torch.testing.assert_close(ours(v, W, terms), definition(v, W, terms), rtol=1e-12, atol=1e-12)
    own = {n: v[n] for n in ("x", "blocks")}
    agree(own, spectral_ops.rotate(**own, terms=terms), own["x"] @ whole(own["blocks"], terms))


@pytest.mark.parametrize("terms", range(1, 9))
def test_every_length_of_the_series(terms, backend):
    v, W, _ = problem("series", scale=False)
    agree(v, ours(v, W, terms), definition(v, W, terms))


@pytest.mark.parametrize("form", ["Cayley", "series", "shared", "two factors"])
def test_gradcheck(form):
    v, W, terms = problem(form)
    names = list(v)
    inputs = [v[n].detach()[:2].requires_grad_() if n == "x" else v[n] for n in names]
    assert torch.autograd.gradcheck(lambda *ts: ours(dict(zip(names, ts, strict=True)), W, terms), inputs)


@pytest.mark.parametrize("frozen", [("x",), ("blocks",), ("scale", "bias"), ("x", "blocks"), ("x", "bias", "scale")])
def test_frozen_parameters(frozen):
    v, W, terms = problem("series")
    for name in frozen:
        v[name].requires_grad_(False)
    agree(v, ours(v, W, terms), definition(v, W, terms))


@pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "expanded"])
def test_layouts_and_leading_dimensions(layout):
    v, W, terms = problem("Cayley")
    v["x"] = laid_out(randn(3, 4, k), layout).requires_grad_()
    agree(v, ours(v, W, terms), definition(v, W, terms))
    agree(v, ours(v, laid_out(W, "transposed"), terms), definition(v, W, terms))


@pytest.mark.parametrize("lead", [(0,), (1,), (2, 0, 3), ()], ids=str)
def test_few_tokens_and_none(lead):
    for form in ("series", "two factors"):
        v, W, terms = problem(form)
        v["x"] = randn(*lead, k).requires_grad_()
        agree(v, ours(v, W, terms), definition(v, W, terms))


@pytest.mark.parametrize("form", ["Cayley", "series", "two factors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_with_float32_parameters(form, dtype, backend):
    """x' is rounded once: two roundings of the terms added up, of which no result is far from the exact one."""
    v, W, terms = problem(form, dtype)
    v = {n: (t if n in ("x", "bias") else t.detach().float().requires_grad_()) for n, t in v.items()}
    exact = {n: t.detach().double().requires_grad_() for n, t in v.items()}
    y, want = ours(v, W, terms), definition(exact, W.double(), terms)
    assert y.dtype is dtype
    dy = randn(T, d, dtype=dtype)
    found = [y, *torch.autograd.grad(y, list(v.values()), dy)]
    expected = [want, *torch.autograd.grad(want, list(exact.values()), dy.double())]
    for t, got, should in zip((v["x"], *v.values()), found, expected, strict=True):
        assert got.dtype is t.dtype
        assert (got - should).norm() <= 4 * torch.finfo(dtype).eps * should.norm()


def test_what_is_saved_and_made():
    """x, and the scaled result where its scale is trained; no [k, k], no block."""
    v = {"x": randn(5, 256, dtype=torch.float32), "blocks": 0.1 * randn(8, 496, dtype=torch.float32)}
    v |= {"scale": torch.ones(256)}
    W = randn(256, 256, dtype=torch.float32, fan=256)
    for t in v.values():
        t.requires_grad_()
    for trained, extra in ((True, [[5, 256]]), (False, [])):
        v["scale"].requires_grad_(trained)
        with saved_tensors() as kept:
            y = ours(v, W, 5)
        known = {t.untyped_storage().data_ptr() for t in (W, *v.values())}
        assert [list(t.shape) for t in kept if t.untyped_storage().data_ptr() not in known] == extra
        assert max(allocations(lambda y=y: y.sum().backward())) < 4 * 256 * 256


def test_checkpointing_and_autocast():
    v, W, terms = problem("series", torch.float32)
    agree(v, checkpoint(lambda x: ours({**v, "x": x}, W, terms), v["x"], use_reentrant=False), ours(v, W, terms), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours({**v, "bias": v["bias"].detach()}, W, terms)
    assert y.dtype is torch.bfloat16
    assert (y - definition(v, W, terms)).norm() <= 0.02 * y.norm()
    assert all(
        t.grad_fn is None or torch.isfinite(t).all() for t in torch.autograd.grad(y.sum(), [v["x"], v["blocks"]])
    )


@pytest.mark.parametrize("form", ["series", "two factors"])
def test_compiled(form):
    v, W, terms = problem(form)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *ts: ours(dict(zip(v, ts, strict=True)), W, terms), backend="aot_eager", fullgraph=True
    )
    agree(v, compiled(*v.values()), definition(v, W, terms))


def test_a_rotation_keeps_lengths():
    x, X = randn(50, 64), randn(3, 16, 4, 4)
    y = spectral_ops.rotate(x, X)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)
    assert not math.isclose((y - x).norm().item(), 0, abs_tol=1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"blocks": randn(5, 6)}, r"blocks: got \[5, 6\].*in_features \(24\)"),
        ({"blocks": randn(6, 5)}, r"blocks: got \[6, 5\]"),
        ({"blocks": randn(24)}, r"blocks: got \[24\]"),
        ({"blocks": randn(2, 8, 3, 3)}, "b even for f > 1"),
        ({"blocks": randn(3, 6, 4, 4)}, r"blocks: got \[3, 6, 4, 4\].*wanted"),
        ({"blocks": randn(1, 6, 4, 5)}, r"blocks: got \[1, 6, 4, 5\]"),
        ({"blocks": randn(1, 6, 4, 4), "terms": 5}, "terms: got 5 with butterfly factors"),
        ({"terms": -1}, "terms: got -1"),
        ({"scale": randn(k)}, r"scale: got \[24\].*wanted size 10"),
        ({"blocks": randn(6, 6).float()}, "blocks: got torch.float32, wanted float64"),
        ({"x": randn(7, 23)}, "x: got"),
    ],
)
def test_errors_name_the_argument(wrong, message):
    args = {"x": randn(T, k), "weight": randn(d, k), "blocks": randn(6, 6), **wrong}
    with pytest.raises((TypeError, ValueError), match=message):
        spectral_ops.rotation_linear(**args)
