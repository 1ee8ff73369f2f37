"""The low-rank row (METHODS 1.1): lowrank_linear, lowrank_update and their operators."""

import itertools

import pytest
import torch
from budget import assert_within_budget, check, evaluate
from contract import Contract
from instruments import saved_tensors
from problems import FAMILIES, LOWRANK, cotangent
from tensors import TYPICAL, randn, storage

import spectral_ops


class TestLowRank(Contract):
    families = LOWRANK


@pytest.mark.parametrize("update", [False, True], ids=["linear", "update"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [None, "frozen", "trained"])
@pytest.mark.parametrize("out_scale", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("core", [None, "diagonal", "full"])
def test_every_combination_of_options(core, out_scale, bias, p, update, backend):
    check(FAMILIES["lora"].build(TYPICAL, core=core, out_scale=out_scale, bias=bias, p=p, update=update))


@pytest.mark.parametrize("r", [1, 2, 7, 8, 15, 16, 17, 31, 33, 64])
def test_ranks(r, backend):
    for dtype in (torch.float32, torch.bfloat16):
        check(FAMILIES["lora-core-scaled-dropout"].build(((19,), 64, 72, r), dtype))


def test_rank_above_in_features(backend):
    check(FAMILIES["lora"].build(((5,), 8, 12, 20)))


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 300])
def test_both_ways_of_scaling_dx(T, backend):
    """With out_scale, dx comes from scaled dy at few tokens and from scaled W at many: both are right."""
    check(FAMILIES["lora-core-scaled-dropout"].build(((T,), 16, 24, 3)))
    check(FAMILIES["lora-core-scaled-dropout"].build(((T,), 16, 24, 3), torch.bfloat16))


