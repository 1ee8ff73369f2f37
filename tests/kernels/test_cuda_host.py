"""The CUDA operators without a GPU: csrc/cuda compiled by the C++ compiler and run on cuda_emulator/.

Host side, grids, shared memory, barriers, shuffles, tensor-core fragments and asynchronous copies are the real ones;
results are compared with the operators' references. Only timing, and what hardware does beyond the programming model,
is left to `pytest -m gpu`.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest
import torch
from instruments import results
from oracles import sampled_columns
from samples import layer_samples
from tensors import DTYPES, HALF, accumulate

from benchmarks.estimates import launches
from benchmarks.estimates.launches import numbers as plan
from spectral_ops._library import LAYERS, OPERATORS
from spectral_ops.functional import CSR

ROOT = Path(__file__).resolve().parents[2]
ROUNDED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # results in dtype
SEED = torch.tensor([123456789012345])

pytestmark = pytest.mark.slow


@pytest.fixture(params=[0, 1, 2, 3], ids=["ascending", "descending", "shuffled", "warp by warp"])
def order(request, monkeypatch):
    """The order in which a block's threads run between barriers: a missing barrier shows in one of them."""
    monkeypatch.setenv("EMULATOR_ORDER", str(request.param))


def matrix(rows, columns, dtype, stride=None):
    """Normal numbers; with a stride, rows of a wider buffer that is NaN elsewhere."""
    if stride is None:
        return torch.randn(rows, columns).to(dtype)
    wide = torch.full((rows, stride), float("nan"), dtype=dtype)
    wide[:, :columns] = torch.randn(rows, columns)
    return wide[:, :columns]


def assert_near(got, wanted, tolerance, what=""):
    assert got.shape == wanted.shape and got.dtype == wanted.dtype, what
    error = (got.double() - wanted.double()).norm()
    assert error <= tolerance * wanted.double().norm(), f"{what}: {error / wanted.double().norm():.2e}"


def assert_untouched(view, rows, stride):
    """The padding around an in-place result is still NaN."""
    if stride is not None:
        whole = view.as_strided((rows, stride), (stride, 1))
        assert whole[:, view.shape[1] :].isnan().all()


def reference(name):
    return OPERATORS[name].reference


# --- block sum -------------------------------------------------------------------------------------------------------

SUMS = [  # T, k, r, row stride
    (5, 256, 64, None),
    (9, 1200, 8, None),  # several steps of a warp
    (3, 100, 7, None),  # a row is not a multiple of 16 bytes
    (9, 40, 12, 48),
    (2, 700, 300, None),  # a block for each row
    (2, 2100, 1500, None),  # r beyond a block
    (4, 513, 16, None),
    (3, 64, 64, 80),
    (1, 8, 1, None),
    (0, 16, 4, None),
    (2, 4424, 24, None),  # many loads at once, several times, and a last time with fewer
    (2, 2091, 40, 2096),  # 16-byte loads and a rest
]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_sum(emulated, dtype, dropout):
    seed, p = (SEED, 0.3) if dropout else (None, 0.0)
    for T, k, r, stride in SUMS:
        x = matrix(T, k, dtype, stride)
        got, wanted = (f(x, r, None, seed, p) for f in (emulated.block_sum, reference("block_sum")))
        assert_near(got, wanted, 2 * ROUNDED[dtype], f"{T, k, r, stride}")
    for offsets, stride, T in (
        ((0, 3, 3, 50, 77, 100), 104, 3),
        ((0, 100), None, 9),  # three times several rows, the last of them fewer
        ((0, 33, 66, 100), 101, 6),
        ((0, 90, 100), 112, 4),
    ):
        offsets, x = torch.tensor(offsets, dtype=torch.int32), matrix(T, 100, dtype, stride)
        r = len(offsets) - 1
        got, wanted = (f(x, r, offsets, seed, p) for f in (emulated.block_sum, reference("block_sum")))
        assert_near(got, wanted, 2 * ROUNDED[dtype], f"{T, offsets}")


def test_dropout_keeps_the_very_elements_of_the_reference(emulated):
    for T, n in ((7, 40), (5, 33), (3, 1)):
        ones = torch.ones(T, n)
        for p in (0.0, 0.1, 0.5, 1 - 2.0**-24, 1.0):
            got = emulated.block_sum(ones, n, None, SEED, p) != 0
            assert torch.equal(got, reference("block_sum")(ones, n, None, SEED, p) != 0), (T, n, p)


def test_block_sum_of_expanded_rows(emulated):
    x = torch.randn(1, 64).expand(4, 64)
    assert_near(emulated.block_sum(x, 8, None, None, 0.0), reference("block_sum")(x, 8, None, None, 0.0), 1e-6)


TILES = [  # T, n, r, row stride
    (5, 256, 64, None),
    (3, 100, 7, None),
    (9, 40, 12, 48),
    (3, 43, 5, 48),
    (2, 8728, 24, None),  # more 16-byte accesses of a row than are under way at once
    (2, 700, 3, None),
    (0, 8, 2, None),
]


