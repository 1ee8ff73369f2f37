"""xᵀ in memory of its own, for products whose library reads a transposed factor slowly: see common.gradient_tiles."""

from __future__ import annotations

from spectral_ops._library import Cost, define, nbytes


@define(
    "transpose_(Tensor(a!) out, Tensor x) -> ()",
    stem="transpose",
    fake=lambda out, x: None,
    cost=lambda out, x: Cost(0, nbytes(out, x)),
)
def transpose_op(out, x):
    """out [n, T] gets xᵀ, bit for bit; x [T, n] in out's dtype."""
    out.copy_(x.t())
