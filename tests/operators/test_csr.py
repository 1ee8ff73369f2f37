"""The CSR row (METHODS 1.5): csr_add, csr_spmm, csr_sddmm, rosa_linear, rosa_update, and the CSR type."""

import copy
import functools
import itertools
import threading

import numpy
import pytest
import scipy.sparse
import torch
from budget import check
from contract import Contract
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments import Recorder, extension_loaded, saved_tensors
from problems import CSR as CSR_FAMILIES
from problems import FAMILIES, cotangent
from tensors import DTYPES, HALF, ids, laid_out, randn, sparse_pattern, storage
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import spectral_ops
from spectral_ops import CSR, csr_add, csr_sddmm, csr_spmm, rosa_linear, rosa_update
from spectral_ops._library import accumulate_dtype
from spectral_ops.core import autograd
from spectral_ops.functional import csr_matrix, rosa_routes


class TestCSR(Contract):
    families = CSR_FAMILIES


def int32(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def dense_of(values, row_offsets, columns, shape) -> torch.Tensor:
    """S, entry by entry."""
    S = torch.zeros(shape, dtype=values.dtype)
    for row in range(shape[0]):
        for p in range(int(row_offsets[row]), int(row_offsets[row + 1])):
            S[row, int(columns[p])] = values[p]
    return S


def random_csr(d, k, dtype=torch.float64, density=0.3, trained=False) -> CSR:
    offsets, columns = sparse_pattern(d, k, density=density)
    return CSR(randn(columns.numel(), dtype=dtype).requires_grad_(trained), offsets, columns, (d, k))


def unsorted_csr(dtype=torch.float64, trained=False) -> CSR:
    values = randn(5, dtype=dtype).requires_grad_(trained)
    return CSR(values, int32([0, 3, 3, 5]), int32([3, 0, 2, 4, 1]), (3, 5), sorted=False)


# --- the matrix ------------------------------------------------------------------------------------------------------


def test_it_is_what_it_says():
    csr = random_csr(6, 9, torch.bfloat16)
    assert csr.nnz == csr.values.numel() == csr.col_indices.numel()
    assert csr.shape == (6, 9)
    assert csr.dtype == torch.bfloat16
    assert csr.device.type == "cpu"
    assert csr.density == csr.nnz / 54
    assert csr.permutation is None
    assert repr(csr) == f"CSR(6 x 9, nnz={csr.nnz}, torch.bfloat16, cpu)"
    assert csr.validate() is csr


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_dense_and_back(dtype):
    for csr in (random_csr(7, 11, dtype), unsorted_csr(dtype)):
        S = dense_of(csr.values, csr.row_offsets, csr.col_indices, csr.shape)
        assert torch.equal(csr.to_dense(), S)
        again = CSR.from_dense(S)
        assert again.dtype == dtype
        assert torch.equal(again.to_dense(), S)
        assert again.row_offsets.dtype == again.col_indices.dtype == torch.int32
        assert torch.equal(CSR.from_dense(S.double(), dtype=dtype).to_dense(), S)


def test_to_dense_is_differentiable():
    for csr in (random_csr(5, 6, trained=True), unsorted_csr(trained=True)):
        G = randn(*csr.shape)
        (grad,) = torch.autograd.grad(csr.to_dense(), csr.values, G)
        want = [G[o, csr.col_indices[p]] for o in range(csr.shape[0])
                for p in range(int(csr.row_offsets[o]), int(csr.row_offsets[o + 1]))]  # fmt: skip
        assert torch.equal(grad, torch.stack(want))


def test_from_a_mask():
    """Values start at zero in float32, in row-major order of the mask."""
    mask = torch.rand(9, 13) < 0.2
    mask[4] = False
    csr = CSR.from_dense(mask)
    assert csr.dtype == torch.float32
    assert csr.nnz == int(mask.sum())
    assert not csr.values.any()
    assert torch.equal(csr.with_values(torch.ones(csr.nnz)).to_dense().bool(), mask)
    assert CSR.from_dense(mask, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(CSR.from_dense(mask.t()).with_values(torch.ones(csr.nnz)).to_dense().bool(), mask.t())


def test_from_a_weight_keeps_nan_and_drops_zeros():
    W = torch.tensor([[0.0, float("nan"), -0.0], [1.0, 0.0, float("inf")]], requires_grad=True)
    csr = CSR.from_dense(W)
    assert csr.col_indices.tolist() == [1, 0, 2]
    assert not csr.values.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_sparse_csr(dtype):
    for csr in (random_csr(7, 11, dtype), unsorted_csr(dtype), random_csr(4, 3, dtype, density=0.0)):
        matrix = csr.to_sparse_csr()
        assert matrix.layout == torch.sparse_csr
        assert torch.equal(matrix.to_dense(), csr.to_dense())
        assert storage(matrix.values()) == storage(csr.values)
        again = CSR.from_sparse_csr(matrix)
        assert storage(again.values) == storage(csr.values)
        assert torch.equal(again.to_dense(), csr.to_dense())
    S = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert torch.equal(CSR.from_sparse_csr(S.to_sparse_csr()).to_dense(), S)  # int64 indices


def test_indices_past_int32_are_refused_not_wrapped():
    """int64 indices come from outside: 2^32 + 1 narrowed would be 1."""
    columns, offsets = torch.tensor([0, 2**32 + 1]), torch.tensor([0, 2])
    with torch.sparse.check_sparse_tensor_invariants(False):
        wrong = torch.sparse_csr_tensor(offsets, columns, torch.ones(2), (1, 2), check_invariants=False)
        with pytest.raises(IndexError, match="^col_indices: got 0 to 4294967297, wanted 0 to 2147483647$"):
            CSR.from_sparse_csr(wrong)
        wrong = torch.sparse_csr_tensor(offsets - 2**32, torch.arange(2), torch.ones(2), (1, 2), check_invariants=False)
        with pytest.raises(IndexError, match="^row_offsets: got -4294967296 to "):
            CSR.from_sparse_csr(wrong)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"])
def test_scipy(form):
    S = random_csr(6, 9).to_dense().numpy()
    for matrix in (scipy.sparse.csr_array(S).asformat(form), scipy.sparse.csr_matrix(S).asformat(form)):
        csr = CSR.from_scipy(matrix)
        numpy.testing.assert_array_equal(csr.to_dense().numpy(), S)
        back = csr.to_scipy()
        assert isinstance(back, scipy.sparse.csr_array)
        numpy.testing.assert_array_equal(back.toarray(), S)


def test_scipy_keeps_explicit_zeros_sums_duplicates_and_copies():
    rows, columns, values = [1, 0, 1, 1], [2, 0, 2, 0], [3.0, 0.0, 4.0, 0.0]
    csr = CSR.from_scipy(scipy.sparse.coo_array((values, (rows, columns)), shape=(2, 3)))
    assert csr.nnz == 3
    assert csr.row_offsets.tolist() == [0, 1, 3]
    assert csr.to_dense().tolist() == [[0, 0, 0], [0, 0, 7]]
    matrix = scipy.sparse.csr_array(numpy.eye(3))
    CSR.from_scipy(matrix).values.fill_(5)
    numpy.testing.assert_array_equal(matrix.toarray(), numpy.eye(3))
    assert CSR.from_scipy(scipy.sparse.csr_array((4, 5))).nnz == 0
    for dtype in HALF:
        assert random_csr(4, 5, dtype).to_scipy().dtype == numpy.float32


def test_scipy_of_unsorted_columns():
    csr = unsorted_csr()
    numpy.testing.assert_array_equal(csr.to_scipy().toarray(), csr.to_dense().numpy())
    again = CSR.from_scipy(csr.to_scipy())
    assert torch.equal(again.to_dense(), csr.to_dense())


@pytest.mark.parametrize("make", [
    lambda: 3, lambda: "csr", lambda: None, lambda: numpy.eye(3), lambda: torch.eye(3), lambda: [[1.0]],
    lambda: scipy.sparse.csr_array(numpy.eye(3, dtype=numpy.int64)),
    lambda: scipy.sparse.csr_array(numpy.eye(3, dtype=numpy.complex64)),
    lambda: scipy.sparse.csr_array(numpy.eye(3, dtype=bool)),
    lambda: scipy.sparse.coo_array(numpy.ones(4)),
])  # fmt: skip
def test_what_from_scipy_refuses(make):
    with pytest.raises(TypeError, match="^matrix: got .*, wanted "):
        CSR.from_scipy(make())


def test_a_broken_scipy_matrix():
    for spoil in (lambda m: m.indices.__setitem__(0, 99), lambda m: m.indptr.__setitem__(1, 99),
                  lambda m: m.indices.__setitem__(0, -1), lambda m: m.indptr.__setitem__(0, 1)):  # fmt: skip
        matrix = scipy.sparse.csr_array(numpy.eye(3))
        spoil(matrix)
        with pytest.raises((ValueError, IndexError), match="^(matrix|row_offsets|col_indices): got .*, wanted "):
            CSR.from_scipy(matrix)


@pytest.mark.parametrize(("make", "error"), [
    (lambda: [[1.0]], TypeError), (lambda: None, TypeError), (lambda: numpy.eye(2), TypeError),
    (lambda: torch.ones(3), ValueError), (lambda: torch.ones(3, dtype=torch.bool), ValueError),
    (lambda: torch.ones(1, 2, 3), ValueError), (lambda: torch.ones(2, 2, dtype=torch.int64), TypeError),
    (lambda: torch.ones(2, 2, dtype=torch.complex64), TypeError), (lambda: torch.eye(2).to_sparse(), ValueError),
    (lambda: torch.eye(2).bool().to_sparse(), ValueError), (lambda: torch.eye(2, device="meta"), ValueError),
    (lambda: torch.eye(2, device="meta").bool(), ValueError),
])  # fmt: skip
def test_what_from_dense_refuses(make, error):
    with pytest.raises(error, match="^dense: got .*, wanted "):
        CSR.from_dense(make())


def test_what_from_sparse_csr_refuses():
    for wrong in (torch.eye(2), torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csc(), 3, None):
        with pytest.raises(TypeError, match="^matrix: got .*, wanted a torch.sparse_csr tensor"):
            CSR.from_sparse_csr(wrong)
    for wrong in (torch.eye(2).to_sparse_bsr((1, 1)), torch.eye(2, dtype=torch.int64).to_sparse_csr(),
                  torch.ones(2, 2, 2).to_sparse_csr()):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match="^(matrix|values): got .*, wanted "):
            CSR.from_sparse_csr(wrong)


# --- transpose -------------------------------------------------------------------------------------------------------


def test_transpose_keeps_explicit_zeros_and_returns_the_permutation():
    for csr in (random_csr(6, 9), unsorted_csr()):
        csr.values[::2] = 0
        other = csr.transpose()
        assert other.shape == csr.shape[::-1]
        assert other.nnz == csr.nnz
        assert torch.equal(other.values, csr.values[other.permutation])
        assert sorted(other.permutation.tolist()) == list(range(csr.nnz))
        assert torch.equal(other.to_dense(), csr.to_dense().t())
        mask = csr.with_values(torch.ones_like(csr.values)).to_dense().bool()
        assert torch.equal(other.with_values(torch.ones_like(csr.values)).to_dense().bool(), mask.t())
        back = other.transpose()
        assert torch.equal(back.to_dense(), csr.to_dense())
        assert torch.equal(back.values, csr.ordered(csr.values))


def test_transposes_of_every_shape():
    for d, k, density in ((1, 1, 1.0), (1, 50, 0.5), (50, 1, 0.5), (4, 4, 0.0), (5, 7, 1.0)):
        csr = random_csr(d, k, density=density)
        assert torch.equal(csr.transpose().to_dense(), csr.to_dense().t())
    csr = random_csr(4, 6, trained=True)
    (grad,) = torch.autograd.grad(csr.transpose().values, csr.values, torch.arange(float(csr.nnz)).double())
    assert torch.equal(grad[csr.transpose().permutation], torch.arange(float(csr.nnz)).double())


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


@pytest.mark.parametrize("kind", ["empty rows", "nothing", "one dense row", "one dense column", "everything", "last"])
def test_shapes_of_patterns(kind, backend):
    d, k = 12, 10
    mask = torch.zeros(d, k, dtype=torch.bool)
    if kind == "empty rows":
        mask[3::4, ::3] = True
    elif kind == "one dense row":
        mask[7] = True
    elif kind == "one dense column":
        mask[:, 4] = True
    elif kind == "everything":
        mask[:] = True
    elif kind == "last":
        mask[-1, -1] = True
    csr = CSR.from_dense(mask)
    csr = csr.with_values(randn(csr.nnz).requires_grad_())
    x, W, dy = randn(7, k), randn(d, k), randn(7, d)
    for which, *pairs, (dS, G) in every_way(x, W, csr, dy):
        for got, want in [*pairs, (dS, G[mask])]:
            torch.testing.assert_close(got, want, msg=lambda m, w=which: f"{w}: {m}")
    torch.testing.assert_close(csr_spmm(x, csr), x @ csr.to_dense().T)
    torch.testing.assert_close(csr_sddmm(dy, x, csr), (dy.T @ x)[mask])
    torch.testing.assert_close(csr_add(W, csr), W + csr.to_dense())


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
        options = {"route": route, "gradient_route": gradient}
        cases = [
            (rosa_linear(x, W.clone(), csr, A, B, b, **options), x @ (W + S + B @ A).T + b, [x, values, A, B, b]),
            (csr_spmm(x, csr, gradient_route=gradient), x @ S.T, [x, values]),
            (rosa_update(base * 1, x, csr, gradient_route=gradient), base + x @ S.T, [base, x, values]),
            (csr_add(W, csr), W + S, [values]),
        ]
        for got, want, inputs in cases:
            torch.testing.assert_close(got, want)
            G = dy if got.shape == dy.shape else randn(*got.shape)
            right = torch.autograd.grad(want, inputs, G, retain_graph=True)
            for a, c in zip(torch.autograd.grad(got, inputs, G), right, strict=True):
                torch.testing.assert_close(a, c)


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


# --- checked once ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checks_made(monkeypatch):
    """How often indices were looked at."""
    made = []
    check_indices = CSR._check_indices
    monkeypatch.setattr(CSR, "_check_indices", lambda self: (made.append(self), check_indices(self))[1])
    return made


def layer(csr, x, W, **options):
    y = rosa_linear(x, W, csr, **options)
    torch.autograd.grad(y.sum(), [x, csr.values])


def test_indices_are_looked_at_once(checks_made):
    csr = random_csr(8, 6, trained=True)
    x, W = randn(3, 6).requires_grad_(), randn(8, 6)
    assert not checks_made, "the constructor waits for no device"
    for route in ("spmm", "scatter", "resident"):
        layer(csr, x, W, route=route)
    csr.transpose(), csr.to_dense(), csr_add(W, csr), csr_spmm(x, csr), csr_sddmm(randn(3, 8), x, csr)
    assert checks_made.count(csr) == 1
    made = len(checks_made)
    layer(csr.with_values(randn(csr.nnz).requires_grad_()), x, W)
    layer(csr.with_values(randn(csr.nnz, dtype=torch.float64).requires_grad_()), x, W)
    csr.to(torch.float32).validate()
    with torch.no_grad():
        csr.values.mul_(2)
    csr.values.data = csr.values.data.clone()
    layer(csr, x, W)
    assert len(checks_made) == made, "other values need no other look"


@pytest.mark.parametrize("change", [
    lambda csr: csr.col_indices.copy_(csr.col_indices.clone()),
    lambda csr: csr.row_offsets.add_(0),
    lambda csr: setattr(csr, "col_indices", csr.col_indices.clone()),
    lambda csr: setattr(csr, "row_offsets", csr.row_offsets.clone()),
    lambda csr: setattr(csr.col_indices, "data", csr.col_indices.clone()),
    lambda csr: setattr(csr, "sorted", False),
])  # fmt: skip
def test_changed_indices_are_looked_at_again(checks_made, change):
    csr = random_csr(8, 6)
    csr.validate()
    change(csr)
    csr.validate()
    csr.validate()
    assert len(checks_made) == 2


def test_an_index_at_the_address_of_a_freed_one_is_looked_at():
    csr = unsorted_csr().validate()
    for _ in range(20):
        csr.col_indices = None
        csr.col_indices = int32([3, 0, 99, 4, 1])
        with pytest.raises(IndexError, match="^col_indices: got columns 0 to 99"):
            csr.validate()
        csr.col_indices = None
        csr.col_indices = int32([3, 0, 2, 4, 1])
        csr.validate()


def test_new_indices_are_what_counts():
    csr = CSR(torch.ones(2), int32([0, 1, 2]), int32([0, 1]), (2, 3))
    x = torch.tensor([[1.0, 10.0, 100.0]])
    assert csr_spmm(x, csr).tolist() == [[1, 10]]
    csr.col_indices[1] = 2
    assert csr_spmm(x, csr).tolist() == [[1, 100]]
    assert csr.transpose().to_dense().tolist() == [[1, 0], [0, 0], [0, 1]]


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


def test_values_of_another_size_are_refused():
    csr = random_csr(8, 6).validate()
    x, nnz = randn(2, 6), csr.nnz
    for values in (randn(nnz - 1), randn(nnz + 1), randn(1, nnz), randn(2 * nnz)[::2], None, randn(nnz).int()):
        csr.values = values
        for function in (lambda: csr_spmm(x, csr), lambda: csr_add(randn(8, 6), csr), csr.to_dense, csr.transpose):
            with pytest.raises((TypeError, ValueError), match="^(values|col_indices): got .*, wanted "):
                function()
    csr.values = torch.nn.Parameter(randn(nnz))
    csr_spmm(x, csr)
    csr.values.data = randn(3)
    with pytest.raises(ValueError, match="^col_indices: got .*, wanted 3 as values has"):
        csr_spmm(x, csr)


def test_under_inference_mode():
    with torch.inference_mode():
        csr = random_csr(8, 6)
        x = randn(3, 6)
        y = csr_spmm(x, csr)
        assert torch.equal(csr_spmm(x, csr), y)
    assert torch.equal(csr_spmm(x.clone(), csr), y)
    values = csr.values.clone().requires_grad_()
    x = x.clone().requires_grad_()
    torch.autograd.grad(csr_spmm(x, csr.with_values(values)).sum(), [x, values])


def test_a_pattern_first_checked_under_inference_mode_trains_later():
    csr = random_csr(8, 6, trained=True)
    x = randn(3, 6).requires_grad_()
    with torch.inference_mode():
        csr_spmm(x, csr)
    torch.autograd.grad(csr_spmm(x, csr).sum(), [x, csr.values])


def test_copies():
    csr = random_csr(8, 6).validate()
    other = copy.deepcopy(csr)
    csr.col_indices.fill_(99)
    assert other.validate().to_dense().shape == (8, 6)
    with pytest.raises(IndexError):
        csr.validate()
    narrow = other.to(torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow.to_dense(), other.to_dense().bfloat16())
    assert other.to("cpu").nnz == other.nnz
    with pytest.raises(ValueError, match="^row_offsets: got .*meta, wanted offsets that can be read"):
        other.to("meta").validate()


def test_checked_by_threads_at_once():
    csr, wrong = random_csr(200, 60, density=0.2, trained=True), []
    x = randn(9, 60)
    want = x @ csr.to_dense().detach().T

    def work():
        try:
            for _ in range(20):
                csr.row_offsets = csr.row_offsets.clone()
                if not torch.allclose(csr_spmm(x, csr).detach(), want):
                    wrong.append("another product")
        except Exception as error:  # noqa: BLE001
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# --- unsorted columns ------------------------------------------------------------------------------------------------


def test_unsorted_columns_count_in_the_order_of_their_values(backend):
    csr = unsorted_csr(trained=True)
    x, W, dy = randn(4, 5), randn(3, 5), randn(4, 3)
    place = (torch.tensor([0, 0, 0, 2, 2]), csr.col_indices.long())
    for which, *pairs, (dS, G) in every_way(x, W, csr, dy):
        for got, want in [*pairs, (dS, G[place])]:
            torch.testing.assert_close(got, want, msg=lambda m, w=which: f"{w}: {m}")
    torch.testing.assert_close(csr_spmm(x, csr), x @ csr.to_dense().T)
    torch.testing.assert_close(csr_add(W, csr), W + csr.to_dense())
    torch.testing.assert_close(csr_sddmm(dy, x, csr), (dy.T @ x)[place])
    torch.testing.assert_close(rosa_update(dy.clone(), x, csr), dy + x @ csr.to_dense().T)
    assert torch.equal(csr.unordered(csr.ordered(csr.values)), csr.values)


def test_columns_declared_unsorted_that_are_sorted():
    csr = random_csr(5, 6)
    other = CSR(csr.values, csr.row_offsets, csr.col_indices, csr.shape, sorted=False).validate()
    assert other.ordered(other.values) is other.values
    assert torch.equal(other.to_dense(), csr.to_dense())


@pytest.mark.parametrize("ordered", [True, False])
def test_duplicates_are_refused(ordered):
    csr = CSR(torch.ones(3), int32([0, 1, 3]), int32([2, 2, 2]), (2, 4), sorted=ordered)
    with pytest.raises(ValueError, match="^col_indices: got column 2 (after 2|twice) in row 1, wanted "):
        csr.validate()
    csr = CSR(torch.ones(2), int32([0, 1, 2]), int32([2, 2]), (2, 4), sorted=ordered)
    csr.validate()  # one in each row


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
        lambda: csr_spmm(x, csr),
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
    csr, unsorted = random_csr(12, 10, dtype), unsorted_csr(dtype)
    x, W, base, b = (randn(*shape, dtype=dtype) for shape in ((2, 3, 10), (12, 10), (2, 3, 12), (12,)))
    A, B = (randn(*shape, dtype=accumulate_dtype(dtype)) for shape in ((3, 10), (12, 3)))
    cases = {
        "csr_add": (lambda W, v: csr_add(W, csr.with_values(v)), [W, csr.values]),
        "csr_add inplace": (lambda W, v: csr_add(W * 2, csr.with_values(v), inplace=True), [W, csr.values]),
        "csr_sddmm": (lambda dy, x: csr_sddmm(dy, x, csr), [base, x]),
        "csr_spmm": (lambda x, v: csr_spmm(x, csr.with_values(v)), [x, csr.values]),
        "csr_spmm unsorted": (lambda x, v: csr_spmm(x, unsorted.with_values(v)), [x[..., :5], unsorted.values]),
        "rosa_update": (lambda y, x, v: rosa_update(y * 2, x, csr.with_values(v)), [base, x, csr.values]),
    }

    def layer(x, v, A, B, b, **options):
        return rosa_linear(x, W, csr.with_values(v), A, B, b, **options, dropout_p=0.4, training=True)

    for route, gradient in itertools.product(rosa_routes.ROUTES, rosa_routes.GRADIENT_ROUTES):
        options = {"route": route, "gradient_route": gradient}
        cases[f"rosa_linear {route} {gradient}"] = (functools.partial(layer, **options), [x, csr.values, A, B, b])
    return cases


FUNCTIONS = list(functions())


def step(function, inputs, run=lambda function, *inputs: function(*inputs)):
    """What it returns and its gradients, dropout drawn from one state of the generator."""
    torch.manual_seed(5)
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(lambda *inputs: function(*inputs).sin().square(), *inputs)
    return [y, *torch.autograd.grad(y.float().sum(), inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_selective_checkpointing_is_plain_bit_for_bit(name, dtype):
    """An in-place sum of a kept tensor must raise, all else must be exact."""
    function, inputs = functions(dtype)[name]
    want = step(function, inputs)
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mul.Tensor)

    def policy(keeps, ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if keeps(op) else CheckpointPolicy.PREFER_RECOMPUTE

    for keeps in (products.__contains__, lambda op: op.namespace == "spectral_ops", lambda op: False, lambda op: True):
        contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(policy, keeps))
        run = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
        if name == "csr_add inplace" and keeps(torch.ops.aten.mul.Tensor):
            with pytest.raises(RuntimeError, match="has been mutated"):
                step(function, inputs, run)
            continue
        got = step(function, inputs, run)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_gradients(name):
    function, inputs = functions(torch.float64)[name]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    dys = randn(4, *y.shape)
    batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for got, want in zip(batched, torch.autograd.grad(y, inputs, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_backend_that_cannot_run_raises_in_both_directions(name):
    function, inputs = functions()[name]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    with spectral_ops.use_backend("cuda"), pytest.raises(spectral_ops.BackendUnavailable):
        function(*inputs)
    y = function(*inputs)
    with spectral_ops.use_backend("cuda"), pytest.raises(spectral_ops.BackendUnavailable):
        torch.autograd.grad(y, inputs[1], torch.ones_like(y))


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
    csr, x, W, dy = random_csr(12, 10), randn(4, 10), randn(12, 10), randn(4, 12)
    p, none = csr.pattern, (None,) * 4
    operator = torch.ops.spectral_ops.rosa_linear_backward.default

    def backward(route, gradient_route, needs, pattern=(*p[:2], None, None, None, *none), x=None, weight=W):
        return operator(dy, x, weight, csr.values, *pattern, *none, 1.0, 0.0, route, gradient_route, needs)

    for call, name in (
        (lambda: backward(2, 0, 1), "column_offsets|permutation"),
        (lambda: backward(1, 0, 1, weight=None), "weight"),
        (lambda: backward(1, 0, 2), "x"),
        (lambda: backward(1, 2, 2, x=x), "active_rows|compact_columns"),
        (lambda: backward(3, 0, 1), "route"),
        (lambda: backward(1, 7, 2, x=x), "gradient_route"),
        (lambda: backward(1, 1, 2, (p.row_offsets[:-1], p.columns, None, None, None, *none), x), "row_offsets"),
        (lambda: backward(1, 0, 1, (p.row_offsets, p.columns + 9, None, None, None, *none)), "columns"),
    ):
        if not extension_loaded():
            name = ""
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
