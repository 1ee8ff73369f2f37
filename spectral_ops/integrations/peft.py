"""Adapter layers of PEFT that compute with the fused operators: what :func:`spectral_ops.accelerate` swaps in.

``accelerate`` changes nothing but ``layer.__class__``, to a subclass of PEFT's own class defined below, so parameters,
state_dict keys, hooks, merging, saving and every isinstance test of PEFT stay as they were. Each call first makes a
plan (peft_plan.py): the tensors to compute with, or the reason why PEFT's own forward must serve it.

Three paths: *fused* reads the base weight and calls no submodule; *fused (base-agnostic)* calls the base layer, as it
must where that is quantised or carries hooks, and adds the adapter to its result; *PEFT* is ``super().forward``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners import adalora, lora, miss
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch._subclasses import FakeTensor

from spectral_ops.core.autograd import autocast_arguments
from spectral_ops.functional import bat, blocksum, column_norm, dora, dora_update, lowrank
from spectral_ops.integrations.peft_adalora import SVD, FusedAdaLoraModel, adalora_plan
from spectral_ops.integrations.peft_plan import (
    Base,
    Bat,
    Bone,
    Facts,
    LowRank,
    Unfit,
    lora_plan,
    miss_plan,
    variant_name,
)
from spectral_ops.integrations.peft_siblings import Member
from spectral_ops.integrations.peft_siblings import notes as shared_notes
from spectral_ops.integrations.report import BASE_AGNOSTIC, FUSED, PEFT, LayerState, Report, Row, note_while_tracing

# --- the call --------------------------------------------------------------------------------------------------------


def operands(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    """What the layer's product is made of: cast under autocast."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return autocast_arguments(x, weight, bias)
    return x, weight, bias


def base_result(base: Base, x: torch.Tensor) -> torch.Tensor:
    """What the base layer returns, as a tensor that may be overwritten."""
    out = base.layer(x)
    return out.clone() if base.observed else out


def run_lora(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[LowRank]) -> torch.Tensor:
    name, A, B, scale, p, bias, magnitude = adapters[0]
    if magnitude is not None:
        return run_dora(layer, x, base, adapters[0])
    if base.weight is None:
        out, rest = base_result(base, x), adapters
        for a in adapters:
            if a.bias is not None:
                out = out + (a.scale * a.bias).to(out.dtype)
    else:
        total = base.bias
        for a in adapters:
            if a.bias is not None:  # lora_B's bias is scaled with its product, so it joins the base layer's
                total = a.scale * a.bias if total is None else torch.add(total, a.bias, alpha=a.scale)
        total = total if total is base.bias else total.to(base.weight.dtype)
        x, weight, total = operands(x, base.weight, total)
        out, rest = lowrank.linear(x, weight, A, B, total, None, None, scale, p), adapters[1:]
    for a in rest:
        out = lowrank.update(out, x.to(out.dtype), a.A, a.B, None, None, None, a.scale, a.p)
    return out


def run_dora(layer: nn.Module, x: torch.Tensor, base: Base, adapter: LowRank) -> torch.Tensor:
    name, A, B, scale, p, _, magnitude = adapter
    if base.weight is None:
        out = base_result(base, x)  # first: a fresh 8-bit layer completes its state in its own forward
        with torch.no_grad():  # no norm is kept: telling whether it is stale would need the dequantised weight as well
            weight = dequantize_bnb_weight(base.layer.weight, state=getattr(base.layer, "state", None))
            norm = column_norm(weight, A, B, scale)
        return dora_update(out, x, A, B, magnitude, norm, base.bias, scale=scale)
    if torch.compiler.is_compiling():  # a compiled graph computes it anew each time
        norm = column_norm(base.weight, A, B, scale)
    else:
        norm = layer._spectral_ops.norm(name, base.weight, A, B, scale)
    x, weight, bias = operands(x, base.weight, base.bias)
    return dora.linear(x, weight, A, B, magnitude, bias, norm, scale, p, layer._spectral_ops.recompute)


def run_miss(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[Bone] | list[Bat]) -> torch.Tensor:
    if type(adapters[0]) is Bat:
        return run_bat(layer, x, base, adapters[0])
    if base.weight is None:
        out, rest = base_result(base, x), adapters
    else:
        (D, p), rest = adapters[0], adapters[1:]
        narrow, weight, bias = operands(x, base.weight, base.bias)
        out = blocksum.linear(narrow, weight, D, bias, p)
    for D, p in rest:
        out = blocksum.update(out, x.to(out.dtype), D, p)
    return out if out.dtype is x.dtype else out.to(x.dtype)  # PEFT's MiSS returns x's dtype, also under autocast


