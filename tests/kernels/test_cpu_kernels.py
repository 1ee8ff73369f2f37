"""The C++ CPU kernels against their references in float64, on every instruction set."""

import pytest
import torch
from cpu_kernels import (
    BAT_BLOCKS,
    BAT_SHAPES,
    CAYLEY,
    SHAPES,
    SPARSE,
    check,
    check_bat,
    check_bat_weight,
    check_cayley,
    check_close,
    check_csr,
    check_dropout,
    check_lowrank,
    check_norm,
    check_routing,
    check_segments,
    randn,
    sparse,
)
from instruments import fresh_python
from oracles import sampled_entries
from tensors import DTYPES, accumulate

from spectral_ops.core import philox
from spectral_ops.functional import bat, csr, dora, dropout, lowrank

_C = pytest.importorskip("spectral_ops._C", reason="the CPU extension is not built")

ISAS = ["default", "avx2", "avx512", "avx512_bf16"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstReference:
    def test_lowrank(self, shape, dtype):
        check_lowrank(*shape, dtype)

    def test_dropout(self, shape, dtype):
        check_dropout(*shape, dtype)

    def test_segments(self, shape, dtype):
        check_segments(*shape, dtype)

    def test_routing(self, shape, dtype):
        check_routing(*shape, dtype)

    def test_norm(self, shape, dtype):
        check_norm(*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BAT_SHAPES, ids=str)
def test_bat_against_reference(shape, dtype):
    check_bat(*shape, dtype)


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", BAT_BLOCKS)
def test_bat_weight_in_bfloat16(r, to):
    check_bat_weight(r, torch.bfloat16, to)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", CAYLEY)
def test_cayley_against_reference(r, dtype):
    check_cayley(r, dtype)


def test_bat_weight_keeps_a_weight_that_nothing_changes():
    W, out = randn(64, 128, dtype=torch.bfloat16), torch.empty(64, 128, dtype=torch.bfloat16)
    W[::7, ::5] = 2.0**-130  # subnormal
    for r in (16, 64):
        bat.bat_weight_op.default(out, W, torch.zeros(64 // r, r, r, dtype=torch.bfloat16), False, False)
        assert torch.equal(out, W)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SPARSE, ids=str)
def test_csr(shape, dtype):
    check_csr(*shape, dtype)


@pytest.mark.parametrize("isa", ISAS[: ISAS.index(_C.isa())])
def test_every_narrower_instruction_set(isa):
    """A fresh process, as the instruction set is chosen once; the widest one ran above."""
    code = f"from spectral_ops import _C; assert _C.isa() == {isa!r}; import torch; torch.manual_seed(0)\n"
    code += "import cpu_kernels; cpu_kernels.sweep()"
    done = fresh_python(code, timeout=1200, SPECTRAL_OPS_CPU_ISA=isa, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


def layouts(rows, columns, dtype):
    """One matrix's worth of values in other memory layouts, and a row repeated with stride 0."""
    yield randn(rows, columns + 3, dtype=dtype)[:, 1 : columns + 1]
    yield randn(2 * rows, columns, dtype=dtype)[::2]
    yield randn(columns, rows, dtype=dtype).t()
    yield randn(rows, 2 * columns, dtype=dtype)[:, ::2]
    yield randn(1, columns, dtype=dtype).expand(rows, columns)
    yield randn(rows, 1, dtype=dtype).expand(rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype):
    T, n, r = 70, 133, 9
    seed = torch.tensor([77])
    for x, h, B in zip(layouts(T, n, dtype), layouts(T, r, dtype), layouts(n, r, dtype), strict=True):
        check(lowrank.lowrank_backward_op, x, h, B, 1.0, randn(n), x, None, True, True, True, True, units=64)
        check(lowrank.lowrank_backward_op, x, h, B, 1.0, None, None, None, True, True, True, False, units=64)
        check(dropout.dropout_project_op, x, B.t(), seed, 0.2, units=64)
        check(dropout.dropout_outer_op, h, x, seed, 0.2, units=64)
        check(dropout.seeded_dropout_op, x, seed, 0.2)
    for out, h in zip(layouts(T, n, dtype), layouts(T, r, dtype), strict=True):
        if 0 in out.stride():
            continue
        B, before = randn(n, r, dtype=dtype), out.double()
        mine, want = out.as_strided(out.shape, out.stride()), before.clone()
        lowrank.lowrank_update_op.default(mine, h, B, 2.0, None, None)
        lowrank.lowrank_update_op.overloads["reference"](want, h.double(), B.double(), 2.0, None, None)
        check_close(mine, want)
        before, want = out.double(), out.double()
        dropout.dropout_lift_op.default(out, h, B.t(), seed, 0.2)
        dropout.dropout_lift_op.overloads["reference"](want, h.double(), B.t().double(), seed, 0.2)
        check_close(out, want)


def test_neighbours_of_a_strided_output_are_left_alone():
    storage = torch.full((40, 90), 7.0)
    lowrank.lowrank_update_op.default(storage[3:35, 5:80], randn(32, 4), randn(75, 4), 1.0, None, None)
    storage[3:35, 5:80] = 7
    assert torch.equal(storage, torch.full((40, 90), 7.0))


def test_expanded_outputs_are_refused():
    with pytest.raises(RuntimeError, match="expanded"):
        lowrank.lowrank_update_op.default(torch.zeros(1, 8).expand(4, 8), randn(4, 2), randn(8, 2), 1.0, None, None)


def assert_equal_on_any_threads(results):
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            runs.append(results())
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    T, n, r = 300, 1000, 16
    dy, h, B, A = randn(T, n, dtype=dtype), randn(T, r, dtype=dtype), randn(n, r, dtype=dtype), randn(r, n, dtype=dtype)
    W, g, seed = randn(n, n, dtype=dtype), randn(n), torch.tensor([5])

    def results():
        norm, stamp = torch.zeros(n), torch.zeros(2, dtype=torch.int64)
        dora.column_norm_cached_op.default(norm, stamp, W, A, B, 1.0, True)
        return [
            *lowrank.lowrank_backward_op.default(dy, h, B, 1.0, g, dy, g, True, True, True, True),
            *lowrank.lowrank_backward_op.default(dy, h, B, 1.0, None, None, None, True, True, True, False),
            dropout.dropout_project_op.default(dy, A, seed, 0.1),
            dropout.dropout_outer_op.default(h, dy, seed, 0.1),
            dora.column_norm_op.default(W, A, B, 1.0), norm, stamp,
        ]  # fmt: skip

    assert_equal_on_any_threads(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bat_does_not_depend_on_the_number_of_threads(dtype):
    T, n, m, r = 150, 3, 40, 64
    W, G, x, g = (randn(*shape, dtype=dtype) for shape in ((n * r, m * r), (n * r, m * r), (T, m * r), (T, m * r)))
    B, C, q, dy = randn(n, r, r), randn(m, r, r), randn(T, r, dtype=dtype), randn(20, n * r, dtype=dtype)

    def results():
        out, dB, dx = torch.empty_like(W), torch.empty_like(B), g.clone()
        bat.bat_weight_op.default(out, W, B, False, False)
        bat.bat_contract_op.default(dB, W, G)
        products = [
            bat.bat_matmul_op.default(x[:20], W, B, False),
            bat.bat_matmul_op.default(dy, W, B, True),
            *bat.bat_mix_op.default(x, C),
            bat.bat_mix_backward_op.default(dx, q, x, C, True, True),
        ]
        return [out, dB, dx, *products]

    assert_equal_on_any_threads(results)


def test_bat_leaves_the_neighbours_of_a_strided_output_alone():
    for dtype in (torch.float32, torch.bfloat16):
        storage = torch.full((40, 150), 7.0, dtype=dtype)
        W, G = randn(32, 128, dtype=dtype), torch.full((40, 150), float("nan"), dtype=dtype)
        for r in (4, 16, 32):
            B = randn(32 // r, r, r)
            check(bat.bat_weight_op, storage[3:35, 5:133], W, B, False, False, written=(0,))
            bat.bat_weight_op.default(storage[3:35, 5:133], W, B, False, False)
            storage[3:35, 5:133] = 7
            assert (storage == 7).all()
            G[3:35, 5:133] = W
            check(bat.bat_contract_op, torch.empty(32 // r, r, r), W, G[3:35, 5:133], written=(0,), units=32)
            assert not bat.bat_matmul_op.default(G[3:7, 5:133], W, B, False).isnan().any()


def test_bat_refuses_what_does_not_fit():
    W, B = randn(8, 12), randn(2, 4, 4)
    with pytest.raises(RuntimeError, match="bat"):
        bat.bat_weight_op.default(torch.empty(8, 12), W, randn(3, 4, 4), False, False)
    with pytest.raises(RuntimeError, match="multiple of 4"):
        bat.bat_weight_op.default(torch.empty(8, 10), randn(8, 10), B, False, False)
    with pytest.raises(RuntimeError, match="out"):
        bat.bat_weight_op.default(torch.empty(8, 12, dtype=torch.bfloat16), W, B, False, False)
    with pytest.raises(RuntimeError, match="x"):
        bat.bat_matmul_op.default(randn(3, 8), W, B, False)
    with pytest.raises(RuntimeError, match="dB"):
        bat.bat_contract_op.default(torch.empty(2, 4, 4, dtype=torch.float64), W, W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_reach_what_they_reach_in_the_reference(bad, dtype):
    T, n, r = 66, 70, 5
    dy, h, B, g = randn(T, n, dtype=dtype), randn(T, r, dtype=dtype), randn(n, r, dtype=dtype), randn(n)
    dy[65, 69] = dy[3, 4] = bad
    seed = torch.tensor([9])
    for op, args in [
        (lowrank.lowrank_backward_op, (dy, h, B, 1.0, None, None, None, True, True, True, False)),
        (lowrank.lowrank_backward_op, (dy, h, B, 1.0, g, h.new_ones(T, n), None, True, True, True, True)),
        (dropout.dropout_project_op, (dy, B.t().contiguous(), seed, 0.5)),
        (dropout.dropout_outer_op, (h, dy, seed, 0.5)),
        (dropout.seeded_dropout_op, (dy, seed, 0.5)),
        (dora.column_norm_op, (dy, B.t().contiguous(), h, 1.0)),
    ]:
        got, want = op.default(*args), op.overloads["reference"](*args)
        for a, b in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (got, want)), strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()), op.name
            assert torch.equal(a.sign()[a.isinf()], b.sign()[b.isinf()]), op.name
    out = dy.clone()
    lowrank.lowrank_update_op.default(out, h, B, 1.0, g, None)
    assert torch.equal(out.isfinite(), dy.isfinite())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norm_of_rows_that_cancel(dtype):
    d, k, r = 90, 150, 6
    A, B = randn(r, k, dtype=dtype), randn(d, r, dtype=dtype)
    W = (-(B.double() @ A.double()) + 1e-3 * randn(d, k, dtype=torch.float64)).to(dtype)
    W[::3] = randn(d, k, dtype=dtype)[::3]
    for w in (W, W.t().contiguous().t()):
        got = dora.column_norm_op.default(w, A, B, 1.0).double()
        want = (w.double() + B.double() @ A.double()).norm(dim=1)
        eps = torch.finfo(accumulate(dtype)).eps
        bound = 32 * eps * (want + w.double().norm(dim=1))
        assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cached_norm_is_recomputed_when_a_bit_of_A_or_B_changes(dtype):
    d, k, r = 33, 65, 4
    W, A, B = randn(d, k), randn(r, k, dtype=dtype), randn(d, r, dtype=dtype)
    norm, stamp = torch.zeros(d), torch.zeros(2, dtype=torch.int64)

    def cached(force=False):
        norm.fill_(-1)
        dora.column_norm_cached_op.default(norm, stamp, W, A, B, 0.5, force)
        if (norm == -1).all():
            return False
        assert torch.equal(norm, dora.column_norm_op.default(W, A, B, 0.5))
        return True

    assert cached(force=True)
    assert not cached()
    assert cached(force=True)
    for change in (
        lambda: A.data[2, 3].mul_(-1),
        lambda: A.data[0].copy_(A[0].flip(0)),
        lambda: B.data[5, 1].mul_(1.5),
        lambda: A.data[0, 0].zero_(),
        lambda: A.data[0, 0].mul_(-1),  # -0.0
    ):
        change()
        assert cached()
        assert not cached()
    first, second = A[1, 1].item(), A[1, 2].item()
    A[1, 1], A[1, 2] = second, first
    assert cached()
    A, B = A.t().contiguous().t(), B.t().contiguous().t()  # the same values elsewhere in memory
    assert not cached()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("d", "k"), [(90, 91), (128, 64), (300, 500), (500, 301), (2, 9000)])
def test_the_fingerprint_reads_the_sample_of_W_that_is_documented(d, k, dtype, turned):
    """Entry by entry, those that it sees a change of, in any layout: whatever is stored between them."""
    W, A, B = randn(d, k, dtype=dtype), randn(2, k), randn(d, 2)
    W = W.t().contiguous().t() if turned else W
    norm, stamp = torch.zeros(d, dtype=accumulate(dtype)), torch.zeros(2, dtype=torch.int64)
    dora.column_norm_cached_op.default(norm, stamp, W, A, B, 0.5, True)
    read = sampled_entries(d, k)
    assert read.any(0).all() and read.any(1).all()
    assert read.sum() >= min(d * k, 4096)
    whole, own = W.clone(), stamp.clone()
    for seen in (True, False):
        places = (read == seen).nonzero()
        for i, j in places[torch.randperm(len(places))[:200]].tolist():
            W[i, j] = -W[i, j]
            norm.fill_(-1)
            dora.column_norm_cached_op.default(norm, stamp, W, A, B, 0.5, False)
            assert torch.equal(norm == -1, torch.full_like(norm, not seen, dtype=torch.bool)), (i, j)
            W[i, j] = whole[i, j]
            stamp.copy_(own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vanishing", [0, 1, 70, 150])
def test_magnitude_gradient_where_the_magnitude_vanishes(dtype, vanishing):
    T, k, d, r = 37, 90, 150, 3
    x, h, W, B = randn(T, k, dtype=dtype), randn(T, r, dtype=dtype), randn(d, k, dtype=dtype), randn(d, r, dtype=dtype)
    dy, bias = randn(T, d, dtype=dtype), randn(d, dtype=dtype)
    norm, g = torch.rand(d, dtype=accumulate(dtype)) + 1, torch.rand(d, dtype=accumulate(dtype)) + 8
    g[torch.randperm(d)[:vanishing]] = 0
    dyz = randn(d, dtype=accumulate(dtype))
    for b in (None, bias):
        for w in (W, W.t().contiguous().t()):
            check(dora.magnitude_grad_op, dyz, dy, x, h, w, B, 0.5, g, norm, b)


def test_masks_are_those_of_the_reference_generator():
    x = torch.ones(67, 129)
    for seed in (0, 1, 2**62 - 1, -5):
        key = torch.tensor([seed])
        assert torch.equal(dropout.seeded_dropout_op.default(x, key, 0.37) != 0, philox.keep_mask(67, 129, key, 0.37))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_csr_does_not_depend_on_the_number_of_threads(dtype):
    T, d, k = 1100, 150, 200
    offsets, columns, _ = sparse(d, k, 0.3)
    x, dy, values, order = randn(T, k, dtype=dtype), randn(T, d, dtype=dtype), randn(columns.numel()), None

    def results(T):
        out = dy[:T].clone()
        csr.csr_spmm_op.default(out, x[:T], values, offsets, columns, order)
        return [out, csr.csr_sddmm_op.default(dy[:T], x[:T], offsets, columns)]

    for tokens in (5, 100, T):
        assert_equal_on_any_threads(lambda tokens=tokens: results(tokens))


def test_csr_with_128000_rows():
    d, k, T = 128_000, 6, 3
    mask = torch.zeros(d, k, dtype=torch.bool)
    mask[::1000, 2], mask[77_777] = True, True
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).int()
    columns, x, dy = mask.nonzero()[:, 1].int(), randn(T, k), randn(T, d)
    values = randn(columns.numel())
    check(csr.csr_spmm_op, dy, x, values, offsets, columns, None, written=(0,))
    check(csr.csr_sddmm_op, dy, x, offsets, columns)
    check(csr.csr_scatter_op, randn(d, k), values, offsets, columns, True, written=(0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_csr_strides(dtype):
    T, d, k = 70, 90, 133
    offsets, columns, _ = sparse(d, k, 0.2)
    values = randn(columns.numel(), dtype=dtype)
    for x, dy in zip(layouts(T, k, dtype), layouts(T, d, dtype), strict=True):
        check(csr.csr_sddmm_op, dy, x, offsets, columns, units=64)
        if 0 in dy.stride():
            continue
        want, neighbours = dy.double(), dy
        csr.csr_spmm_op.overloads["reference"](want, x.double(), values.double(), offsets, columns, None)
        csr.csr_spmm_op.default(neighbours, x, values, offsets, columns, None)
        check_close(neighbours, want, units=64)
    for W in layouts(d, k, dtype):
        taken = torch.zeros(2 * columns.numel(), dtype=dtype)[::2]
        csr.csr_gather_op.default(taken, W, offsets, columns)
        assert torch.equal(taken, W[torch.arange(d).repeat_interleave(offsets.diff()), columns.long()])


def test_csr_checks():
    """What would reach outside a tensor is refused, also where nothing has validated the pattern."""
    d, k, T = 4, 6, 3
    offsets, columns = torch.tensor([0, 2, 2, 3, 5]).int(), torch.tensor([1, 5, 0, 2, 3]).int()
    W, values, x, dy, order = randn(d, k), randn(5), randn(T, k), randn(T, d), torch.arange(5).int()
    scatter, gather, spmm, sddmm = (
        op.default for op in (csr.csr_scatter_op, csr.csr_gather_op, csr.csr_spmm_op, csr.csr_sddmm_op)
    )
    for message, call in {
        "row_offsets: got a range of 0 to 4": lambda: sddmm(dy, x, torch.tensor([0, 2, 2, 3, 4]).int(), columns),
        "row_offsets: got a range of 1 to 5": lambda: scatter(
            W, values, offsets + torch.tensor([1, 0, 0, 0, 0]).int(), columns, True
        ),
        "wanted one within 0 to 5": lambda: gather(values, W, offsets + 1, columns),
        "row_offsets: decreases": lambda: spmm(
            dy, x, values, torch.tensor([0, 9, -(2**31), 3, 5]).int(), columns, None
        ),
        "row_offsets: got 5 elements": lambda: scatter(W[:3], values, offsets, columns, True),
        "row_offsets: wanted int32": lambda: scatter(W, values, offsets.long(), columns, True),
        "columns: got an index outside 0 to 5": lambda: scatter(W, values, offsets, columns + 1, True),
        "columns: got an index outside 0 to 2": lambda: sddmm(dy, x[:, :3], offsets, columns),
        "columns: got an index outside 0 to 4": lambda: gather(values, W[:, :5], offsets, columns),
        "columns: got an index outside 0 to 5 ": lambda: spmm(dy, x, values, offsets, columns - 1, None),
        "permutation: got an index outside": lambda: spmm(dy, x, values, offsets, columns, order - 1),
        "permutation: got 4 elements": lambda: spmm(dy, x, values, offsets, columns, order[:4]),
        "values: got 4 elements": lambda: scatter(W, values[:4], offsets, columns, True),
        "out: got 4 elements": lambda: gather(values[:4], W, offsets, columns),
        "x: got size 2 in dimension 0": lambda: spmm(dy, x[:2], values, offsets, columns, None),
        "x: got scalar type": lambda: sddmm(dy, x.double(), offsets, columns),
        "out: is expanded": lambda: spmm(dy[:1].expand(T, d), x, values, offsets, columns, None),
    }.items():
        with pytest.raises(RuntimeError, match=message.strip()):
            call()
