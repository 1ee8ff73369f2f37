"""lowrank_backward's form for Hopper on the emulator, which interprets wgmma: operands by their descriptors as products
see them, accumulators that are NaN until waited for, clusters whose blocks run together. The emulator cannot know
whether it reads descriptors as the hardware does.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wgmma_case import CASES, plan_of, run

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"
KERNEL, PRODUCTS = "cuda/lowrank_backward_wgmma.cu", "cuda/wgmma.cuh"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(emulator_command):
    def compiled(sources: Path, library: Path) -> Path:
        subprocess.run([*emulator_command, "-I", sources, "-shared", EMULATOR / "wgmma.cpp", "-o", library], check=True)
        return library

    return compiled


@pytest.fixture(scope="module")
def whole(compiled, tmp_path_factory):
    return compiled(ROOT / "csrc", tmp_path_factory.mktemp("wgmma") / "whole.so")


@pytest.fixture(scope="module")
def library(whole):
    return ctypes.CDLL(str(whole))


@pytest.mark.parametrize("order", [0, 1, 2, 3], ids=["ascending", "descending", "shuffled", "warp by warp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_result_depends_on_the_order_of_threads(library, monkeypatch, case, order):
    monkeypatch.setenv("EMULATOR_ORDER", "0")
    torch.manual_seed(0)
    wanted = run(library, *case)
    monkeypatch.setenv("EMULATOR_ORDER", str(order))
    torch.manual_seed(0)
    assert all(map(torch.equal, run(library, *case), wanted))


@pytest.mark.parametrize("g_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tails_of_rows_columns_and_ranks(library, dtype, g_dtype):
    for T, d, r in ((64, 64, 64), (1, 8, 33), (65, 257, 34), (257, 72, 63), (70, 1801, 61), (7, 2048, 40)):
        run(library, T, d, r, dtype, g_dtype)


def test_plan_covers_every_row_and_column_and_fills_the_gpu(library):
    for d in (1, 64, 100, 2048, 2049, 4096, 5120, 11008, 14336, 28672, 70000):
        for T in (1, 64, 300, 8192, 100000):
            p = plan_of(library, T, d, 64)
            assert p["tile_columns"] % 64 == 0 and p["tile_columns"] <= 512 and p["split_rows"] % 64 == 0
            assert 4 * p["tile_columns"] * (p["groups"] - 1) < d <= 4 * p["tile_columns"] * p["groups"]
            assert p["split_rows"] * (p["splits"] - 1) < T <= p["split_rows"] * p["splits"]
            assert p["dB_at"] % 4 == 0 and p["bytes"] == 4 * 64 * (p["groups"] * T + p["splits"] * d)
            assert p["splits"] == 1 or p["groups"] * p["splits"] <= 32
    for d in (4096, 14336):
        p = plan_of(library, 8192, d, 64)
        assert p["groups"] * p["splits"] == 32


def test_takes_what_it_can_read_16_bytes_at_a_time(library):
    def takes(r=64, dy_stride=128, h_offset=0, h_stride=64, db=0, dtype=2):
        return library.wgmma_takes(*map(ctypes.c_int64, (r, dy_stride, h_offset, h_stride, db, dtype)))

    assert takes() and takes(r=33) and takes(dtype=3)
    for refused in (
        {"r": 32}, {"r": 65}, {"dy_stride": 100}, {"h_offset": 8}, {"h_stride": 65}, {"db": 1}, {"dtype": 1}
    ):  # fmt: skip
        assert not takes(**refused), refused


BROKEN = {  # what to replace, in a file each, and by what
    "no fence between copies and products": [
        (KERNEL, "      copy_wait<1>();\n      proxy_fence();", "      copy_wait<1>();")
    ],
    "copies not awaited": [(KERNEL, "copy_wait<1>()", "copy_wait<2>()")],
    "products not awaited": [
        (KERNEL, "products_wait<0>();\n      products_done(dB[0])", "products_wait<1>();\n      products_done(dB[0])")
    ],
    "accumulators not fenced": [(KERNEL, "        products_begin();\n", "")],
    "the other stage": [(KERNEL, "stage0 + step % 2 * kStageBytes, h", "stage0 + (step + 1) % 2 * kStageBytes, h")],
    "a stage filled while it is read": [
        (KERNEL, "      __syncthreads();\n      fetch(step + 2);", "      fetch(step + 2);\n      __syncthreads();")
    ],
    "no swizzle": [(PRODUCTS, "(chunk ^ row % 8) * 16", "chunk * 16")],
    "transposed where it is not": [(KERNEL, "product_async<T, 1>", "product_async<T, 0>")],
    "the wrong stride between groups of rows": [(PRODUCTS, "uint64_t{1024 >> 4} << 32", "uint64_t{2048 >> 4} << 32")],
    "tiles out of line": [(KERNEL, "  shared += (1024 - shared_address(shared) % 1024) % 1024;\n", "")],
    "u read before it is sent": [
        (KERNEL, "      cluster_arrive<true>();\n      cluster_wait();\n      const", "      const"),
        (
            KERNEL,
            "      cluster_wait();\n      cluster_arrive<false>();\n      cluster_wait();\n",
            "      cluster_wait();\n",
        ),
    ],
    "a split's end": [(KERNEL, "end = min_of(begin + a.split_rows, a.rows)", "end = a.rows")],
}


def accepted(library: Path, order: str) -> bool:
    program = [sys.executable, Path(__file__).parent / "wgmma_case.py", library]
    return subprocess.run(program, env=os.environ | {"EMULATOR_ORDER": order}, capture_output=True).returncode == 0


def test_program_accepts_the_whole_kernel(whole):
    assert accepted(whole, "0")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.thorough] * (i > 0)) for i, n in enumerate(BROKEN)]
)
def test_emulator_tells_a_broken_kernel(compiled, tmp_path, name):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for file, old, new in BROKEN[name]:
        path = tmp_path / "csrc" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    broken = compiled(tmp_path / "csrc", tmp_path / "broken.so")
    assert not all(accepted(broken, order) for order in "0123"), "nothing noticed it"
