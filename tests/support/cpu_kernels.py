"""Each C++ CPU kernel against its reference in float64, at one size; ``sweep`` runs every check at every size."""

import functools

import torch
from budget import check_operator
from samples import OPERATOR_NAMES, samples_of
from tensors import DTYPES, accumulate
from tensors import randn as normal

from spectral_ops import _library, _loader
from spectral_ops.functional import bat, csr, dora, dropout, lowrank, routing, segments
from spectral_ops.functional.cayley import cayley_backward_op, cayley_forward_op

SHAPES = [  # rows, columns, r
    (0, 5, 2), (3, 0, 2), (0, 0, 3), (4, 6, 0), (1, 1, 1), (1, 333, 17), (5, 7, 3), (63, 65, 1), (64, 64, 8),
    (129, 67, 16), (70, 131, 130), (200, 390, 64), (67, 1100, 5),
]  # fmt: skip

BAT_SHAPES = [  # tokens, block-rows, block-columns, r
    (0, 2, 3, 2), (3, 0, 2, 4), (2, 2, 0, 3), (5, 9, 37, 1), (2, 5, 7, 3), (7, 2, 9, 5), (9, 3, 1, 11), (15, 2, 3, 16),
    (20, 1, 4, 24), (70, 3, 2, 64), (63, 2, 3, 64), (33, 1, 2, 96), (65, 2, 1, 130), (3, 1, 2, 256), (1, 40, 2, 32),
    (130, 2, 40, 8),
]  # fmt: skip
BAT_BLOCKS = [1, 3, 8, 16, 24, 48, 63, 64, 128]
CAYLEY = [0, 1, 8, 16, 33, 64, 65, 130]
SPARSE = [  # T, d, k, density, threads: every number of lanes, groups that go round the threads and groups that do not
    (0, 5, 7, 0.5, 1), (3, 0, 7, 0.5, 1), (3, 5, 0, 0.5, 1), (4, 6, 5, 0.0, 1), (1, 1, 1, 1.0, 1),
    (1, 300, 333, 0.1, 1), (2, 40, 31, 0.3, 2), (3, 40, 31, 0.3, 1), (17, 35, 64, 0.2, 1), (33, 600, 130, 0.05, 2),
    (130, 66, 131, 0.5, 2), (70, 20, 2500, 0.1, 1), (260, 40, 700, 0.3, 3), (1100, 20, 120, 0.9, 7),
    (2300, 20, 40, 0.9, 7),
]  # fmt: skip

randn = functools.partial(normal, dtype=torch.float32)


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check_close(got, want, name="", units=16):
    """Within one rounding to the result's dtype, plus ``units`` of float32 (float64) for the order of a sum."""
    assert got.shape == want.shape, name
    if not want.numel():
        return
    got, want, dtype = got.double(), want.double(), got.dtype
    noise = units * torch.finfo(accumulate(dtype)).eps * (1 + want.abs().max().item())
    bound = 0.5001 * torch.finfo(dtype).eps * want.abs() + noise
    worst = ((got - want).abs() - bound).max().item()
    assert worst <= 0, f"{name}: exceeds the bound by {worst}"


def check(operator, *args, written=(), units=16):
    """The kernel on args against the reference on their float64 copies; ``written``: positions of in-place outputs."""
    assert operator.name in _loader.EXTENSIONS["cpu"].operators, "it would be held against itself"
    mine = [a.clone() if i in written else a for i, a in enumerate(args)]
    copies = [wide(a).clone() if i in written else wide(a) for i, a in enumerate(args)]
    got, want = operator.default(*mine), operator.overloads["reference"](*copies)
    if written:
        got, want = [mine[i] for i in written], [copies[i] for i in written]
    elif not isinstance(got, (tuple, list)):
        got, want = [got], [want]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        check_close(
            a, b, f"{operator.name}[{i}] {[tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]}", units
        )


def check_lowrank(T, d, r, dtype):
    dy, h, B, y = randn(T, d, dtype=dtype), randn(T, r, dtype=dtype), randn(d, r, dtype=dtype), randn(T, d, dtype=dtype)
    g, b = randn(d, dtype=accumulate(dtype)), randn(d, dtype=dtype)
    for needs in [(1, 1, 1, 1), (1, 1, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)]:
        needs = [bool(n) for n in needs]
        check(lowrank.lowrank_backward_op, dy, h, B, 0.7, None, None, None, *needs)
        check(lowrank.lowrank_backward_op, dy, h, B, 0.7, g, y, b, *needs)
    check(lowrank.lowrank_backward_op, dy, h, B, 0.7, None, y, None, True, True, False, False)
    for scale, shift in [(None, None), (g, None), (g, b.to(accumulate(dtype)))]:
        check(lowrank.lowrank_update_op, y, h, B, -1.3, scale, shift, written=(0,))


def check_cayley(r, dtype):
    X, G = randn(2, r, r, dtype=dtype), randn(2, r, r, dtype=accumulate(dtype))
    check(cayley_forward_op, X, units=64)
    check(cayley_backward_op, torch.linalg.qr(G)[0], G, units=64)