def run_bat(layer: nn.Module, x: torch.Tensor, base: Base, adapter: Bat) -> torch.Tensor:
    bias = base.bias
    if bias is not None and bias.dtype is not base.weight.dtype:  # PEFT's bat takes one in another dtype
        bias = bias.to(base.weight.dtype)
    narrow, weight, bias = operands(x, base.weight, bias)
    out = bat.linear(narrow, weight, adapter.B, bias, False, layer._spectral_ops.exact)
    return out if out.dtype is x.dtype else out.to(x.dtype)


def run_adalora(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[SVD]) -> torch.Tensor:
    if base.weight is None:
        out, rest = base_result(base, x), adapters
    else:
        first, rest = adapters[0], adapters[1:]
        x, weight, bias = operands(x, base.weight, base.bias)
        out = lowrank.linear(x, weight, first.A, first.B, bias, first.core(), None, first.scale, first.p)
    for a in rest:
        out = lowrank.update(out, x.to(out.dtype), a.A, a.B, None, a.core(), None, a.scale, a.p)
    return out


def bound(run, base: Base, adapters: list, facts: Facts) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """The call that a plan makes, as little as there is left to do: usually one operator over one weight. It must not
    hold the layer, which holds it."""
    first, weight, bias = adapters[0], base.weight, base.bias
    if weight is not None and len(adapters) == 1 and facts.autocast is None:
        if type(first) is LowRank and first.magnitude is None and first.bias is None:
            _, A, B, scale, p, *_ = first
            if p == 0.0 and facts.lasting:
                return Member(weight, A, B, bias, None, scale)
            return lambda layer, x: lowrank.linear(x, weight, A, B, bias, None, None, scale, p)
        if type(first) is Bone:
            D, p = first
            return lambda layer, x: blocksum.linear(x, weight, D, bias, p)
        capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
        if type(first) is SVD:
            A, B, E, rank, scale, p = first
            if rank.requires_grad or capturing or type(rank) is FakeTensor:
                return lambda layer, x: lowrank.linear(x, weight, A, B, bias, first.core(), None, scale, p)
            scale = scale / (rank.item() + 1e-5)  # waits for a GPU, once: the number of triplets is a fact of the plan
            if p == 0.0 and facts.lasting:
                return Member(weight, A, B, bias, E, scale)
            return lambda layer, x: lowrank.linear(x, weight, A, B, bias, E, None, scale, p)
    return lambda layer, x: run(layer, x, base, adapters)


