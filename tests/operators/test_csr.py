"""The operators of a sparse matrix (METHODS 1.5): csr_add, csr_spmm and csr_sddmm."""

import pytest
import torch
from contract import Contract
from instruments import Recorder, extension_loaded, saved_tensors
from problems import FAMILIES
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
from tensors import DTYPES, HALF, ids, laid_out, randn, storage

import spectral_ops
from spectral_ops import CSR, csr_add, csr_sddmm, csr_spmm
from spectral_ops.core import autograd
from spectral_ops.functional import csr_matrix, rosa_routes


class TestCSR(Contract):
    families = [FAMILIES["csr-spmm"]]


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_patterns(kind, backend):
    mask = mask_of(kind)
    csr = CSR.from_dense(mask)
    csr = csr.with_values(randn(csr.nnz).requires_grad_())
    x, W, dy = randn(7, 10).requires_grad_(), randn(12, 10), randn(7, 12)
    S = csr.to_dense()
    for gradient in rosa_routes.GRADIENT_ROUTES:
        agree(csr_spmm(x, csr, gradient_route=gradient), x @ S.T, [x, csr.values], dy)
    torch.testing.assert_close(csr_sddmm(dy, x, csr), (dy.T @ x)[mask])
    agree(csr_add(W, csr), W + S, [csr.values], W)


@pytest.mark.parametrize("d", [0, 1, 2])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_degenerate_shapes(d, k, backend):
    csr = CSR(torch.zeros(0), int32([0] * (d + 1)), int32([]), (d, k)).validate()
    assert csr.transpose().shape == (k, d)
    assert csr.to_dense().shape == (d, k)
    assert csr.density == 0
    W = torch.ones(d, k)
    assert torch.equal(csr_add(W, csr), W)
    assert csr_spmm(torch.ones(4, k), csr).tolist() == [[0.0] * d] * 4
    assert csr_sddmm(torch.ones(4, d), torch.ones(4, k), csr).shape == (0,)


@pytest.mark.parametrize("lead", [(0,), (4,), (2, 0), ()], ids=str)
@pytest.mark.parametrize(("d", "k"), [(0, 3), (3, 0), (0, 0), (3, 2)])
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_gradients_of_degenerate_shapes(lead, d, k, density, backend):
    csr = CSR.from_dense(torch.rand(d, k) < density)
    values = randn(csr.nnz).requires_grad_()
    csr = csr.with_values(values)
    x, W, dy = randn(*lead, k).requires_grad_(), randn(d, k), randn(*lead, d)
    S = csr.to_dense()
    for gradient in rosa_routes.GRADIENT_ROUTES:
        agree(csr_spmm(x, csr, gradient_route=gradient), x @ S.T, [x, values], dy)
    agree(csr_add(W, csr), W + S, [values], randn(d, k))


@pytest.mark.parametrize("T", [0, 1, 3])
def test_128_000_rows(T, backend):
    """A language model's head: a few entries in each of some rows, and columns past 32767 in its transpose."""
    d, k, nnz = 128_000, 6, 900
    places = torch.randperm(d * k)[:nnz].sort()[0]
    offsets = torch.searchsorted(places, torch.arange(d + 1) * k).to(torch.int32)
    csr = CSR(randn(nnz).requires_grad_(), offsets, (places % k).to(torch.int32), (d, k))
    for matrix, wide in ((csr, False), (csr.transpose(), True)):
        values = matrix.values.detach().requires_grad_()
        matrix = matrix.with_values(values)
        n_out, n_in = matrix.shape
        x, dy = randn(T, n_in).requires_grad_(), randn(T, n_out)
        rows, columns = places // k, places % k
        if wide:
            rows, columns = columns[csr.transpose().permutation], rows[csr.transpose().permutation]
        S = torch.sparse_coo_tensor(torch.stack([rows, columns]), values.detach(), (n_out, n_in))
        y = csr_spmm(x, matrix, gradient_route="sampled")
        torch.testing.assert_close(y.detach(), (S @ x.detach().T).T)
        dx, dS = torch.autograd.grad(y, [x, values], dy)
        torch.testing.assert_close(dx, (S.t() @ dy.T).T)
        torch.testing.assert_close(dS, (dy[:, rows] * x.detach()[:, columns]).sum(0))
    W = torch.zeros(d, k, dtype=torch.float64)
    csr_add(W, csr.with_values(csr.values.detach()), inplace=True)
    assert torch.equal(W.view(-1)[places], csr.values.detach())
    assert int((W != 0).sum()) == nnz


