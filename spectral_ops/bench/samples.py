"""What operators make their sample arguments of: ``check``, the tuner, the benchmarks and the tests share them.

Which arguments those are, an operator says itself, where it is defined (``samples=``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from spectral_ops import _library


def arguments(name: str, *sizes, **options) -> Iterator[tuple]:
    """Argument tuples that exercise operator ``name``, its optional ones on and off, from :class:`Samples` of these.

    The first is the one to benchmark. No two share memory that the operator writes.
    """
    return iter(_library.OPERATORS[name].samples(Samples(*sizes, **options)))


@dataclass
class Samples:
    """Sizes and tensors of a layer, each made when it is first asked for: x [T, k], W [d, k], dy and y [T, d],
    A [r, k], B [d, r], h [T, r] and bias [d] in ``dtype``; g (about 1), shift and norm [d] in ``acc``, what ``dtype``
    is summed in; and the key of a dropout mask. density: of :meth:`pattern`."""

    T: int
    d: int
    k: int
    r: int
    dtype: torch.dtype
    device: str
    seed: int = 0
    density: float = 0.006

    def __post_init__(self) -> None:
        self.acc = _library.accumulate_dtype(self.dtype)
        self.on = {"generator": torch.Generator(self.device).manual_seed(self.seed), "device": self.device}

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers times ``scale``, rounded to ``dtype`` (None: the samples' own)."""
        return (scale * torch.randn(*shape, dtype=torch.float64, **self.on)).to(dtype or self.dtype)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype or self.dtype, device=self.device)

    x = cached_property(lambda self: self.randn(self.T, self.k))
    W = cached_property(lambda self: self.randn(self.d, self.k, scale=max(self.k, 1) ** -0.5))
    dy = cached_property(lambda self: self.randn(self.T, self.d))
    y = cached_property(lambda self: self.randn(self.T, self.d))
    A = cached_property(lambda self: self.randn(self.r, self.k, scale=max(self.k, 1) ** -0.5))
    B = cached_property(lambda self: self.randn(self.d, self.r, scale=0.3))
    h = cached_property(lambda self: self.randn(self.T, self.r))
    bias = cached_property(lambda self: self.randn(self.d))
    g = cached_property(lambda self: 1 + self.randn(self.d, scale=0.1, dtype=self.acc))
    shift = cached_property(lambda self: self.randn(self.d, dtype=self.acc))
    norm = cached_property(lambda self: self.W.to(self.acc).square().sum(1).sqrt())
    key = cached_property(lambda self: torch.randint(0, 2**62, (1,), **self.on))

    def shards(self, features: int) -> torch.Tensor | None:
        """int32 offsets [r + 1] of r runs of uneven length; None where the features are no r shards."""
        if not 0 < self.r <= features:
            return None
        ends = [i + (features - self.r) * i * i // self.r**2 for i in range(self.r + 1)]
        return torch.tensor(ends, dtype=torch.int32, device=self.device)

    def pattern(self, ragged: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 row offsets [d + 1] and columns [nnz] of a pattern of W, the same for every T, r and seed.

        ragged: the first row empty, the second full.
        """
        same = torch.Generator(self.device).manual_seed(0)
        mask = torch.rand(self.d, self.k, generator=same, device=self.device) < self.density
        if ragged:
            mask[:1], mask[1:2] = False, True
        return F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32), mask.nonzero()[:, 1].to(torch.int32)

    def order(self, n: int) -> torch.Tensor:
        """A permutation [n], int64."""
        return torch.randperm(n, **self.on)

    @staticmethod
    def rows(t: torch.Tensor) -> torch.Tensor:
        """A copy of ``t`` as rows of a buffer three columns wider, with NaN in those."""
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]

    @staticmethod
    def transposed(t: torch.Tensor) -> torch.Tensor:
        """The values of ``t`` with its last two dimensions swapped in memory."""
        return t.mT.contiguous().mT
