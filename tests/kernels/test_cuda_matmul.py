"""lowrank_matmul's form for Hopper on the emulator, which interprets TMA, mbarriers, clusters and wgmma. It holds the
kernel to our reading of the descriptors, which test_gpu.py asks a chip about (docs/HOPPER.md).
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matmul_case import CASES, FULL, Case, first_wrong, passed, run, tensors_of

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"
KERNEL = "cuda/lowrank_matmul.cu"
OPERANDS = [("x", False), ("W", False), ("W", True), ("B", False), ("B", True)]  # and whether they lie by columns
LAYOUTS = [(W, B) for W in (False, True) for B in (False, True)]
RANKS = (1, 8, 16, 17, 40, 64, 65, 128, 200, 256)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(emulator_command):
    def compiled(sources: Path, library: Path) -> Path:
        subprocess.run(
            [*emulator_command, "-I", sources, "-shared", EMULATOR / "matmul.cpp", "-o", library], check=True
        )
        return library

    return compiled


@pytest.fixture(scope="module")
def library(compiled, tmp_path_factory):
    return ctypes.CDLL(str(compiled(ROOT / "csrc", tmp_path_factory.mktemp("matmul") / "whole.so")))


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setenv("EMULATOR_HOPPER", "1")
    monkeypatch.setenv("EMULATOR_ORDER", "0")
    monkeypatch.setenv("EMULATOR_PROCESSORS", "132")
    torch.manual_seed(0)


@pytest.mark.parametrize("order", [1, 2, 3], ids=["descending", "shuffled", "warp by warp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_result_depends_on_the_order_of_threads(library, monkeypatch, case, order):
    wanted = run(library, case)
    monkeypatch.setenv("EMULATOR_ORDER", str(order))
    torch.manual_seed(0)
    assert torch.equal(run(library, case), wanted)


@pytest.mark.parametrize("W_by_columns, B_by_columns", LAYOUTS)
@pytest.mark.parametrize("r", RANKS)
def test_ranks_in_each_layout(library, r, W_by_columns, B_by_columns):
    run(library, Case(70, 264, 72, r, torch.bfloat16, W_by_columns, B_by_columns))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("W_by_columns, B_by_columns", LAYOUTS)
def test_tails_of_rows_columns_and_inner(library, dtype, W_by_columns, B_by_columns):
    sizes = ((1, 8, 8, 8), (1, 300, 64, 3), (129, 256, 100, 16), (257, 6, 1, 9), (256, 256, 64, 64), (64, 66, 513, 33))
    for T, d, k, r in sizes:
        run(library, Case(T, d, k, r, dtype, W_by_columns, B_by_columns))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_and_shifts(library, dtype):
    for g in (False, True):
        for bias in (False, True):
            for r in (0, 8):
                run(library, Case(66, 266, 64, r, dtype, g=g, bias=bias))


@pytest.mark.parametrize("r", [0, 8])
@pytest.mark.parametrize("period", [1, 3, 8, 16, 24, 37, 64, 128, 200, 264])
def test_tile_of_a_period(library, period, r):
    run(library, Case(66, 264, 64, r, period=period, bias=True))
    run(library, Case(130, 264, 64, r, torch.float16, W_by_columns=True, period=period))


def test_many_tiles_to_a_cluster(library):
    """One cluster takes every tile, then two that do not share them evenly; their stages are used many times. Before
    that more rows than one group of the raster has."""
    run(library, Case(2100, 300, 64, 8, processors=8))
    for processors in (2, 4):
        for W_by_columns, B_by_columns in LAYOUTS:
            run(
                library,
                Case(520, 520, 130, 20, torch.bfloat16, W_by_columns, B_by_columns, processors=processors, **FULL),
            )


@pytest.mark.parametrize("operand, by_columns", OPERANDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_read_every_element_where_it_is(library, operand, by_columns, dtype):
    """What a chip is asked first (test_gpu.py)."""
    assert first_wrong(library, operand, by_columns, dtype) is None


def test_takes_what_tma_can_describe(library):
    case = Case(130, 264, 72, 40)
    y, x, W, h, B, *others = tensors_of(case)
    plain = dict(zip("yxWhB", (y, x, W, h, B), strict=True))

    def takes(case=case, **other):
        tensors = list((plain | other).values())
        return bool(library.matmul_takes(*passed(case, [*tensors, *others])))

    def odd(t):  # rows that do not begin at 16 bytes
        return torch.empty(t.shape[0], t.shape[1] + 1 - t.shape[1] % 2, dtype=t.dtype)[:, : t.shape[1]]

    def moved(t):
        return torch.empty(t.shape[0] + 1, t.stride(0), dtype=t.dtype).flatten()[1:].as_strided(t.shape, t.stride())

    assert takes()
    for name, t in plain.items():
        assert not takes(**{name: odd(t)}) and not takes(**{name: moved(t)}), name
    for name in "WB":
        by_columns = torch.empty(plain[name].shape[1], 264, dtype=x.dtype).t()
        assert takes(**{name: by_columns}), name
        assert not takes(**{name: plain[name].as_strided(plain[name].shape, (16, 2))}), name
    for name in "xhy":
        assert not takes(**{name: torch.empty(plain[name].shape[1], 136, dtype=x.dtype).t()[: case.T]}), name
    for r, taken in ((1, True), (256, True), (257, False)):
        h, B = (torch.empty(n, 264, dtype=x.dtype)[:, :r] for n in (case.T, case.d))
        assert takes(dataclasses.replace(case, r=r), h=h, B=B) == taken, r
    assert takes(dataclasses.replace(case, r=0), h=None, B=None)
    assert not takes(dataclasses.replace(case, T=0)) and not takes(dataclasses.replace(case, d=263))
    for extra, dtype, offset, taken in (("g", torch.float32, 0, True), ("g", torch.float32, 1, False),
                                        ("bias", case.dtype, 0, True), ("bias", case.dtype, 1, False)):  # fmt: skip
        vector = torch.empty(case.d + offset, dtype=dtype)[offset:]
        others[("g", "bias").index(extra)] = vector
        assert takes() == taken, (extra, offset)
        others[:2] = None, None


# What to replace, in a file each, and by what.
WAIT = "        if (t == 0) tile_stores_read<1>();\n"
MEET = "        if (group == 0) named_barrier(1, 128);\n        else named_barrier(2, 128);\n"
FLIP = "      if (++stage == kStages) stage = 0, phase ^= 1;\n    };"
BROKEN = {
    "the producer's phase": [(KERNEL, "barrier_wait(empty + stage, phase ^ 1)", "barrier_wait(empty + stage, phase)")],
    "the consumers' phase": [(KERNEL, FLIP, FLIP.replace(", phase ^= 1", ""))],
    "a stage released while it is read": [
        (KERNEL, "products_wait<1>();\n        release(previous);", "release(previous);\n        products_wait<1>();")
    ],
    "released by one block's warps": [
        (KERNEL, "barrier_init(empty + i, 2 * kMatmulCluster)", "barrier_init(empty + i, 2)")
    ],
    "too few bytes expected": [
        (KERNEL, "barrier_expect(full + stage, kStageBytes)", "barrier_expect(full + stage, kABytes)")
    ],
    "too many bytes expected": [
        (KERNEL, "barrier_expect(full + stage, kStageBytes)", "barrier_expect(full + stage, kStageBytes + 128)")
    ],
    "barriers not made visible": [(KERNEL, "    barriers_visible();\n", "")],
    "no barrier before the other block's are used": [
        (KERNEL, "  __syncwarp();\n  cluster_arrive<true>();\n  cluster_wait();\n\n", "  __syncthreads();\n\n")
    ],
    "a block that ends while the other needs it": [
        (KERNEL, "  cluster_arrive<true>();\n  cluster_wait();\n#endif", "#endif")
    ],
    "accumulators not fenced": [(KERNEL, "        products_begin();\n#pragma unroll\n", "#pragma unroll\n")],
    "accumulators not awaited": [
        (
            KERNEL,
            "products_wait<0>();\n      products_done(d);\n      release",
            "products_wait<1>();\n      products_done(d);\n      release",
        )
    ],
    "the second segment's not awaited": [(KERNEL, "          products_wait<0>();\n", "")],
    "the second segment overwritten": [(KERNEL, "multiply(extra);", "multiply(0);")],
    "the scale on both segments": [
        (KERNEL, "      if (extra && a.scale != 1.f) {", "      if (false) {"),
        (KERNEL, "      if (a.g) {", "      for (int e = 0; e < 128; ++e) d[e] *= a.scale;\n      if (a.g) {"),
    ],
    "a tail of ranks": [(KERNEL, "(a.ranks - step * kMatmulDepth + 15) / 16", "(a.ranks - step * kMatmulDepth) / 16")],
    "a tail of the inner dimension": [(KERNEL, "ceil_div(from.inner, kMatmulDepth)", "(from.inner / kMatmulDepth)")],
    "W's step by columns": [(KERNEL, "kColumnsW ? 2048 : 32", "kColumnsW ? 1024 : 32")],
    "B's step by columns": [(KERNEL, "kColumnsB ? 2048 : 32", "kColumnsB ? 1024 : 32")],
    "tiles out of line": [(KERNEL, "  shared += (1024 - shared_address(shared) % 1024) % 1024;\n", "")],
    "no swizzle of what is stored": [
        (
            KERNEL,
            "in_tile(warp * 16 + lane % 16, 2 * p + lane / 16)",
            "(warp * 16 + lane % 16) * 128 + (2 * p + lane / 16) * 16",
        )
    ],
    "no fence before a store": [(KERNEL, "        proxy_fence();\n", "")],
    "a store before all have written": [(KERNEL, "        proxy_fence();\n" + MEET, "        proxy_fence();\n")],
    "a buffer written while it is stored": [(KERNEL, WAIT, "")],
    "a buffer written before the wait": [(KERNEL, WAIT + MEET, WAIT)],
    "an end before the stores are done": [(KERNEL, "    if (t == 0) tile_stores_done<0>();\n", "")],
}
FEWER = [  # forms, in broken copies: those that the program calls, which compile in half the time
    ("(columns_B ? two_segment<T, 1, 1> : two_segment<T, 1, 0>)", "two_segment<T, 1, 1>"),
    ("(columns_B ? two_segment<T, 0, 1> : two_segment<T, 0, 0>)", "two_segment<T, 0, 0>"),
    ("launch_matmul<float16>(a, stream)", "cudaErrorInvalidValue"),
    ("has_body<two_segment<float16, 0, 0>>()", "false"),
]
FIELDS = {  # and what the first test on a chip says of it, of W by rows or by columns
    "SBO": (
        KERNEL,
        "(uint64_t{(kTileBytes >> 4) - 1} << 16)",
        "(uint64_t{(kTileBytes >> 4) - 1} << 16 | uint64_t{1024 >> 4} << 32)",
        ["None", "8 columns (SBO)"],
    ),
    "LBO": (KERNEL, "uint64_t{(kTileBytes >> 4) - 1}", "uint64_t{(kTileBytes >> 5) - 1}", ["None", "(LBO)"]),
    "steps": (KERNEL, "kColumnsW ? 2048 : 32", "kColumnsW ? 1024 : 16", ["step of 16", "step of 16"]),
}


def accepted(library: Path, order: str) -> bool:
    program = [sys.executable, Path(__file__).parent / "matmul_case.py", library]
    return subprocess.run(program, env=os.environ | {"EMULATOR_ORDER": order}, capture_output=True).returncode == 0


@pytest.fixture
def broken(compiled, tmp_path):
    """A library of the kernel with texts replaced: file, old and new."""

    def broken(*changes: tuple[str, str, str]) -> Path:
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        for file, old, new in (*changes, *((KERNEL, *pair) for pair in FEWER)):
            path = tmp_path / "csrc" / file
            text = path.read_text()
            assert old in text, old
            path.write_text(text.replace(old, new))
        return compiled(tmp_path / "csrc", tmp_path / "broken.so")

    return broken


@pytest.mark.thorough
def test_program_accepts_the_whole_kernel(broken):
    library = broken()
    assert all(accepted(library, order) for order in "0123")


@pytest.mark.thorough
@pytest.mark.parametrize("name", BROKEN)
def test_emulator_tells_a_broken_kernel(broken, name):
    library = broken(*BROKEN[name])
    assert not all(accepted(library, order) for order in "0123"), "nothing noticed it"


@pytest.mark.parametrize(
    "field", [pytest.param(f, marks=[pytest.mark.thorough] * (i > 0)) for i, f in enumerate(FIELDS)]
)
def test_first_test_on_a_chip_names_the_field(broken, field):
    *change, said = FIELDS[field]
    program = [sys.executable, Path(__file__).parent / "matmul_case.py", broken(tuple(change)), "cpu", "W"]
    lines = subprocess.run(program, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 2 and all(word in line for word, line in zip(said, lines, strict=True)), lines