class Fused:
    """What the accelerated layers share; it stands before PEFT's class, whose forward is the way back."""

    _spectral_ops: LayerState

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            plan = self._spectral_ops.plan
            if plan is not None and not args and not kwargs and plan[0].hold(self, x):
                return plan[1](self, x)
        return self._planned(x, *args, **kwargs)

    def _planned(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The call with a plan made anew, which the next calls take while it holds; PEFT's where none fits."""
        state = self._spectral_ops
        if self._disable_adapters or self.merged_adapters:  # the base layer alone: nothing to fuse
            return super().forward(x, *args, **kwargs)
        reason, facts = None, Facts()
        try:
            if args or kwargs:
                raise Unfit(argument_reason(kwargs))
            base, adapters = self._plan(x, facts)
        except Unfit as unfit:
            reason = str(unfit)
        compiling = torch.compiler.is_compiling()
        if reason is not None:
            if compiling:
                note_while_tracing(state.key, reason)
            else:
                state.note(reason)
        elif adapters:
            if compiling:
                return self._run(x, base, adapters)
            call = bound(type(self)._run, base, adapters, facts)  # also now: a checkpoint compares the two calls
            state.plan = (facts, call) if facts.lasting else None
            return call(self, x)
        return super().forward(x, *args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self._spectral_ops.forget()
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:  # the base weight comes back rounded, perhaps at the same address
        self._spectral_ops.forget()
        super().unmerge()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:  # some initialisations write to the base weight
        super().update_layer(*args, **kwargs)
        self._spectral_ops.forget()

    def _apply(self, fn, recurse: bool = True):
        self._spectral_ops.forget()
        return super()._apply(fn, recurse)


class FusedLora(Fused):
    _plan, _run = lora_plan, run_lora


class FusedLoraLinear(FusedLora, lora.Linear):
    """``peft.tuners.lora.Linear`` through lowrank_linear and dora_linear."""


class FusedMissLinear(Fused, miss.MissLinear):
    """``peft.tuners.miss.MissLinear`` through bone_linear and bat_linear."""

    _plan, _run = miss_plan, run_miss


class FusedAdaLora(Fused):
    _plan, _run = adalora_plan, run_adalora


class FusedSVDLinear(FusedAdaLora, adalora.SVDLinear):
    """``peft.tuners.adalora.SVDLinear`` through lowrank_linear with a diagonal core."""


REPLACEMENTS: dict[type, type] = {
    lora.Linear: FusedLoraLinear,
    miss.MissLinear: FusedMissLinear,
    adalora.SVDLinear: FusedSVDLinear,
}

if is_bnb_available():

    class FusedLoraLinear8bitLt(FusedLora, lora.Linear8bitLt):
        """``peft.tuners.lora.Linear8bitLt`` through lowrank_update and dora_update."""

    class FusedSVDLinear8bitLt(FusedAdaLora, adalora.SVDLinear8bitLt):
        """``peft.tuners.adalora.SVDLinear8bitLt`` through lowrank_update with a diagonal core."""

    REPLACEMENTS |= {
        lora.Linear8bitLt: FusedLoraLinear8bitLt,
        adalora.SVDLinear8bitLt: FusedSVDLinear8bitLt,
    }

if is_bnb_4bit_available():

    class FusedLoraLinear4bit(FusedLora, lora.Linear4bit):
        """``peft.tuners.lora.Linear4bit`` through lowrank_update and dora_update."""

    class FusedSVDLinear4bit(FusedAdaLora, adalora.SVDLinear4bit):
        """``peft.tuners.adalora.SVDLinear4bit`` through lowrank_update with a diagonal core."""

    REPLACEMENTS |= {lora.Linear4bit: FusedLoraLinear4bit, adalora.SVDLinear4bit: FusedSVDLinear4bit}

ORIGINALS = {fused: original for original, fused in REPLACEMENTS.items()}


# --- accelerate and restore ------------------------------------------------------------------------------------------


def argument_reason(kwargs: dict[str, Any]) -> str:
    if kwargs.get("adapter_names") is not None:
        return "a mixed batch (adapter_names)"
    if kwargs.get("alora_offsets") is not None:
        return "alora_offsets"
    return "extra arguments to forward"


def tuner_of(layer: BaseTunerLayer) -> str:
    """The package of PEFT that the layer's class comes from: "lora", "miss", "adalora"."""
    module = ORIGINALS.get(type(layer), type(layer)).__module__
    return module.split(".")[2] if module.startswith("peft.tuners.") else module


def method_of(layer: BaseTunerLayer, configs: dict[str, Any]) -> str:
    """The active methods of a layer in their usual spelling."""
    if isinstance(layer, miss.MissLinear):
        return {"mini": "MiSS mini", "bat": "MiSS bat"}.get(layer.miss_fn, "MiSS")
    if tuner_of(layer) == "adalora":
        return "AdaLoRA"
    if not isinstance(layer, lora.LoraLayer) or tuner_of(layer) != "lora":
        return tuner_of(layer)
    methods = []
    for name in layer.active_adapters:
        if name not in layer.r:
            continue
        init = getattr(configs.get(name), "init_lora_weights", None)
        if name in layer.lora_variant:
            method = variant_name(layer.lora_variant[name]).replace("Dora", "DoRA")
        elif isinstance(init, str) and init.startswith("pissa"):
            method = "PiSSA"
        else:
            method = "rsLoRA" if layer.use_rslora.get(name) else "LoRA"
        methods.append(method)
    return " + ".join(dict.fromkeys(methods))


def describe(name: str, layer: BaseTunerLayer, configs: dict[str, Any], inside_attention: bool, exact: bool) -> Row:
    """The row of one layer: decided from its present state, the input still unknown."""
    original = ORIGINALS.get(type(layer), type(layer))
    head = (name, f"{tuner_of(layer)}.{original.__name__}", method_of(layer, configs))
    if inside_attention:
        return Row(*head, PEFT, reason="lora.MultiheadAttention uses its weight, not its forward")
    if original not in REPLACEMENTS:
        return Row(*head, PEFT, reason=f"{original.__name__} layers of the {tuner_of(layer)} tuner are left to PEFT")
    if type(layer) is original and "forward" in layer.__dict__:
        return Row(*head, PEFT, reason="its own forward was replaced (a hook that accelerate's device_map added)")
    is_miss = original is miss.MissLinear
    try:
        base, adapters = REPLACEMENTS[original]._plan(layer, None, Facts())
    except Unfit as unfit:
        return Row(*head, PEFT, reason=str(unfit))
    if not adapters:
        return Row(*head, FUSED, reason="no active adapter here: the base layer alone")
    if isinstance(adapters[0], Bat):
        return Row(*head, FUSED, *bat_operator(base.weight.dtype, exact))
    first, more = ("bone_linear", "bone_update") if is_miss else ("lowrank_linear", "lowrank_update")
    if getattr(adapters[0], "magnitude", None) is not None:
        first, more = "column_norm, dora_linear", "column_norm, dora_update"
    if base.weight is None:
        return Row(*head, BASE_AGNOSTIC, more)
    return Row(*head, FUSED, first if len(adapters) == 1 else f"{first}, {more}")


def bat_operator(dtype: torch.dtype, exact: bool) -> tuple[str, str]:
    """The operator of a bat layer over a weight in ``dtype``, and what becomes of its small changes."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "bat_linear", ""
    if exact:
        return "bat_linear, exact", ""
    return "bat_linear", f"the transformed weight is rounded to {dtype}; accelerate(model, exact=True) does not"


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def accelerate(
    model: nn.Module, *, strict: bool = False, recompute: bool = False, exact: bool = False, siblings: bool = True
) -> Report:
    """See :func:`spectral_ops.accelerate`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {model!r} ({type(model).__name__}), wanted a PEFT model (a torch.nn.Module)")
    layers = tuner_layers(model)
    if not layers:
        raise ValueError(
            f"model: got a {type(model).__name__} without any PEFT adapter layer, wanted one that get_peft_model made"
        )
    attention = tuple(f"{name}." for name, m in layers.items() if isinstance(m, MultiheadAttention))
    configs = getattr(model, "peft_config", None) or {}
    rows = [describe(name, layer, configs, name.startswith(attention), exact) for name, layer in layers.items()]
    left = [f"  {row.name}: {row.reason}" for row in rows if row.path == PEFT]
    if strict and left:
        raise RuntimeError(f"strict=True, and {len(left)} layers would be left to PEFT:\n" + "\n".join(left))
    states = []
    for name, layer in layers.items():
        if type(layer) in REPLACEMENTS and not name.startswith(attention) and "forward" not in layer.__dict__:
            layer._spectral_ops = LayerState(name)
            layer.__class__ = REPLACEMENTS[type(layer)]
        if type(layer) in ORIGINALS:
            state = layer._spectral_ops
            state.name, state.strict, state.recompute, state.exact = name, strict, recompute, exact
            state.siblings = siblings
            state.alone()
            states.append(state)
    notes = []
    for tuner in model.modules():
        if type(tuner) is AdaLoraModel:
            tuner.__class__ = FusedAdaLoraModel
            tuner.take_over()
        if type(tuner) is FusedAdaLoraModel:
            notes.append("AdaLoRA's update_and_allocate and regulariser: fused, one operator for all layers")
    reference = weakref.ref(model)

    def newcomers() -> list[str]:
        alive = reference()
        known = {row.name for row in rows}
        layers = {} if alive is None else tuner_layers(alive)
        return [name for name, layer in layers.items() if type(layer) in REPLACEMENTS and name not in known]

    return Report(rows, states, newcomers, notes, lambda: shared_notes(states))


def restore(model: nn.Module) -> nn.Module:
    """See :func:`spectral_ops.restore`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {model!r} ({type(model).__name__}), wanted a PEFT model (a torch.nn.Module)")
    for layer in model.modules():
        if type(layer) in ORIGINALS:
            layer.__class__ = ORIGINALS[type(layer)]
            del layer._spectral_ops
        if type(layer) is FusedAdaLoraModel:
            layer.give_back()
            layer.__class__ = AdaLoraModel
    return model
