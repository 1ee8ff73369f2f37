"""RoSA's functions (METHODS 1.5): rosa_linear on every route, and rosa_update."""

import functools
import itertools

import pytest
import torch
from budget import check
from contract import Contract
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments import Recorder, extension_loaded, saved_tensors
from problems import FAMILIES, cotangent
from sparse import (
    KINDS,
    agree,
    check_a_backend_that_cannot_run,
    check_batched_gradients,
    check_selective_checkpointing,
    int32,
    mask_of,
    random_csr,
    unsorted_csr,
)
from tensors import HALF, ids, randn, storage

import spectral_ops
from spectral_ops import CSR, rosa_linear, rosa_update
from spectral_ops._library import accumulate_dtype
from spectral_ops.functional import rosa_routes


class TestRosa(Contract):
    families = [family for name, family in FAMILIES.items() if name.startswith("rosa")]


# --- sizes -----------------------------------------------------------------------------------------------------------


def every_way(x, W, csr, dy):
    """y, dx and dS of the layer by every route, beside what the dense formula gives."""
    S = csr.to_dense().detach()
    for route, gradient in itertools.product(
        ("spmm", "scatter", "resident", "auto"), (*rosa_routes.GRADIENT_ROUTES, "auto")
    ):
        x = x.detach().requires_grad_()
        y = rosa_linear(x, W, csr, route=route, gradient_route=gradient)
        dx, dS = torch.autograd.grad(y, [x, csr.values], dy)
        spectral_ops.residents.restore(W)
        yield (route, gradient), (y, x.detach() @ (W + S).T), (dx, dy @ (W + S)), (dS, dy.T @ x.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_patterns(kind, backend):
    mask = mask_of(kind)
    csr = CSR.from_dense(mask)
    csr = csr.with_values(randn(csr.nnz).requires_grad_())
    for which, *pairs, (dS, G) in every_way(randn(7, 10), randn(12, 10), csr, randn(7, 12)):
        for got, want in [*pairs, (dS, G[mask])]:
            torch.testing.assert_close(got, want, msg=lambda m, w=which: f"{w}: {m}")


@pytest.mark.parametrize("d", [0, 1, 2])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_degenerate_shapes(d, k, backend):
    csr = CSR(torch.zeros(0), int32([0] * (d + 1)), int32([]), (d, k))
    W = torch.ones(d, k)
    for route in rosa_routes.ROUTES:
        assert rosa_linear(torch.ones(4, k), W, csr, route=route).tolist() == [[float(k)] * d] * 4
    spectral_ops.residents.restore(W)


@pytest.mark.parametrize("lead", [(0,), (4,), (2, 0), ()], ids=str)
@pytest.mark.parametrize(("d", "k"), [(0, 3), (3, 0), (0, 0), (3, 2)])
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_gradients_of_degenerate_shapes(lead, d, k, density, backend):
    csr = CSR.from_dense(torch.rand(d, k) < density)
    values = randn(csr.nnz).requires_grad_()
    csr = csr.with_values(values)
    x, base, b = randn(*lead, k).requires_grad_(), randn(*lead, d).requires_grad_(), randn(d).requires_grad_()
    W, A, B, dy = randn(d, k), randn(2, k).requires_grad_(), randn(d, 2).requires_grad_(), randn(*lead, d)
    S = csr.to_dense()
    for route, gradient in itertools.product(rosa_routes.ROUTES, rosa_routes.GRADIENT_ROUTES):
        y = rosa_linear(x, W.clone(), csr, A, B, b, route=route, gradient_route=gradient)
        agree(y, x @ (W + S + B @ A).T + b, [x, values, A, B, b], dy)
    for gradient in rosa_routes.GRADIENT_ROUTES:
        y = rosa_update(base * 1, x, csr, gradient_route=gradient)
        agree(y, base + x @ S.T, [base, x, values], dy)


# --- the pattern -----------------------------------------------------------------------------------------------------


def test_indices_spoiled_between_forward_and_backward_reach_no_kernel(backend):
    """Backward works on its forward's pattern, whatever became of the tensors it was given as."""
    for make in (lambda: random_csr(8, 6, trained=True), lambda: unsorted_csr(trained=True)):
        csr = make()
        x, W = randn(4, csr.shape[1]).requires_grad_(), randn(*csr.shape)
        for route, gradient in itertools.product(("spmm", "scatter"), rosa_routes.GRADIENT_ROUTES):
            y = rosa_linear(x, W, csr, route=route, gradient_route=gradient)
            dy = randn(*y.shape)
            want = torch.autograd.grad(y, [x, csr.values], dy, retain_graph=True)
            kept = csr.row_offsets.clone(), csr.col_indices.clone()
            csr.row_offsets.fill_(2**31 - 1)
            csr.col_indices.fill_(2**31 - 1)
            got = torch.autograd.grad(y, [x, csr.values], dy)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            csr.row_offsets.copy_(kept[0])
            csr.col_indices.copy_(kept[1])


def test_unsorted_columns_count_in_the_order_of_their_values(backend):
    csr = unsorted_csr(trained=True)
    x, W, dy = randn(4, 5), randn(3, 5), randn(4, 3)
    place = (torch.tensor([0, 0, 0, 2, 2]), csr.col_indices.long())
    for which, *pairs, (dS, G) in every_way(x, W, csr, dy):
        for got, want in [*pairs, (dS, G[place])]:
            torch.testing.assert_close(got, want, msg=lambda m, w=which: f"{w}: {m}")
    torch.testing.assert_close(rosa_update(dy.clone(), x, csr), dy + x @ csr.to_dense().T)


# --- numbers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_route_is_the_dense_formula(data):
    d, k, T = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 5))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=d, max_size=d)))
    csr = CSR.from_dense(mask)
    csr = csr.with_values(randn(csr.nnz).requires_grad_())
    for _, *pairs, (dS, G) in every_way(randn(T, k), randn(d, k), csr, randn(T, d)):
        for got, want in [*pairs, (dS, G[mask])]:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("gradient_route", rosa_routes.GRADIENT_ROUTES)
