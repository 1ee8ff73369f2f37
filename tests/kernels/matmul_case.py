"""lowrank_matmul's kernel for Hopper on the emulator against float64. As a program, `matmul_case.py LIBRARY`: it must not
end with status 0 where the library is a broken copy of the kernel."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

import torch

CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # the most that one rounding changes, of a number's size
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """y [T, d] = g * (x Wᵀ + 0.7 h Bᵀ) + bias + tile[:, j % period], of k columns of x and r of h. W and B are stored by
    rows of the inner dimension or, ``W_by_columns``, transposed. period 0: no tile; r 0: no h."""

    T: int
    d: int
    k: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    W_by_columns: bool = False
    B_by_columns: bool = False
    g_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None
    period: int = 0
    processors: int = 132

    def __str__(self) -> str:
        stored = "".join("nk"[not by] for by in (self.W_by_columns, self.B_by_columns))
        return f"{self.T}x{self.d}x{self.k}+{self.r} {str(self.dtype)[6:]} {stored} {self.period}"


FULL = {"g_dtype": torch.float32, "bias_dtype": torch.bfloat16}
# Tails everywhere and every stage used twice: several tiles of one cluster; then operands stored the other way.
CASES = [
    Case(300, 600, 330, 24, processors=2, period=24, **FULL),
    Case(140, 300, 200, 72, torch.float16, True, True, processors=2, **FULL),
]


def pitch(n: int) -> int:
    """A row's elements in memory: a multiple of 16 bytes, more than the row has."""
    return (n // 8 + 2) * 8


def in_nan(rows: int, columns: int, dtype: torch.dtype, fan: int = 1) -> torch.Tensor:
    """Normal numbers amid NaN: in the rows' ends, and 64 rows before and after."""
    whole = torch.full((rows + 128, pitch(columns)), NAN, dtype=dtype)
    whole[64:-64, :columns] = (torch.randn(rows, columns) * fan**-0.5).to(dtype)
    return whole[64:-64, :columns]


def factor(rows: int, columns: int, dtype: torch.dtype, by_columns: bool) -> torch.Tensor:
    return in_nan(columns, rows, dtype, columns).t() if by_columns else in_nan(rows, columns, dtype, columns)


def passed(case: Case, tensors: list[torch.Tensor | None], scale: float = 0.7):
    """The C arguments of a case's tensors y, x, W, h, B, g, bias and tile."""
    y, x, W, h, B, g, bias, tile = tensors
    strides = (y.stride(0), x.stride(0), *W.stride(), *((0, 0, 0) if h is None else (h.stride(0), *B.stride())))
    numbers = (case.T, case.d, case.k, case.r, case.period, *strides, 0 if tile is None else tile.stride(0),
               CODES[x.dtype], CODES.get(case.g_dtype, 1), CODES.get(case.bias_dtype, 1))  # fmt: skip
    pointers = (ctypes.c_void_p * 8)(*(None if t is None else t.data_ptr() for t in tensors))
    return pointers, ctypes.c_double(scale), (ctypes.c_int64 * len(numbers))(*numbers)


def tensors_of(case: Case) -> list[torch.Tensor | None]:
    T, d, k, r, dtype = case.T, case.d, case.k, case.r, case.dtype
    y = torch.full((T + 128, pitch(d)), NAN, dtype=dtype)[64:-64, :d]
    x, W = in_nan(T, k, dtype), factor(d, k, dtype, case.W_by_columns)
    h, B = (in_nan(T, r, dtype), factor(d, r, dtype, case.B_by_columns)) if r else (None, None)
    g = None if case.g_dtype is None else (1 + 0.3 * torch.randn(d)).to(case.g_dtype)
    bias = None if case.bias_dtype is None else torch.randn(d).to(case.bias_dtype)
    tile = in_nan(T, case.period, dtype) if case.period else None
    return [y, x, W, h, B, g, bias, tile]


def wanted_of(case: Case, tensors: list[torch.Tensor | None]) -> torch.Tensor:
    _, x, W, h, B, g, bias, tile = (t if t is None else t.double() for t in tensors)
    y = x @ W.t()
    y = y if h is None else y + 0.7 * h @ B.t()
    y = y if g is None else y * g
    y = y if bias is None else y + bias
    return y if tile is None else y + tile[:, torch.arange(case.d) % case.period]


def run(library, case: Case) -> torch.Tensor:
    os.environ["EMULATOR_PROCESSORS"] = str(case.processors)
    tensors = tensors_of(case)
    error = library.lowrank_matmul(*passed(case, tensors))
    assert error == 0, error
    y = tensors[0]
    whole = y._base.clone()
    whole[64:-64, : case.d] = NAN
    assert whole.isnan().all(), f"{case}: written beyond y"
    wanted = wanted_of(case, tensors)
    excess = (y.double() - wanted).abs() - ROUNDED[case.dtype] * wanted.abs() - 1e-4  # 1e-4: the sums' own roundings
    assert (excess <= 0).all(), f"{case}: off by {excess.max():.2e} more than a rounding"
    return y.clone()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for each in CASES:
        run(ctypes.CDLL(sys.argv[1]), each)
