"""Cayley transform: an orthogonal matrix from any square one, smooth and without constraints (METHODS 2, Spectral R).

    K = (X - Xᵀ) / 2      Q = (I - K) (I + K)⁻¹ = 2 (I + K)⁻¹ - I
    backward, with G = dQ:   P = (I + K)⁻ᵀ G      dK = -P (I + Q)ᵀ      dX = (dK - dKᵀ) / 2

K is skew, so every singular value of I + K is at least 1: it is never singular, and Q is orthogonal as closely as the
solve is accurate. I + K and I - K commute, which puts the inverse on the left: one factorisation and triangular solves
give Q, and the factors are kept, so that backward is two more triangular solves and a product, and factors nothing.

The factorisation and the solves stay with torch's library. Kernels of our own for small r would be several times faster
by themselves, but beside the products of a layer there is little to gain: benchmarks/bench_cayley.py measures both.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype
from spectral_ops.functional import checks
from spectral_ops.functional.common import apply, backward_pass

__all__ = ["cayley"]


class CayleyFunction(Function):
    """Q [..., r, r] of X; saves Q, and the LU factors of I + K with their pivots."""

    @staticmethod
    def forward(ctx, X):
        wide = X.to(accumulate_dtype(X.dtype))
        K = (wide - wide.mT) / 2
        eye = torch.eye(X.shape[-1], dtype=wide.dtype, device=X.device)
        LU, pivots, _ = torch.linalg.lu_factor_ex(eye + K)  # not lu_factor, which waits for the device to look at info
        Q = torch.linalg.lu_solve(LU, pivots, eye - K)
        ctx.save_for_backward(Q, LU, pivots)
        ctx.dtype = X.dtype
        return Q

    @staticmethod
    @backward_pass
    def backward(ctx, G):
        Q, LU, pivots = ctx.saved_tensors
        P = torch.linalg.lu_solve(LU, pivots, G, adjoint=True)
        negative = P + P @ Q.mT  # -dK
        return ((negative.mT - negative) / 2).to(ctx.dtype)


def cayley(X):
    """The orthogonal matrix Q = (I - K)(I + K)⁻¹ of the skew part K = (X - Xᵀ)/2 of a matrix, by a linear solve.

    Args:
        X: [r, r], or [n, r, r] for n matrices at once (those of many layers may be stacked); any floating dtype and
            strides; may require grad. Only its skew part matters, and its gradient is skew.

    Returns Q of X's shape, with determinant 1, in float32 (float64 for float64): exactly I where X is symmetric. Saves
    Q and a matrix of its size for backward. Raises TypeError/ValueError that name X. METHODS 2, Spectral Adapter R,
    arXiv:2405.13952.
    """
    checks.tensor("X", X, "[r, r] or [n, r, r]")
    if X.dim() not in (2, 3) or X.shape[-1] != X.shape[-2] or X.shape[-1] == 0:
        raise ValueError(f"X: got {checks.describe(X)}, wanted square matrices [r, r] or [n, r, r] with r >= 1")
    return apply(CayleyFunction, X.device.type, X)