def test_columns_past_32767(backend):
    k = 70_000
    columns = [0, 32_767, 32_768, 65_535, 65_536, k - 1]
    csr = CSR(torch.arange(1.0, 7.0, requires_grad=True), int32([0, 6]), int32(columns), (1, k))
    x = torch.zeros(6, k)
    for i, c in enumerate(columns):
        x[i, c] = 1
    assert csr_spmm(x, csr).squeeze(1).tolist() == [1, 2, 3, 4, 5, 6]
    assert csr_sddmm(torch.eye(6)[:, :1], x, csr).tolist() == [1, 0, 0, 0, 0, 0]
    assert csr.transpose().row_offsets[[0, 1, 32_768, 65_536, k]].tolist() == [0, 1, 2, 4, 6]
    assert csr_add(torch.zeros(1, k), csr)[0, columns].tolist() == [1, 2, 3, 4, 5, 6]


def test_unsorted_columns_count_in_the_order_of_their_values(backend):
    csr = unsorted_csr(trained=True)
    x, W, dy = randn(4, 5).requires_grad_(), randn(3, 5), randn(4, 3)
    place, S = (torch.tensor([0, 0, 0, 2, 2]), csr.col_indices.long()), csr.to_dense()
    for gradient in rosa_routes.GRADIENT_ROUTES:
        agree(csr_spmm(x, csr, gradient_route=gradient), x @ S.T, [x, csr.values], dy)
    agree(csr_add(W, csr), W + S, [csr.values], W)
    torch.testing.assert_close(csr_sddmm(dy, x, csr), (dy.T @ x)[place])
    assert torch.equal(csr.unordered(csr.ordered(csr.values)), csr.values)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=ids)
