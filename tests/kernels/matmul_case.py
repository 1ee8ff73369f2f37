"""lowrank_matmul's kernel for Hopper against float64, on the emulator or a chip. As a program, `matmul_case.py LIBRARY
[cuda]`: it must not end with status 0 where the library is a broken copy of the kernel. `matmul_case.py LIBRARY DEVICE
OPERAND` prints what of x, W or B products read wrongly, by rows and by columns."""

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
    """y [T, d] = g * (x Wᵀ + 0.7 h Bᵀ) + bias + tile[:, j % period], of k columns of x and r of h; without tile for a
    period of 0. W and B lie by rows or, ``W_by_columns``, are views of transposed ones."""

    T: int
    d: int
    k: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    W_by_columns: bool = False
    B_by_columns: bool = False
    g: bool = False
    bias: bool = False
    period: int = 0
    processors: int = 132

    def __str__(self) -> str:
        stored = "".join("nk"[not by] for by in (self.W_by_columns, self.B_by_columns))
        return f"{self.T}x{self.d}x{self.k}+{self.r} {str(self.dtype)[6:]} {stored} {self.period}"


FULL = {"g": True, "bias": True}
# Tails everywhere, several tiles of one cluster, stages that are used again; then operands that lie the other way, and
# one segment alone.
CASES = [
    Case(300, 600, 330, 24, processors=2, period=24, **FULL),
    Case(140, 300, 200, 72, torch.bfloat16, True, True, processors=2, **FULL),
    Case(130, 264, 100, 0, period=37),
]


