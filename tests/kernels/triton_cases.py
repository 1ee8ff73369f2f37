"""What test_triton.py runs in a process of its own, where TRITON_INTERPRET was set before triton was imported.

``CASES`` names the cases; importing this module imports no triton. As a program it reads names from standard input and
answers each with one line of JSON: null, or the traceback. ``python tests/kernels/triton_cases.py NAME...`` runs some.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch
from budget import check_operator
from instruments import poisoned, results
from oracles import sampled_entries
from samples import OPERATOR_NAMES, samples_of

from spectral_ops import _library, triton_kernels, use_backend
from spectral_ops.core import philox

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# tokens, in_features, out_features, rank: one token; odd sizes; 4 and 8 dividing k; past a tile on every side
SIZES = [(6, 21, 34, 5), (1, 24, 40, 1), (67, 48, 57, 3), (5, 260, 72, 16), (3, 130, 259, 17), (70, 64, 136, 64)]
SIZES_MORE = [(300, 20, 33, 3), (4, 1030, 8, 16), (9, 40, 36, 130), (40, 8, 8, 300)]  # several ranges; large ranks
# blocks of Bat: r no power of two; then sums in two stages, and blocks in several steps, with aligned rows and without
SIZES_BAT = [(6, 11, 15, 5), (1, 4, 3, 1), (3, 34, 51, 17), (70, 64, 128, 64)]
SIZES_BAT_MORE = [(37, 12, 9, 3), (4, 96, 32, 16), (5, 160, 80, 80), (3, 72, 36, 36)]
# a row of several steps; tokens past a tile, and in several ranges
SIZES_CSR = [(6, 21, 34, 5), (1, 150, 12, 1), (67, 24, 9, 3)]
SIZES_CSR_MORE = [(300, 10, 17, 3), (3, 260, 70, 1)]
# programs search the offsets, which takes the interpreter long: none of these is of many
SIZES_SEGMENT, SIZES_SEGMENT_MORE = SIZES[:4], [*SIZES[-1:], (300, 20, 33, 3), (9, 40, 36, 130)]
SIZES_LOGITS = [(6, 21, 34, 5), (1, 24, 1, 1), (3, 1, 9000, 1)]  # V: one logit; several steps
SIZES_CAYLEY = [(6, 1, 1, 5), (1, 1, 1, 1), (3, 1, 1, 17), (2, 1, 1, 33)]
SIZES_CAYLEY_MORE = [(1, 1, 1, 64), (1, 1, 1, 65)]  # the largest of the kernels, and one past it
# kernels with few tokens or rows per program: the interpreter's time goes by programs, so they get fewer of either
SMALL_TILES = {
    "block_sum": (19, 72), "block_tile_": (19, 72), "seeded_dropout": (19, 72), "magnitude_grad": (19, 40),
    "routing_combine": (19, 1100), "routing_combine_backward": (19, 1100),
}  # fmt: skip
OPERATORS = [name for name in OPERATOR_NAMES if triton_kernels.has(_library.OPERATORS[name].stem, name)]
TILES = {name: triton_kernels.tiles(_library.OPERATORS[name].stem, name) for name in OPERATORS}
CASES: dict[str, Callable[[], None]] = {}
THOROUGH: set[str] = set()  # those of CASES that take the interpreter long


def case(function: Callable) -> Callable:
    CASES[function.__name__] = function
    return function


def thorough(function: Callable) -> Callable:
    THOROUGH.add(function.__name__)
    return case(function)


def triton_op(name: str) -> Callable:
    return _library.OPERATORS[name].overloads["triton"]


def samples(name: str, dtype: torch.dtype, size: tuple[int, int, int, int]) -> list[tuple]:
    T, k, d, r = size
    most_T, most_d = SMALL_TILES.get(name, (T, d))
    return samples_of(name, dtype=dtype, T=min(T, most_T), d=min(d, most_d), k=k, r=r)


def check(name: str, dtype: torch.dtype, size: tuple[int, int, int, int], turn: int) -> None:
    """Against the float64 reference, with buffers that start as NaN; in float16 twice, with the same bits.

    Every other sample, by ``turn``: of two dtypes and sizes that differ in one step each the one runs what the other
    leaves out.
    """
    chosen = samples(name, dtype, size)
    for args in chosen[turn % 2 :: 2] or chosen:
        with poisoned():
            first = check_operator(_library.OPERATORS[name], triton_op(name), args)
            if dtype == torch.float16:
                again = results(_library.OPERATORS[name], triton_op(name), args)
                for a, b in zip(first, again, strict=True):
                    assert torch.equal(a, b), f"{name}: two runs differ"


def sizes(name: str, dtype: torch.dtype) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]]:
    """Those of every run, and those of a thorough one."""
    of_row = {
        "bat": (SIZES_BAT, SIZES_BAT_MORE),
        "csr": (SIZES_CSR, SIZES_CSR_MORE),
        "cayley": (SIZES_CAYLEY, SIZES_CAYLEY_MORE),
        "segment": (SIZES_SEGMENT, SIZES_SEGMENT_MORE),
    }
    some, more = of_row.get(name.partition("_")[0], (SIZES, SIZES_MORE))
    if name in ("target_logprob", "softmax_gradient_"):
        some, more = SIZES_LOGITS, []
    # numpy has float16 and no bfloat16, which the interpreter emulates at several times the cost
    return (some[:2] + some[-1:] + more[:1], more[1:]) if dtype == torch.float16 else (some, [])


for _name in OPERATORS:
    for _dtype in DTYPES:
        for _more, _sizes in enumerate(sizes(_name, _dtype)):
            for _turn, _size in enumerate(_sizes, DTYPES.index(_dtype)):
                _label = f"{_name}-{str(_dtype)[6:]}-{'x'.join(map(str, _size))}"
                CASES[_label] = functools.partial(check, _name, _dtype, _size, _turn)
                THOROUGH.update([_label] * _more)


def check_empty(name: str) -> None:
    """No tokens, no inputs, no outputs, no rank: the shapes and zeros of the reference."""
    for T, k, d, r in [(0, 8, 12, 2), (3, 0, 12, 2), (3, 8, 0, 2), (3, 8, 12, 0)]:
        for args in samples(name, torch.float32, (T, k, d, r)):
            if name.startswith(("block_", "bat_")) and 0 in (k, d, r):
                continue  # no shard to belong to
            operator = _library.OPERATORS[name]
            with poisoned():
                got = results(operator, triton_op(name), args)
            want = results(operator, operator.overloads["reference"], args)
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype, (name, (T, k, d, r), a.shape, b.shape)
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


for _name in OPERATORS:
    CASES[f"{_name}-empty"] = functools.partial(check_empty, _name)


def check_float64(name: str) -> None:
    for args in samples(name, torch.float64, SIZES[0]):
        operator = _library.OPERATORS[name]
        got = results(operator, triton_op(name), args)
        want = results(operator, operator.overloads["reference"], args)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


for _name in OPERATORS:
    CASES[f"{_name}-float64"] = functools.partial(check_float64, _name)


def check_tiles(name: str) -> None:
    """Every other tile that the launcher takes, over rows that are aligned, as tables are for those."""
    launch = triton_kernels.launcher(_library.OPERATORS[name].stem, name)
    for tiles in TILES[name]:
        with poisoned():
            call = functools.partial(launch, tiles=tiles)
            check_operator(_library.OPERATORS[name], call, samples(name, torch.float32, (40, 32, 48, 16))[0])


for _name in filter(TILES.get, OPERATORS):
    CASES[f"{_name}-tiles"] = functools.partial(check_tiles, _name)


@case
def every_float8_number() -> None:
    """Decoded from its bits: subnormals, the NaNs and infinities of either format, and both zeros."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        numbers, out = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(16, 16), torch.empty(16, 16)
        triton_op("float8_dequantise_")(out, numbers, torch.ones(1, 1), 16, 16)
        want = numbers.float()
        assert torch.equal(out.isnan(), want.isnan()) and torch.equal(1 / out[~out.isnan()], 1 / want[~want.isnan()])