def test_float32_values_are_not_rounded_first(dtype, backend):
    """1 + 2^-12 times 256 differs from 256 in float32 sums; a value rounded to half precision would not."""
    k = 300
    value = 1 + 2**-12
    csr = CSR(torch.full((k,), value), int32([0, k]), torch.arange(k, dtype=torch.int32), (1, k))
    x = torch.cat([torch.ones(1, k // 2), -torch.ones(1, k // 2)], 1).to(dtype)
    x[0, -1] = 0
    y = csr_spmm(x, csr)
    assert y.item() == torch.tensor(value).to(dtype).item()
    minus = csr.with_values(torch.full((k,), value).index_fill_(0, torch.arange(k // 2, k), 1.0))
    got = csr_spmm(torch.cat([torch.ones(1, 150), -torch.ones(1, 150)], 1).to(dtype), minus).item()
    assert abs(got - 150 * 2**-12) <= 150 * 2**-12 * torch.finfo(dtype).eps
    weight = torch.zeros(1, k, dtype=dtype)
    assert torch.equal(csr_add(weight, csr), torch.full((1, k), value).to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=ids)
def test_sums_are_in_float32(dtype, backend):
    """4096 equal terms: a half-precision running sum would stall."""
    k = 4096
    csr = CSR(torch.full((k,), 0.125, dtype=dtype), int32([0, k]), torch.arange(k, dtype=torch.int32), (1, k))
    assert csr_spmm(torch.ones(2, k, dtype=dtype), csr).tolist() == [[512.0]] * 2
    long = torch.full((k, 1), 0.125, dtype=dtype)
    one = CSR(torch.ones(1), int32([0, 1]), int32([0]), (1, 1))
    assert csr_sddmm(long, torch.ones(k, 1, dtype=dtype), one).tolist() == [512.0]
    column = CSR(torch.full((k,), 0.125, dtype=dtype), torch.arange(k + 1, dtype=torch.int32), int32([0] * k), (k, 1))
    x = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    (dx,) = torch.autograd.grad(csr_spmm(x, column), x, torch.ones(1, k, dtype=dtype))
    assert dx.item() == 512


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=ids)
def test_every_pair_of_dtypes(dtype, values_dtype, backend):
    csr = random_csr(12, 10, values_dtype, trained=True)
    S = csr.to_dense().detach().double()
    x, W, dy = randn(6, 10, dtype=dtype).requires_grad_(), randn(12, 10, dtype=dtype), randn(6, 12, dtype=dtype)
    tolerance = {"rtol": 0.02, "atol": 0.06} if dtype in HALF or values_dtype in HALF else {"rtol": 1e-5, "atol": 1e-5}
    place = csr.with_values(torch.ones(csr.nnz)).to_dense().bool()
    y = csr_spmm(x, csr)
    torch.testing.assert_close(y.double(), x.double() @ S.T, **tolerance)
    dx, dS = torch.autograd.grad(y, [x, csr.values], dy)
    assert (y.dtype, dx.dtype, dS.dtype) == (dtype, dtype, values_dtype)
    torch.testing.assert_close(dx.double(), dy.double() @ S, **tolerance)
    torch.testing.assert_close(dS.double(), (dy.double().T @ x.detach().double())[place], **tolerance)
    added = csr_add(W, csr)
    assert added.dtype == dtype
    assert torch.equal(added, (W.double() + S).to(dtype)) or dtype == torch.float32
    torch.testing.assert_close(added.double(), W.double() + S, **tolerance)
    sampled = csr_sddmm(dy, x, csr)
    assert sampled.dtype == values_dtype
    torch.testing.assert_close(sampled.double(), (dy.double().T @ x.double())[place], **tolerance)


# --- csr_add and csr_sddmm -------------------------------------------------------------------------------------------


def test_csr_add(backend):
    csr, W = random_csr(6, 9, trained=True), randn(6, 9).requires_grad_()
    kept = W.detach().clone()
    out = csr_add(W, csr)
    assert torch.equal(out, W + csr.to_dense())
    assert torch.equal(W.detach(), kept)
    G = randn(6, 9)
    dW, dS = torch.autograd.grad(out, [W, csr.values], G)
    assert torch.equal(dW, G)
    assert torch.equal(dS, torch.autograd.grad(csr.to_dense(), csr.values, G)[0])
    assert torch.autograd.gradcheck(lambda w, v: csr_add(w, csr.with_values(v)), (W, csr.values))
    other = unsorted_csr(trained=True)
    W = randn(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, v: csr_add(w, other.with_values(v)), (W, other.values))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slice"])
def test_csr_add_in_place(layout, backend):
    csr, W = random_csr(6, 9), randn(6, 9)
    want = W + csr.to_dense()
    whole = torch.full((8, 12), 7.0, dtype=torch.float64)
    if layout == "transposed":
        W = W.t().contiguous().t()
    elif layout == "slice":
        whole[1:7, 2:11] = W
        W = whole[1:7, 2:11]
    version = W._version
    assert csr_add(W, csr, inplace=True) is W
    torch.testing.assert_close(W, want)
    assert W._version > version
    if layout == "slice":
        outside = torch.ones(8, 12, dtype=torch.bool)
        outside[1:7, 2:11] = False
        assert (whole[outside] == 7).all()
    csr_add(W, csr.with_values(-csr.values), inplace=True)
    torch.testing.assert_close(W, want - csr.to_dense())


def test_csr_add_in_place_is_differentiable_and_refuses_leaves():
    csr, W = random_csr(6, 9, trained=True), randn(6, 9).requires_grad_()
    kept = W.detach().clone()
    with pytest.raises(ValueError, match="^weight: got a leaf that requires grad, wanted "):
        csr_add(W, csr, inplace=True)
    assert torch.equal(W.detach(), kept), "refused after the fact"
    with torch.no_grad():
        csr_add(W, csr, inplace=True)
    assert not torch.equal(W.detach(), kept)
    G = randn(6, 9)
    dW, dS = torch.autograd.grad(csr_add(W * 2, csr, inplace=True), [W, csr.values], G)
    assert torch.equal(dW, 2 * G)
    assert torch.equal(dS, torch.autograd.grad(csr.to_dense(), csr.values, G)[0])


def test_csr_add_in_place_refuses_memory_that_overlaps(backend):
    for W in (torch.zeros(1, 9).expand(6, 9), torch.zeros(6, 1).expand(6, 9)):
        with pytest.raises(ValueError, match="^weight: got strides .*, wanted entries that share no memory"):
            csr_add(W, random_csr(6, 9, torch.float32), inplace=True)
        assert not W.any()


def test_csr_sddmm_gradcheck():
    for csr in (random_csr(6, 5), unsorted_csr()):
        d, k = csr.shape
        dy, x = randn(2, 3, d).requires_grad_(), randn(2, 3, k).requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b, c=csr: csr_sddmm(a, b, c), (dy, x))
        (only,) = torch.autograd.grad(csr_sddmm(dy.detach(), x, csr).sum(), x)
        torch.testing.assert_close(only, dy.detach() @ csr.with_values(torch.ones_like(csr.values)).to_dense())


def test_csr_spmm_of_other_leading_dimensions(backend):
    csr = random_csr(6, 9)
    for lead in ((), (0,), (2, 0, 3), (2, 3, 4), (1, 1)):
        x = randn(*lead, 9)
        torch.testing.assert_close(csr_spmm(x, csr), x @ csr.to_dense().T)


# --- what a training step does not do --------------------------------------------------------------------------------


def test_the_transposed_pattern_is_built_once(monkeypatch):
    csr = random_csr(8, 6, trained=True).validate()
    x = randn(3, 6).requires_grad_()
    monkeypatch.setattr(csr_matrix, "_pattern", lambda *a: pytest.fail("the pattern was built again"))
    for _ in range(2):
        torch.autograd.grad(csr_spmm(x, csr).sum(), [x, csr.values])


def test_dense_and_sampled_gradients_allocate_no_full_gradient():
    """d above a tile: dyᵀx [d, k] never exists, and the buffer of a tile is shared."""
    d, k, T = 1500, 40, 6
    csr = random_csr(d, k, torch.float32, density=0.01, trained=True)
    x, dy = randn(T, k).float(), randn(T, d).float()
    for route in rosa_routes.GRADIENT_ROUTES:
        y = csr_spmm(x, csr, gradient_route=route)
        spectral_ops.scratch.release()
        with Recorder() as seen:
            torch.autograd.grad(y, csr.values, dy)
        assert max(t.untyped_storage().nbytes() for *_, t in seen.allocated) < d * k * 4, route


def test_x_is_saved_only_for_gradients_that_need_it():
    csr, x = random_csr(8, 6), randn(3, 6).requires_grad_()
    with saved_tensors() as kept:
        csr_spmm(x, csr)
    assert storage(x) not in map(storage, kept)


# --- one operator per layer and direction ----------------------------------------------------------------------------


def functions(dtype=torch.float32):
    """Every function here: what it makes of its inputs, and those."""
    csr, unsorted = random_csr(12, 10, dtype), unsorted_csr(dtype)
    x, W, base = (randn(*shape, dtype=dtype) for shape in ((2, 3, 10), (12, 10), (2, 3, 12)))
    return {
        "csr_add": (lambda W, v: csr_add(W, csr.with_values(v)), [W, csr.values]),
        "csr_add inplace": (lambda W, v: csr_add(W * 2, csr.with_values(v), inplace=True), [W, csr.values]),
        "csr_sddmm": (lambda dy, x: csr_sddmm(dy, x, csr), [base, x]),
        "csr_spmm": (lambda x, v: csr_spmm(x, csr.with_values(v)), [x, csr.values]),
        "csr_spmm unsorted": (lambda x, v: csr_spmm(x, unsorted.with_values(v)), [x[..., :5], unsorted.values]),
    }


FUNCTIONS = list(functions())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_selective_checkpointing_is_plain_bit_for_bit(name, dtype):
    check_selective_checkpointing(*functions(dtype)[name], overwrites=name == "csr_add inplace")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_gradients(name):
    check_batched_gradients(*functions(torch.float64)[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_backend_that_cannot_run_raises_in_both_directions(name):
    check_a_backend_that_cannot_run(*functions()[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_operators_of_csr_add(dtype):
    """The compiled one and the composition of references agree, results are fresh, and shapes come without values."""
    csr = random_csr(12, 10, dtype)
    index = csr.pattern.row_offsets, csr.pattern.columns
    wide = randn(12, 14, dtype=dtype)
    for W in (randn(12, 10, dtype=dtype), randn(10, 12, dtype=dtype).t(), wide[:, 2:12], wide[:1, 2:12].expand(12, 10)):
        for name, args in (("csr_add_forward", (W, csr.values, *index)), ("csr_add_backward", (W, *index, dtype))):
            packet, kept = getattr(torch.ops.spectral_ops, name), W.clone()
            got, want = packet.default(*args), packet.reference(*args)
            assert torch.equal(got, want) and got.is_contiguous() and storage(got) != storage(W)
            assert torch.equal(W, kept)
            torch.library.opcheck(packet.default, args, test_utils=("test_schema", "test_faketensor"))


def test_what_a_direct_call_leaves_out_is_named():
    """None where a route reads a tensor, numbers that are no route, indices that lead outside: an error, no crash."""
    csr, x, dy = random_csr(12, 10), randn(4, 10), randn(4, 12)
    p, none = csr.pattern, (None,) * 4
    operator = torch.ops.spectral_ops.csr_spmm_backward.default

    def backward(gradient_route, needs, pattern=(*p[:2], None, None, None, *none), x=None):
        return operator(dy, x, csr.values, *pattern, gradient_route, needs)

    for call, name in (
        (lambda: backward(0, 1), "column_offsets|permutation"),
        (lambda: backward(0, 1, (*p[:2], p.column_offsets, None, None, *none)), "entry_rows|permutation"),
        (lambda: backward(0, 2), "x"),
        (lambda: backward(2, 2, x=x), "active_rows|compact_columns"),
        (lambda: backward(7, 2, x=x), "gradient_route"),
        (lambda: backward(1, 2, (p.row_offsets[:-1], p.columns, None, None, None, *none), x), "row_offsets"),
        (lambda: backward(0, 2, (p.row_offsets, p.columns + 9, None, None, None, *none), x), "columns"),
    ):
        if not extension_loaded():
            name = None
        with pytest.raises((RuntimeError, AttributeError, TypeError, IndexError), match=name):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "d"), [(0, 5), (1, 3), (3, 2), (8, 16), (65, 67), (200, 33), (70, 1100)])
def test_a_dense_gradient_has_every_element_of_dy_in_its_place(T, d, dtype):
    """x is the identity, so dyᵀx is dyᵀ to the bit: whole tiles and edges of the copy that bfloat16 goes through."""
    k = max(T, 1)
    csr = CSR.from_dense(torch.ones(d, k, dtype=dtype))
    values = csr.values.clone().requires_grad_()
    dy, x = randn(T, 2 * d, dtype=dtype)[:, ::2][:, :d], torch.eye(k, dtype=dtype)[:T]
    for laid in (dy, dy.contiguous(), randn(d, T, dtype=dtype).t()):
        y = csr_spmm(x, csr.with_values(values), gradient_route="dense")
        (got,) = torch.autograd.grad(y, [values], laid)
        want = torch.zeros(d, k, dtype=dtype)
        want[:, :T] = laid.t()
        assert torch.equal(got.view(d, k), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "d", "k", "multiple"), [(9, 40, 7, 8), (70, 21, 33, 1), (0, 8, 3, 1), (5, 0, 3, 1)])
def test_tiles_add_up_to_the_gradient(dtype, T, d, k, multiple, monkeypatch):
    """Composed in Python: tiles that do not fill d, rows of dy and x that lie apart."""
    monkeypatch.setitem(autograd.TILE_ROWS, "cpu", 16)
    dy, x = laid_out(randn(T, d, dtype=dtype), "rows"), laid_out(randn(T, k, dtype=dtype), "rows")
    tiles = [(start, G.clone()) for start, G in autograd.gradient_tiles(dy, x, multiple)]
    assert [start for start, _ in tiles] == list(range(0, d, 16))
    G = torch.cat([G for _, G in tiles]) if tiles else x.new_empty(0, k)
    want = dy.double().t() @ x.double()
    assert G.shape == want.shape and G.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(G.double(), want, rtol=tolerance, atol=10 * torch.finfo(torch.float32).eps * T**0.5)
