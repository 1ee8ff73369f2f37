"""The block-sum row (METHODS 1.3): block_sum, bone_linear (Bone, MiSS, mini), bone_update, disha_linear."""

import pytest
import torch
from budget import check
from contract import Contract
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments import Recorder
from oracles import shard_delta
from problems import BLOCKSUM, FAMILIES
from tensors import HALF, TYPICAL, ids, randn, storage

import spectral_ops
from spectral_ops.functional.blocksum import block_matmul_op


class TestBlockSum(Contract):
    families = BLOCKSUM


@pytest.mark.parametrize("r", [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64])
def test_ranks(r, backend):
    """1 <= r <= k, k % r == 0 or not."""
    for k in (64, 67):
        for dtype in (torch.float32, torch.bfloat16):
            check(FAMILIES["bone-dropout"].build(((19,), k, 40, r), dtype))


@pytest.mark.parametrize("q", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_mini_of_every_width(q, p, backend):
    x, W, D = randn(5, 14).requires_grad_(), randn(24, 14), randn(4, q).requires_grad_()
    torch.manual_seed(2)
    y = spectral_ops.bone_linear(x, W, D, dropout_p=p, training=True)
    if p:
        return check(FAMILIES["mini-dropout"].build(((5,), 14, 24, 4)))
    want = x @ (W + shard_delta(D, 14, 24)).T
    torch.testing.assert_close(y, want)
    dy = randn(5, 24)
    for a, b in zip(torch.autograd.grad(y, [x, D], dy), torch.autograd.grad(want, [x, D], dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=ids)
def test_product_and_tiles_are_one_operator(dtype):
    """block_matmul rounds once; the library's products, which run elsewhere, round twice."""
    for T, n, k, r in ((5, 24, 14, 4), (3, 7, 9, 7), (2, 5, 3, 8), (0, 4, 6, 2), (4, 6, 0, 3)):
        x, W, s, bias = (randn(*shape, dtype=dtype) for shape in ((T, k), (n, k), (T, r), (n,)))
        tiled = s.double()[:, torch.arange(n) % r]
        for b in (None, bias):
            want = (x.double() @ W.double().T + tiled + (0 if b is None else b.double())).to(dtype)
            torch.testing.assert_close(block_matmul_op(x, W, s, b), want)
            torch.testing.assert_close(block_matmul_op.library(x, W, s, b), want, rtol=2e-2, atol=5e-2)
            assert block_matmul_op.fake(x, W, s, b).shape == want.shape


def test_shards_are_residue_classes_not_runs():
    """h[p] = x[p] + x[p + r] + ...: on x = 0, 1, 2, ... the two readings differ, and are told apart."""
    x = torch.arange(7.0)
    assert spectral_ops.block_sum(x, 3).tolist() == [0 + 3 + 6, 1 + 4, 2 + 5]
    D = torch.tensor([[1.0], [10.0], [100.0]])
    y = spectral_ops.bone_linear(x, torch.zeros(1, 7), D)
    assert y.item() == 9 + 50 + 700
    runs = spectral_ops.disha_linear(x, torch.zeros(1, 7), D, [3, 3, 1])
    assert runs.item() == (0 + 1 + 2) + 10 * (3 + 4 + 5) + 100 * 6


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_disha_on_any_pair_of_maps(data):
    k, d = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 14))

    def spec(n, identity):
        kind = data.draw(st.sampled_from(["cyclic", "blocks", *(["identity"] if identity else [])]))
        if kind == "identity":
            return None, n
        if kind == "cyclic":
            return "cyclic", data.draw(st.integers(1, n))
        cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
        edges = [0, *cuts, n]
        return [b - a for a, b in zip(edges, edges[1:], strict=False)], len(edges) - 1

    in_shards, r1 = spec(k, False)
    out_shards, r2 = spec(d, True)
    x, W, D, b = randn(3, k).requires_grad_(), randn(d, k), randn(r1, r2).requires_grad_(), randn(d).requires_grad_()
    y = spectral_ops.disha_linear(x, W, D, in_shards, out_shards, b)
    want = x @ (W + shard_delta(D, k, d, in_shards, out_shards)).T + b
    torch.testing.assert_close(y, want)
    dy = randn(3, d)
    for got, right in zip(torch.autograd.grad(y, [x, D, b], dy), torch.autograd.grad(want, [x, D, b], dy), strict=True):
        torch.testing.assert_close(got, right)


