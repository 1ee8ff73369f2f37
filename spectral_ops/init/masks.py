"""RoSA's mask: the places of a weight whose scores are largest, as a CSR pattern (METHODS 2)."""

from __future__ import annotations

import torch

from spectral_ops.core import checks


@torch.no_grad()
def topk_pattern(scores, nnz):
    """row_offsets int32 [d + 1] and col_indices int32 [nnz] of the ``nnz`` largest entries of ``scores`` [d, k].

    Worked out on the device of ``scores`` (which waits for it). Among equal scores the first in row-major order win, so
    that every device and every rank gets the same pattern. Columns ascend within each row. Raises ValueError for more
    entries than places, or scores that are not finite.
    """
    checks.tensor("scores", scores, "[d, k]", 2)
    checks.integer("nnz", nnz, 0, scores.numel(), "at most one entry per place of scores")
    d, k = scores.shape
    flat = scores.reshape(-1)
    if not torch.isfinite(flat).all():
        raise ValueError(f"scores: got non-finite values in {checks.describe(scores)}, wanted finite ones")
    if nnz == 0:
        chosen = flat.new_empty(0, dtype=torch.int64)
    else:
        least = torch.topk(flat, nnz, sorted=False).values.min()
        above = (flat > least).nonzero().squeeze(1)
        ties = (flat == least).nonzero().squeeze(1)[: nnz - above.numel()]  # topk itself takes any of them
        chosen = torch.cat([above, ties]).sort().values
    bounds = torch.arange(d + 1, device=flat.device) * k
    return torch.searchsorted(chosen, bounds).to(torch.int32), (chosen % max(k, 1)).to(torch.int32)
