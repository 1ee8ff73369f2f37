"""RoSA: the layer's tax beside clone + scatter + dense gradient, each operator of the row, and the sparse products of
torch and scipy on the same matrix where they take the dtype."""

import pytest
import torch

from benchmarks import harness
from spectral_ops import csr_sddmm, csr_spmm
from spectral_ops.bench import peers


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_tax(benchmark, record, dtype):
    harness.tax(benchmark, record, "rosa", dtype)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("name", harness.operators("csr"))
def test_operator(benchmark, name, dtype):
    harness.operator(benchmark, name, dtype)


def problem(dtype: str):
    csr = peers.pattern(harness.D, harness.K, torch.device("cpu"))
    csr = csr.with_values(torch.randn(csr.nnz)).to(getattr(torch, dtype))
    x, dy = torch.randn(harness.T, harness.K, dtype=csr.dtype), torch.randn(harness.T, harness.D, dtype=csr.dtype)
    return csr, x, dy


def spmm_spectral_ops(csr, x):
    return lambda: csr_spmm(x, csr)


def spmm_torch(csr, x):
    S = csr.to_sparse_csr()
    return lambda: (S @ x.t()).t()


def spmm_scipy(csr, x):
    if csr.dtype != torch.float32:
        pytest.skip("scipy's sparse matrices hold no bfloat16")
    S, dense = csr.to_scipy(), x.numpy()
    return lambda: torch.from_numpy((S @ dense.T).T)


def sddmm_spectral_ops(csr, x, dy):
    return lambda: csr_sddmm(dy, x, csr)


def sddmm_torch(csr, x, dy):
    S = csr.to_sparse_csr()
    return lambda: torch.sparse.sampled_addmm(S, dy.t(), x, beta=0.0).values()


def sddmm_dense(csr, x, dy):
    rows = torch.repeat_interleave(torch.arange(csr.shape[0]), csr.row_offsets.diff().long())
    columns = csr.col_indices.long()
    return lambda: (dy.t() @ x)[rows, columns]


def compare(benchmark, make, dtype, *arguments, expected):
    """Time one implementation, after checking it; one that refuses the dtype is skipped with torch's own words."""
    try:
        call = make(*arguments)
        got = call()
    except RuntimeError as refused:
        pytest.skip(str(refused).split("\n")[0])
    error = (got.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == "float32" else 1e-2)
    benchmark.pedantic(call, rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("make", [spmm_spectral_ops, spmm_torch, spmm_scipy])
def test_spmm_peers(benchmark, make, dtype):
    csr, x, _ = problem(dtype)
    compare(benchmark, make, dtype, csr, x, expected=x.double() @ csr.to_dense().double().t())


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("make", [sddmm_spectral_ops, sddmm_torch, sddmm_dense])
def test_sddmm_peers(benchmark, make, dtype):
    csr, x, dy = problem(dtype)
    dense = dy.double().t() @ x.double()
    expected = dense[csr.with_values(torch.ones(csr.nnz)).to_dense() != 0]
    compare(benchmark, make, dtype, csr, x, dy, expected=expected)
