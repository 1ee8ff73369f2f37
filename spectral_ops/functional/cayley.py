"""Cayley transform: an orthogonal matrix from any square one, smooth and without constraints (METHODS 1.9).

    K = (X - Xᵀ) / 2      Q = (I - K) (I + K)⁻¹ = 2 (I + K)⁻¹ - I
    backward, with G = dQ, M = I + Q and V = M Gᵀ M:   dK = -(Mᵀ G Mᵀ) / 2      dX = (dK - dKᵀ) / 2 = (V - Vᵀ) / 4

K is skew, so every singular value of I + K is at least 1: it is never singular, and Q is as orthogonal as the inverse
is accurate. Backward is two products, from Q alone: in float32 they are more accurate than autograd through a solve
wherever K is large, since M, the inverse doubled, has digits that (I + K)⁻¹ (I - K) has lost.

The inverse is an elimination with pivots: without them its entries grow with |K|², and in float32 digits are lost from
|K| = 100 on. One matrix is one thread's (in Triton one program's, in registers for r <= 64, the library's above). The
CPU kernels run at any r, since they beat the library at all that were measured: benchmarks/bench_cayley.py.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, calls, define, nbytes
from spectral_ops.core import checks
from spectral_ops.core.autograd import apply, backward_pass

__all__ = ["cayley"]

# --- operators -------------------------------------------------------------------------------------------------------


def _inverse(A):
    """A⁻¹ of each matrix. inv_ex does not wait for the device; torch.linalg.inv does.

    On the CPU one matrix at a time: with two threads torch 2.13 (MKL 2024.2) inverts batches of r >= 160 wrongly, with
    residuals of 0.1 and no error.
    """
    if A.device.type != "cpu":
        return torch.linalg.inv_ex(A)[0]
    inverse = torch.empty_like(A)
    for one, matrix in zip(inverse, A, strict=True):
        one.copy_(torch.linalg.inv_ex(matrix)[0])
    return inverse


def _forward_cost(X):
    out = X.numel() * accumulate_dtype(X.dtype).itemsize
    return Cost(2 * X.numel() * X.shape[-1], nbytes(X) + out)


def _forward_samples(s):
    X = s.randn(min(s.T, 2), s.r, s.r)
    yield (X,)
    yield (X.mT,)


@define(
    "cayley_forward(Tensor X) -> Tensor",
    fake=lambda X: X.new_empty(X.shape, dtype=accumulate_dtype(X.dtype)),
    cost=_forward_cost,
    samples=_forward_samples,
)
def cayley_forward_op(X):
    """Q [n, r, r] of X [n, r, r], in float32 (float64 for float64), contiguous."""
    wide = X.to(accumulate_dtype(X.dtype))
    eye = torch.eye(X.shape[-1], dtype=wide.dtype, device=X.device)
    return (2 * _inverse(eye + (wide - wide.mT) / 2) - eye).contiguous()


def _backward_samples(s):
    n = min(s.T, 2)
    Q, G = cayley_forward_op.reference(s.randn(n, s.r, s.r)), s.randn(n, s.r, s.r, dtype=s.acc)
    yield Q, G
    yield Q.mT, G[:1].expand_as(G)


@define(
    "cayley_backward(Tensor Q, Tensor G) -> Tensor",
    fake=lambda Q, G: Q.new_empty(Q.shape),
    cost=lambda Q, G: Cost(4 * Q.numel() * Q.shape[-1], nbytes(Q, G) + nbytes(Q)),
    samples=_backward_samples,
)
def cayley_backward_op(Q, G):
    """dX [n, r, r] of G = dQ, both float32 or float64 as Q is: skew, contiguous."""
    M = Q + torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    V = M @ (G.mT @ M)
    return (V - V.mT) / 4


# --- autograd --------------------------------------------------------------------------------------------------------


class CayleyFunction(Function):
    """Q [n, r, r] of X, of which Q alone is saved."""

    @staticmethod
    def forward(ctx, X):
        Q = cayley_forward_op(X)
        ctx.save_for_backward(Q)
        ctx.dtype = X.dtype
        return Q

    @staticmethod
    @backward_pass
    def backward(ctx, G):
        (Q,) = ctx.saved_tensors
        return cayley_backward_op(Q, G).to(ctx.dtype)


# --- public function -------------------------------------------------------------------------------------------------


@calls(cayley_forward_op, cayley_backward_op)
def cayley(X):
    """The orthogonal matrix Q = (I - K)(I + K)⁻¹ of the skew part K = (X - Xᵀ)/2 of a matrix.

    Args:
        X: [r, r], or [n, r, r] for n matrices at once (those of many layers may be stacked); any floating dtype and
            strides; may require grad. Only its skew part matters, and its gradient is skew.

    Returns Q of X's shape, with determinant 1, in float32 (float64 for float64): exactly I where X is symmetric. What
    is not finite stays in its own matrix. Saves Q alone for backward. Raises TypeError/ValueError that name X.
    METHODS 1.9; Spectral Adapter, arXiv:2405.13952.
    """
    checks.tensor("X", X, "[r, r] or [n, r, r]")
    if X.dim() not in (2, 3) or X.shape[-1] != X.shape[-2] or X.shape[-1] == 0:
        raise ValueError(f"X: got {checks.describe(X)}, wanted square matrices [r, r] or [n, r, r] with r >= 1")
    if X.dim() == 3:
        return apply(CayleyFunction, X, X)
    return apply(CayleyFunction, X, X.unsqueeze(0)).squeeze(0)