@case
def every_operator_is_listed():
    """What is read from a module's source is what importing it finds."""
    without = {"block_matmul"}  # no kernel: the library's product and block_tile_
    for name, operator in _library.OPERATORS.items():
        assert triton_kernels.has(operator.stem, name) == (name not in without), f"{name} has lost its Triton kernel"
        module = importlib.import_module(f"spectral_ops.triton_kernels.{operator.stem}")
        assert triton_kernels.has(operator.stem, name) == callable(getattr(module, name, None)), name


@thorough
def gradients_that_read_dy_twice():
    """With g, biases and y; one range of tokens and several; rows that are not aligned; dB and nothing else."""
    from spectral_ops.triton_kernels import lowrank

    held, operator, backward = lowrank.HELD, _library.OPERATORS["lowrank_backward"], triton_op("lowrank_backward")
    lowrank.HELD = 0
    try:
        for dtype in (torch.bfloat16, torch.float32):
            for size in ((300, 8, 72, 40), (67, 8, 57, 130)):
                for args in samples("lowrank_backward", dtype, size):
                    only = (*args[:5], None, None, False, True, False, False)
                    for each in (args, only):
                        with seen_as("lowrank", 90) as names, poisoned():
                            check_operator(operator, backward, each)
                        assert ("outer_kernel" in names) == each[8]
                        assert ("backward_kernel" in names) == (each[5] is not None or each[7] or any(each[9:]))
    finally:
        lowrank.HELD = held