def check_dropout(T, k, r, dtype):
    x, out = randn(T, k, dtype=dtype), randn(T, k, dtype=dtype)
    A, u = randn(r, k, dtype=dtype), randn(T, r, dtype=dtype)
    seed = torch.tensor([2**61 + 12345])
    for p in (0.3, 1.0):
        check(dropout.dropout_project_op, x, A, seed, p)
        check(dropout.dropout_outer_op, u, x, seed, p)
        check(dropout.seeded_dropout_op, x, seed, p)
        check(dropout.dropout_lift_op, out, u, A, seed, p, written=(0,))


def check_segments(T, k, r, dtype):
    x, u, out = randn(T, k, dtype=dtype), randn(T, r, dtype=dtype), randn(T, k, dtype=dtype)
    offsets = torch.tensor([T // 5, T // 2, T // 2, T - T // 7])
    foreign = torch.ones(T, 1, dtype=torch.bool)
    foreign[offsets[0] : offsets[-1]] = False
    for order in (None, torch.randperm(T), torch.arange(T).flip(0)):
        at = foreign if order is None else torch.empty_like(foreign).index_copy_(0, order, foreign)
        x, u, read = x.masked_fill(at, torch.nan), u.masked_fill(foreign, torch.nan), out.masked_fill(at, 0)
        for A in (randn(3, r, k, dtype=dtype), randn(3, k, r, dtype=dtype).transpose(1, 2)):
            check(segments.segment_project_op, x, A, order, offsets, units=32)
            check(segments.segment_lift_op, read, u, A.transpose(1, 2), order, offsets.int(), written=(0,), units=32)
        check(segments.segment_outer_op, u, x, order, offsets, units=32)
        x, u = x.nan_to_num(), u.nan_to_num()
    twice = torch.cat([torch.randperm(T), torch.randperm(T)])[: T + T // 2]
    offsets = torch.tensor([0, T // 3, T, len(twice)], dtype=torch.int32)
    check(segments.segment_project_op, x, randn(3, r, k, dtype=dtype), twice, offsets, units=32)
    check(segments.segment_outer_op, randn(len(twice), r, dtype=dtype), x, twice, offsets, units=32)
    out, u = randn(2 * T, k, dtype=dtype), randn(T, r, dtype=dtype)
    check(segments.segment_lift_op, out, u, randn(3, k, r, dtype=dtype), torch.randperm(2 * T)[:T],
          torch.tensor([0, T // 3, T // 2, T]), written=(0,), units=32)  # fmt: skip


def check_routing(T, d, K, dtype):
    K = min(K, 16)  # the reference's time goes by it
    S = T * K
    y, dout, places = randn(S, d, dtype=dtype), randn(T, d, dtype=dtype), torch.randperm(S).view(T, K)
    for end in {S, S - S // 3, 0}:
        offsets = torch.tensor([0, end], dtype=torch.int32)
        y[end:] = torch.nan
        for weights in (None, randn(T, K, dtype=dtype), randn(T, K, dtype=torch.float32)):
            check(routing.routing_combine_op, y, weights, places, offsets)
            for need in (True, False):
                check(routing.routing_combine_backward_op, dout, y, weights, places, offsets.long(), need, units=64)
        y = y.nan_to_num()


def check_norm(d, k, r, dtype):
    for factor in {dtype, torch.float32, torch.bfloat16}:
        if torch.finfo(factor).bits > torch.finfo(dtype).bits and dtype == torch.float64:
            continue
        W, A, B = randn(d, k, dtype=dtype), randn(r, k, dtype=factor), randn(d, r, dtype=factor)
        for w in (W, W.t().contiguous().t(), randn(d, 2 * k, dtype=dtype)[:, ::2]):
            units = 100  # what cancels down to 1/64 loses six bits
            for a, b in ((A, B), (A.t().contiguous().t(), B.t().contiguous().t())):
                check(dora.column_norm_op, w, a, b, 0.5, units=units)


def check_bat(T, n, m, r, dtype, factor=None):
    d, k = n * r, m * r
    for to in {dtype, factor or torch.float32, torch.bfloat16} if dtype != torch.float64 else {dtype}:
        B, C = randn(n, r, r, dtype=to) / r**0.5, randn(m, r, r, dtype=to) / r**0.5
        W, x, dy = randn(d, k, dtype=dtype), randn(T, k, dtype=dtype), randn(T, d, dtype=dtype)
        for blocks, row in ((B, False), (C, True)):
            for w in (W, W.t().contiguous().t(), randn(d, 2 * k, dtype=dtype)[:, ::2]):
                check(bat.bat_weight_op, torch.empty_like(W), w, blocks, row, False, written=(0,))
                check(bat.bat_weight_op, torch.empty(d, k, dtype=accumulate(dtype)), w, blocks, row, True, written=(0,))
        for w in (W, W.t().contiguous().t()):
            check(bat.bat_matmul_op, x, w, B, False, units=32)
            check(bat.bat_matmul_op, dy, w, B, True, units=32)
        for G in (randn(d, k, dtype=dtype), randn(d, k, dtype=accumulate(dtype)), randn(k, d, dtype=dtype).t()):
            check(bat.bat_contract_op, torch.empty(n, r, r, dtype=accumulate(dtype)), W, G, written=(0,), units=32)
        check(bat.bat_mix_op, x, C)
        g, q = randn(T, k, dtype=dtype), randn(T, r, dtype=dtype)
        for need_g, need_dC in ((True, True), (True, False), (False, True), (False, False)):
            mine, want = g.clone(), wide(g).clone()
            dC = bat.bat_mix_backward_op.default(mine, q, x, C, need_g, need_dC)
            expected = bat.bat_mix_backward_op.reference(want, wide(q), wide(x), wide(C), need_g, need_dC)
            check_close(mine, want, "g")
            check_close(dC, expected.to(torch.float64), "dC", units=32)


def check_bat_weight(r, dtype, to):
    """Blocks in ``to``, as narrow as W or wider, with rows of W and out that lie apart and start anywhere."""
    for n, m in ((2, 3), (1, 40 // r + 1), (0, 2), (2, 0)):
        d, k = n * r, m * r
        W, B = randn(d + 1, k + 7, dtype=dtype)[1:, 3 : k + 3], randn(n, r, r, dtype=to) / r**0.5
        for delta in (False, True):
            for out_dtype in {dtype, accumulate(dtype)}:
                storage = torch.full((d, k + 6), 7.0, dtype=out_dtype)
                mine, want = storage[:, 1 : k + 1], torch.empty(d, k, dtype=torch.float64)
                bat.bat_weight_op.default(mine, W, B, False, delta)
                bat.bat_weight_op.overloads["reference"](want, wide(W), wide(B), False, delta)
                check_close(mine, want, f"W' of {n} x {m} blocks of {r}, delta {delta}")
                assert (storage[:, :1] == 7).all() and (storage[:, k + 1 :] == 7).all()


def sparse(d, k, density):
    """Offsets, columns and the mask of a [d, k] pattern: its first quarter empty, one row full, the rest at random."""
    mask = torch.rand(d, k) < density
    mask[: d // 4] = False
    if density:
        mask[d // 2 : d // 2 + 1] = True
    offsets = torch.zeros(d + 1, dtype=torch.int32)
    offsets[1:] = mask.sum(1).cumsum(0)
    return offsets, mask.nonzero()[:, 1].int(), mask


def check_csr(T, d, k, density, threads, dtype):
    offsets, columns, mask = sparse(d, k, density)
    nnz, n = columns.numel(), d // 3
    x, dy, W = randn(T, k, dtype=dtype), randn(T, d, dtype=dtype), randn(d, k, dtype=dtype)
    order = torch.randperm(nnz).int()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(csr.csr_sddmm_op, dy, x, offsets, columns)
        for values in (randn(nnz, dtype=dtype), randn(nnz, dtype=accumulate(dtype))):
            for permutation in (None, order):
                check(csr.csr_spmm_op, dy, x, values, offsets, columns, permutation, written=(0,), units=64)
            for add in (False, True):
                check(csr.csr_scatter_op, W, values, offsets, columns, add, written=(0,))
                mine, want = W.t().contiguous().t(), W.double()
                csr.csr_scatter_op.default(mine, values, offsets, columns, add)
                csr.csr_scatter_op.overloads["reference"](want, values.double(), offsets, columns, add)
                check_close(mine, want)
                assert torch.equal(mine[~mask], W[~mask])
            for rows in (slice(0, d), slice(n, d), slice(n, n + 2)):
                part = offsets[rows.start : rows.stop + 1].clone()
                if len(part) == rows.stop - rows.start + 1:
                    check(csr.csr_gather_op, values, W[rows], part, columns, written=(0,))
                    check(csr.csr_gather_op, values, W[rows].t().contiguous().t(), part, columns, written=(0,))
    finally:
        torch.set_num_threads(before)


def sweep(dtypes=DTYPES):
    for dtype in dtypes:
        for shape in SPARSE:
            check_csr(*shape, dtype)
        for shape in BAT_SHAPES:
            check_bat(*shape, dtype)
        for r in BAT_BLOCKS:
            check_bat_weight(r, dtype, dtype)
        for r in CAYLEY:
            check_cayley(r, dtype)
        for shape in SHAPES:
            check_lowrank(*shape, dtype)
            check_dropout(*shape, dtype)
            check_segments(*shape, dtype)
            check_routing(*shape, dtype)
            check_norm(*shape, dtype)
        for name in OPERATOR_NAMES:  # what no check above knows
            if name in _loader.EXTENSIONS["cpu"].operators:
                for args in samples_of(name, dtype=dtype):
                    check_operator(_library.OPERATORS[name], _library.OPERATORS[name].default, args)
