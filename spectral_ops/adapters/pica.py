"""PiCa: y = x Wᵀ + drop(x) Pᵀ Mᵀ + b, P = V_rᵀ of W frozen, M trained and shared by layers of one role (METHODS 1.1, 2;
arXiv:2505.20211)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.config import AdapterConfig, check_pattern, match_pattern
from spectral_ops.adapters.lowrank import LowRankLinear
from spectral_ops.core import checks
from spectral_ops.init import truncated_svd


@dataclass
class PiCaConfig(AdapterConfig):
    """PiCa; see :class:`AdapterConfig` for the common fields.

    Layers whose paths end in the same name (the role, such as q_proj) share one M; they must have one size and rank.
    side: "input", where P is V_rᵀ [r, k] and M [d, r]; or "output", where P is U_r [d, r] and M [r, k]. niter: None for
    the exact decomposition, else the power iterations of the randomised one. pica_dropout: on the adapter branch.
    rank_pattern: another r for the layers whose path ends with a match of the key.
    """

    side: str = "input"
    niter: int | None = None
    pica_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)

    peft_type: ClassVar[str] = "PICA"
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "all", "pica_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("input", "output"):
            self.wrong("side", self.side, '"input" or "output"')
        if self.niter is not None:
            checks.integer(self._field("niter"), self.niter, 0, None, "power iterations")
        checks.probability(self._field("pica_dropout"), self.pica_dropout)
        check_pattern(self, "rank_pattern")
        for key, r in self.rank_pattern.items():
            checks.integer(f"{self._field('rank_pattern')}[{key!r}]", r, 1, None, "rank")

    @property
    def dropout(self) -> float:
        return self.pica_dropout

    @property
    def slow_init(self) -> bool:
        return True

    def for_layer(self, path: str) -> PiCaConfig:
        r = match_pattern(self.rank_pattern, path, self.r)
        return self if r == self.r else replace(self, r=r)

    def for_model(self, sizes: dict[str, tuple[int, int]]) -> PiCaConfig:
        first: dict[str, tuple[str, tuple[int, int], int]] = {}
        for path, size in sizes.items():
            r = self.for_layer(path).r
            other, other_size, other_r = first.setdefault(role(path), (path, size, r))
            if (size, r) != (other_size, other_r):
                raise ValueError(
                    f"target_modules: got {path!r} {list(size)} with r={r} beside {other!r} {list(other_size)} with"
                    f" r={other_r}, wanted one size and rank for all of {role(path)!r}, which share one M"
                )
        return self


def role(path: str) -> str:
    """What a layer is in its block: the last name of its path."""
    return path.rpartition(".")[2]


class PiCaLinear(LowRankLinear):
    """A linear layer with PiCa adapters: ``pica_P`` its own and frozen, ``pica_M`` tied across layers of its role.

    M is float32 at least, so that its gradient, a sum over all those layers, is too.
    """

    config_type = PiCaConfig
    tensor_keys = {"pica_P": "pica_P", "pica_M": "pica_M"}
    tied_keys = frozenset({"pica_M"})

    @classmethod
    def shapes(cls, config, d, k):
        if config.r > min(d, k):
            config.wrong("r", config.r, f"at most {min(d, k)} (a weight [{d}, {k}] has no more triplets)")
        inner, outer = (config.r, k), (d, config.r)
        projection, trained = (inner, outer) if config.side == "input" else (outer, inner)
        return {"pica_P": projection, "pica_M": trained}

    @classmethod
    def file_key(cls, path, suffix):
        return f"base_model.pica_M.{role(path)}" if suffix == "pica_M" else super().file_key(path, suffix)

    @classmethod
    def link(cls, layers, name):
        first: dict[str, PiCaLinear] = {}
        for path, layer in layers.items():
            owner = first.setdefault(role(path), layer)
            if owner is layer:
                shared = layer.pica_M[name]
                zeros = torch.zeros(shared.shape, dtype=shared.dtype, device=layer.base_layer.weight.device)
                layer.pica_M[name] = nn.Parameter(zeros, requires_grad=False)
            else:
                layer.pica_M.tie(name, owner.pica_M)

    def parameter_dtype(self, key, dtype):
        return accumulate_dtype(dtype) if key == "pica_M" else dtype

    def trainable(self, name):
        return ("pica_M",)

    def reset(self, name):
        config = self.settings[name]
        U, _, Vh = truncated_svd(self.decomposable("PiCa's decomposition"), config.r, niter=config.niter)
        self.pica_P[name].copy_(Vh if config.side == "input" else U)

    def factors(self, name):
        P, M = self.pica_P[name], self.pica_M[name]
        return (P, M, None) if self.settings[name].side == "input" else (M, P, None)

    def describe_adapter(self, name):
        config = self.settings[name]
        return f"r={config.r}, side={config.side}"
