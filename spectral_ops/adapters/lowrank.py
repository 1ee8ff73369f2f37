"""y = x Wᵀ + γ drop(x) Aᵀ C Bᵀ + b over factors a method makes of what it trains and what it froze (METHODS 1.1)."""

from __future__ import annotations

import torch

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.base import AdapterLinear


class LowRankLinear(AdapterLinear):
    """A linear layer whose adapters add a product of low rank to its weight; a method states :meth:`factors`."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A [r, k], B [d, r], and the core C: None, a diagonal [r], or [r, r]. Gradients reach what is trained."""
        raise NotImplementedError

    def scale(self, name: str) -> float:
        """γ, which multiplies the product; a number, so that it is rounded to no narrow dtype."""
        return 1.0

    def adapted(self, x, name):
        A, B, core = self.factors(name)
        return self.lowrank(x, A, B, self.settings[name].dropout, core=core, scale=self.scale(name))

    @torch.no_grad()
    def delta(self, name: str) -> torch.Tensor:
        """γ B Cᵀ A [d, k] in at least float32."""
        A, B, core = self.factors(name)
        acc = accumulate_dtype(A.dtype)
        A, B = A.to(acc), B.to(acc)
        if core is not None:
            B = B * core if core.dim() == 1 else B @ core.to(acc).t()
        return self.scale(name) * (B @ A)

    def delta_weight(self, adapter_name=None):
        return self.delta(self._known(adapter_name))

    def merged_weight(self, weight, name):
        return weight + self.delta(name), ()

    def unmerged_weight(self, weight, name):
        return weight - self.delta(name)
