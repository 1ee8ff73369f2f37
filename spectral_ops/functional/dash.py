"""LoRA-Dash's scores: which singular directions of a weight an adapter has strengthened the most (METHODS 2)."""

from __future__ import annotations

import torch

from spectral_ops._library import accumulate_dtype
from spectral_ops.core import checks

__all__ = ["task_direction_scores"]

EPSILON = 1e-6


def task_direction_scores(lora_A, lora_B, U, S, Vh, scale=1.0):
    """δ [n]: by how much of its singular value an adapter changes each singular direction of the weight under it.

        δ_i = |u_iᵀ (scale B A) v_i| / (σ_i + 1e-6)

    Args:
        lora_A: A [r, k]; lora_B: B [d, r], any floating dtype.
        U [d, n], S [n], Vh [n, k]: n singular triplets of the weight [d, k].
        scale: γ, a number.

    Two products, UᵀB and Vh Aᵀ, [n, r] each, multiplied entry by entry and summed over r: no B A [d, k] is formed, and
    nothing waits for the device. In float32 at least (float64 where an argument is). Raises TypeError/ValueError that
    name the argument. LoRA-Dash, arXiv:2409.01035.
    """
    checks.tensor("lora_A", lora_A, "[r, in_features]", 2)
    checks.tensor("lora_B", lora_B, "[out_features, r]", 2)
    checks.size("lora_B", lora_B, 1, lora_A.shape[0], "the rank, rows of lora_A")
    checks.tensor("S", S, "[n]", 1)
    checks.tensor("U", U, "[out_features, n]", 2)
    checks.size("U", U, 0, lora_B.shape[0], "out_features, rows of lora_B")
    checks.size("U", U, 1, S.shape[0], "the number of triplets, entries of S")
    checks.tensor("Vh", Vh, "[n, in_features]", 2)
    checks.size("Vh", Vh, 0, S.shape[0], "the number of triplets, entries of S")
    checks.size("Vh", Vh, 1, lora_A.shape[1], "in_features, columns of lora_A")
    checks.device("lora_A", lora_A, lora_B=lora_B, U=U, S=S, Vh=Vh)
    checks.number("scale", scale)
    acc = torch.float32
    for t in (lora_A, lora_B, U, S, Vh):
        acc = torch.promote_types(acc, accumulate_dtype(t.dtype))
    left, right = U.to(acc).t() @ lora_B.to(acc), Vh.to(acc) @ lora_A.to(acc).t()
    return (scale * (left * right).sum(1)).abs() / (S.to(acc) + EPSILON)
