"""The CSR type (METHODS 1.5): conversions, checks of its indices, and when they are made."""

import copy
import threading

import numpy
import pytest
import torch
from sparse import dense_of, int32, random_csr, unsorted_csr
from tensors import DTYPES, HALF, ids, randn, storage

from spectral_ops import CSR, csr_add, csr_sddmm, csr_spmm, rosa_linear

scipy = pytest.importorskip("scipy")
pytest.importorskip("scipy.sparse")

# --- conversions -----------------------------------------------------------------------------------------------------


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
