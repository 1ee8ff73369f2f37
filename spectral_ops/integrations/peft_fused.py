"""What the accelerated layers of every tuner of PEFT share: a call by its plan, and PEFT's forward where none fits.

A tuner's module (peft.py, peft_experts.py and those in ``peft_layers/``) gives its layers' class a plan and a run, and
enters it in :data:`REPLACEMENTS`. That table, from PEFT's class to ours, is all that ``accelerate`` knows of methods.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spectral_ops.adapters import float8, quantised
from spectral_ops.core.autograd import autocast_arguments
from spectral_ops.integrations.peft_plan import Base, Facts, Unfit
from spectral_ops.integrations.peft_report import BASE_AGNOSTIC, FUSED, LayerState, note_trace, note_while_tracing

REPLACEMENTS: dict[type, type] = {}  # PEFT's class -> ours
ORIGINALS: dict[type, type] = {}  # and back
NARROW = (torch.bfloat16, torch.float16)


def enter(*classes: type) -> None:
    """Let ``accelerate`` swap these in, each for the class of PEFT's that stands last among its bases."""
    for fused in classes:
        original = fused.__bases__[-1]
        REPLACEMENTS[original], ORIGINALS[fused] = fused, original


def operands(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    """What the layer's product is made of: cast under autocast."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return autocast_arguments(x, weight, bias)
    return x, weight, bias


def base_result(base: Base, x: torch.Tensor) -> torch.Tensor:
    """What the base layer returns, as a tensor that may be overwritten; ValueError where it has no gradient for x."""
    out = quantised.product(base.layer, x)
    return out.clone() if base.observed else out


def argument_reason(kwargs: dict[str, Any]) -> str:
    if kwargs.get("adapter_names") is not None:
        return "a mixed batch (adapter_names)"
    if kwargs.get("alora_offsets") is not None:
        return "alora_offsets"
    return "extra arguments to forward"


def refuse_merge(layer: nn.Module) -> None:
    """Raise ValueError where PEFT would add to a weight in FP8 without its scales."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dtype in float8.FLOAT8:
        raise ValueError(
            f"merge: got a base weight in {weight.dtype}, whose scales PEFT does not know, wanted a base that PEFT can"
            " merge into (spectral_ops.as_peft_model and spectral_ops.merge quantise the merged weight anew)"
        )


def outliving(method: Callable) -> Callable:
    """The method, also for a layer that :func:`restore` gave its class back while somebody still held it bound."""
    name = method.__name__

    @functools.wraps(method)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        return (method if isinstance(self, Fused) else getattr(type(self), name))(self, *args, **kwargs)

    return call


class Fused:
    """What the accelerated layers share; it stands before PEFT's class, whose forward is the way back."""

    _spectral_ops: LayerState
    # Of a subclass: the tensors of a call as (base, adapters), or Unfit; and their product.
    _plan: Callable[[nn.Module, torch.Tensor | None, Facts], tuple[Base, list]]
    _run: Callable[[nn.Module, torch.Tensor, Base, list], torch.Tensor]
    _method = ""  # its usual spelling, where the active adapters do not decide it

    @classmethod
    def _service(cls, base: Base, adapters: list, exact: bool) -> tuple[str, str]:
        """The path and the operators of a plan. An adapter tells its own, over the base's weight or over its result."""
        if base.operators:
            return FUSED, base.operators
        tiers = ["update" if i or base.weight is None else "linear" for i in range(len(adapters))]
        names = [name for a, tier in zip(adapters, tiers, strict=True) for name in a.operators(tier)]
        return BASE_AGNOSTIC if base.weight is None else FUSED, ", ".join(dict.fromkeys(names))

    @classmethod
    def _remark(cls, base: Base, adapters: list, exact: bool) -> str:
        """What the layer does differently from PEFT's, for the report."""
        return ""

    @classmethod
    def _bind(cls, base: Base, adapters: list, facts: Facts) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        """The call that a plan makes, as little as there is left to do. It must not hold the layer, which holds it."""
        run = cls._run
        return lambda layer, x: run(layer, x, base, adapters)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            state = self.__dict__.get("_spectral_ops")
            if state is None:  # restored while somebody held this method bound (see outliving)
                return type(self).forward(self, x, *args, **kwargs)
            plan = state.plan
            if plan is not None and not args and not kwargs and plan[0].hold(self, x):
                state.calls += 1
                return plan[1](self, x)
        elif "_spectral_ops" not in self.__dict__:  # the same, in a graph
            return type(self).forward(self, x, *args, **kwargs)
        return self._planned(x, *args, **kwargs)

    def _planned(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The call with a plan made anew, which the next calls take while it holds; PEFT's where none fits."""
        state, compiling = self._spectral_ops, torch.compiler.is_compiling()
        reason, facts, adapters = None, Facts(), []
        if not self._disable_adapters and not self.merged_adapters:  # else the base layer alone: nothing to fuse
            try:
                if args or kwargs:
                    raise Unfit(argument_reason(kwargs))
                base, adapters = self._plan(x, facts)
            except Unfit as unfit:
                reason = str(unfit)
        if reason is not None:
            if compiling:
                note_while_tracing(state.key, reason)
            else:
                state.note(reason)
        elif adapters:
            if compiling:
                note_trace()
                return self._run(x, base, adapters)
            state.served = self._service(base, adapters, state.exact)
            state.calls += 1
            call = self._bind(base, adapters, facts)  # also now: a checkpoint compares the two calls
            state.plan = (facts, call) if facts.lasting else None
            return call(self, x)
        elif not compiling:
            state.idle += 1
        return super().forward(x, *args, **kwargs)

    @outliving
    def merge(self, *args: Any, **kwargs: Any) -> None:
        refuse_merge(self)
        self._spectral_ops.forget()
        super().merge(*args, **kwargs)

    @outliving
    def unmerge(self) -> None:  # the base weight comes back rounded, perhaps at the same address
        self._spectral_ops.forget()
        super().unmerge()

    @outliving
    def update_layer(self, *args: Any, **kwargs: Any) -> None:  # some initialisations write to the base weight
        super().update_layer(*args, **kwargs)
        self._spectral_ops.forget()

    @outliving
    def _apply(self, fn, recurse: bool = True):
        self._spectral_ops.forget()
        return super()._apply(fn, recurse)