@pytest.mark.parametrize("accumulate_", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_tile(emulated, dtype, accumulate_):
    cases = [(*c, None) for c in TILES]
    runs = torch.tensor([0, 3, 3, 50, 77, 100], dtype=torch.int32)
    cases += [(3, 100, 5, 103, runs), (3, 100, 5, 112, runs)]
    for T, n, r, stride, offsets in cases:
        for seed in (None, SEED):
            for s_dtype in {dtype, torch.float32 if dtype in HALF else dtype}:
                out, s = matrix(T, n, dtype, stride), matrix(T, r, s_dtype)
                wanted = out.clone()
                reference("block_tile_")(wanted, s, offsets, seed, 0.3, accumulate_)
                emulated.block_tile_(out, s, offsets, seed, 0.3, accumulate_)
                assert_near(out, wanted, 2 * ROUNDED[dtype], f"{T, n, r, stride, s_dtype}")
                assert_untouched(out, T, stride)


# --- low rank --------------------------------------------------------------------------------------------------------

UPDATES = [  # T, d, r, row stride
    (5, 256, 16, None),
    (33, 100, 7, None),
    (150, 40, 24, 48),
    (70, 65, 64, None),
    (40, 300, 70, None),
    (1, 8, 1, None),
    (17, 37, 16, None),
    (150, 264, 8, None),  # two tiles of rows and of columns
    (70, 72, 32, None),
    (90, 80, 40, 88),
    (40, 296, 64, None),
    (70, 80, 136, None),
    (33, 64, 12, None),
    (9, 64, 50, None),
    (6, 24, 0, None),
    (0, 8, 4, None),
]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowrank_update(emulated, dtype, scaled):
    for T, d, r, stride in UPDATES:
        out, h, B = matrix(T, d, dtype, stride), matrix(T, r, dtype, r + 3 if r % 2 else None), matrix(d, r, dtype)
        g, shift = (torch.randn(d, dtype=accumulate(dtype)) if scaled else None for _ in range(2))
        wanted = out.clone()
        reference("lowrank_update_")(wanted, h, B, 0.7, g, shift)
        emulated.lowrank_update_(out, h, B, 0.7, g, shift)
        assert_near(out, wanted, ROUNDED[dtype], f"{T, d, r, stride}")
        assert_untouched(out, T, stride)


@pytest.mark.parametrize("r", [8, 12, 16, 56, 72])
def test_lowrank_update_of_factors_of_any_stride(emulated, r):
    """16-byte loads, pairs and single elements; what lies beyond the ranks is NaN."""
    T, d, dtype = 40, 72, torch.bfloat16
    for h_more, B_more, first in ((8, 16, 0), (4, 4, 0), (8, 2, 0), (3, 8, 0), (8, 5, 0), (8, 8, 1), (8, 8, 8)):
        h, B = matrix(T, r, dtype, r + h_more), matrix(d, r, dtype, r + B_more)
        out = matrix(T, d + 8, dtype)[:, first : first + d]
        wanted = out.clone()
        reference("lowrank_update_")(wanted, h, B, 0.7, None, None)
        emulated.lowrank_update_(out, h, B, 0.7, None, None)
        assert_near(out, wanted, ROUNDED[dtype], f"{r, h_more, B_more, first}")


@pytest.mark.parametrize("T, d, r", [(70, 16904, 8), (97, 256 * 44, 40), (193, 256 * 65 + 8, 72)])
def test_lowrank_update_of_several_rows_in_a_block(emulated, T, d, r):
    """So many columns that a block sweeps over 64, 32 and 128 rows, and the last block over fewer."""
    dtype = torch.bfloat16
    out, h, B = matrix(T, d, dtype), matrix(T, r, dtype), matrix(d, r, dtype)
    wanted = out.clone()
    reference("lowrank_update_")(wanted, h, B, 0.7, None, None)
    emulated.lowrank_update_(out, h, B, 0.7, None, None)
    assert_near(out, wanted, ROUNDED[dtype])


BACKWARDS = [  # T, d, r, row stride
    (5, 64, 16, None),
    (100, 100, 7, None),
    (70, 520, 24, 528),  # two chunks of columns, two splits of rows
    (40, 65, 64, None),
    (200, 40, 70, None),  # more ranks than one pass takes: in half precision two products, and a pass for the rest
    (33, 24, 130, None),
    (37, 37, 16, None),
    (300, 24, 8, None),
    (0, 16, 4, None),
    (9, 24, 0, None),
    (9, 0, 4, None),
]
ALIGNED = [  # T, d, r, row strides of dy and h: every row starts at a multiple of 16 bytes
    (70, 1032, 16, None, 16),  # a chunk of eight columns
    (37, 520, 32, None, 32),
    (133, 784, 64, None, 64),
    (70, 264, 12, None, 16),  # fewer ranks than are copied at a time
    (50, 75, 20, 80, 24),  # and fewer columns
    (9, 400, 52, None, 56),
    (40, 8, 76, None, 80),  # two passes, the second with few ranks
]
WANTED = [  # g, y, bias; need u, dB, db, gdy
    (False, False, False, True, True, False, False),  # LoRA
    (True, True, True, True, True, True, True),  # DoRA with everything
    (True, False, False, True, False, True, True),
    (True, True, False, False, True, False, False),
    (False, False, True, True, True, True, False),  # LoRA with a bias
    (False, False, False, False, False, True, False),
]


def backward_case(emulated, dtype, T, d, r, stride, wanted, h_stride=None):
    has_g, has_y, has_bias, *needs = wanted
    dy, h, B = matrix(T, d, dtype, stride), matrix(T, r, dtype, h_stride or r + 2), matrix(d, r, dtype)
    g = torch.randn(d, dtype=accumulate(dtype)) if has_g else None
    y = matrix(T, d, dtype) if has_y else None
    bias = matrix(1, d, dtype)[0] if has_bias else None
    arguments = (dy, h, B, 0.7, g, y, bias, *needs)
    got, expected = emulated.lowrank_backward(*arguments), reference("lowrank_backward")(*arguments)
    for name, a, b in zip(("u", "dB", "db", "dyz", "gdy"), got, expected, strict=True):
        tolerance = ROUNDED[dtype] if name in ("u", "gdy") else ROUNDED[accumulate(dtype)]
        assert_near(a, b, tolerance, f"{name} of {T, d, r, stride, wanted}")
    return got


@pytest.mark.parametrize("wanted", WANTED, ids=["lora", "dora", "no dB", "no u", "bias", "only db"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowrank_backward(emulated, dtype, wanted):
    for T, d, r, stride in BACKWARDS:
        backward_case(emulated, dtype, T, d, r, stride, wanted)


@pytest.mark.parametrize("wanted", WANTED, ids=["lora", "dora", "no dB", "no u", "bias", "only db"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_lowrank_backward_16_bytes_at_a_time(emulated, dtype, wanted):
    for T, d, r, stride, h_stride in ALIGNED:
        backward_case(emulated, dtype, T, d, r, stride, wanted, h_stride)


def test_aligned_rows_take_the_fast_form(emulated, monkeypatch):
    monkeypatch.setenv("EMULATOR_HOPPER", "0")
    for T, d, r, stride, h_stride in ALIGNED:
        for has_g, has_y, _, *needs in WANTED:
            dy, h = matrix(T, d, torch.bfloat16, stride), matrix(T, r, torch.bfloat16, h_stride)
            B = matrix(d, r, torch.bfloat16)
            y = matrix(T, d, torch.bfloat16) if has_y else None
            args = (dy, h, B, 1.0, torch.ones(d) if has_g else None, y, None, *needs)
            names = [launch.kernel for launch in launches.recorded("lowrank_backward", args)]
            fast = [name.endswith(", true>") for name in names if name.startswith("backward_mma")]
            whole = d % 8 == 0 or not (has_y or needs[3])  # y and gdy are contiguous
            assert set(fast) <= {whole} and (fast or "library" in names), (T, d, r, needs, names)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_lowrank_backward_on_hopper(emulated, monkeypatch, dtype):
    """33 to 64 ranks take the form for Hopper there, and elsewhere the one that every GPU has."""
    for hopper in ("1", "0"):
        monkeypatch.setenv("EMULATOR_HOPPER", hopper)
        plain, everything = WANTED[:2]
        for T, d, r, wanted in (
            (40, 64, 62, plain),
            (300, 72, 46, plain),
            (70, 520, 38, plain),
            (70, 96, 30, plain),
            (70, 96, 62, everything),
        ):
            backward_case(emulated, dtype, T, d, r, None, wanted)
            args = (
                matrix(T, d, dtype),
                matrix(T, r, dtype, r + 2),
                matrix(d, r, dtype),
                1.0,
                None,
                None,
                None,
                *wanted[3:],
            )
            first = launches.recorded("lowrank_backward", args)[0].kernel
            assert ("wgmma" in first) == (hopper == "1" and r > 32 and wanted is plain), (r, first)


@pytest.mark.parametrize("r", [16, 32, pytest.param(64, marks=pytest.mark.thorough)])
def test_lowrank_backward_of_more_steps_than_stages(emulated, order, r):
    backward_case(emulated, torch.bfloat16, 132 * 96 - 5, 8, r, None, WANTED[0], r)  # six steps of a block
    backward_case(emulated, torch.bfloat16, 90, 256 * 67 - 8, r, None, WANTED[1], r)


@pytest.mark.parametrize("wanted", WANTED[:3], ids=["lora", "dora", "no dB"])
def test_lowrank_backward_is_the_same_with_and_without_alignment(emulated, wanted):
    """The slow form adds in the order of the fast one."""
    has_g, has_y, has_bias, *needs = wanted
    T, d, r = 90, 400, 24
    dy, h, B, y = matrix(T, d, torch.bfloat16), *(matrix(n, m, torch.bfloat16) for n, m in ((T, r), (d, r), (T, d)))
    vectors = torch.randn(d) if has_g else None, y if has_y else None, y[0].clone() if has_bias else None
    aligned = emulated.lowrank_backward(dy, h, B, 0.7, *vectors, *needs)
    shifted = torch.empty(T, d + 1, dtype=torch.bfloat16)[:, 1:].copy_(dy)
    for a, b in zip(aligned, emulated.lowrank_backward(shifted, h, B, 0.7, *vectors, *needs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("r", [16, 24, 64])
def test_no_result_depends_on_the_order_of_threads(emulated, order, dtype, r):
    backward_case(emulated, dtype, 80, 72, r, None, WANTED[1])
    out, h, B = matrix(40, 70, dtype), matrix(40, r, dtype), matrix(70, r, dtype)
    wanted = out.clone()
    reference("lowrank_update_")(wanted, h, B, 0.7, None, None)
    emulated.lowrank_update_(out, h, B, 0.7, None, None)
    assert_near(out, wanted, ROUNDED[dtype])
    norm_case(emulated, dtype, dtype, 70, 200, r, False)
    x = matrix(5, 300, dtype)
    for shards in (r, 100):
        assert_near(
            emulated.block_sum(x, shards, None, None, 0.0), reference("block_sum")(x, shards, None, None, 0.0), 2e-2
        )


def test_rows_beyond_32_bit_offsets(emulated):
    stride = 2**31 + 64  # elements; untouched pages cost nothing
    try:
        memory = torch.empty(stride + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this machine does not lend 4 GiB of address space")
    far = memory.as_strided((2, 64), (stride, 1))
    far.copy_(torch.randn(2, 64))
    near = far.clone()
    assert torch.equal(emulated.block_sum(far, 16, None, None, 0.0), emulated.block_sum(near, 16, None, None, 0.0))
    h, B = matrix(2, 16, torch.bfloat16), matrix(64, 16, torch.bfloat16)
    for got, wanted in zip(
        emulated.lowrank_backward(far, h, B, 1.0, None, far, None, True, True, True, True),
        emulated.lowrank_backward(near, h, B, 1.0, None, near, None, True, True, True, True),
        strict=True,
    ):
        assert torch.equal(got, wanted)
    A, D = matrix(4, 64, torch.bfloat16), matrix(2, 4, torch.bfloat16)
    assert torch.equal(emulated.column_norm(far, A, D, 1.0), emulated.column_norm(near, A, D, 1.0))
    for t in (far, near):
        emulated.lowrank_update_(t, h, B, 1.0, None, None)
        emulated.block_tile_(t, h, None, None, 0.0, True)
    assert torch.equal(far, near)


# --- DoRA ------------------------------------------------------------------------------------------------------------


def norm_case(emulated, dtype, parameters, d, k, r, transposed):
    W = matrix(k, d, dtype).t() if transposed else matrix(d, k, dtype)
    A, B = (0.1 * torch.randn(r, k)).to(parameters), (0.1 * torch.randn(d, r)).to(parameters)
    if d > 5:  # a row that cancels, up to rounding
        W[3] = (-1.5 * 1.01 * (B[3].double() @ A.double())).to(dtype)
    wanted = reference("column_norm")(W.double(), A.double(), B.double(), 1.5).to(accumulate(dtype))
    tolerance = 1e-12 if dtype == parameters == torch.float64 else 2e-6
    got = emulated.column_norm(W, A, B, 1.5)
    assert_near(got, wanted, tolerance, f"{d, k, r, transposed}")
    assert ((got - wanted).abs() <= 1e-5 * wanted).all()  # row by row, the cancelling one too
    return W, A, B, wanted


NORMS = [  # d, k, r, transposed; half precision takes the tensor cores where k is a multiple of 8
    (10, 100, 16, False),
    (130, 256, 7, False),  # two tiles of rows, two splits of columns
    (140, 200, 24, False),  # k no multiple of what is read at once
    (270, 392, 40, False),  # two tiles of 256 rows
    (20, 136, 130, False),  # three tiles of ranks
    (33, 520, 70, False),
    (9, 1112, 17, False),  # nine pieces of A
    (3, 640, 260, False),  # two pieces of A in a block
    (3, 2500, 5, False),  # more splits of columns than a half warp has lanes
    (3, 2496, 5, False),
    (65, 300, 40, True),
    (33, 515, 70, False),  # more ranks than one pass takes; k odd
    (5, 64, 1, True),
    (200, 32, 24, False),
    (7, 40, 0, False),
    (4, 0, 3, False),
    (0, 16, 3, False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_norm(emulated, dtype):
    for parameters in {torch.float32, dtype}:
        for case in NORMS:
            norm_case(emulated, dtype, parameters, *case)


def laid_out(t, layout):
    """The values of t in another memory layout; what lies between them is NaN."""
    rows, columns = t.shape
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "offset":  # not aligned to 16 bytes
        memory = torch.full((rows * columns + 1,), float("nan"), dtype=t.dtype)[1:]
        return memory.view(rows, columns).copy_(t)
    wide = torch.full((rows, 2 * columns + 16), float("nan"), dtype=t.dtype)
    view = wide[:, 8 : 8 + columns] if layout == "rows" else wide[:, : 2 * columns : 2]
    return view.copy_(t)


LAYOUTS = ("transposed", "offset", "rows", "every second")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_norm_of_any_layout_and_dtype(emulated, dtype):
    d, k, r = 37, 192, 20
    for parameters in DTYPES:
        W, A, B, wanted = norm_case(emulated, dtype, parameters, d, k, r, False)
        near = emulated.column_norm(W, A, B, 1.5)
        for layout in LAYOUTS:
            far = emulated.column_norm(W, laid_out(A, layout), laid_out(B, layout), 1.5)
            assert torch.equal(far, near), (parameters, layout)
            assert_near(emulated.column_norm(laid_out(W, layout), A, B, 1.5), wanted, 2e-6, f"{parameters}, {layout}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_norm_does_not_depend_on_the_order_of_threads(emulated, order, dtype):
    for r in (40, 66):
        norm_case(emulated, dtype, torch.float32, 36, 264, r, False)


def fingerprint(A, B, W):
    """What a stamp holds: two sums over the elements of A, then B, then W's sample, of functions of their bits and
    positions; a position of the sample that lies beyond a row counts and adds nothing."""
    mask, low, high = 2**64 - 1, 0, 0
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    columns = sampled_columns(*W.shape)
    beyond = columns >= W.shape[1]
    sample = W.gather(1, columns.clamp(max=W.shape[1] - 1))
    signed = [
        (t.reshape(-1).view(integers[t.element_size()]).tolist(), 256 ** t.element_size()) for t in (A, B, sample)
    ]
    bits = [x % size for values, size in signed for x in values]
    skipped = [False] * (A.numel() + B.numel()) + beyond.reshape(-1).tolist()
    for position, x in enumerate(bits, 1):
        if skipped[position - 1]:
            continue
        z = (x + position * 0x9E3779B97F4A7C15) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        low, high = low + (z ^ z >> 31), high + (z >> 32) * (z & 0xFFFFFFFF)
    return torch.tensor([low & mask, high & mask], dtype=torch.uint64).view(torch.int64)


@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_fingerprint_is_of_values_and_positions_alone(emulated, parameters):
    cases = [
        (3, 5, 1),
        (5, 24, 8),
        (7, 300, 3),
        (150, 140, 2),
    ]  # the last: W's rows are sampled, some in one place less
    if parameters == torch.float32:
        cases.append((400, 100, 100))  # A takes two steps of every thread, and a row of B is no multiple of 16 bytes
    for d, k, r in cases:
        dtype = parameters if parameters != torch.float32 else torch.bfloat16
        W, A, B = matrix(d, k, dtype), matrix(r, k, parameters), matrix(d, r, parameters)
        wanted = fingerprint(A, B, W)
        for layout in (None, *LAYOUTS):
            norm, stamp = torch.zeros(d, dtype=accumulate(dtype)), torch.zeros(2, dtype=torch.int64)
            w, a, b = (t if layout is None else laid_out(t, layout) for t in (W, A, B))
            emulated.column_norm_cached_(norm, stamp, w, a, b, 1.0, True)
            assert torch.equal(stamp, wanted), (d, k, r, layout)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_cached_norm_follows_every_bit_of_A_and_B_and_of_a_small_W(emulated, dtype):
    W, A, B, wanted = norm_case(emulated, dtype, torch.float32, 33, 130, 6, False)
    norm, stamp = torch.zeros_like(wanted), torch.zeros(2, dtype=torch.int64)

    def cached(force):
        emulated.column_norm_cached_(norm, stamp, W, A, B, 1.5, force)

    cached(True)
    assert_near(norm, wanted, 2e-6)
    norm.fill_(7)
    cached(False)
    assert (norm == 7).all()  # nothing changed: kept
    cached(True)
    assert_near(norm, wanted, 2e-6)
    for change in (
        lambda: A.data.view(-1)[5].copy_(torch.nextafter(A.view(-1)[5], torch.tensor(9.0))),
        lambda: B.data.copy_(B.data.roll(1, 0)),  # the same values elsewhere
        lambda: B.data[0, 0].neg_(),
        lambda: W.data[32, 129].neg_(),
        lambda: W.data[:, :2].copy_(W.data[:, :2].flip(1)),
    ):
        before = stamp.clone()
        norm.fill_(7)
        change()
        cached(False)
        assert not torch.equal(stamp, before)
        now = reference("column_norm")(W.double(), A.double(), B.double(), 1.5).float()
        assert_near(norm, now, 2e-6)


def magnitude_case(emulated, dtype, T, d, k, r, vanishing, has_bias=False, padding=None, transposed=False):
    """``vanishing``: the columns where m is zero or nearly so, or "all"."""
    dy, x, h = matrix(T, d, dtype), matrix(T, k, dtype, padding), matrix(T, r, dtype)
    W, B = matrix(k, d, dtype).t() if transposed else matrix(d, k, dtype, padding), matrix(d, r, dtype)
    bias = 0.1 * matrix(1, d, dtype)[0] if has_bias else None
    dyz, g, norm = torch.randn(d), torch.rand(d) + 0.5, torch.rand(d) + 0.5
    if vanishing == "all":
        g.zero_()
    else:
        g[vanishing] = torch.tensor([0.0, 1e-6, -1e-6]).repeat(len(vanishing))[: len(vanishing)]
    if has_bias:  # beside which y holds too few digits
        g[d // 3] = 1e-3 * bias[d // 3].abs()
    vectors = [t.to(accumulate(dtype)) for t in (dyz, g, norm)]
    arguments = (vectors[0], dy, x, h, W, B, 0.7, *vectors[1:], bias)
    got, wanted = emulated.magnitude_grad(*arguments), reference("magnitude_grad")(*arguments)
    assert_near(got, wanted, 1e-12 if dtype == torch.float64 else 1e-5)
    if wanted.numel() and T:
        assert ((got - wanted).abs() <= 1e-3 * wanted.abs().max()).all()


MAGNITUDES = [  # T, d, k, r, columns where m vanishes, row stride of x and W, W transposed
    (20, 70, 50, 8, [5, 40], None, False),
    (70, 70, 64, 40, [0, 1, 2, 3, 30, 31, 32, 63, 69], None, False),  # three splits, a group of eight and one more
    (37, 19, 1056, 3, "all", 1064, False),  # several steps of a lane
    (33, 40, 48, 5, "all", 51, False),  # rows that are not aligned
    (40, 33, 24, 0, [7], None, True),
    (300, 12, 16, 2, [3, 4], None, False),  # more splits than a block has warps
    (3, 2100, 16, 2, [1, 2047, 2048, 2099], None, False),  # a second window of columns
    (9, 24, 0, 3, "all", None, False),
    (0, 24, 16, 3, "all", None, False),
    (5, 24, 16, 3, [], None, False),
    (5, 0, 16, 3, [], None, False),
]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_grad(emulated, dtype, has_bias):
    for T, d, k, r, vanishing, padding, transposed in MAGNITUDES:
        magnitude_case(emulated, dtype, T, d, k, r, vanishing, has_bias and d > 0, padding, transposed)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_magnitude_grad_does_not_depend_on_the_order_of_threads(emulated, order, dtype):
    magnitude_case(emulated, dtype, 70, 40, 64, 8, [1, 2, 3, 4, 5, 6, 7, 8, 9], True)
    magnitude_case(emulated, dtype, 33, 320, 16, 2, [300])  # found by another warp than the one whose word it is in


def test_magnitude_grad_reads_no_row_where_no_magnitude_vanishes(emulated):
    d, nan = 40, float("nan")
    dy, x, h, W, B = (torch.full(shape, nan) for shape in ((9, d), (9, 16), (9, 4), (d, 16), (d, 4)))
    dyz, g, norm = torch.randn(d), torch.rand(d) + 0.5, torch.rand(d) + 0.5
    assert_near(emulated.magnitude_grad(dyz, dy, x, h, W, B, 0.7, g, norm, None), dyz / (g * norm), 1e-6)


# --- Bat -------------------------------------------------------------------------------------------------------------

BLOCKS = [  # d, k, r
    (96, 64, 16),
    (96, 288, 96),  # tiles of 32
    (32, 96, 32),
    (64, 64, 64),
    (192, 640, 64),  # thread blocks that take a part of a block and then the next
    (32, 272, 16),  # shares that end where a block does
    (128, 384, 128),  # two tiles of columns
    (48, 240, 48),
    (12, 20, 4),
    (21, 14, 7),
    (80, 40, 20),
    (10, 200, 1),
    (150, 75, 75),
]


def weight_case(emulated, dtype, d, k, r, bat_dtype, row, padding=0, wide=False):
    W = matrix(d, k, dtype, k + padding)
    bat = 0.1 * torch.randn((k if row else d) // r, r, r)
    bat[0] *= 1e-4  # so small that fp16 could not hold it
    bat = bat.to(bat_dtype)
    for delta in (False, True):
        out = matrix(d, k, accumulate(dtype) if wide else dtype, k + padding)
        wanted = torch.empty(d, k, dtype=torch.float64)
        reference("bat_weight_")(wanted, W.double(), bat.double(), row, delta)
        emulated.bat_weight_(out, W, bat, row, delta)
        tolerance = 1e-6 if out.dtype == torch.float32 else ROUNDED[out.dtype]
        assert_near(out, wanted.to(out.dtype), tolerance, f"{d, k, r, row, delta}")
        assert_untouched(out, d, k + padding)
        if delta:  # small blocks too, relative to themselves
            part = (slice(None), slice(r)) if row else (slice(r), slice(None))
            assert_near(out[part], wanted[part].to(out.dtype), 2 * tolerance, f"{d, k, r, row}")


@pytest.mark.parametrize("row", [False, True], ids=["col", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bat_weight(emulated, dtype, row):
    for i, case in enumerate(BLOCKS):
        bat_dtype = torch.float32 if i % 3 or dtype == torch.float64 else dtype
        weight_case(emulated, dtype, *case, bat_dtype, row, (0, 8, 3)[i // 2 % 3], wide=i % 2 == 1)


def contract_case(emulated, dtype, d, k, r, G_dtype, padding=0):
    W, G = matrix(d, k, dtype, k + padding), matrix(d, k, G_dtype, k + padding)
    if dtype == torch.float16:
        G *= 1e-7 if G_dtype == torch.float32 else 1e-2
    dB = torch.full((d // r, r, r), float("nan"), dtype=accumulate(dtype))
    wanted = torch.empty(dB.shape, dtype=torch.float64)
    reference("bat_contract_")(wanted, W.double(), G.double())
    emulated.bat_contract_(dB, W, G)
    assert_near(dB, wanted.to(dB.dtype), 1e-12 if dtype == torch.float64 else 1e-6, f"{d, k, r, G_dtype, padding}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bat_contract(emulated, dtype):
    for i, case in enumerate([*BLOCKS, (16, 1040, 16), (64, 0, 16)]):
        for G_dtype in {dtype, accumulate(dtype)}:
            contract_case(emulated, dtype, *case, G_dtype, (0, 8, 3)[i // 2 % 3])


def test_bat_reads_transposed_weights(emulated):
    W, bat, G = matrix(96, 64, torch.bfloat16).t(), torch.randn(4, 16, 16), matrix(64, 96, torch.float32)
    for row in (False, True):
        blocks = torch.randn(6, 16, 16) if row else bat
        out, wanted = (torch.empty(64, 96, dtype=torch.bfloat16) for _ in range(2))
        reference("bat_weight_")(wanted, W, blocks, row, False)
        emulated.bat_weight_(out, W, blocks, row, False)
        assert_near(out, wanted, ROUNDED[torch.bfloat16])
    got, wanted = torch.empty(4, 16, 16), torch.empty(4, 16, 16)
    reference("bat_contract_")(wanted, W, G)
    emulated.bat_contract_(got, W, G)
    assert_near(got, wanted, 1e-6)


def before_a_hole(t):
    """A copy that ends where memory does: reading on is a segmentation fault."""
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    memory = mmap.mmap(-1, (-(-size // page) + 1) * page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + len(memory) - page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), page, 0) == 0
    held = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=len(memory) - page - size)
    return held.view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bat_reads_nothing_beyond_its_tensors(emulated, dtype):
    for d, k, r, row in ((32, 80, 16, False), (80, 32, 16, True), (64, 96, 32, False), (64, 192, 64, False)):
        W, G = before_a_hole(matrix(d, k, dtype)), before_a_hole(matrix(d, k, torch.float32))
        bat, out = before_a_hole(torch.zeros((k if row else d) // r, r, r)), torch.empty(d, k, dtype=dtype)
        emulated.bat_weight_(out, W, bat, row, False)
        assert torch.equal(out, W)
        dB, wanted = (torch.empty(d // r, r, r) for _ in range(2))
        emulated.bat_contract_(dB, W, G)
        reference("bat_contract_")(wanted, W, G)
        assert_near(dB, wanted, 1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bat_does_not_depend_on_the_order_of_threads(emulated, order, dtype):
    weight_case(emulated, dtype, 64, 128, 32, torch.float32, False)
    contract_case(emulated, dtype, 32, 1056, 32, torch.float32)
    weight_case(emulated, dtype, 128, 448, 64, torch.float32, False)  # from a part of a block on to the next
    contract_case(emulated, dtype, 128, 384, 64, torch.float32)


# --- CSR -------------------------------------------------------------------------------------------------------------


def pattern(d, k, nnz, dense_row=None):
    """row_offsets and columns of a random mask, with a full row where asked, and its transpose with the permutation."""
    mask = torch.zeros(d, k, dtype=torch.bool)
    if nnz:
        mask.view(-1)[torch.randperm(d * k)[:nnz]] = True
    if dense_row is not None:
        mask[dense_row] = True
    csr = CSR.from_dense(mask)
    return csr.pattern


PATTERNS = [  # d, k, nnz, dense row
    (40, 50, 200, None),
    (300, 600, 2500, 7),  # two chunks of rows, two blocks of columns
    (20, 1100, 90, 3),  # empty rows, three blocks
    (520, 9, 100, 519),
    (1, 1, 1, None),
    (30, 40, 0, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_csr_scatter_and_gather(emulated, dtype):
    for case in PATTERNS:
        d, k = case[:2]
        offsets, columns, *_ = pattern(*case)
        for values_dtype in {dtype, torch.float32}:
            values = torch.randn(columns.numel()).to(values_dtype)
            for stride in (None, k + 3):
                for accumulate_ in (False, True):
                    out = matrix(d, k, dtype, stride)
                    wanted = out.clone()
                    reference("csr_scatter_")(wanted, values, offsets, columns, accumulate_)
                    emulated.csr_scatter_(out, values, offsets, columns, accumulate_)
                    assert torch.equal(out, wanted), case
                    assert_untouched(out, d, stride)
            first, last = d // 3, d - d // 4  # rows of a larger matrix
            dense, some = matrix(k, last - first, dtype).t(), offsets[first : last + 1].contiguous()
            got, wanted = (torch.full((columns.numel(),), 7.0, dtype=values_dtype) for _ in range(2))
            emulated.csr_gather_(got, dense, some, columns)
            reference("csr_gather_")(wanted, dense, some, columns)
            assert torch.equal(got, wanted), case


def products_case(emulated, dtype, T, case, values_dtype, padding):
    """csr_sddmm, and csr_spmm_ with the matrix and with its transpose. What no entry needs is NaN for the kernels."""
    d, k = case[:2]
    p = pattern(*case)
    x, dy = matrix(T, k, dtype, k + padding), matrix(T, d, dtype, d + padding)
    got = emulated.csr_sddmm(dy, x, p.row_offsets, p.columns)
    wanted = reference("csr_sddmm")(dy.double(), x.double(), p.row_offsets, p.columns)
    assert_near(got, wanted.to(got.dtype), 1e-12 if dtype == torch.float64 else 2e-6, f"sddmm {T, case, padding}")
    empty = [
        torch.ones(n, dtype=torch.bool).index_fill_(0, at.long(), False) for n, at in ((k, p.columns), (d, p.rows))
    ]
    values = torch.randn(p.columns.numel()).to(values_dtype)
    straight, turned = (p.row_offsets, p.columns, None), (p.column_offsets, p.rows, p.permutation)
    for n, source, arguments, unread in ((d, x, straight, empty[0]), (k, dy, turned, empty[1])):
        out = matrix(T, n, dtype, n + padding)
        wanted = out.clone()
        reference("csr_spmm_")(wanted, source, values, *arguments)
        source[:, unread] = float("nan")
        emulated.csr_spmm_(out, source, values, *arguments)
        assert_near(out, wanted, ROUNDED[dtype], f"spmm {T, case, padding}")
        assert_untouched(out, T, n + padding)


@pytest.mark.parametrize("T", [0, 1, 19, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_csr_products(emulated, dtype, T):
    for i, case in enumerate(PATTERNS):
        products_case(emulated, dtype, T, case, torch.float32 if i % 2 else dtype, (0, 3, 16)[i % 3])


def test_csr_products_of_several_slabs_and_chunks_in_a_block(emulated, monkeypatch):
    monkeypatch.setenv("EMULATOR_ORDER", "3")
    products_case(emulated, torch.float64, 63, (600, 51_000, 900, 599), torch.float64, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_csr_products_of_many_rows(emulated, dtype):
    """Six chunks of rows in a block, a last slab and a last block of columns that are not full, and a row of more
    entries than eight lanes share."""
    T = 2200 // dtype.itemsize
    assert plan(emulated.plans.product_plan_of, T, 1064, 1040, 5000, CODES[dtype], 1)[1:5] == [1, 6, 3, 18]
    products_case(emulated, dtype, T, (1064, 1040, 5000, 700), torch.float32, 0)


@pytest.mark.parametrize("padding", [0, 3, 16])
def test_csr_products_of_rows_that_are_not_whole(emulated, padding):
    for d, k in ((130, 40), (128, 44), (136, 40)):
        products_case(emulated, torch.bfloat16, 77, (d, k, 300, 3), torch.float32, padding)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_csr_products_do_not_depend_on_the_order_of_threads(emulated, order, dtype):
    products_case(emulated, dtype, 70, (300, 600, 2500, 7), dtype, 0)
    products_case(emulated, dtype, 70, (304, 600, 2500, 7), dtype, 8)
    products_case(emulated, dtype, 3, (40, 50, 200, None), dtype, 0)
    products_case(emulated, dtype, 2200 // dtype.itemsize, (1064, 16, 400, None), dtype, 0)


# --- plans -----------------------------------------------------------------------------------------------------------


CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_plan_covers_every_row_and_column_once(emulated, dtype):
    size = 8 if dtype == torch.float64 else 4
    for T in (0, 1, 15, 16, 17, 500, 8192, 2**22):
        for d in (1, 128, 512, 513, 4096, 14336, 100_000):
            for r in (1, 8, 16, 17, 64, 65, 256):
                ranks, tile, chunks, split, splits, dB, db, dyz, total = plan(
                    emulated.plans.backward_plan_of, T, d, r, CODES[dtype], 1, 1, 1, 1, 1
                )
                assert (chunks - 1) * tile < d <= chunks * tile
                assert T == 0 or (splits - 1) * split < T <= splits * split
                assert split % (16 if dtype in HALF else 32) == 0 and 1 <= ranks <= min(r, 64)
                assert splits == 1 or chunks * splits <= (132 if dtype in HALF else 264)
                assert chunks * splits < 2**31
                sizes = chunks * T * ranks, splits * d * ranks, splits * d, splits * d
                assert [dB, db, dyz, total // size] == [sum(sizes[:n]) for n in (1, 2, 3, 4)]


def test_backward_partial_sums_stay_far_below_dy(emulated):
    for d in (4096, 14336):
        for r, share in ((16, 0.13), (64, 0.54)):
            *_, total = plan(emulated.plans.backward_plan_of, 8192, d, r, CODES[torch.bfloat16], 1, 1, 0, 0, 0)
            assert total < share * 8192 * d * 2, (d, r, total)


@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_plan_covers_every_row_and_column_once(emulated, dtype, aligned):
    size = accumulate(dtype).itemsize
    for d in (1, 127, 128, 129, 4096, 14336, 131072):
        for k in (0, 1, 127, 128, 129, 4096, 14336):
            for r in (0, 1, 16, 63, 64, 100):
                units, ranks, tile, tiles, split, splits, square, gram, stamp, total = plan(
                    emulated.plans.norm_plan_of, d, k, r, CODES[dtype], aligned, 1
                )
                assert units == (dtype in HALF and aligned) and ranks == min(r, 64)
                assert (tiles - 1) * tile < d <= tiles * tile
                assert k == 0 or (splits - 1) * split < k <= splits * split
                assert split % 64 == 0 and splits <= 32
                assert square == splits * d * -(-r // 4) * 4 and square + splits * d <= gram < square + splits * d + 4
                assert gram % 4 == 0 and stamp % 8 == 0 and total == stamp + 8 * 513
                assert stamp >= size * (gram + r * r) + r * k * (4 if units else size)


def test_norm_fills_an_h100_in_whole_waves(emulated):
    for d, k, r, per_wave in (
        (4096, 4096, 16, 264),
        (14336, 4096, 16, 264),
        (4096, 14336, 16, 264),
        (4096, 4096, 64, 132),
        (4096, 14336, 64, 132),
    ):
        _, _, _, tiles, _, splits, *_ = plan(emulated.plans.norm_plan_of, d, k, r, CODES[torch.bfloat16], 1, 1)
        blocks = tiles * splits + 4  # four add up A Aᵀ
        assert blocks <= -(-blocks // per_wave) * per_wave <= 1.03 * blocks, (d, k, r, blocks)


@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_plan_covers_every_row_once(emulated, dtype, aligned):
    for r in (1, 7, 16, 48, 64, 75, 96, 128, 256):
        for blocks in (0, 1, 32, 500):
            for k in (0, r, 5 * r, 17 * r, 64 * r):
                units, tile, tiles, steps, share, grid, splits, total = plan(
                    emulated.plans.contract_plan_of, blocks * r, k, r, CODES[dtype], aligned
                )
                assert units == (dtype in HALF and aligned and r % 16 == 0)
                assert tiles == blocks * (-(-r // tile)) ** 2 and (not units or r % tile == 0)
                assert (steps - 1) * 16 < k <= steps * 16 and share >= 16
                assert (grid - 1) * share < tiles * steps <= grid * share
                starts = range(0, tiles * steps, steps or 1)  # of the tiles
                met = [(at + steps - 1) // share - at // share + 1 for at in starts]
                assert not met or max(met) <= splits <= max(met) + 1
                assert total == splits * tiles * tile**2 * accumulate(dtype).itemsize


def test_contract_fills_an_h100(emulated):
    for d, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
        for r in (16, 32, 64, 128):
            _, tile, tiles, steps, share, grid, *_ = plan(
                emulated.plans.contract_plan_of, d, k, r, CODES[torch.bfloat16], 1
            )
            slots = 132 if tile == 64 else 264
            assert 0.94 * slots <= grid <= slots and tiles * steps > 0.94 * slots * share, (d, k, r)
    *_, splits, _ = plan(emulated.plans.contract_plan_of, 4096, 4096, 64, CODES[torch.bfloat16], 1)
    assert splits == 2  # a share of 128 steps, not 125, ends where a tile does


def test_weight_fills_an_h100(emulated):
    for blocks, others, r in ((64, 64, 64), (224, 64, 64), (64, 224, 64), (32, 32, 128), (128, 128, 32), (9, 2502, 16)):
        units, tile, panels, groups, items, parts, shared = plan(emulated.plans.weight_plan_of, blocks, others, r, 2)
        assert units and panels * tile == r and shared == 4 * r * tile
        assert items == blocks * r // 16 * groups and (groups - 1) * 64 // tile < others <= groups * 64 // tile
        assert panels * parts == 264
    units, *_, parts, shared = plan(emulated.plans.weight_plan_of, 1, 1, 64, 2)
    assert units and parts == 1  # too small to be shared
    for r, parts in ((40, 2), (512, 2), (384, 3)):
        assert not plan(emulated.plans.weight_plan_of, 2, 2, r, parts)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_plan_covers_every_tile_and_slab_once(emulated, dtype):
    size = torch.tensor([], dtype=dtype).element_size()
    for T in (0, 1, 63, 64, 65, 2048, 8192, 2**22):
        for d in (1, 256, 257, 4096, 128_000):
            for k in (1, 512, 513, 4096, 14336):
                for nnz in (1, d * k // 160, min(d * k, 2**31 - 1)):
                    chunks, blocks, slabs, split, splits, part, parts, the_list, source, sections, total = plan(
                        emulated.plans.sampled_plan_of, T, d, k, nnz, CODES[dtype]
                    )
                    assert (chunks - 1) * 256 < d <= chunks * 256 and (blocks - 1) * 512 < k <= blocks * 512
                    assert (slabs - 1) * 128 < T * size <= slabs * 128
                    assert splits == 0 if T == 0 else (splits - 1) * split < slabs <= splits * split
                    assert (parts - 1) * part < chunks <= parts * part
                    assert blocks * parts * splits < 2**31
                    wide = max(size, 4)
                    assert splits <= 1 or splits * nnz * wide <= 2**26
                    assert the_list == splits * nnz * wide and source == the_list + 4 * nnz
                    assert sections == source + 4 * nnz and total == sections + 8 * chunks * blocks


@pytest.mark.parametrize("k", [1024, 4096, 14336])
def test_sampled_product_fills_an_h100(emulated, k):
    for T in (512, 2048, 8192):
        _, blocks, _, _, splits, _, parts, *_ = plan(
            emulated.plans.sampled_plan_of, T, 4096, k, 4096 * k // 160, CODES[torch.bfloat16]
        )
        assert 132 <= blocks * parts * splits <= 264, T


@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_plan_covers_every_row_and_column_once(emulated, dtype, aligned):
    size = torch.tensor([], dtype=dtype).element_size()
    for T in (1, 16, 17, 63, 64, 65, 512, 8192, 2**22):
        for d in (1, 64, 65, 4096, 14336, 128_000):
            for k in (1, 512, 513, 4096, 14336):
                for nnz in (1, d * k // 160):
                    few, whole, rows, tiles, slabs, chunks, blocks, sections, total = plan(
                        emulated.plans.product_plan_of, T, d, k, nnz, CODES[dtype], aligned
                    )
                    assert few == (T <= 16)
                    if few:
                        assert total == 0
                        continue
                    assert whole == (aligned and d * size % 16 == 0 and k * size % 16 == 0)
                    assert (slabs - 1) * 128 < T * size <= slabs * 128 and (blocks - 1) * 512 < k <= blocks * 512
                    assert (tiles - 1) * rows * 64 < d <= tiles * rows * 64 and chunks == tiles * rows
                    assert rows == (2 if not whole or slabs * -(-d // 128) <= 132 else 6)
                    assert sections == nnz * (16 if dtype == torch.float64 else 8)
                    assert total == sections + 8 * 64 * (chunks * blocks + 2)


# --- launching -------------------------------------------------------------------------------------------------------


def test_the_shared_memory_of_a_kernel_is_set_once_for_all_sizes(emulated):
    """The emulator refuses a kernel another maximum than its first: no thread may lower what another launches with."""
    state = emulated.plans.shared_memory_of
    for r in (320, 256):  # 80 and 64 KB
        before, *_ = plan(state, 0)
        weight_case(emulated, torch.bfloat16, r, r, r, torch.float32, False)
        calls, value, _, pending = plan(state, 0)
        assert calls > before and value == 99 * 1024 and pending == 0


def test_a_refused_launch_reports_its_error_and_leaves_none_behind(emulated):
    W, bat = matrix(256, 256, torch.bfloat16), torch.zeros(1, 256, 256)
    state, out = emulated.plans.shared_memory_of, torch.empty_like(W)
    plan(state, 98)
    with pytest.raises(RuntimeError, match="error 98"):
        emulated.bat_weight_(out, W, bat, False, False)
    assert plan(state, 0)[2:] == [0, 0]
    emulated.bat_weight_(out, W, bat, False, False)
    assert torch.equal(out, W)


# --- products with an update in them ---------------------------------------------------------------------------------

ROUTES = ["library", "update_first", "fused"]
MATMULS = [  # T, d, k, r
    (37, 24, 40, 16),
    (1, 8, 16, 8),
    (5, 16, 24, 12),  # factors whose rows start at no multiple of 16 bytes: copied, as they are small
    (9, 8, 16, 1),
    (6, 264, 72, 4),
    (7, 40, 16, 256),
]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setenv("EMULATOR_HOPPER", "1")


@pytest.fixture(params=ROUTES)
def route(request, hopper, monkeypatch):
    monkeypatch.setenv("SPECTRAL_OPS_MATMUL", request.param)
    return request.param


def route_of(name, args):
    """By what is launched: the kernel, or products of the library in this order."""
    made = launches.recorded(name, args)
    if any("two_segment" in launch.kernel for launch in made):
        assert len(made) == 1, made
        return "fused"
    x, weight = args[:2]
    last = made[-1].product == (*x.shape[:1], *weight.shape)
    return "update_first" if last and len(made) > 1 else "library"


def matmul_args(T, d, k, r, dtype=torch.bfloat16, scaled=False, biased=False):
    g = 1 + 0.1 * torch.randn(d, dtype=accumulate(dtype)) if scaled else None
    return matrix(T, k, dtype), matrix(d, k, dtype), matrix(T, r, dtype), matrix(d, r, dtype), 0.7, g, (
        torch.randn(d).to(dtype) if biased else None
    )  # fmt: skip


def same_as_reference(emulated, name, args, dtype, what=""):
    got, wanted = getattr(emulated, name)(*args), reference(name)(*args)
    assert_near(got, wanted, 2 * ROUNDED[dtype], what)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_lowrank_matmul_by_every_route(emulated, route, dtype, scaled, biased):
    for sizes in MATMULS:
        x, W, h, B, *rest = matmul_args(*sizes, dtype, scaled, biased)
        for weight in (W, W.t().contiguous().t()):
            for factor in (B, B.t().contiguous().t()):
                args = x, weight, h, factor, *rest
                same_as_reference(emulated, "lowrank_matmul", args, dtype, f"{sizes}")
                wanted = "library" if scaled and route == "update_first" else route
                assert route_of("lowrank_matmul", args) == wanted, sizes


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_block_matmul_by_every_route(emulated, route, dtype, biased):
    for T, d, k, r in MATMULS:
        x, W, s, _, _, _, bias = matmul_args(T, d, k, r, dtype, False, biased)
        for weight in (W, W.t().contiguous().t()):
            same_as_reference(emulated, "block_matmul", (x, weight, s, bias), dtype, f"{T, d, k, r}")
            wanted = "library" if biased and route == "update_first" else route
            assert route_of("block_matmul", (x, weight, s, bias)) == wanted, (T, d, k, r)


def test_what_the_kernel_does_not_take_goes_to_the_library(emulated, hopper, monkeypatch):
    monkeypatch.setenv("SPECTRAL_OPS_MATMUL", "fused")
    bf16 = torch.bfloat16
    x, W, h, B, *rest = matmul_args(9, 16, 24, 8)
    odd = [
        (matrix(9, 24, bf16, 25), W, h, B, *rest),
        (matrix(24, 9, bf16).t(), W, h, B, *rest),
        (x, matrix(16, 24, bf16, 27), h, B, *rest),
        (x[:, 1:], W[:, 1:], h, B, *rest),
        (x[:1].expand(9, 24), W, h, B, *rest),
        matmul_args(9, 15, 24, 8),  # rows of y
        matmul_args(9, 16, 24, 264),
    ]
    odd += [matmul_args(9, 16, 24, 8, dtype, True, True) for dtype in (torch.float32, torch.float64)]
    for args in odd:
        same_as_reference(emulated, "lowrank_matmul", args, args[0].dtype)
        assert route_of("lowrank_matmul", args) != "fused"
        tiled = *args[:3], args[-1]
        same_as_reference(emulated, "block_matmul", tiled, args[0].dtype)
    monkeypatch.setenv("EMULATOR_HOPPER", "0")  # another GPU
    args = x, W, h, B, *rest
    monkeypatch.delenv("SPECTRAL_OPS_MATMUL")
    same_as_reference(emulated, "lowrank_matmul", args, bf16)
    assert route_of("lowrank_matmul", args) != "fused"


def test_products_of_nothing(emulated, route):
    for sizes in ((0, 16, 24, 8), (9, 0, 24, 8), (9, 16, 24, 0), (9, 16, 0, 8)):
        for scaled, biased in ((False, False), (False, True), (True, True)):
            args = matmul_args(*sizes, torch.bfloat16, scaled, biased)
            same_as_reference(emulated, "lowrank_matmul", args, torch.bfloat16, f"{sizes}")
            if sizes[3]:
                same_as_reference(emulated, "block_matmul", (*args[:3], args[-1]), torch.bfloat16, f"{sizes}")


BAD = [(name, "vector") for name in ("x", "weight", "h", "B")] + [(name, "short") for name in ("h", "B", "g", "bias")]
BAD += [("weight", "narrow"), ("weight", "float"), ("h", "float"), ("B", "float"), ("g", "int"), ("bias", "int")]


@pytest.mark.parametrize("name, how", BAD)
def test_bad_products_are_refused_by_name(emulated, hopper, name, how):
    args = matmul_args(9, 16, 24, 8, torch.bfloat16, True, True)
    named = dict(zip(("x", "weight", "h", "B", "scale", "g", "bias"), args, strict=True))
    t = named[name]
    others = {"vector": t.flatten(), "short": t[:-1], "narrow": t[..., :-1], "float": t.float(), "int": t.int()}
    named[name] = others[how]
    with pytest.raises(RuntimeError, match=rf"\b{name}: "):
        emulated.lowrank_matmul(*named.values())
    if name not in ("B", "g"):
        with pytest.raises(RuntimeError, match=rf"\b{'s' if name == 'h' else name}: "):
            emulated.block_matmul(*(named[n] for n in ("x", "weight", "h", "bias")))


def test_the_route_goes_by_sizes(emulated, hopper):
    """A large product joins the update on Hopper; one with few tokens does not."""
    assert route_of("lowrank_matmul", matmul_args(8192, 4096, 4096, 16)) == "fused"
    assert route_of("lowrank_matmul", matmul_args(16, 4096, 4096, 16)) != "fused"


# --- layers: the operators of a whole layer, around the same kernels -------------------------------------------------


IN_PYTHON = {"conv", "embedding", "experts", "float8", "householder", "svft"}  # their kernels hide that on a GPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in sorted(LAYERS) if LAYERS[name].stem not in IN_PYTHON])
def test_layer(emulated, name, dtype):
    """The C++ of a layer with its CUDA kernels emulated, against the composition in Python of references."""
    layer = LAYERS[name]
    for args in layer_samples(name, dtype):
        if name == "bat_linear_forward" and args[-1] and dtype in HALF:
            continue  # exact: on a GPU W' - W is multiplied apart, which a CPU's tensors do not ask for
        got, want = (results(layer, run, args) for run in (getattr(emulated, name), layer.overloads["reference"]))
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_near(a, b, 4 * ROUNDED[dtype], f"result {i} of {name}")


JOINING = [name for name in sorted(LAYERS) if {"lowrank_matmul", "block_matmul"}.intersection(LAYERS[name].pieces)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", JOINING)
def test_layer_by_every_route(emulated, route, name, dtype):
    layer = LAYERS[name]
    for args in layer_samples(name, dtype):
        got, want = (results(layer, run, args) for run in (getattr(emulated, name), layer.overloads["reference"]))
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_near(a, b, 4 * ROUNDED[dtype], f"result {i} of {name}")


def test_a_route_that_there_is_not_raises(emulated, monkeypatch):
    monkeypatch.setenv("SPECTRAL_OPS_MATMUL", "fast")
    x, W, h, B = (torch.ones(8, 8, dtype=torch.bfloat16) for _ in range(4))
    with pytest.raises(RuntimeError, match="SPECTRAL_OPS_MATMUL: got fast, wanted library, update_first or fused"):
        emulated.lowrank_matmul(x, W, h, B, 1.0, None, None)


@pytest.mark.parametrize("name", [n for n in JOINING if n != "lowrank_group_backward"])
def test_a_layer_makes_its_product_in_one_launch(emulated, hopper, monkeypatch, name):
    """Where nothing is dropped, the widest product is the kernel's, and no pass over its result follows."""
    monkeypatch.setenv("SPECTRAL_OPS_MATMUL", "fused")
    joined = 0
    for args in layer_samples(name, torch.bfloat16):
        joined += sum("two_segment" in launch.kernel for launch in launches.recorded(name, args))
    assert joined, name