@case
def sparse_products_in_several_chunks_of_tokens():
    """Whole chunks, and one that is cut; and the most tokens that are read as they are."""
    from spectral_ops.triton_kernels import csr

    whole = csr.TURNED
    csr.TURNED = 128 * 40 * 2  # bytes of 128 tokens
    try:
        for T in (csr.FEW - 1, 256, 300):
            for name in ("csr_spmm_", "csr_sddmm"):
                for args in samples_of(name, dtype=torch.bfloat16, T=T, d=19, k=40, r=1):
                    with poisoned():
                        check_operator(_library.OPERATORS[name], triton_op(name), args)
    finally:
        csr.TURNED = whole


@contextlib.contextmanager
def seen_as(stem: str, arch: int):
    """The kernels of a module as another architecture gets them; yields the names of those that run."""
    module = importlib.import_module(f"spectral_ops.triton_kernels.{stem}")
    names, real = [], {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}

    class Named:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            names.append(self.name)
            return real[self.name][grid]

    own = module.arch
    try:
        vars(module).update({"arch": lambda x: arch} | {name: Named(name) for name in real})
        yield names
    finally:
        vars(module).update({"arch": own} | real)


@case
def products_through_descriptors():
    """Tails of every size, no and several steps, and what no descriptor can stand for."""
    matmul, operator = triton_op("lowrank_matmul"), _library.OPERATORS["lowrank_matmul"]
    for dtype, arch in ((torch.bfloat16, 90), (torch.float16, 90), (torch.bfloat16, 100)):
        for T, k, d, r in ((70, 64, 136, 64), (300, 200, 130, 24), (1, 8, 1, 8), (3, 72, 264, 16)):
            x, W, h, B = (torch.randn(shape).to(dtype) for shape in ((T, k), (d, k), (T, r), (d, r)))
            wide = torch.randn(T, k + 8).to(dtype)[:, :k]
            g, bias = torch.randn(d), torch.randn(d).to(dtype)
            for args in ((x, W, h, B, 0.7, None, None), (wide, W, h, B, 0.7, g, bias)):
                with seen_as("lowrank", arch) as names, poisoned():
                    check_operator(operator, matmul, args)
                assert set(names) == {"described_matmul_kernel"}, names
        one_row = torch.randn(1, k).to(dtype).expand(T, k)  # rows that overlap
        turned = torch.randn(k, T).to(dtype).t()
        cut = torch.randn(T, k + 1).to(dtype)[:, 1:]
        for other in (one_row, turned, cut):
            with seen_as("lowrank", arch) as names, poisoned():
                check_operator(operator, matmul, (other, W, h, B, 0.7, None, None))
            assert set(names) == {"matmul_kernel"}, names
        with seen_as("lowrank", arch) as names, poisoned():
            check_operator(operator, matmul, (x, W, h[:, :0], B[:, :0], 0.7, None, None))  # no ranks
        assert set(names) == {"matmul_kernel"}, names