def test_special_cases_coincide(backend):
    """Bone is DiSHA (cyclic, identity), mini is (cyclic, cyclic), and blocks of size one are the identity."""
    v = FAMILIES["bone"].build(bias=None).inputs
    x, W, D = v["x"].detach(), v["weight"], v["D"].detach()
    d = W.shape[0]
    assert torch.equal(spectral_ops.disha_linear(x, W, D, "cyclic"), spectral_ops.bone_linear(x, W, D))
    for out_shards in ([1] * d, "cyclic"):
        got = spectral_ops.disha_linear(x, W, D, "cyclic", out_shards)
        torch.testing.assert_close(got, spectral_ops.bone_linear(x, W, D))
    mini = D[:, :8].contiguous()
    assert torch.equal(spectral_ops.disha_linear(x, W, mini, "cyclic", "cyclic"), spectral_ops.bone_linear(x, W, mini))


def test_r_of_k_is_a_full_update(backend):
    """r = k: every input is its own shard, so ΔW = Dᵀ."""
    x, W, D = randn(6, 10), randn(7, 10), randn(10, 7)
    torch.testing.assert_close(spectral_ops.bone_linear(x, W, D), x @ (W + D.T).T)


@pytest.mark.parametrize("dtype", HALF, ids=ids)
def test_sums_are_accumulated_in_float32(dtype, backend):
    """4096 equal terms: a half-precision running sum would stall long before the end."""
    x = torch.full((3, 4096), 0.125, dtype=dtype)
    assert (spectral_ops.block_sum(x, 1) == 512).all()
    assert (spectral_ops.block_sum(x, 4) == 128).all()
    many = torch.ones(2, 40_000, dtype=dtype)
    assert ((spectral_ops.block_sum(many, 1).float() - 40_000).abs() <= 128).all()  # half a unit of bf16 there


def test_mini_sums_dy_over_its_groups_in_float32(backend):
    """mini's dD sums dy over d / q outputs first: 2048 groups of one value each, exactly."""
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    W = torch.zeros(4096, 4, dtype=torch.bfloat16)
    D = torch.zeros(2, 2, requires_grad=True)
    y = spectral_ops.bone_linear(x, W, D)
    (dD,) = torch.autograd.grad(y, D, torch.ones_like(y))
    assert (dD == 2 * 2048).all()  # h = 2 in both shards


def test_block_sum_under_other_leading_dimensions(backend):
    for lead in ((), (0,), (2, 0, 3), (2, 3, 4), (1, 1, 1, 5)):
        x = randn(*lead, 11)
        got = spectral_ops.block_sum(x, 4)
        want = torch.stack([x[..., p::4].sum(-1) for p in range(4)], -1)
        torch.testing.assert_close(got, want)


def test_x_is_not_read_for_dD():
    """Backward knows x only through h: x may be gone (or overwritten) by then."""
    problem = FAMILIES["bone"].build(TYPICAL)
    y = problem.call()
    dy = randn(*y.shape)
    v = problem.inputs
    want = torch.autograd.grad(y, [v["x"], v["D"]], dy, retain_graph=True)
    with torch.no_grad():
        v["x"].fill_(float("nan"))
    got = torch.autograd.grad(y, [v["x"], v["D"]], dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_backward_makes_no_tiled_copy():
    """dx is the only [T, k] tensor of backward: the tiled s is written into it."""
    T, k, d, r = 64, 32, 16, 4
    problem = FAMILIES["bone-dropout"].build(((T,), k, d, r), torch.bfloat16)
    y = problem.call()
    dy = randn(T, d, dtype=torch.bfloat16)
    with Recorder() as seen:
        torch.autograd.grad(y, [problem.inputs["x"], problem.inputs["D"]], dy)
    assert [s for s in seen.shapes() if s == (T, k)] == [(T, k)]


def test_update_overwrites_a_fresh_base_and_copies_any_other():
    v = FAMILIES["bone-update"].build(p=0.0).freeze("x", "D").inputs
    base = v["base_out"].detach()
    want = spectral_ops.bone_update(base.clone(), v["x"], v["D"])
    fresh = base.clone()
    assert storage(spectral_ops.bone_update(fresh, v["x"], v["D"])) == storage(fresh)
    leaf = base.clone().requires_grad_()
    assert torch.equal(spectral_ops.bone_update(leaf, v["x"], v["D"]), want)
    assert torch.equal(leaf, base)
    with torch.no_grad():
        whole = torch.cat([base, base])
        view = whole[: base.shape[0]]
        kept = whole.clone()
        assert torch.equal(spectral_ops.bone_update(view, v["x"], v["D"]), want)
    assert torch.equal(whole, kept), "a view was overwritten"


def test_zero_D_is_the_frozen_layer():
    x, W, b = randn(5, 12, dtype=torch.float32), randn(8, 12, dtype=torch.float32), randn(8, dtype=torch.float32)
    y = spectral_ops.bone_linear(x, W, torch.zeros(4, 8), b)
    assert torch.equal(y, torch.nn.functional.linear(x, W, b))
