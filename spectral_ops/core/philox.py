"""Dropout from a counter-based generator: the mask is a function of (seed, element), regenerated and never stored.

Element e = t * n + i of a [T, n] tensor takes word e mod 4 of Philox4x32-10 at counter e div 4 under the 64-bit key
``seed`` (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). It is kept where the word's upper 24
bits, as a fraction of 2**24, are at least p, and then scaled by 1 / (1 - p). Every backend draws this same mask, bit
for bit. The seed itself comes from torch's generator for the device (:func:`spectral_ops.core.autograd.draw_seed`).
"""

from __future__ import annotations

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """The four 32-bit words, as int64 [..., 4], of Philox4x32-10 at 64-bit counters [...] under seed [1] int64."""
    c = [counter & WORD, (counter >> 32) & WORD, torch.zeros_like(counter), torch.zeros_like(counter)]
    key = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(10):
        even, odd = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
        c = [(odd >> 32) & WORD ^ c[1] ^ key[0], odd & WORD, (even >> 32) & WORD ^ c[3] ^ key[1], even & WORD]
        key = [(k + w) & WORD for k, w in zip(key, WEYL, strict=True)]
    return torch.stack(c, -1)


def keep_mask(rows: int, columns: int, seed: torch.Tensor, p: float) -> torch.Tensor:
    """bool [rows, columns]: which elements dropout with probability ``p`` keeps."""
    n = rows * columns
    words = philox(torch.arange((n + 3) // 4, device=seed.device), seed).flatten()[:n]
    return ((words >> 8).to(torch.float64) * 2.0**-24 >= p).reshape(rows, columns)


def dropout(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Inverted dropout of x [T, n]: kept elements are scaled by 1 / (1 - p), the others are zero."""
    return torch.where(keep_mask(*x.shape, seed, p), x / (1 - p), torch.zeros((), dtype=x.dtype, device=x.device))
