"""Spectral Adapter: fine-tune the leading singular vectors of the weight (METHODS 2; arXiv:2405.13952).

With triplets U [d, r], S [r], Vᵀ [r, k] of W, frozen and kept in the file, beside what trains:

    additive (A)   W' = W + (U + ΔU) S (V + ΔV)ᵀ - U S Vᵀ        ΔU [d, r] and ΔVᵀ [r, k], from zero
    rotation (R)   W' = W + U N Vᵀ                               N = Q_U diag(S * C) Q_Vᵀ - diag(S)

where Q_U and Q_V are the Cayley transforms of two [r, r] matrices, from zero, and C [r] starts at one. R is the
low-rank operator with A = Vᵀ, B = U and the core Nᵀ. A's update is written so that each term vanishes at the start,

    (U + ΔU) S (V + ΔV)ᵀ - U S Vᵀ = ΔU S (V + ΔV)ᵀ + U S ΔVᵀ     A = [Vᵀ + ΔVᵀ; ΔVᵀ]   B = [ΔU | U]   core [S; S]

so that nothing cancels, W is untouched, and a fresh adapter, a disabled and a detached one compute exactly what the
layer did. It has rank 2r. ``residual`` moves U S Vᵀ out of W as PiSSA does: rank r, but W is rounded to its dtype, and
the layer holds that one adapter. Any number of the others fit on one weight, on triplets of their own (``start``), and
:func:`fuse_spectral` makes one adapter of them: side by side, their ranks add up to the sum of their updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.lowrank import LowRankLinear
from spectral_ops.core import checks
from spectral_ops.functional import cayley
from spectral_ops.init import truncated_svd


@dataclass
class SpectralConfig(AdapterConfig):
    """Spectral Adapter; see :class:`AdapterConfig` for the common fields. PEFT does not have it.

    r: triplets. mode: "additive" or "rotation". start: the adapter takes the triplets start, ..., start + r - 1, from
    the largest on. niter: power iterations of a randomized decomposition; None: the exact one. residual: additive only,
    the base gives up U S Vᵀ, for half the rank. spectral_dropout: on the adapter branch.
    """

    mode: str = "additive"
    start: int = 0
    niter: int | None = None
    residual: bool = False
    spectral_dropout: float = 0.0

    peft_type: ClassVar[str] = "SPECTRAL"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("additive", "rotation"):
            self.wrong("mode", self.mode, '"additive" or "rotation"')
        checks.integer(self._field("start"), self.start, 0, None, "the first triplet")
        if self.niter is not None:
            checks.integer(self._field("niter"), self.niter, 0, None, "power iterations")
        if not isinstance(self.residual, bool) or (self.residual and self.mode == "rotation"):
            self.wrong("residual", self.residual, 'False, or True in mode "additive"')
        checks.probability(self._field("spectral_dropout"), self.spectral_dropout)

    @property
    def dropout(self) -> float:
        return self.spectral_dropout

    @property
    def changes_base(self) -> bool:
        return self.residual

    @property
    def slow_init(self) -> bool:
        return True


class SpectralLinear(LowRankLinear):
    """A linear layer with Spectral Adapters, each over its frozen ``spectral_U``, ``spectral_S`` and ``spectral_Vh``.

    Additive: ``spectral_delta_U`` [d, r] and ``spectral_delta_Vh`` [r, k]. Rotation: ``spectral_rotation`` [2, r, r],
    whose skew parts turn U and V, and ``spectral_scale`` C [r].
    """

    config_type = SpectralConfig
    tensor_keys = {
        "spectral_delta_U": "spectral_delta_U",
        "spectral_delta_Vh": "spectral_delta_Vh",
        "spectral_rotation": "spectral_rotation",
        "spectral_scale": "spectral_scale",
    }
    initial_keys = {"spectral_U": "spectral_U", "spectral_S": "spectral_S", "spectral_Vh": "spectral_Vh"}

    @classmethod
    def shapes(cls, config, d, k):
        r, triplets = config.r, min(d, k)
        if config.start + r > triplets:
            config.wrong("r", r, f"at most {triplets} - start ({config.start}), the triplets of a weight [{d}, {k}]")
        if config.mode == "rotation":
            return {"spectral_rotation": (2, r, r), "spectral_scale": (r,)}
        return {"spectral_delta_U": (d, r), "spectral_delta_Vh": (r, k)}

    @classmethod
    def initial_shapes(cls, config, d, k):
        return {"spectral_U": (d, config.r), "spectral_S": (config.r,), "spectral_Vh": (config.r, k)}

    def admit(self, config):
        if config.residual:
            self.readable("residual=True")
        if self.settings and (config.residual or any(other.residual for other in self.settings.values())):
            raise ValueError(
                f"adapter_name: got a second adapter on a layer with {self.adapter_names}, wanted a layer of its own"
                " for residual=True, which changes the base"
            )

    def reset(self, name):
        config = self.settings[name]
        U, S, Vh = truncated_svd(self.decomposable("the decomposition"), config.start + config.r, niter=config.niter)
        self.set_initial(name, U[:, config.start :], S[config.start :], Vh[config.start :])
        for key in self.held(name):
            nn.init.zeros_(getattr(self, key)[name])
        if config.mode == "rotation":
            nn.init.ones_(self.spectral_scale[name])

    def set_initial(self, name, U, S, Vh):
        """Record the triplets of adapter ``name``."""
        like = getattr(self, next(iter(self.held(name))))[name]
        for key, tensor in zip(self.initial_keys, (U, S, Vh), strict=True):
            getattr(self, key)[name] = nn.Parameter(
                tensor.to(like).clone(memory_format=torch.contiguous_format), requires_grad=False
            )

    # the layer

    def triplets(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Vᵀ [r, k], U [d, r] and S [r]: A, B and the core of the part of W that the adapter starts from."""
        return self.spectral_Vh[name], self.spectral_U[name], self.spectral_S[name]

    def taken(self):
        name = next((name for name, config in self.settings.items() if config.residual), None)
        return None if name is None else (*self.triplets(name), 1.0)

    def factors(self, name):
        Vh, U, S = self.triplets(name)
        if self.settings[name].mode == "rotation":
            return Vh, U, self._core(self.spectral_rotation[name], S, self.spectral_scale[name])
        dU, dVh = self.spectral_delta_U[name], self.spectral_delta_Vh[name]
        if self.settings[name].residual:
            return Vh + dVh, U + dU, S
        return torch.cat([Vh + dVh, dVh]), torch.cat([dU, U], 1), torch.cat([S, S])

    @staticmethod
    def _core(X: torch.Tensor, S: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        """Nᵀ = Q_V D Q_Uᵀ - S with D = S C, as the sum of what Q_V - I, Q_U - I and C - 1 add: exactly zero where they
        are, even where the library rounds the factors of products (TF32)."""
        with torch.autocast(S.device.type, enabled=False):
            Q = cayley(X)
            S = S.to(Q.dtype)
            D, turned = S * C, Q - torch.eye(len(S), dtype=Q.dtype, device=Q.device)
            return (turned[1] * D) @ Q[0].t() + D.unsqueeze(1) * turned[0].t() + torch.diag(D - S)

    # files and fusion

    def file_tensors(self, name, plain):
        frozen = {suffix: getattr(self, key)[name].detach() for key, suffix in self.initial_keys.items()}
        return super().file_tensors(name, plain) | frozen

    @torch.no_grad()
    def fuse(self, names: list[str], adapter_name: str, config: SpectralConfig) -> None:
        """Add adapter ``adapter_name``, not active, whose update is the sum of those of ``names``; config.r is Σr."""

        def side_by_side(key: str, dim: int) -> torch.Tensor:
            return torch.cat([getattr(self, key)[name] for name in names], dim)

        U, S, Vh = side_by_side("spectral_U", 1), side_by_side("spectral_S", 0), side_by_side("spectral_Vh", 0)
        wide = U.dtype == accumulate_dtype(self.base_layer.weight.dtype)
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=wide, initialise=False)
        self.set_initial(adapter_name, U, S, Vh)
        if config.mode == "rotation":
            both = zip(*(self.spectral_rotation[name] for name in names), strict=True)
            self.spectral_rotation[adapter_name].copy_(torch.stack([torch.block_diag(*blocks) for blocks in both]))
            self.spectral_scale[adapter_name].copy_(side_by_side("spectral_scale", 0))
        else:
            self.spectral_delta_U[adapter_name].copy_(side_by_side("spectral_delta_U", 1))
            self.spectral_delta_Vh[adapter_name].copy_(side_by_side("spectral_delta_Vh", 0))

    def describe_adapter(self, name):
        config = self.settings[name]
        return f"{config.mode}, r={config.r}, start={config.start}{', residual' if config.residual else ''}"