@case
def vanishing_magnitudes_are_the_reference_s():
    from spectral_ops.functional import dora
    from spectral_ops.triton_kernels.dora import VANISHING

    assert VANISHING.value == dora.VANISHING


@thorough
def every_vanishing_magnitude_is_found():
    """In several windows of columns and blocks of tokens, alone and side by side."""
    operator, (T, d, k, r) = _library.OPERATORS["magnitude_grad"], (70, 1100, 20, 3)
    W, B, x, h, dy = torch.randn(d, k), torch.randn(d, r), torch.randn(T, k), torch.randn(T, r), torch.randn(T, d)
    norm, dyz = torch.rand(d) + 1, torch.randn(d)
    for found in ([], [0], [1023, 1024], [3, 4, 5, 700, 1099], list(range(d))):
        g = torch.rand(d) + 0.5
        g[found] = 0
        check_operator(operator, triton_op("magnitude_grad"), (dyz, dy, x, h, W, B, 0.7, g, norm, None))


@case
def rows_find_their_adapter_among_many():
    from spectral_ops.functional.segments import group_rows

    for n, T in [(1, 5), (4, 64), (7, 33), (300, 70)]:
        order, offsets = group_rows(torch.randint(-1, n, (T,)), n)
        x, A = torch.randn(T, 24), torch.randn(n, 3, 24)
        wanted = _library.OPERATORS["segment_project"].reference(x, A, order, offsets)
        torch.testing.assert_close(triton_op("segment_project")(x, A, order, offsets), wanted)


def segment_arguments(P: int, ends: list[int], dtype: torch.dtype, ordered: bool) -> dict[str, tuple]:
    """Of every segment operator over P places, whatever ``ends`` are: NaN in all that no adapter's place has."""
    n, k, d, r = len(ends) - 1, 24, 40, 5
    offsets, order = torch.tensor(ends, dtype=torch.int32), torch.randperm(P) if ordered else None
    foreign = torch.ones(P, 1, dtype=torch.bool)
    foreign[max(min(ends[0], P), 0) : max(min(ends[-1], P), 0)] = False
    at = foreign if order is None else torch.empty_like(foreign).index_copy_(0, order, foreign)
    x, u = (torch.randn(P, width).to(dtype).masked_fill(where, torch.nan) for width, where in ((k, at), (r, foreign)))
    A, B = torch.randn(n, r, k).to(dtype), torch.randn(d, r, n).to(dtype).permute(2, 0, 1)
    return {
        "segment_project": (x, A, order, offsets),
        "segment_lift_": (torch.randn(P, d).to(dtype), u, B, order, offsets),
        "segment_outer": (u, x, order, offsets),
    }


@case
def experts_of_all_sizes():
    """One expert alone; one with every row of several; empty ones between, before and behind; rows of other ranks."""
    for P, ends in [
        (300, [0, 300]), (300, [0, 0, 300, 300, 300]), (150, [0, 0, 1, 1, 130, 150, 150]), (200, [40, 60, 60, 170]),
        (7, list(range(8)) + [7] * 9), (9, [9, 9, 9]), (3, [0, 0, 0]), (0, [0, 0, 0]),
    ]:  # fmt: skip
        for dtype, ordered in ((torch.float32, False), (torch.bfloat16, True)):
            for name, args in segment_arguments(P, ends, dtype, ordered).items():
                with poisoned():
                    check_operator(_library.OPERATORS[name], triton_op(name), args)


