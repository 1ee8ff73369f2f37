"""Products with a dropped-out factor whose mask is regenerated on the fly (METHODS 1.1, backward of drop(x)).

    h  = drop(x) Aᵀ        dA = uᵀ drop(x)        dx += mask * (u A)

The mask belongs to x [T, k]; no [T, k] copy of drop(x) is made. :mod:`spectral_ops.core.philox` defines it.
"""

from __future__ import annotations

import torch

from spectral_ops._library import Cost, accumulate_dtype, define, nbytes
from spectral_ops.core import philox
from spectral_ops.core.autograd import tokens


def _project_cost(x, A, seed, p):
    return Cost(2 * x.numel() * A.shape[0], nbytes(x, A) + x.shape[0] * A.shape[0] * x.element_size())


def _project_samples(s):
    yield s.x, s.A, s.key, 0.25
    yield s.rows(s.x), s.A, s.key, 0.0


@define(
    "dropout_project(Tensor x, Tensor A, Tensor seed, float p) -> Tensor",
    fake=lambda x, A, seed, p: x.new_empty(x.shape[0], A.shape[0]),
    cost=_project_cost,
    samples=_project_samples,
)
def dropout_project_op(x, A, seed, p):
    """h [T, r] = drop(x) Aᵀ in x's dtype, for x [T, k] and A [r, k] of one dtype."""
    acc = accumulate_dtype(x.dtype)
    return (philox.dropout(x.to(acc), seed, p) @ A.to(acc).t()).to(x.dtype)


def _outer_cost(u, x, seed, p):
    k, r = x.shape[1], u.shape[1]
    return Cost(2 * x.numel() * r, nbytes(x, u) + r * k * accumulate_dtype(x.dtype).itemsize)


def _outer_samples(s):
    yield s.h, s.x, s.key, 0.25
    yield s.h, s.rows(s.x), s.key, 0.9


@define(
    "dropout_outer(Tensor u, Tensor x, Tensor seed, float p) -> Tensor",
    fake=lambda u, x, seed, p: x.new_empty(u.shape[1], x.shape[1], dtype=accumulate_dtype(x.dtype)),
    cost=_outer_cost,
    samples=_outer_samples,
)
def dropout_outer_op(u, x, seed, p):
    """dA [r, k] = uᵀ drop(x) in float32 (float64 for float64), for u [T, r] and x [T, k] of one dtype."""
    acc = accumulate_dtype(x.dtype)
    return u.to(acc).t() @ philox.dropout(x.to(acc), seed, p)


def _lift_cost(out, u, A, seed, p):
    return Cost(2 * out.numel() * A.shape[0], 2 * nbytes(out) + nbytes(u, A))


def _lift_samples(s):
    yield s.randn(s.T, s.k), s.h, s.A, s.key, 0.25
    yield s.rows(s.x), s.h, s.A, s.key, 0.5


@define(
    "dropout_lift_(Tensor(a!) out, Tensor u, Tensor A, Tensor seed, float p) -> ()",
    fake=lambda out, u, A, seed, p: None,
    cost=_lift_cost,
    samples=_lift_samples,
)
def dropout_lift_op(out, u, A, seed, p):
    """out [T, k] += drop(u A), for u [T, r] and A [r, k] of out's dtype."""
    acc = accumulate_dtype(out.dtype)
    out.copy_(out.to(acc) + philox.dropout(u.to(acc) @ A.to(acc), seed, p))


@define(
    "seeded_dropout(Tensor x, Tensor seed, float p) -> Tensor",
    fake=lambda x, seed, p: x.new_empty(x.shape),
    cost=lambda x, seed, p: Cost(x.numel(), 2 * nbytes(x)),
    samples=lambda s: [(s.x, s.key, 0.25), (s.rows(s.x), s.key, 0.0)],
)
def seeded_dropout_op(x, seed, p):
    """drop(x) [T, k], contiguous: for the one method (DoRA) whose base product reads drop(x) itself."""
    return philox.dropout(x.to(accumulate_dtype(x.dtype)), seed, p).to(x.dtype).contiguous()


def dropped(x: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """drop(x) [..., k] as x times its mask, which autograd can differentiate as often as it likes."""
    if seed is None:
        return x
    return x * seeded_dropout_op(torch.ones_like(tokens(x)), seed, p).reshape(x.shape)


def project(x: torch.Tensor, A: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """drop(x) Aᵀ [T, r]; the library's product where there is no dropout."""
    return x @ A.t() if seed is None else dropout_project_op(x, A, seed, p)


def lift_(out: torch.Tensor, u: torch.Tensor, A: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """out [T, k] += mask * (u A), in place."""
    if seed is None:
        return out.addmm_(u, A)
    dropout_lift_op(out, u, A, seed, p)
    return out
