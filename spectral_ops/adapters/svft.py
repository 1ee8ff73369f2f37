"""SVFT: y = x (W + U M Vᵀ)ᵀ + b, U and V the frozen singular vectors of W, M sparse and trained (METHODS 2;
arXiv:2405.19597).

Which entries of M train is its pattern, the four of the paper. It keeps U and V whole, where PiCa keeps one of them cut
to r columns: that is the price of touching every direction with few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.core import checks
from spectral_ops.functional import CSR, csr_spmm, svft
from spectral_ops.init import truncated_svd

PATTERNS = ("banded", "random", "top_k")


@dataclass
class SVFTConfig(AdapterConfig):
    """SVFT; see :class:`AdapterConfig` for the common fields. PEFT does not have it.

    pattern: which entries of M [m, m] train. "banded": the diagonal and ``off_diag`` more on either side of it; with
    off_diag=0, the paper's plain SVFT, the diagonal alone. "random": as many, drawn with ``seed``. "top_k": as many,
    where a left and a right singular vector are most alike (u_i · v_j), which takes a square weight. r: how many of the
    largest triplets M spans; None, the paper's choice, for all min(d, k).
    """

    r: int | None = None
    pattern: str = "banded"
    off_diag: int = 0
    seed: int = 0

    peft_type: ClassVar[str] = "SVFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern not in PATTERNS:
            self.wrong("pattern", self.pattern, f"one of {', '.join(map(repr, PATTERNS))}")
        checks.integer(self._field("off_diag"), self.off_diag, 0, None, "diagonals on either side")
        checks.integer(self._field("seed"), self.seed, 0, 2**63 - 1, "a seed")

    def check_rank(self) -> None:
        if self.r is not None:
            super().check_rank()

    @property
    def slow_init(self) -> bool:
        return True

    def span(self, d: int, k: int) -> int:
        """m, how many triplets M spans on a layer [d, k]."""
        n = min(d, k)
        if self.r is not None and self.r > n:
            self.wrong("r", self.r, f"at most {n} (a weight [{d}, {k}] has no more triplets)")
        return n if self.r is None else self.r

    def nnz(self, m: int) -> int:
        """How many entries of M [m, m] train."""
        band = min(self.off_diag, m - 1)
        return m + band * (2 * m - band - 1)


class SVFTLinear(AdapterLinear):
    """A linear layer with SVFT adapters: ``svft_values`` [nnz] trains; ``svft_row_offsets`` [m + 1] and
    ``svft_col_indices`` [nnz], int32, say where it stands in M; ``svft_U`` [d, m] and ``svft_Vh`` [m, k] are frozen.

    A file holds all five: a decomposition made again would turn signs.
    """

    config_type = SVFTConfig
    tensor_keys = {"svft_values": "svft_values"}
    index_keys = {"svft_row_offsets": "svft_row_offsets", "svft_col_indices": "svft_col_indices"}
    initial_keys = {"svft_U": "svft_U", "svft_Vh": "svft_Vh"}

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self._csr: dict[str, tuple[torch.Tensor, int, CSR]] = {}

    @classmethod
    def shapes(cls, config, d, k):
        if config.pattern == "top_k" and d != k:
            config.wrong("pattern", "top_k", f'"banded" or "random" over a weight [{d}, {k}] that is not square')
        return {"svft_values": (config.nnz(config.span(d, k)),)}

    @classmethod
    def index_shapes(cls, config, d, k):
        m = config.span(d, k)
        return {"svft_row_offsets": (m + 1,), "svft_col_indices": (config.nnz(m),)}

    @classmethod
    def initial_shapes(cls, config, d, k):
        m = config.span(d, k)
        return {"svft_U": (d, m), "svft_Vh": (m, k)}

    @classmethod
    def check_tensors(cls, config, d, k, tensors):
        values, *index = (tensors[key] for key in ("svft_values", "svft_row_offsets", "svft_col_indices"))
        m = config.span(d, k)
        CSR(values, *index, (m, m)).validate()

    def reset(self, name):
        config, m = self.settings[name], self.svft_row_offsets[name].numel() - 1
        U, _, Vh = truncated_svd(self.decomposable("SVFT's decomposition"), m)
        self.set_initial(name, U, Vh)
        nn.init.zeros_(self.svft_values[name])
        places = chosen(config, m, U, Vh).to(U.device)  # ascending
        self.svft_row_offsets[name].copy_(torch.searchsorted(places // m, torch.arange(m + 1, device=U.device)))
        self.svft_col_indices[name].copy_(places % m)

    def set_initial(self, name, U, Vh):
        """Record the singular vectors of adapter ``name``."""
        like = self.svft_values[name]
        for key, tensor in zip(self.initial_keys, (U, Vh), strict=True):
            held = tensor.to(like).clone(memory_format=torch.contiguous_format)
            getattr(self, key)[name] = nn.Parameter(held, requires_grad=False)

    def remove_adapter(self, name):
        super().remove_adapter(name)
        self._csr.pop(name, None)

    # the layer

    def csr(self, adapter_name: str | None = None) -> CSR:
        """M [m, m] of an adapter (default: the active one) over its parameter."""
        name = self._known(adapter_name)
        values, offsets = self.parameter("svft_values", name), self.svft_row_offsets[name]
        known = self._csr.get(name)
        compiling = torch.compiler.is_compiling()
        if known is None or known[0] is not offsets or not (compiling or known[1] == offsets._version):
            m = offsets.numel() - 1
            csr = CSR(values, offsets, self.svft_col_indices[name], (m, m)).validate()
            known = self._csr[name] = (offsets, offsets._version, csr)
        return known[2] if known[2].values is values else known[2].with_values(values)

    def adapted(self, x, name):
        return self.fused(x, _linear, _update, self.svft_U[name], self.svft_Vh[name], self.csr(name))

    def delta(self, name):
        csr, wide = self.csr(name), accumulate_dtype(self.svft_U[name].dtype)
        U, Vh = self.svft_U[name].to(wide), self.svft_Vh[name].to(wide)
        return csr_spmm(U, csr.with_values(csr.values.detach().to(wide)).transpose()) @ Vh

    # copies and files

    def file_tensors(self, name, plain):
        frozen = {suffix: getattr(self, key)[name].detach() for key, suffix in self.initial_keys.items()}
        return super().file_tensors(name, plain) | frozen

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_csr": {}}

    def describe_adapter(self, name):
        config, m = self.settings[name], self.svft_row_offsets[name].numel() - 1
        return f"{config.pattern}, off_diag={config.off_diag}, m={m}, nnz={self.svft_values[name].numel()}"


def chosen(config: SVFTConfig, m: int, U: torch.Tensor, Vh: torch.Tensor) -> torch.Tensor:
    """The flat places of the trained entries in M [m, m], ascending int64."""
    nnz = config.nnz(m)
    if config.pattern == "random":
        return torch.randperm(m * m, generator=torch.Generator().manual_seed(config.seed))[:nnz].sort().values
    if config.pattern == "top_k":
        return (U.t() @ Vh.t()).flatten().topk(nnz).indices.sort().values
    return banded(m, config.off_diag)


def banded(m: int, off_diag: int) -> torch.Tensor:
    """The flat places of a matrix [m, m] within ``off_diag`` of its diagonal, ascending."""
    band = min(off_diag, m - 1)
    columns = torch.arange(m).unsqueeze(1) + torch.arange(-band, band + 1)
    inside = (columns >= 0) & (columns < m)
    return (columns + m * torch.arange(m).unsqueeze(1))[inside]


def _linear(x, weight, bias, U, Vh, csr: CSR):
    return svft.linear(x, weight, bias, U, Vh, csr.ordered(csr.values), csr.pattern)


def _update(out, x, U, Vh, csr: CSR):
    """Over what the base layer returned."""
    x = x.to(out.dtype)
    product = csr_spmm(F.linear(x, Vh.to(out.dtype)), csr)
    return out + F.linear(product, U.to(out.dtype))