@case
def offsets_that_are_none_stay_within_the_places():
    """Negative, past the end, and falling: nothing beside the tensors is read (it is NaN) or written."""
    P = 70
    for ends in ([-50, 20, 30, 40, 500], [500, 600, 700, 800, 900], [-9] * 5, [0, 70, 0, 70, 35], [2**31 - 1] * 5):
        for name, args in segment_arguments(P, ends, torch.float32, False).items():
            framed = []
            for t in args:
                if t is None or not t.is_floating_point() or t.shape[0] != P:
                    framed.append(t)
                    continue
                frame = torch.full((3 * P, t.shape[1]), 7.0 if name == "segment_lift_" else torch.nan)
                frame[P : 2 * P] = t.nan_to_num()
                framed.append(frame[P : 2 * P])
            got = triton_op(name)(*framed)
            if name == "segment_lift_":
                whole = framed[0]._base
                assert torch.equal(whole[:P], torch.full_like(whole[:P], 7.0)), ends
                assert torch.equal(whole[2 * P :], torch.full_like(whole[:P], 7.0)), ends
                got = framed[0]
            assert ends[1] == 70 or got.isfinite().all(), (name, ends)  # places of several adapters, and of none


@case
def masks_are_the_reference_s():
    for T, k in [(7, 21), (5, 24), (3, 514), (9, 4), (11, 3), (2, 1)]:
        for p in (0.0, 0.3, 2.0**-24):
            seed = torch.randint(0, 2**62, (1,))
            keep = philox.keep_mask(T, k, seed, p)
            got = triton_op("seeded_dropout")(torch.ones(T, k), seed, p)
            assert torch.equal(got != 0, keep), (T, k, p)
            out = torch.zeros(T, k)
            triton_op("dropout_lift_")(out, torch.ones(T, 1), torch.ones(1, k), seed, p)
            assert torch.equal(out != 0, keep), (T, k, p)
            for r in {1, 2, 4, k} & set(range(1, k + 1)):
                out = torch.zeros(T, k)
                triton_op("block_tile_")(out, torch.ones(T, r), None, seed, p, False)
                assert torch.equal(out != 0, keep), (T, k, r, p)


