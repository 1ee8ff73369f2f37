"""What the tests' inputs are made of: dtypes, shapes, random tensors and their memory layouts."""

from __future__ import annotations

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
# leading dimensions, in_features, out_features, rank
SHAPES = [
    ((7,), 24, 40, 4),
    ((), 16, 24, 3),  # x is a vector
    ((2, 3), 31, 17, 13),  # odd sizes, k % r != 0
    ((2, 1, 5), 33, 64, 16),
    ((1,), 20, 12, 1),  # one token, rank one
    ((0,), 8, 12, 2),  # nothing
    ((2, 0), 9, 5, 4),
    ((131,), 48, 57, 20),  # past a tile of tokens; r no multiple of 16
    ((5,), 16, 24, 16),  # r = k
    ((3,), 130, 259, 64),
]
LARGE = [((2,), 40_000, 12, 3), ((2,), 12, 40_000, 3)]  # features past what 15 or 16 bits count
TYPICAL = ((3, 5), 24, 40, 5)


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def ids(value) -> str | None:
    """Readable test ids for dtypes and shapes."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and len(value) == 4 and isinstance(value[0], tuple):
        lead, k, d, r = value
        return f"{'x'.join(map(str, lead)) or 'vector'}-k{k}-d{d}-r{r}"
    return None


def randn(*shape: int, dtype=torch.float64, device="cpu", fan: int = 1) -> torch.Tensor:
    """Normal numbers of variance 1/fan, rounded to ``dtype``."""
    return (torch.randn(*shape, dtype=torch.float64) / max(fan, 1) ** 0.5).to(dtype).to(device)


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``t`` in another memory layout (``expanded``: its first row everywhere)."""
    if layout == "contiguous":
        return t
    if layout == "rows":  # rows of a wider, longer buffer
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    if layout == "columns":  # every second column: no unit stride
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "transposed":  # leading dimensions (or those of a matrix) swapped in memory
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return t[(slice(0, 1),) * (t.dim() - 1)].expand(t.shape)
    raise ValueError(layout)


def storage(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


def sparse_pattern(d: int, k: int, device="cpu", density: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 row offsets and columns of a [d, k] pattern: the first row empty, the second full, the rest at random."""
    mask = torch.rand(d, k, generator=torch.Generator().manual_seed(d * 1009 + k)) < density
    mask[:1], mask[1:2] = False, True
    offsets = torch.zeros(d + 1, dtype=torch.int32)
    offsets[1:] = mask.sum(1).cumsum(0)
    return offsets.to(device), mask.nonzero()[:, 1].to(device, torch.int32)


def copied(args: tuple) -> tuple:
    """The arguments with every tensor copied, strides kept."""
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device).copy_(a)
        if isinstance(a, torch.Tensor) and not any(s == 0 for s in a.stride())
        else a
        for a in args
    )