def test_views_that_start_inside_their_memory(backend):
    """x, weights and gradients may be parts of larger tensors, as those of a fused projection are."""
    xs, dys = randn(4, 2, 3, 24), randn(4, 2, 3, 40)
    W, A, B = randn(80, 24, fan=24), randn(10, 24, fan=24), randn(80, 5)
    x, dy, parts = xs[1], dys[2], [t[t.shape[0] // 2 :].requires_grad_(t is not W) for t in (W, A, B)]
    for inputs in (parts, [t.detach().clone().requires_grad_(t.requires_grad) for t in parts]):
        y = spectral_ops.lowrank_linear(x, *inputs)
        (group,) = spectral_ops.lowrank_linear_group(x, [(*inputs, None, 1.0)])
        both = [[out, *torch.autograd.grad(out, inputs[1:], dy)] for out in (y, group)]
        if inputs is parts:
            seen = both
    for a, b in zip(sum(seen, []), sum(both, []), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(y, x @ (W[40:] + B[40:] @ A[5:]).T)


def test_update_overwrites_a_fresh_base_and_copies_any_other():
    v = FAMILIES["lora-update"].build().freeze("x", "A", "B").inputs
    call = lambda out: spectral_ops.lowrank_update(out, v["x"], v["A"], v["B"], scale=0.75)  # noqa: E731
    base = v["base_out"].detach()
    want = call(base.clone())
    fresh = base.clone()
    assert storage(call(fresh)) == storage(fresh)
    assert torch.equal(fresh, want)
    whole = torch.cat([base, base])
    view = whole[: base.shape[0]].requires_grad_(False)
    assert torch.equal(call(view), want)
    leaf = base.clone().requires_grad_()
    assert torch.equal(call(leaf), want)
    assert torch.equal(leaf, base), "a trained leaf was overwritten"
    strided = base.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(call(strided), want)


def test_update_behind_a_layer_that_others_differentiate():
    """base_out may come out of an autograd graph; the graph behind it gets its gradient."""
    problem = FAMILIES["lora-update-everything"].build()
    v = problem.inputs
    hidden = randn(*v["x"].shape[:-1], 6).requires_grad_()
    frozen = randn(v["base_out"].shape[-1], 6)
    torch.manual_seed(problem.seed)
    out = spectral_ops.lowrank_update(
        torch.nn.functional.linear(hidden, frozen), v["x"], v["A"], v["B"], scale=0.75, core=v["core"],
        out_scale=v["out_scale"], bias=v["bias"], dropout_p=0.3, training=True,
    )  # fmt: skip
    dy = randn(*out.shape)
    (got,) = torch.autograd.grad(out, hidden, dy)
    torch.testing.assert_close(got, (dy * v["out_scale"]) @ frozen)


def test_scaled_bias_of_the_base_layer_trains_once(backend):
    """With out_scale the base layer's own node returns g dy for its bias and ours the rest: together Σ dy."""
    v = FAMILIES["lora-update-everything"].build(p=0.0).inputs
    W = randn(v["base_out"].shape[-1], v["x"].shape[-1])
    bias = v["bias"].detach().requires_grad_()
    base = torch.nn.functional.linear(v["x"], W, bias)
    out = spectral_ops.lowrank_update(base, v["x"], v["A"], v["B"], out_scale=v["out_scale"], bias=bias)
    dy = randn(*out.shape)
    (got,) = torch.autograd.grad(out, bias, dy)
    torch.testing.assert_close(got, dy.flatten(0, -2).sum(0))


@pytest.mark.parametrize("name", [None, "reference"])
def test_column_scale_is_not_rounded_to_half_precision(name):
    """g = 1 + 3/512 lies halfway between two bf16 numbers, g = 1.001 rounds to 1: u and dB see neither rounding."""
    T, k, d = 512, 64, 48
    x, dy = randn(T, k, dtype=torch.bfloat16), randn(T, d, dtype=torch.bfloat16)
    W = randn(d, k, dtype=torch.bfloat16, fan=k)
    A, B = randn(4, k, fan=k, dtype=torch.float32), torch.zeros(d, 4, requires_grad=True)
    exact = x.double() @ W.double().T
    for g, tolerance in ((1 + 3 / 512, 1e-3), (1.001, 2e-4)):
        with spectral_ops.use_backend(name) if name else torch.enable_grad():
            y = spectral_ops.lowrank_linear(x, W, A, B, out_scale=torch.full((d,), g))
            (dB,) = torch.autograd.grad(y, B, dy)
        slope = ((y.detach().double() * exact).sum() / exact.square().sum()).item()
        if name == "reference" or g > 1.002:  # a product stored in bf16 first takes no notice of g = 1.001
            assert abs(slope - g) < tolerance, f"the mean column scale of y is {slope}, wanted {g}"
        h = (x @ A.bfloat16().T).double()
        slope = ((dB.double() * (dy.double().T @ h)).sum() / (dy.double().T @ h).square().sum()).item()
        assert abs(slope - g) < 1e-5, f"the mean column scale of dB is {slope}, wanted {g}"


def test_frozen_bias_and_core_get_no_gradient():
    problem = FAMILIES["lora"].build(core="full", bias="frozen").freeze("core")
    v = problem.inputs
    y = problem.call()
    grads = torch.autograd.grad(y, [v["x"], v["A"], v["B"]], torch.ones_like(y))
    assert all(g is not None for g in grads)
    assert not v["core"].requires_grad
    assert v["core"].grad is None


def test_x_is_not_kept_when_A_is_frozen():
    problem = FAMILIES["lora"].build().freeze("A")
    with saved_tensors() as kept:
        problem.call()
    assert storage(problem.inputs["x"]) not in {storage(t) for t in kept}


def test_h_is_not_kept_when_B_and_core_are_frozen():
    T, k, d, r = 12, 24, 40, 5
    problem = FAMILIES["lora-diagonal"].build(((T,), k, d, r)).freeze("B", "core")
    with saved_tensors() as kept:
        problem.call()
    assert (T, r) not in [tuple(t.shape) for t in kept]


def test_methods_that_share_the_operator():
    """AdaLoRA's diagonal, Spectral Adapter R's core, VeRA's λ (as λ⊙B): each against its own formula."""
    T, k, d, r = 9, 20, 28, 4
    x, W = randn(T, k), randn(d, k, fan=k)
    A, B = randn(r, k, fan=k), randn(d, r)
    E, Q, lam = randn(r).requires_grad_(), randn(r, r).requires_grad_(), randn(d).requires_grad_()
    dy = randn(T, d)
    cases = [
        (spectral_ops.lowrank_linear(x, W, A, B, core=E, scale=2.0), x @ W.T + 2 * x @ (B @ torch.diag(E) @ A).T, E),
        (spectral_ops.lowrank_linear(x, W, A, B, core=Q), x @ (W + B @ Q.T @ A).T, Q),
        (spectral_ops.lowrank_linear(x, W, A, lam[:, None] * B), x @ W.T + ((x @ A.T) @ B.T) * lam, lam),
    ]
    for got, want, parameter in cases:
        torch.testing.assert_close(got, want)
        ours, theirs = (torch.autograd.grad(y, parameter, dy)[0] for y in (got, want))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("names", list(itertools.combinations(["x", "A", "B", "core", "bias"], 3)), ids="-".join)
def test_only_three_trained_update(names, backend):
    """The base-agnostic tier with any three of its inputs trained."""
    problem = FAMILIES["lora-update-everything"].build()
    problem.freeze(*(n for n in problem.trained() if n not in names))
    check(problem)


def test_budget_notices_a_wrong_formula():
    """The judge itself: an oracle whose core is transposed, or whose scale is off by a percent, is told apart."""
    for spoil in ("core", "scale"):
        problem = FAMILIES["lora"].build(core="full", dtype=torch.float32)
        y = problem.call()
        dy = cotangent(problem, y)
        path = evaluate(problem, dy, absolute=True)[0]
        if spoil == "core":
            problem.inputs["core"] = problem.inputs["core"].detach().T
        else:
            problem.constants["scale"] *= 1.01
        want = evaluate(problem, dy)[0]
        with pytest.raises(AssertionError, match="budget"):
            assert_within_budget("y", y, want, path, torch.float32, 100)