@case
def mask_where_counters_pass_32_bits():
    global kept, tl  # a kernel looks its names up in the module
    import triton
    import triton.language as tl

    from spectral_ops.triton_kernels.common import kept, threshold

    @triton.jit
    def draw(out, seed, start, limit, N: tl.constexpr, ALIGNED: tl.constexpr):
        first = tl.load(start) + tl.zeros([1, 1], tl.int64)
        keep = kept(tl.load(seed), first, 0, limit, N, ALIGNED)
        tl.store(out + tl.arange(0, N)[None, :], keep.to(tl.int32))

    seed = torch.tensor([0x3FED_CBA9_8765_4321])
    for start in (0, 2**31 - 8, 2**33 - 8, 2**34 - 8, 2**40 + 4):
        words = philox.philox(start // 4 + torch.arange(8), seed).flatten()
        want = (words >> 8).double() * 2.0**-24 >= 0.3
        for aligned in (True, False):
            got = torch.full((1, 32), -1, dtype=torch.int32)
            draw[(1,)](got, seed, torch.tensor([start]), threshold(0.3), 32, aligned)
            assert torch.equal(got[0].bool(), want) and (got >= 0).all(), (start, aligned)


@case
def norm_is_reused_only_for_the_same_bits():
    cached = triton_op("column_norm_cached_")
    for dtype in (torch.float32, torch.bfloat16):
        W, A, B = torch.randn(70, 33).to(dtype), torch.randn(5, 33), torch.randn(70, 5)
        stamp = torch.zeros(2, dtype=torch.int64)
        norm = torch.full((70,), float("nan"))

        def run(force=False, norm=norm, stamp=stamp, W=W, A=A, B=B):
            norm.fill_(float("nan"))
            cached(norm, stamp, W, A, B, 0.5, force)
            assert norm.isnan().all() or not norm.isnan().any()
            return not norm.isnan().any()

        assert run(force=True)
        assert not run() and not run()
        assert run(force=True)
        for t, i, j in ((A, (0, 0), (4, 32)), (B, (69, 4), (0, 1)), (A, (2, 3), (2, 4))):
            t[i] = t[i] * (1 + 2.0**-23)  # the last bit
            assert run() and not run()
            t[i], t[j] = t[j].clone(), t[i].clone()  # the same bits elsewhere
            assert run() and not run()
        A.zero_()
        assert run() and not run()
        A[0, 0] = -0.0
        assert run() and not run()
        for i, j in ((0, 0), (69, 32), (33, 7)):  # all of a W of this size
            W[i, j] = -W[i, j]
            assert run() and not run()
        W[0, 0], W[0, 1] = W[0, 1].clone(), W[0, 0].clone()
        assert run() and not run()
        want = (W.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
        run(force=True)
        torch.testing.assert_close(norm.double(), want, rtol=1e-6, atol=0)


@thorough
def fingerprint_reads_the_sample_of_W_that_is_documented():
    cached = triton_op("column_norm_cached_")
    for d, k, turned in ((90, 120, False), (130, 90, True), (2, 9000, False)):
        W, A, B = torch.randn(d, k), torch.randn(2, k), torch.randn(d, 2)
        W = W.t().contiguous().t() if turned else W
        norm, stamp = torch.zeros(d), torch.zeros(2, dtype=torch.int64)
        cached(norm, stamp, W, A, B, 0.5, True)
        read, own = sampled_entries(d, k), stamp.clone()
        for seen in (True, False):
            places = (read == seen).nonzero()
            for i, j in [places[0].tolist(), places[-1].tolist(), *places[torch.randperm(len(places))[:12]].tolist()]:
                W[i, j] = -W[i, j]
                norm.fill_(-1)
                cached(norm, stamp, W, A, B, 0.5, False)
                assert ((norm == -1) == (not seen)).all(), (d, k, i, j)
                W[i, j] = -W[i, j]
                stamp.copy_(own)


@case
def norm_survives_cancellation():
    """W + scale B A almost zero: no digits are lost, as nothing is subtracted after squaring."""
    A, B = torch.randn(3, 40), torch.randn(20, 3)
    W = (-(B.double() @ A.double()) * (1 + 1e-5)).float()
    got = triton_op("column_norm")(W, A, B, 1.0)
    want = (W.double() + B.double() @ A.double()).norm(dim=1)
    bound = 8 * torch.finfo(torch.float32).eps * (W.double().abs() + B.double().abs() @ A.double().abs()).norm(dim=1)
    assert ((got.double() - want).abs() <= bound).all()


@case
def column_scale_does_not_round_away():
    """g - 1 = 1e-3 is below bfloat16's step: u must see it all the same."""
    dy, B = torch.randn(64, 48).bfloat16(), torch.randn(48, 16).bfloat16()
    h = torch.randn(64, 16).bfloat16()
    g = torch.full((48,), 1 + 1e-3)
    wide = (dy.double() * g.double()) @ B.double()
    u, dB, *_ = triton_op("lowrank_backward")(dy, h, B, 1.0, g, None, None, True, True, False, False)
    exact = torch.where(wide.abs() > 1, (u.double() - wide).abs() / wide.abs(), 0)
    assert exact.max() <= 2.0**-8  # one rounding of the result
    torch.testing.assert_close(dB.double(), (dy.double() * g.double()).t() @ h.double(), rtol=1e-5, atol=1e-4)


def fewer_at_a_time():
    """The module of the importance kernels, with 4 tensors to a launch: the interpreter is slow with many addresses."""
    from spectral_ops.triton_kernels import importance

    importance.GROUP = 4
    return importance


@case
def importance_of_all_layers():
    """Odd sizes, parts of tensors, and a layer without rows of A; then pruned."""
    fewer_at_a_time()
    update, prune = (_library.OPERATORS[name] for name in ("importance_update_", "importance_prune_"))
    for dtype in (*DTYPES, torch.float64):
        for sizes, shards in (
            ([(5, 21, 34), (1, 7, 3), (17, 1500, 19)], []),
            ([(5, 21, 34), (1, 7, 3)], [0, 0, 40, 1, 0, 3]),
        ):
            shapes = [s for r, k, d in sizes for s in ((r, k), (d, r), (r, 1))]
            if shards:
                shapes[3] = (0, 7)
            params, grads = ([torch.randn(s).to(dtype) for s in shapes] for _ in range(2))
            n, wide = sum(p.numel() for p in params), torch.promote_types(dtype, torch.float32)
            state, first, found = [torch.rand(n).to(wide) for _ in range(2)], [0, 5, 6][: len(sizes)], []
            for kind in ("reference", "triton"):
                own, E = [s.clone() for s in state], [p.clone() for p in params[2::3]]
                scores = update.overloads[kind](*own, params, grads, shards, 0.85, 0.7, True)
                picked = scores if kind == "reference" else found[0][0]
                found.append([scores, *own, prune.overloads[kind](picked, E, first, 4), *E])
            for got, want in zip(*reversed(found), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@case
def importance_of_moved_gradients():
    """More tensors than one launch takes; gradients that moved need no further upload."""
    importance = fewer_at_a_time()
    update, prune = (_library.OPERATORS[name].overloads for name in ("importance_update_", "importance_prune_"))
    shapes = [s for n in range(importance.GROUP + 1) for s in ((1, 2 + n % 3), (2, 1), (1, 1))]
    params = [torch.randn(s) for s in shapes]
    n, first = sum(p.numel() for p in params), list(range(len(shapes) // 3))
    uploads = []
    for _ in range(2):
        grads, state, found = [torch.randn(s) for s in shapes], [torch.rand(n) for _ in range(2)], []
        for kind in ("triton", "reference"):
            own, E = [s.clone() for s in state], [p.clone() for p in params[2::3]]
            scores = update[kind](*own, params, grads, [], 0.85, 0.7, True)
            found.append([scores, *own, prune[kind](scores, E, first, 2), *E])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        uploads.append(importance._numbers.cache_info().misses)
    assert uploads[0] == uploads[1]


@case
def cayley_of_what_is_not_finite():
    """It ends, writes every entry, and leaves the other matrices alone."""
    ahead, back = (_library.OPERATORS[name].overloads for name in ("cayley_forward", "cayley_backward"))
    for bad in (float("nan"), float("inf")):
        X, G = torch.randn(3, 5, 5), torch.randn(3, 5, 5)
        want = ahead["reference"](X)
        X[1, 2, 2] = X[1, 0, 3] = bad
        with poisoned():
            Q = ahead["triton"](X)
            dX = back["triton"](Q, G)
        torch.testing.assert_close(Q[::2], want[::2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dX[::2], back["reference"](want, G)[::2], rtol=1e-5, atol=1e-5)
        assert not Q[1].isfinite().any() and not dX[1].isfinite().any()


@case
def layers_run_forward_and_backward():
    from spectral_ops import functional as F

    x, W, b = torch.randn(5, 24), torch.randn(20, 24), torch.randn(20)
    A, B, m, D = torch.randn(4, 24), torch.randn(20, 4), torch.rand(20) + 1, torch.randn(4, 20)
    layers = {
        "lora": lambda t: F.lowrank_linear(t[0], W, t[1], t[2], b, scale=0.5, dropout_p=0.25, training=True),
        "dora": lambda t: F.dora_linear(t[0], W, t[1], t[2], t[3], b, scale=0.5),
        "dora dropout": lambda t: F.dora_linear(t[0], W, *t[1:4], b, scale=0.5, dropout_p=0.25, training=True),
        "bone": lambda t: F.bone_linear(t[0], W, t[4], b, dropout_p=0.25, training=True),
    }
    dy = torch.randn(5, 20)
    for name, layer in layers.items():
        found = {}
        for backend in ("triton", "reference"):
            leaves = [t.clone().requires_grad_() for t in (x, A, B, m, D)]
            torch.manual_seed(1)
            with use_backend(backend):
                y = layer(leaves)
                y.backward(dy)
            found[backend] = [y.detach(), *(t.grad for t in leaves if t.grad is not None)]
        for got, want in zip(found["triton"], found["reference"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def answer(name: str) -> str | None:
    torch.manual_seed(0)
    try:
        CASES[name]()
    except BaseException:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:]:
        for wanted in sys.argv[1:]:
            print(wanted, answer(wanted) or "passed", flush=True)
    else:
        replies, sys.stdout = sys.stdout, sys.stderr
        for line in sys.stdin:
            print(json.dumps(answer(line.strip())), file=replies, flush=True)
