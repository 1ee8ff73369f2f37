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
KERNEL, PRODUCTS, TMA = "cuda/lowrank_matmul.cu", "cuda/wgmma.cuh", "cuda/tma.cuh"
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
def whole(compiled, tmp_path_factory):
    return compiled(ROOT / "csrc", tmp_path_factory.mktemp("matmul") / "whole.so")


@pytest.fixture(scope="module")
def library(whole):
    return ctypes.CDLL(str(whole))


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
    sizes = ((1, 8, 8, 8), (1, 300, 64, 3), (129, 256, 100, 16), (257, 7, 1, 9), (256, 256, 64, 64), (64, 65, 513, 33))
    for T, d, k, r in sizes:
        run(library, Case(T, d, k, r, dtype, W_by_columns, B_by_columns))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_and_shifts(library, dtype):
    for g in (None, torch.float32, torch.bfloat16):
        for bias in (None, torch.float32, torch.bfloat16):
            run(library, Case(66, 266, 64, 8, dtype, g_dtype=g, bias_dtype=bias))


@pytest.mark.parametrize("r", [0, 8])
@pytest.mark.parametrize("period", [1, 3, 8, 16, 24, 37, 64, 128, 200, 264])
def test_tile_of_a_period(library, period, r):
    run(library, Case(66, 264, 64, r, period=period, bias_dtype=torch.bfloat16))
    run(library, Case(130, 264, 64, r, torch.float16, W_by_columns=True, period=period))


def test_many_tiles_to_a_cluster(library):
    """One cluster takes every tile, then two that do not share them evenly; both wrap their stages many times."""
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
    assert not takes(dataclasses.replace(case, T=0))


BROKEN: dict[str, list[tuple[str, str, str]]] = {}  # what to replace, in a file each, and by what


def accepted(library: Path, order: str) -> bool:
    program = [sys.executable, Path(__file__).parent / "matmul_case.py", library]
    return subprocess.run(program, env=os.environ | {"EMULATOR_ORDER": order}, capture_output=True).returncode == 0


def test_program_accepts_the_whole_kernel(whole):
    assert accepted(whole, "0")


@pytest.mark.parametrize("name", BROKEN)
def test_emulator_tells_a_broken_kernel(compiled, tmp_path, name):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for file, old, new in BROKEN[name]:
        path = tmp_path / "csrc" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    broken = compiled(tmp_path / "csrc", tmp_path / "broken.so")
    assert not all(accepted(broken, order) for order in "0123"), "nothing noticed it"
