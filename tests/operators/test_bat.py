"""The Bat row (METHODS 1.4): bat_linear in both modes, bat_weight and their operators."""

import itertools

import pytest
import torch
from budget import assert_within_budget, check
from contract import Contract
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments import Recorder, allocations, saved_tensors
from oracles import bat_changed
from problems import BAT, FAMILIES
from tensors import DTYPES, HALF, accumulate, ids, laid_out, randn, storage

import spectral_ops
from spectral_ops import bat_linear, bat_weight
from spectral_ops.core import autograd
from spectral_ops.functional import bat


class TestBat(Contract):
    families = BAT


def one_block_after_the_other(W, blocks, mode):
    """W' by METHODS 1.4 read literally: for each r x r block, W(o,j)(I + B) + B."""
    d, k = W.shape
    r = blocks.shape[-1]
    out = torch.zeros_like(W)
    for o, j in itertools.product(range(d // r), range(k // r)):
        B = blocks[o] if mode == "col" else blocks[j]
        block = W[o * r : o * r + r, j * r : j * r + r]
        out[o * r : o * r + r, j * r : j * r + r] = block + block @ B + B
    return out


def problem_of(d, k, r, mode, T=7, dtype=torch.float64, blocks_dtype=None):
    x, W, dy = randn(T, k, dtype=dtype).requires_grad_(), randn(d, k, dtype=dtype, fan=k), randn(T, d, dtype=dtype)
    n = (d if mode == "col" else k) // r
    return x, W, randn(n, r, r, dtype=blocks_dtype or dtype, fan=4 * r).requires_grad_(), dy


@pytest.mark.parametrize("mode", ["col", "row"])
@pytest.mark.parametrize(
    ("d", "k", "r"), [(6, 9, 3), (4, 4, 4), (5, 7, 1), (12, 8, 2), (10, 5, 5), (5, 10, 5), (14, 21, 7)]
)
def test_the_definition(d, k, r, mode, backend):
    """Also of the oracle itself; at few tokens and at many."""
    for T in (0, 1, r - 1, r, r + 1, 3 * r):
        x, W, blocks, dy = problem_of(d, k, r, mode, T)
        want = one_block_after_the_other(W, blocks, mode)
        torch.testing.assert_close(bat_changed(W, blocks, mode), want, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(bat_weight(W, blocks, mode=mode), want, rtol=1e-12, atol=1e-12)
        y = bat_linear(x, W, blocks, mode=mode)
        torch.testing.assert_close(y, x @ want.T, rtol=1e-12, atol=1e-12)
        ours = torch.autograd.grad(y, [x, blocks], dy)
        theirs = torch.autograd.grad(x @ want.T, [x, blocks], dy)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_the_two_modes_are_told_apart():
    """W = 0, r = 1: W'(o, j) is B_o (col) or C_j (row); and a product from the right, not from the left."""
    W, v = torch.zeros(3, 3), torch.tensor([1.0, 2.0, 3.0])
    assert bat_weight(W, v.view(3, 1, 1), mode="col").tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert bat_weight(W, v.view(3, 1, 1), mode="row").tolist() == [[1, 2, 3]] * 3
    B = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for mode in ("col", "row"):
        assert bat_weight(W, B, mode=mode).tolist() == [[1, 2 + 1 + 1], [3, 4 + 3]]
        assert bat_linear(torch.eye(2), W, B, mode=mode).T.tolist() == [[1, 4], [3, 7]]


@pytest.mark.parametrize(
    "r", [1, 2, 3, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 192, 255, 256]
)
def test_block_sizes(r, backend):
    """1 to 256, powers of two and not, at fewer and at more tokens than r."""
    k, d = (r, 2 * r) if r > 60 else (3 * r, 2 * r)
    for T, mode in ((max(r - 1, 1), "col"), (r + 3, "col"), (9, "row")):
        check(FAMILIES["bat"].build(((T,), k, d, r), torch.float32, mode=mode))
        check(FAMILIES["bat"].build(((T,), k, d, r), torch.bfloat16, torch.float32, mode=mode))


@pytest.mark.parametrize("mode", ["col", "row"])
def test_one_block_is_the_whole_weight(mode, backend):
    """r = k = d: W' = W (I + B) + B."""
    for T in (3, 40):
        x, W, blocks, _ = problem_of(24, 24, 24, mode, T)
        torch.testing.assert_close(
            bat_linear(x, W, blocks, mode=mode), x @ (W @ (torch.eye(24) + blocks[0]) + blocks[0]).T
        )
        check(FAMILIES["bat"].build(((T,), 24, 24, 24), mode=mode))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sizes(data):
    r, n, m = (data.draw(st.integers(1, 6)) for _ in range(3))
    mode, T = data.draw(st.sampled_from(["col", "row"])), data.draw(st.integers(0, 9))
    x, W, blocks, dy = problem_of(n * r, m * r, r, mode, T)
    want = x @ one_block_after_the_other(W, blocks, mode).T
    y = bat_linear(x, W, blocks, mode=mode)
    torch.testing.assert_close(y, want)
    for a, b in zip(torch.autograd.grad(y, [x, blocks], dy), torch.autograd.grad(want, [x, blocks], dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bias", [None, "frozen", "trained"])
@pytest.mark.parametrize("T", [2, 30])
@pytest.mark.parametrize("name", ["bat", "bat-row", "bat-exact"])
def test_every_combination_of_options(name, T, bias, backend):
    check(FAMILIES[name].build(((T,), 20, 30, 5), bias=bias))
    check(FAMILIES[name].build(((T,), 20, 30, 5), torch.bfloat16, torch.float32, bias=bias))


@pytest.mark.parametrize("r", [5, 100, 600])
def test_more_rows_than_a_tile(r, backend):
    """d above the 512 rows of a tile of dyᵀx, and blocks that do not divide 512, or exceed it."""
    d = -(-1100 // r) * r
    check(FAMILIES["bat"].build(((r + 2,), r, d, r), torch.float32))
    check(FAMILIES["bat"].build(((3,), r, d, r), torch.float32))


# --- bat_weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("mode", ["col", "row"])
def test_bat_weight(mode, dtype, backend):
    """Rounded once from float32 blocks: within half a last place of the exact W', and dB in its dtype."""
    for layout in ("contiguous", "transposed", "rows", "columns"):
        _, W, blocks, _ = problem_of(24, 16, 4, mode, dtype=dtype, blocks_dtype=accumulate(dtype))
        W = laid_out(W, layout)
        out = bat_weight(W, blocks, mode=mode)
        assert out.dtype == dtype
        assert out.is_contiguous()
        wide = blocks.detach().double().requires_grad_()
        want = one_block_after_the_other(W.double(), wide, mode)
        path = one_block_after_the_other(W.double().abs(), wide.abs(), mode).detach()
        assert_within_budget("W'", out, want, path, dtype, 8, roundings=1.001)
        G = randn(24, 16, dtype=dtype)
        (dB,) = torch.autograd.grad(out, blocks, G)
        (exact,) = torch.autograd.grad(want, wide, G.double())
        (terms,) = torch.autograd.grad(one_block_after_the_other(W.double().abs(), wide, mode), wide, G.double().abs())
        assert dB.dtype == blocks.dtype
        assert_within_budget("dB", dB, exact, terms, accumulate(dtype), 64, roundings=2)


@pytest.mark.parametrize("mode", ["col", "row"])
def test_bat_weight_and_bat_linear_agree(mode, backend):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, W, blocks, dy = problem_of(24, 36, 6, mode, 20, dtype, accumulate(dtype))
        y, changed = bat_linear(x, W, blocks, mode=mode), bat_weight(W, blocks, mode=mode)
        apart = x @ changed.T
        if mode == "col":
            assert torch.equal(y, apart)
        tolerance = {"rtol": 0.05, "atol": 0.1} if dtype in HALF else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(y, apart, **tolerance)
        ours, theirs = torch.autograd.grad(y, [x, blocks], dy), torch.autograd.grad(apart, [x, blocks], dy)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", HALF, ids=ids)
@pytest.mark.parametrize("r", [8, 16, 64])
def test_blocks_as_narrow_as_the_weight(r, dtype, backend):
    """-1, 0 and 1 in groups that fill vectors, where bf16 factors are multiplied two at a time: every sum is exact."""
    W, B, G = (torch.randint(-1, 2, shape).to(dtype) for shape in ((2 * r, 128), (2, r, r), (2 * r, 128)))
    blocks = B.requires_grad_()
    out = bat_weight(W, blocks)
    wide = B.detach().double().requires_grad_()
    want = one_block_after_the_other(W.double(), wide, "col")
    assert torch.equal(out.double(), want)
    (dB,), (exact,) = torch.autograd.grad(out, blocks, G), torch.autograd.grad(want, wide, G.double())
    assert torch.equal(dB, exact.to(dtype))


def test_bat_weight_gradcheck():
    for mode in ("col", "row"):
        _, W, blocks, _ = problem_of(6, 9, 3, mode)
        assert torch.autograd.gradcheck(lambda b, w=W, m=mode: bat_weight(w, b, mode=m), (blocks,))


def test_zero_blocks_are_the_frozen_layer():
    for dtype in (torch.float32, torch.bfloat16):
        x, W, blocks, _ = problem_of(24, 36, 6, "col", 20, dtype, torch.float32)
        b = randn(24, dtype=dtype)
        want = torch.nn.functional.linear(x, W, b)
        for T in (20, 3):
            for options in ({}, {"mode": "row"}, {"exact": True}):
                zero = torch.zeros(6 if "mode" in options else 4, 6, 6)
                got = bat_linear(x[:T], W, zero, b, **options)
                if T == 20 and options != {"exact": True}:
                    assert torch.equal(got, want)
                near = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
                torch.testing.assert_close(got, want[:T], **near)
        assert torch.equal(bat_weight(W, torch.zeros_like(blocks)), W)


@pytest.mark.parametrize("mode", ["col", "row"])
@pytest.mark.parametrize("T", [3, 20])
def test_tensors_that_start_inside_their_storage(mode, T, backend):
    x, W, blocks, dy = problem_of(24, 36, 6, mode, T)
    b = randn(24)
    want = bat_linear(x, W, blocks, b, mode=mode)
    within = [torch.cat([torch.full_like(t[:2], torch.nan), t.detach()])[2:] for t in (x, W, blocks, b, dy)]
    x2, blocks2 = within[0].requires_grad_(), within[2].requires_grad_()
    y = bat_linear(x2, within[1], blocks2, within[3], mode=mode)
    torch.testing.assert_close(y, want)
    ours, theirs = torch.autograd.grad(y, [x2, blocks2], within[4]), torch.autograd.grad(want, [x, blocks], dy)
    for a, c in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("name", ["bat", "bat-few-tokens", "bat-row", "bat-exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_batched_gradients(name, dtype):
    """torch.autograd.functional's jacobian asks for several at once."""
    problem = FAMILIES[name].build(((20,), 24, 36, 6), dtype)
    y = problem.call()
    inputs = [problem.inputs[n] for n in problem.trained()]
    dys = randn(3, *y.shape, dtype=dtype)
    together = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for a, c in zip(together, torch.autograd.grad(y, inputs, dy, retain_graph=True), strict=True):
            assert torch.equal(a[i], c)


def test_a_second_derivative_needs_trained_blocks():
    """x is kept for them alone, and the formula reads it."""
    x, W, blocks, dy = problem_of(24, 36, 6, "col")
    y = bat_linear(x, W, blocks.detach())
    with pytest.raises(RuntimeError, match="second derivative where bat is frozen"):
        torch.autograd.grad(y, x, dy, create_graph=True)


# --- small changes over bf16 -----------------------------------------------------------------------------------------


def cancelling(T, dtype):
    """x, W and dy with x Wᵀ = 0 and dy W = 0, and blocks of 1e-4: y and dx are the change's effect alone."""
    r, n = 16, 8
    half = randn(n * r // 2, n * r // 2).mul(0.02)
    W = torch.cat([torch.cat([half, -half], 1), torch.cat([-half, half], 1)]).to(dtype)
    x, dy = randn(T, n * r // 2).repeat(1, 2).to(dtype), randn(T, n * r // 2).repeat(1, 2).to(dtype)
    return x.requires_grad_(), W, randn(n, r, r, dtype=torch.float32).mul(1e-4).requires_grad_(), dy


@pytest.mark.parametrize("T", [4, 40])
def test_exact_keeps_what_a_bf16_weight_rounds_away(T, backend):
    """A change of 1e-4 beside weights of 0.02: rounding W' to bf16 loses a third of it, exact (or few tokens) none."""
    x, W, blocks, dy = cancelling(T, torch.bfloat16)
    change = one_block_after_the_other(W.double(), blocks.detach().double(), "col") - W.double()
    want_y, want_dx = x.detach().double() @ change.T, dy.double() @ change
    base = (x.detach().double() @ W.double().T).abs().max()
    assert base < 1e-12, "the base's output was meant to cancel"

    def errors(exact):
        y = bat_linear(x, W, blocks, exact=exact)
        (dx,) = torch.autograd.grad(y, x, dy)
        return [((g.double() - w).norm() / w.norm()).item() for g, w in ((y.detach(), want_y), (dx, want_dx))]

    assert max(errors(True)) < 0.01
    if T < blocks.shape[-1]:
        assert max(errors(False)) < 0.01
    else:
        assert min(errors(False)) > 0.2
    (loss,) = torch.autograd.grad(bat_linear(x, W, blocks, exact=True).double().square().sum(), blocks)
    assert loss.abs().sum() > 0


def test_exact_changes_nothing_in_float32():
    x, W, blocks, dy = problem_of(24, 36, 6, "col", 20, torch.float32)
    runs = []
    for exact in (False, True):
        y = bat_linear(x, W, blocks, exact=exact)
        runs.append([y, *torch.autograd.grad(y, [x, blocks], dy)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_float32_blocks_are_not_rounded_first(backend):
    """I + B with B = 2^-12 - I: bf16 blocks would hold -1, and the product with them nothing."""
    r = 4
    B = (2**-12 - 1) * torch.eye(r)
    W = torch.eye(r, dtype=torch.bfloat16)
    want = 2**-12 * torch.eye(r) + B
    got = bat_weight(W, B.unsqueeze(0))
    assert torch.equal(got, want.to(torch.bfloat16))
    W = 3 * torch.eye(r, dtype=torch.bfloat16)
    x = torch.ones(1, r, dtype=torch.bfloat16)  # fewer tokens than r: nothing is rounded before y
    assert torch.equal(bat_linear(x, W, B.unsqueeze(0)), (x.float() @ (3 * 2**-12 * torch.eye(r) + B).T).bfloat16())


@pytest.mark.parametrize("dtype", HALF, ids=ids)
def test_block_products_are_summed_in_float32(dtype, backend):
    """256 terms of one sign, beside a large first one that would swallow them one by one."""
    r = 256
    W = torch.full((r, r), 1.0, dtype=dtype)
    B = torch.full((1, r, r), 2**-10)
    B[0, 0] = 4.0
    want = (1 + 255 * 2**-10 + 4) + B[0]
    assert torch.equal(bat_weight(W, B), want.to(dtype))
    y = bat_linear(torch.eye(r, dtype=dtype)[:9], W, B)  # rows of the identity pick columns of W'
    assert torch.equal(y, want.to(dtype).T[:9])
    z = bat_linear(torch.ones(3, r, dtype=dtype) / 16, torch.zeros(r, r, dtype=dtype), B, mode="row")
    assert torch.equal(z, ((B[0].sum(1) / 16).to(dtype)).expand(3, r))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"mode": "row"}], ids=str)
@pytest.mark.parametrize("T", [3, 60])
def test_x_is_all_that_is_saved(T, options):
    """No W', and x itself, not a copy; without trained blocks nothing at all."""
    x, W, blocks, _ = problem_of(40, 30, 5, options.get("mode", "col"), T, torch.bfloat16, torch.float32)
    with saved_tensors() as kept:
        bat_linear(x, W, blocks, **options)
    assert {storage(t) for t in kept} == {storage(x), storage(W), storage(blocks)}
    with saved_tensors() as kept:
        bat_linear(x, W, blocks.detach(), **options)
    assert {storage(t) for t in kept} == {storage(W), storage(blocks)}


def test_no_gradient_of_the_weight_is_allocated():
    """d above a tile: neither W' (once its buffer is there) nor dyᵀx [d, k] is allocated, forward or backward."""
    assert autograd.TILE_ROWS["cpu"] == 1024
    d, k, r, T = 2048, 48, 16, 64
    for options in ({}, {"mode": "row"}):
        x, W, blocks, dy = problem_of(d, k, r, options.get("mode", "col"), T, torch.float32)
        inputs = [x, blocks]

        def step(x=x, W=W, blocks=blocks, dy=dy, inputs=inputs, options=options):
            return torch.autograd.grad(bat_linear(x, W, blocks, **options), inputs, dy)

        step()  # the buffers are taken
        large = [size for size in allocations(step) if size >= d * k * 4]
        assert large == [T * d * 4], "the result alone"
    x, W, blocks, dy = problem_of(d, k, r, "col", T, torch.float32)
    y = bat_linear(x.detach(), W, blocks)
    spectral_ops.scratch.release()
    assert max(allocations(lambda: torch.autograd.grad(y, blocks, dy))) <= d * k * 4 / 2
    assert spectral_ops.scratch.nbytes == 1024 * k * 4


def test_one_buffer_for_every_layer():
    spectral_ops.scratch.release()
    for d, k in ((64, 32), (96, 32), (32, 32)):
        x, W, blocks, dy = problem_of(d, k, 8, "col", 20, torch.float32)
        torch.autograd.grad(bat_linear(x, W, blocks), [x, blocks], dy)
    assert spectral_ops.scratch.nbytes == 96 * 32 * 4


def test_row_forms_no_changed_weight():
    """Neither the compiled layer nor the one composed in Python, whose operators can be seen."""
    x, W, blocks, dy = problem_of(96, 64, 8, "row", 4, torch.float32)
    spectral_ops.scratch.release()

    def step():
        return torch.autograd.grad(bat_linear(x, W, blocks, mode="row"), [x, blocks], dy)

    assert all(size < 96 * 64 * 4 for size in allocations(step))
    assert spectral_ops.scratch.nbytes == 0
    with Recorder() as seen, torch.no_grad():
        bat.bat_linear_forward_op.reference(x, W, blocks, None, True, False)
        bat.bat_linear_backward_op.reference(dy, x, W, blocks, True, False, 3)
    assert any("bat_mix" in name for name, _ in seen.calls)
    assert not any("bat_weight" in name for name, _ in seen.calls)


def test_backward_is_of_its_own_forward():
    """Layers that share the buffer, their backward passes in another order, and blocks changed in between."""
    layers = [problem_of(24, 36, 6, "col", 20) for _ in range(3)]
    outputs = [bat_linear(x, W, b) for x, W, b, _ in layers]
    for (x, W, b, dy), y in zip(layers, outputs, strict=True):
        got = torch.autograd.grad(y, [x, b], dy, retain_graph=True)
        want = torch.autograd.grad(x @ one_block_after_the_other(W, b, "col").T, [x, b], dy)
        for a, c in zip(got, want, strict=True):
            torch.testing.assert_close(a, c)
    x, W, b, dy = layers[0]
    with torch.no_grad():
        b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs[0], x, dy)