def pitch(n: int) -> int:
    """A row's elements in memory: a multiple of 16 bytes, more than the row has."""
    return (n // 8 + 2) * 8


def in_nan(rows: int, columns: int, dtype: torch.dtype, fan: int = 1, device: str = "cpu") -> torch.Tensor:
    """Normal numbers amid NaN: in the rows' ends, and 64 rows before and after."""
    whole = torch.full((rows + 128, pitch(columns)), NAN, dtype=dtype, device=device)
    whole[64:-64, :columns] = (torch.randn(rows, columns) * fan**-0.5).to(whole)
    return whole[64:-64, :columns]


def factor(rows: int, columns: int, dtype: torch.dtype, by_columns: bool, device: str) -> torch.Tensor:
    if by_columns:
        return in_nan(columns, rows, dtype, columns, device).t()
    return in_nan(rows, columns, dtype, columns, device)


def passed(case: Case, tensors: list[torch.Tensor | None], scale: float = 0.7):
    """The C arguments of a case's tensors y, x, W, h, B, g, bias and tile."""
    y, x, W, h, B, _, _, tile = tensors
    strides = (y.stride(0), x.stride(0), *W.stride(), *((0, 0, 0) if h is None else (h.stride(0), *B.stride())))
    numbers = (case.T, case.d, case.k, case.r, case.period, *strides, 0 if tile is None else tile.stride(0),
               CODES[x.dtype], CODES[torch.float32], CODES[x.dtype])  # fmt: skip
    pointers = (ctypes.c_void_p * 8)(*(None if t is None else t.data_ptr() for t in tensors))
    return pointers, ctypes.c_double(scale), (ctypes.c_int64 * len(numbers))(*numbers)


def launched(library, case: Case, tensors: list[torch.Tensor | None], scale: float = 0.7) -> torch.Tensor:
    os.environ["EMULATOR_PROCESSORS"] = str(case.processors)
    y = tensors[0]
    stream = torch.cuda.current_stream(y.device).cuda_stream if y.is_cuda else 0
    error = library.lowrank_matmul(*passed(case, tensors, scale), ctypes.c_void_p(stream))
    assert error == 0, error
    return y


def tensors_of(case: Case, device: str = "cpu") -> list[torch.Tensor | None]:
    T, d, k, r, dtype = case.T, case.d, case.k, case.r, case.dtype
    y = torch.full((T + 128, pitch(d)), NAN, dtype=dtype, device=device)[64:-64, :d]
    x, W = in_nan(T, k, dtype, 1, device), factor(d, k, dtype, case.W_by_columns, device)
    h = in_nan(T, r, dtype, 1, device) if r else None
    B = factor(d, r, dtype, case.B_by_columns, device) if r else None
    g = (1 + 0.3 * torch.randn(d)).to(device) if case.g else None
    bias = torch.randn(d).to(device, dtype) if case.bias else None
    tile = in_nan(T, case.period, dtype, 1, device) if case.period else None
    return [y, x, W, h, B, g, bias, tile]


def wanted_of(case: Case, tensors: list[torch.Tensor | None]) -> torch.Tensor:
    _, x, W, h, B, g, bias, tile = (t if t is None else t.double() for t in tensors)
    y = x @ W.t()
    y = y if h is None else y + 0.7 * h @ B.t()
    y = y if g is None else y * g
    y = y if bias is None else y + bias
    return y if tile is None else y + tile[:, torch.arange(case.d, device=y.device) % case.period]


def run(library, case: Case, device: str = "cpu", again: int = 0) -> torch.Tensor:
    """y, held against float64, and ``again`` times against itself: a chip has races, and an emulator does not."""
    tensors = tensors_of(case, device)
    y = launched(library, case, tensors)
    whole = y._base.clone()
    whole[64:-64, : case.d] = NAN
    assert whole.isnan().all(), f"{case}: written beyond y"
    wanted = wanted_of(case, tensors)
    excess = (y.double() - wanted).abs() - ROUNDED[case.dtype] * wanted.abs() - 1e-4  # 1e-4: the sums' own roundings
    assert (excess <= 0).all(), f"{case}: off by {excess.max():.2e} more than a rounding"
    first = y.clone()
    for _ in range(again):
        assert torch.equal(launched(library, case, tensors), first), f"{case}: another result"
    return first


# What has to be right for an operand's first rows and columns to arrive: (rows, columns, what), one thing more each.
BY_ROWS = (
    (8, 8, "the start address, or the operand's direction (tnsp)"),
    (8, 16, "the swizzle mode"),
    (64, 16, "the stride between groups of 8 rows (SBO)"),
    (256, 16, "the stride between groups of 8 rows (SBO), past 64 of them"),
    (256, 64, "the step of 16 columns in the start address"),
)
BY_COLUMNS = (
    (8, 8, "the start address, or the operand's direction (tnsp)"),
    (64, 8, "the swizzle mode"),
    (64, 16, "the stride between groups of 8 columns (SBO)"),
    (256, 16, "the stride between boxes of 64 rows (LBO)"),
    (256, 64, "the step of 16 columns in the start address"),
)


def arrived(library, operand: str, by_columns: bool, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Which element of an operand x, W or B [rows, 64] products read for each: [rows, 64, 2], its row and column.

    The other factor has one 1 in a row, so y shows single elements; they hold their row's number, then their column's.
    """
    case = Case(128, 256, 64, 64, dtype, by_columns, by_columns)
    tensors = tensors_of(case, device)
    _, x, W, h, B, *_ = tensors
    left, right, *others = (x, W, h, B) if operand != "B" else (h, B, x, W)
    ours, other = (left, right) if operand == "x" else (right, left)
    found = []
    for value in (torch.arange(len(ours))[:, None].expand(-1, 64), torch.arange(64).expand(len(ours), -1)):
        for t in others:
            t.zero_()
        ours.copy_(value.to(ours))
        other.copy_(torch.eye(64).repeat(len(other) // 64, 1).to(other))
        y = launched(library, case, tensors, 1.0).float().cpu()
        found.append(y[:, :64] if operand == "x" else y[:64].t())
    return torch.stack(found, 2)


def first_wrong(library, operand: str, by_columns: bool, dtype: torch.dtype, device: str = "cpu") -> str | None:
    """What of an operand's descriptor products read otherwise than the kernel means it, or None."""
    found = arrived(library, operand, by_columns, dtype, device)
    rows, columns = torch.meshgrid(torch.arange(len(found)), torch.arange(64), indexing="ij")
    right = (found == torch.stack((rows, columns), 2)).all(2)
    for height, width, what in BY_COLUMNS if by_columns else BY_ROWS:
        if not right[:height, :width].all():
            row, column = (~right[:height, :width]).nonzero()[0].tolist()
            return f"{what}: element {row, column} is read at {tuple(found[row, column].tolist())}"
    return None


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    library, *words = sys.argv[1:]
    library = ctypes.CDLL(library)
    if words[1:]:
        for by_columns in (False, True)[: 1 + (words[1] != "x")]:
            print(first_wrong(library, words[1], by_columns, torch.bfloat16, words[0]))
    else:
        for each in CASES:
            run(library, each, *words)
