"""What PEFT's sparse tuners share: values at places of the frozen weight, through RoSA's operators.

PEFT keeps the places as it likes: rows and columns, or positions in no order. The operators read a CSR pattern, which
is worked out once per adapter and index tensor and kept with the layer's state.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensor

from spectral_ops.functional import CSR, lowrank, rosa, rosa_routes
from spectral_ops.functional.csr import Reorder
from spectral_ops.functional.csr_matrix import Pattern
from spectral_ops.integrations.peft_fused import Fused, base_result, operands
from spectral_ops.integrations.peft_plan import Base, Facts, LowRank, Unfit, quantised, weight_of
from spectral_ops.integrations.peft_report import LayerState


class Support(NamedTuple):
    """Where an adapter's values lie, or why they cannot be placed; and the index tensor that said so."""

    indices: torch.Tensor
    version: int | None
    device: torch.device
    pattern: Pattern | None
    order: torch.Tensor | None = None  # int32 [nnz], of the values in the pattern; None: as they are
    inverse: torch.Tensor | None = None
    reason: str = ""

    def serves(self, indices: torch.Tensor, device: torch.device) -> bool:
        return self.indices is indices and self.version == version_of(indices) and self.device == device


class Sparse(NamedTuple):
    """One active adapter: the values as PEFT keeps them, their factor, and with Supra a low-rank part."""

    name: str
    values: torch.Tensor
    scale: float | torch.Tensor
    low: LowRank | None = None
    support: Support | None = None  # None while only the report asks

    def operators(self, tier: str) -> list[str]:
        return [f"rosa_{tier}", *(["lowrank_update"] if tier == "update" and self.low is not None else [])]

    def entries(self) -> torch.Tensor:
        """The values of S in the pattern's order."""
        values, support = self.values, self.support
        if support.order is not None:
            values = Reorder.apply(values, support.order, support.inverse)
        return values if isinstance(self.scale, (float, int)) and self.scale == 1 else values * self.scale


def version_of(indices: torch.Tensor) -> int | None:
    return None if indices.is_inference() else indices._version


def build(indices: torch.Tensor, positions: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> Support:
    """The support of values [nnz] at flat positions [nnz] of a weight [d, k], on the values' device."""
    head = indices, version_of(indices), values.device
    d, k = shape
    with torch.no_grad(), torch.inference_mode(False):
        keys, order = positions.sort()
        ends = torch.arange(d + 1, device=keys.device) * k
        offsets, columns = torch.searchsorted(keys, ends).to(torch.int32), (keys % k).to(torch.int32)
        try:
            pattern = CSR(values.detach(), offsets, columns, shape).pattern
        except (IndexError, ValueError) as error:  # a place twice, or outside the weight
            return Support(*head, None, reason=f"the indices are no support of a weight {list(shape)}: {error}")
        if bool((order[1:] > order[:-1]).all()):
            return Support(*head, pattern)
        return Support(*head, pattern, order.to(torch.int32), order.argsort().to(torch.int32))


@torch.compiler.assume_constant_result
def build_while_tracing(key: int, name: str) -> bool:
    """Have a support ready before a graph reads it: runs once, while the call is traced, on the tensors themselves."""
    layer = LayerState.by_key[key].layer()
    layer._support(name, *layer._places(name))
    return True


class FusedSparse(Fused):
    """A layer whose adapters are values at places; a subclass says where PEFT keeps both."""

    def _places(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """An adapter's index tensor and its values."""
        raise NotImplementedError

    def _positions(self, indices: torch.Tensor) -> torch.Tensor:
        """int64 [nnz] positions in the flat weight."""
        raise NotImplementedError

    def _support(self, name: str, indices: torch.Tensor, values: torch.Tensor) -> Support:
        """The support of an adapter, built where the one that is kept is not of these tensors."""
        supports = self._spectral_ops.supports
        found = supports.get(name)
        if found is None or not found.serves(indices, values.device):
            positions = self._positions(indices.detach().to(values.device))
            found = build(indices, positions, values, (self.out_features, self.in_features))
            supports[name] = found
            if not hasattr(self._spectral_ops, "layer"):  # of a copy
                self._spectral_ops.outlive(self)
        return found


def support_of(layer: FusedSparse, name: str, indices: torch.Tensor, values: torch.Tensor, facts: Facts) -> Support:
    """The support that a call computes with, or Unfit."""
    if type(indices) is FakeTensor or type(values) is FakeTensor:
        raise Unfit("only shapes are traced, and the indices cannot be read")
    if torch.compiler.is_compiling():
        state = layer._spectral_ops
        if not hasattr(state, "layer"):
            raise Unfit(
                "a copy of an accelerated layer is traced before its first call: call it, or accelerate it, first"
            )
        build_while_tracing(state.key, name)
        found = state.supports[name]
        if found.indices is not indices:  # also a guard: another index tensor is traced anew
            raise Unfit("the indices have changed while they were traced")
    else:
        facts.version(indices)
        found = layer._support(name, indices, values)
    if found.pattern is None:
        raise Unfit(found.reason)
    return found


def with_supports(layer: FusedSparse, adapters: list[Sparse], facts: Facts) -> list[Sparse]:
    """The adapters of a call that has passed every other check."""
    found = []
    for a in adapters:
        indices, _ = layer._places(a.name)
        found.append(a._replace(support=support_of(layer, a.name, indices, a.values, facts)))
    return found


def warn_of_hooks(layer: nn.Module, facts: Facts, module: ModuleType) -> None:
    """What PEFT's module of the tuner says, once per layer, where the base layer's hooks are passed over."""
    warn = getattr(module, "_warn_once_about_module_hooks", None)  # 0.18 has none
    if warn is not None and facts.called and not torch.compiler.is_compiling():
        warn(layer)


def weighed(layer: nn.Module, base: Base, facts: Facts, method: str, module: ModuleType) -> Base:
    """The base with its weight, which PEFT adds the values to; it never calls the base layer, nor its hooks."""
    if base.split is not None:
        raise Unfit(f"{method} over a tensor-parallel base layer")
    if quantised(base.layer):
        raise Unfit(f"{method} adds to the weight itself, and the base layer holds it quantised")
    if base.weight is not None:
        return base
    warn_of_hooks(layer, facts, module)
    return base._replace(weight=weight_of(base.layer, facts))


def run_sparse(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[Sparse]) -> torch.Tensor:
    rest = adapters
    if base.weight is None:
        out = base_result(base, x)
    else:
        out, rest = sparse_linear(x, base, adapters[0]), adapters[1:]
    for a in rest:
        narrow = x.to(out.dtype)
        out = rosa.update(out, narrow, a.entries(), a.support.pattern)
        if a.low is not None:
            out = lowrank.update(out, narrow, a.low.A, a.low.B, None, None, None, a.low.scale, a.low.p)
    return out


def sparse_linear(x: torch.Tensor, base: Base, adapter: Sparse) -> torch.Tensor:
    x, weight, bias = operands(x, base.weight, base.bias)
    values, pattern, low = adapter.entries(), adapter.support.pattern, adapter.low
    T = x.numel() // max(x.shape[-1], 1)
    route = rosa_routes.forward_route(T, *weight.shape, values.numel(), x.device.type, x.dtype)
    A, B, scale, p = (None, None, 1.0, 0.0) if low is None else (low.A, low.B, low.scale, low.p)
    return rosa.linear(x, weight, values, pattern, A, B, bias, scale, p, route)
