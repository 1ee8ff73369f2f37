"""lowrank_backward_wgmma on the emulator against float64. As a program, `wgmma_case.py LIBRARY`: it must not end with
status 0 where the library is a broken copy of the kernel."""

from __future__ import annotations

import ctypes
import sys

import torch

CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
PLAN = ("tile_columns", "groups", "split_rows", "splits", "pitch", "dB_at", "bytes")
# Tails of rows, columns and ranks, three splits; then several tiles in a block and two clusters side by side.
CASES = [(600, 300, 39, torch.bfloat16), (130, 2100, 64, torch.float16)]


def plan_of(library, T, d, r) -> dict[str, int]:
    numbers = (ctypes.c_int64 * len(PLAN))()
    library.wgmma_plan_of(*map(ctypes.c_int64, (T, d, r)), numbers)
    return dict(zip(PLAN, numbers, strict=True))


def rows_in_nan(rows, columns, dtype, stride):
    """Normal numbers in rows of a wider buffer that is NaN elsewhere."""
    whole = torch.full((rows, stride), float("nan"), dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns).to(dtype)
    return whole[:, :columns]


def run(library, T, d, r, dtype, g_dtype=torch.float32):
    """u and dB; g_dtype None: without g."""
    dy, h = rows_in_nan(T, d, dtype, (d + 15) // 8 * 8), rows_in_nan(T, r, dtype, (r + 15) // 8 * 8)
    B = rows_in_nan(d, r, dtype, r + 1)
    g = None if g_dtype is None else torch.randn(d).to(g_dtype)
    plan = plan_of(library, T, d, r)
    workspace = torch.full((plan["bytes"] // 4 + 256,), float("nan"))
    u, dB = torch.full((T * r + 64,), float("nan"), dtype=dtype), torch.full((d * r + 64,), float("nan"))
    error = library.backward_wgmma(
        *(ctypes.c_void_p(t if t is None else t.data_ptr()) for t in (dy, h, B, g, u, dB, workspace)),
        ctypes.c_double(0.7),
        *map(ctypes.c_int64, (T, d, r, dy.stride(0), h.stride(0), B.stride(0), CODES[dtype], CODES.get(g_dtype, 1))),
    )
    assert error == 0, error
    for whole, size in ((workspace, plan["bytes"] // 4), (u, T * r), (dB, d * r)):
        assert whole[size:].isnan().all(), "written beyond its end"
    u, dB = u[: T * r].view(T, r), dB[: d * r].view(d, r)
    column = torch.ones(d, 1) if g is None else g.float()[:, None]
    scaled = (column * B.float()).to(dtype)  # the kernel's operand
    wanted_u, wanted_dB = 0.7 * dy.double() @ scaled.double(), 0.7 * column.double() * (dy.double().t() @ h.double())
    for name, got, wanted, tolerance in (("u", u, wanted_u, ROUNDED[dtype]), ("dB", dB, wanted_dB, 1e-6)):
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error <= tolerance, f"{name} of {T, d, r, dtype}: {error:.2e}"
    return u, dB


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for case in CASES:
        run(ctypes.CDLL(sys.argv[1]), *case)
