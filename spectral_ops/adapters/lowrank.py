"""y = x Wᵀ + γ drop(x) Aᵀ C Bᵀ + b over factors a method makes of what it trains and what it froze (METHODS 1.1)."""

from __future__ import annotations

import torch

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.functional import lowrank, lowrank_update


class LowRankLinear(AdapterLinear):
    """A linear layer whose adapters add a product of low rank to its weight; a method states :meth:`factors`.

    An adapter may start from a part of W that the base gives up: then :meth:`taken` says which.
    """

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A [r, k], B [d, r], and the core C: None, a diagonal [r], or [r, r]. Gradients reach what is trained."""
        raise NotImplementedError

    def scale(self, name: str) -> float:
        """γ, which multiplies the product; a number, so that it is rounded to no narrow dtype."""
        return 1.0

    def taken(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float] | None:
        """A, B, core and γ of the product that the base weight lacks, or None. At most one adapter takes anything."""
        return None

    def adapted(self, x, name):
        p = self.settings[name].dropout if self.training else 0.0
        return self.fused(x, fused_linear, fused_update, *self.factors(name), self.scale(name), p)

    def delta(self, name):
        return product(*self.factors(name), self.scale(name))

    @torch.no_grad()
    def commit(self, name):
        if (taken := self.taken()) is not None:
            self.write_matrix(self.full_matrix() - product(*taken))

    @torch.no_grad()
    def restore(self):
        if self.taken() is not None:
            self.write_matrix(self.original_weight())

    @torch.no_grad()
    def original_weight(self):
        weight, taken = super().original_weight(), self.taken()
        return weight if taken is None else weight + product(*taken)

    def original(self, x):
        taken = self.taken()
        return self.product(x) if taken is None else self.fused(x, fused_linear, fused_update, *taken, 0.0)


def fused_linear(x, weight, bias, A, B, core, scale, p):
    """The layer's output where its weight is read."""
    return lowrank.linear(x, weight, A, B, bias, core, None, scale, p)


def fused_update(out, x, A, B, core, scale, p):
    """The same over what the base layer returned."""
    return lowrank_update(out, x, A, B, scale=scale, core=core, dropout_p=p, training=True)


def product(A: torch.Tensor, B: torch.Tensor, core: torch.Tensor | None, scale: float) -> torch.Tensor:
    """scale B Cᵀ A [d, k] in at least float32, without a graph."""
    wide = accumulate_dtype(A.dtype)
    A, B = A.detach().to(wide), B.detach().to(wide)
    if core is not None:
        core = core.detach().to(wide)
        B = B * core if core.dim() == 1 else B @ core.t()
    return scale * (B @ A)