@pytest.mark.parametrize("route", ["spmm", "scatter"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [None, "frozen", "trained"])
def test_every_combination_of_options(bias, p, route, gradient_route, backend):
    for low_rank in (True, False):
        options = {"bias": bias, "p": p if low_rank else 0.0, "route": route, "gradient_route": gradient_route}
        check(FAMILIES["rosa"].build(low_rank=low_rank, **options))
        check(FAMILIES["rosa"].build(((40,), 33, 70, 3), torch.bfloat16, torch.float32, low_rank=low_rank, **options))


def test_more_rows_than_a_tile(backend):
    """d above the 512 rows that a tile of dyᵀx has."""
    for name in ("rosa-scatter", "rosa-sparse-only", "rosa-spmm-dropout"):
        check(FAMILIES[name].build(((9,), 12, 1201, 3)))
        check(FAMILIES[name].build(((9,), 12, 1201, 3), torch.bfloat16))


@pytest.mark.parametrize("dtype", HALF, ids=ids)
@pytest.mark.parametrize("gradient_route", rosa_routes.GRADIENT_ROUTES)
def test_spmm_keeps_a_small_delta_that_scatter_rounds_away(dtype, gradient_route):
    """S at a quarter of the last place of W: W + S is W again in half precision, x Sᵀ is not nothing."""
    d, k = 16, 24
    W = torch.ones(d, k, dtype=dtype)
    csr = CSR.from_dense(torch.rand(d, k) < 0.4)
    small = torch.finfo(dtype).eps / 8
    csr = csr.with_values(torch.full((csr.nnz,), small, requires_grad=True))
    x = torch.cat([torch.ones(5, k // 2), -torch.ones(5, k // 2)], 1).to(dtype).requires_grad_()  # x Wᵀ = 0
    options = {"gradient_route": gradient_route}
    scattered = rosa_linear(x, W, csr, route="scatter", **options)
    assert not scattered.any()
    resident = rosa_linear(x, W, csr, route="resident", **options)
    spectral_ops.residents.restore(W)
    assert not resident.any()
    y = rosa_linear(x, W, csr, route="spmm", **options)
    want = x.detach().double() @ csr.to_dense().detach().double().T
    torch.testing.assert_close(y.double(), want, rtol=torch.finfo(dtype).eps, atol=0)
    assert want.any()
    dy = torch.cat([torch.ones(5, d // 2), -torch.ones(5, d // 2)], 1).to(dtype)  # dy W = 0
    dx, dS = torch.autograd.grad(y, [x, csr.values], dy)
    torch.testing.assert_close(
        dx.double(), dy.double() @ csr.to_dense().detach().double(), rtol=torch.finfo(dtype).eps, atol=0
    )
    assert dS.dtype == torch.float32


def test_update_overwrites_a_fresh_base_and_copies_any_other():
    csr, x, base = random_csr(6, 9), randn(4, 9), randn(4, 6)
    want = base + x @ csr.to_dense().T
    fresh = base.clone()
    out = rosa_update(fresh, x, csr)
    assert storage(out) == storage(fresh)
    torch.testing.assert_close(out, want)
    leaf = base.clone().requires_grad_()
    torch.testing.assert_close(rosa_update(leaf, x, csr).detach(), want)
    assert torch.equal(leaf.detach(), base)
    whole = torch.cat([base, base])
    kept = whole.clone()
    torch.testing.assert_close(rosa_update(whole[:4], x, csr), want)
    assert torch.equal(whole, kept), "a view was overwritten"


def test_zero_values_are_the_frozen_layer():
    csr = random_csr(6, 9, torch.float32)
    csr.values.zero_()
    x, W, b = (randn(*s, dtype=torch.float32) for s in ((5, 9), (6, 9), (6,)))
    for route in ("spmm", "scatter", "resident"):
        assert torch.equal(rosa_linear(x, W, csr, bias=b, route=route), torch.nn.functional.linear(x, W, b))
    spectral_ops.residents.restore(W)


# --- what a training step does not do --------------------------------------------------------------------------------

FORBIDDEN = (
    "_local_scalar_dense",
    "item",
    "sort",
    "argsort",
    "unique",
    "nonzero",
    "searchsorted",
    "_to_cpu",
    "bincount",
)


@pytest.mark.parametrize("route", ["spmm", "scatter"])
@pytest.mark.parametrize("gradient_route", rosa_routes.GRADIENT_ROUTES)
@pytest.mark.parametrize("make", [random_csr, lambda d, k, *a, **o: unsorted_csr(*a, **o)], ids=["sorted", "unsorted"])
def test_no_sync_no_sort_no_transposed_copy(route, gradient_route, make):
    """Once a CSR is checked, a step neither waits for a device nor sorts, and only "scatter" copies anything [d, k]."""
    csr = make(40, 30, torch.float32, trained=True)
    d, k = csr.shape
    T, r = 7, 2
    x, W = randn(T, k, dtype=torch.bfloat16).requires_grad_(), randn(d, k, dtype=torch.bfloat16)
    A, B = randn(r, k).float().requires_grad_(), randn(d, r).float().requires_grad_()
    csr.validate()
    spectral_ops.scratch.release()
    with Recorder() as seen:
        y = rosa_linear(x, W, csr, A, B, route=route, gradient_route=gradient_route)
        torch.autograd.grad(y.sum(), [x, csr.values, A, B])
    names = [name.split(".")[1] for name, _ in seen.calls]
    assert not set(names) & set(FORBIDDEN), names
    if route == "spmm" and gradient_route == "sampled":
        large = [(name, tuple(s)) for name, s, t in seen.allocated if t.numel() >= d * k]
        assert not large or T * max(d, k) >= d * k, large
        index_copies = [(n, tuple(s)) for n, s, t in seen.allocated if not t.is_floating_point()]
        assert not index_copies, index_copies
    written = [a[0] for name, a in seen.calls if name.endswith("_.default") and isinstance(a[0], torch.Tensor)]
    assert all(storage(t) != storage(W) for t in written), "W was written"


@pytest.mark.parametrize("route", ["spmm", "scatter"])
@pytest.mark.parametrize("gradient_route", rosa_routes.GRADIENT_ROUTES)
def test_nor_does_the_compiled_layer(route, gradient_route):
    """The same where no dispatch mode looks: by what torch's profiler records inside the operators."""
    csr, dtype = random_csr(700, 600, torch.float32, density=0.01, trained=True), torch.bfloat16
    x, W = randn(7, 600, dtype=dtype).requires_grad_(), randn(700, 600, dtype=dtype)
    A, B = randn(2, 600).float().requires_grad_(), randn(700, 2).float().requires_grad_()
    dy, kept = randn(7, 700, dtype=dtype), W.clone()
    csr.validate()
    spectral_ops.scratch.release()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        y = rosa_linear(x, W, csr, A, B, route=route, gradient_route=gradient_route)
        torch.autograd.grad(y, [x, csr.values, A, B], dy)
    events = profiler.profiler.kineto_results.events()
    names = {e.name().removeprefix("aten::") for e in events}
    assert "spectral_ops::rosa_linear_forward" in names
    assert not names & set(FORBIDDEN), names
    blocks = [e.nbytes() for e in events if e.name() == "[memory]"]
    if route == "spmm" and gradient_route == "sampled":
        assert max(blocks) < W.nbytes, blocks
    elif route == "scatter":  # one copy of W, which the layers share
        assert sum(size >= W.nbytes for size in blocks) <= 1 + (gradient_route != "sampled"), blocks
    assert torch.equal(W, kept)


def test_saved_bytes_of_every_route():
    """x, which the frozen layer's caller holds, and h [T, r]; never S dense, nor W + S."""
    T, d, k, r = 12, 20, 16, 3
    csr = random_csr(d, k, torch.float32, trained=True)
    x, W = randn(T, k).float().requires_grad_(), randn(d, k).float()
    A, B = randn(r, k).float().requires_grad_(), randn(d, r).float().requires_grad_()
    for route in ("spmm", "scatter", "resident"):
        for low_rank in ((), (A, B)):
            with saved_tensors() as kept:
                y = rosa_linear(x, W, csr, *low_rank, route=route)
            own = {storage(t) for t in (x, W, A, B, csr.values)}
            extra = {storage(t): t for t in kept if storage(t) not in own}
            assert [tuple(t.shape) for t in extra.values()] == ([(T, r)] if low_rank else []), route
            del y
        spectral_ops.residents.restore(W)


def test_x_is_saved_only_for_gradients_that_need_it():
    csr, x, W = random_csr(8, 6), randn(3, 6).requires_grad_(), randn(8, 6)
    A, B = randn(2, 6), randn(8, 2).requires_grad_()
    for function in (
        *(lambda r=r: rosa_linear(x, W, csr, route=r) for r in ("spmm", "scatter", "resident")),
        lambda: rosa_linear(x, W, csr, A, B),
        lambda: rosa_update(randn(3, 8), x, csr),
    ):
        with saved_tensors() as kept:
            function()
        assert storage(x) not in map(storage, kept)
    spectral_ops.residents.restore(W)


def test_changed_values_make_backward_raise():
    """As autograd does for any saved tensor, whatever the route."""
    csr = random_csr(8, 6, trained=True)
    x, W = randn(3, 6).requires_grad_(), randn(8, 6)
    for route in ("spmm", "scatter", "resident"):
        y = rosa_linear(x, W, csr, route=route)
        with torch.no_grad():
            csr.values.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), x)
        spectral_ops.residents.restore(W)


def test_the_cost_model_is_asked_where_auto_is_said(monkeypatch):
    csr = random_csr(8, 6, trained=True)
    x, W = randn(3, 6).requires_grad_(), randn(8, 6)
    asked = []
    gradient = rosa_routes.gradient_route
    forward = rosa_routes.forward_route
    monkeypatch.setattr(rosa_routes, "gradient_route", lambda *a: (asked.append(a), gradient(*a))[1])
    monkeypatch.setattr(rosa_routes, "forward_route", lambda *a, **o: (asked.append((a, o)), forward(*a, **o))[1])
    torch.autograd.grad(rosa_linear(x, W, csr).sum(), csr.values)
    rows, columns = len(csr.pattern.active_rows), len(csr.pattern.active_columns)
    assert asked == [
        ((3, 8, 6, csr.nnz, "cpu", torch.float64), {}),
        (3, 8, 6, csr.nnz, rows, columns, "cpu", torch.float64),
    ]
    asked.clear()
    torch.autograd.grad(rosa_linear(x, W, csr, route="spmm", gradient_route="dense").sum(), csr.values)
    assert not asked


# --- one operator per layer and direction ----------------------------------------------------------------------------


def functions(dtype=torch.float32):
    """Every function here: what it makes of its inputs, and those."""
    csr = random_csr(12, 10, dtype)
    x, W, base, b = (randn(*shape, dtype=dtype) for shape in ((2, 3, 10), (12, 10), (2, 3, 12), (12,)))
    A, B = (randn(*shape, dtype=accumulate_dtype(dtype)) for shape in ((3, 10), (12, 3)))
    cases = {"rosa_update": (lambda y, x, v: rosa_update(y * 2, x, csr.with_values(v)), [base, x, csr.values])}

    def layer(x, v, A, B, b, **options):
        return rosa_linear(x, W, csr.with_values(v), A, B, b, **options, dropout_p=0.4, training=True)

    for route, gradient in itertools.product(rosa_routes.ROUTES, rosa_routes.GRADIENT_ROUTES):
        options = {"route": route, "gradient_route": gradient}
        cases[f"rosa_linear {route} {gradient}"] = (functools.partial(layer, **options), [x, csr.values, A, B, b])
    return cases


FUNCTIONS = list(functions())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_selective_checkpointing_is_plain_bit_for_bit(name, dtype):
    check_selective_checkpointing(*functions(dtype)[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_gradients(name):
    check_batched_gradients(*functions(torch.float64)[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_backend_that_cannot_run_raises_in_both_directions(name):
    check_a_backend_that_cannot_run(*functions()[name])


def test_what_a_direct_call_leaves_out_is_named():
    """None where a route reads a tensor, numbers that are no route, indices that lead outside: an error, no crash."""
    csr, x, W, dy = random_csr(12, 10), randn(4, 10), randn(12, 10), randn(4, 12)
    p, none = csr.pattern, (None,) * 4
    operator = torch.ops.spectral_ops.rosa_linear_backward.default

    def backward(route, gradient_route, needs, pattern=(*p[:2], None, None, None, *none), x=None, weight=W):
        return operator(dy, x, weight, csr.values, *pattern, *none, 1.0, 0.0, route, gradient_route, needs)

    for call, name in (
        (lambda: backward(2, 0, 1), "column_offsets|permutation"),
        (lambda: backward(1, 0, 1, weight=None), None),  # to torch an undefined tensor, which no message names
        (lambda: backward(1, 0, 2), "x"),
        (lambda: backward(1, 2, 2, x=x), "active_rows|compact_columns"),
        (lambda: backward(3, 0, 1), "route"),
        (lambda: backward(1, 7, 2, x=x), "gradient_route"),
        (lambda: backward(1, 1, 2, (p.row_offsets[:-1], p.columns, None, None, None, *none), x), "row_offsets"),
        (lambda: backward(1, 0, 1, (p.row_offsets, p.columns + 9, None, None, None, *none)), "columns"),
    ):
        if not extension_loaded():
            name = None
        with pytest.raises((RuntimeError, AttributeError, TypeError, IndexError), match=name):
            call()


def test_deterministic_with_and_without_the_switch(two_threads):
    for name in ("rosa-spmm-dropout", "rosa-scatter", "rosa-sparse-only"):
        problem = FAMILIES[name].build(((70,), 48, 90, 6), torch.float32)
        y = problem.call()
        dy = cotangent(problem, y)
        inputs = [problem.inputs[n] for n in problem.trained()]
        want = [y, *torch.autograd.grad(y, inputs, dy)]
        torch.use_deterministic_algorithms(True)
        try:
            y = problem.call()
            got = [y, *torch.autograd.grad(y, inputs, dy)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
