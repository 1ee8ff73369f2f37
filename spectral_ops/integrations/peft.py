"""Adapter layers of PEFT that compute with the fused operators: what :func:`spectral_ops.accelerate` swaps in.

``accelerate`` changes nothing but ``layer.__class__``, to a subclass of PEFT's own class defined below, so parameters,
state_dict keys, hooks, merging, saving and every isinstance test of PEFT stay as they were. Each call first makes a
plan: the tensors to compute with, or the reason why PEFT's own forward must serve it. The plan is made anew each time
(a few microseconds), because adapters are switched, hooks come and go and weights are offloaded between calls.

Three paths: *fused* reads the base weight and calls no submodule; *fused (base-agnostic)* calls the base layer, as it
must where that is quantised or carries hooks, and adds the adapter to its result; *PEFT* is ``super().forward``.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners import lora, miss
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from spectral_ops.functional import (
    bone_linear,
    bone_update,
    column_norm,
    dora_linear,
    dora_update,
    lowrank_linear,
    lowrank_update,
)
from spectral_ops.integrations.report import BASE_AGNOSTIC, FUSED, PEFT, LayerState, Report, Row, note_while_tracing

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTISED: tuple[type, ...] = ()  # base layers whose forward returns a fresh tensor that nobody else reads
if is_bnb_available():
    import bitsandbytes as bnb

    QUANTISED += (bnb.nn.Linear8bitLt,)
    if is_bnb_4bit_available():
        QUANTISED += (bnb.nn.Linear4bit, bnb.nn.LinearFP4, bnb.nn.LinearNF4)


class Unfit(Exception):
    """The fast path does not fit this call; the message is the reason that the report shows."""


# --- what a call computes with ---------------------------------------------------------------------------------------


class Base(NamedTuple):
    """The frozen layer: its weight as [d, k] and bias, or no weight where the layer itself must be called."""

    layer: nn.Module
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    observed: bool = False  # a hook may keep its result, so it must not be overwritten


class LowRank(NamedTuple):
    """One active LoRA or DoRA adapter."""

    name: str
    A: torch.Tensor
    B: torch.Tensor
    scale: float
    p: float
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None


class Bone(NamedTuple):
    """One active MiSS adapter."""

    D: torch.Tensor
    p: float


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, or a replaced one (device_map offload)."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def read(module: nn.Module, name: str, role: str) -> torch.Tensor:
    """A parameter that can be used without calling its module: whole, on a real device, and no tensor subclass."""
    p = module._parameters.get(name)
    if p is None:
        p = module.__dict__.get(name)  # FSDP1 puts the unsharded tensor there
    if type(p) is not nn.Parameter and type(p) is not torch.Tensor:
        raise Unfit(f"{role} is a {type(p).__name__}, not a plain tensor")
    if p.is_meta:
        raise Unfit(f"{role} is on the meta device (offloaded)")
    if hasattr(p, "ds_id"):
        raise Unfit(f"{role} is partitioned by ZeRO-3")
    return p


def leaf(module: nn.Module, kind: type, role: str) -> torch.Tensor:
    """The weight of a submodule that PEFT would call and the fast path does not."""
    if type(module) is not kind:
        raise Unfit(f"{role} is a {type(module).__name__}, not a plain {kind.__name__}")
    if hooked(module):
        raise Unfit(f"{role} carries hooks of its own")
    return read(module, "weight", role)


def drop_rate(dropout: nn.Module, role: str) -> float:
    """The probability a dropout submodule applies in this call."""
    if type(dropout) is nn.Identity:
        p = 0.0
    elif type(dropout) is nn.Dropout:
        p = dropout.p if dropout.training else 0.0
    else:
        raise Unfit(f"{role} is a {type(dropout).__name__}, not nn.Dropout")
    if hooked(dropout):
        raise Unfit(f"{role} carries hooks of its own")
    if p >= 1.0:
        raise Unfit(f"{role} drops everything (p = {p})")
    return p


def base_of(layer: nn.Module) -> Base:
    """How the frozen layer takes part in this call."""
    base = layer._modules["base_layer"]
    kind = type(base)
    if (kind is nn.Linear or kind is Conv1D) and not hooked(base):
        weight = read(base, "weight", "the base weight")
        if weight.requires_grad and torch.is_grad_enabled():
            raise Unfit("the base weight is trained")
        return Base(base, weight.t() if kind is Conv1D else weight, base._parameters["bias"])
    if isinstance(base, BaseTunerLayer):
        raise Unfit("the base layer is itself an adapter layer")
    if "parametrizations" in base._modules:
        raise Unfit("the base layer is parametrized")
    if kind in QUANTISED:
        return Base(base, None, base._parameters["bias"], hooked(base))
    if not isinstance(base, (nn.Linear, Conv1D)):
        raise Unfit(f"the base layer is a {kind.__name__}")
    if "weight" in base._parameters:
        read(base, "weight", "the base weight")
    return Base(base, None, base._parameters.get("bias"), True)


def check_input(layer: nn.Module, x: torch.Tensor, base: Base, parameters: list[torch.Tensor]) -> None:
    """x and the dtypes are such that PEFT would compute the same up to rounding."""
    if type(x) is not torch.Tensor and type(x) is not nn.Parameter:
        raise Unfit(f"x is a {type(x).__name__}, not a plain tensor")
    if _has_any_global_hook():
        raise Unfit("a global module hook is registered, which must see every submodule called")
    dtype = x.dtype
    weight = x if base.weight is None else base.weight
    if weight.dtype is dtype and dtype in FLOATS:
        for p in parameters:
            if p.dtype is not dtype:
                break
        else:
            return
    autocast = torch.is_autocast_enabled(x.device.type) and dtype is not torch.float64
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif weight.dtype is not dtype:
        raise Unfit(f"x is {dtype} over a base weight in {weight.dtype}")
    if weight.dtype not in FLOATS[:3] or x.dtype not in FLOATS[:3]:
        raise Unfit(f"x in {x.dtype} over {weight.dtype} is not a mix the fused operators take")
    for p in parameters:
        if p.dtype is not dtype and p.dtype is not torch.float32:
            raise Unfit(f"an adapter in {p.dtype} over {dtype} would be rounded differently")
        if p.dtype is not dtype and not (autocast or layer.cast_input_dtype_enabled):
            raise Unfit(f"an adapter in {p.dtype} over {dtype} with input casting disabled")


def active(layer: nn.Module) -> list[str] | tuple[str, ...]:
    names = layer._active_adapter
    return (names,) if isinstance(names, str) else names


def lora_plan(layer: nn.Module, x: torch.Tensor | None) -> tuple[Base, list[LowRank]]:
    """The tensors of a LoRA layer's call, or Unfit. Without x the input is not looked at."""
    base = base_of(layer)
    modules = layer._modules
    As, Bs, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    adapters, parameters = [], []
    for name in active(layer):
        if name not in As:
            continue
        A, B = leaf(As[name], nn.Linear, "lora_A"), leaf(Bs[name], nn.Linear, "lora_B")
        p = drop_rate(dropouts[name], "lora_dropout")
        bias = Bs[name]._parameters["bias"]
        scale = layer.scaling[name]
        if not isinstance(scale, (float, int)):
            raise Unfit(f"the scaling is a {type(scale).__name__}, not a number")
        magnitude = None
        variant = layer.lora_variant.get(name)
        if variant is not None:
            if type(variant) is not variants.DoraLinearVariant:
                raise Unfit(f"the LoRA variant {variant_name(variant)} is left to PEFT")
            magnitude = leaf(modules["lora_magnitude_vector"]._modules[name], DoraLinearLayer, "the magnitude")
            p = p if layer.training else 0.0
            check_dora(layer, base, bias, p)
            parameters.append(magnitude)
        parameters += (A, B)
        adapters.append(LowRank(name, A, B, scale, p, bias, magnitude))
    if len(adapters) > 1 and any(a.magnitude is not None for a in adapters):
        raise Unfit("several active adapters, one of them DoRA")
    if x is not None:
        check_input(layer, x, base, parameters)
    return base, adapters


def check_dora(layer: nn.Module, base: Base, bias: torch.Tensor | None, p: float) -> None:
    if bias is not None:
        raise Unfit("DoRA with lora_bias: PEFT counts the bias into every entry of the weight whose norm it takes")
    if layer.ephemeral_gpu_offload:
        raise Unfit("DoRA with ephemeral_gpu_offload")
    if base.weight is None:
        if type(base.layer) not in QUANTISED or base.observed:
            raise Unfit("DoRA reads the base weight, and the base layer carries hooks or is not a plain nn.Linear")
        if p > 0:
            raise Unfit("DoRA with dropout over a quantised base needs a second product with its weight")


def miss_plan(layer: nn.Module, x: torch.Tensor | None) -> tuple[Base, list[Bone]]:
    """The tensors of a MiSS layer's call, or Unfit."""
    if layer.miss_fn == "bat":
        raise Unfit("bat arrives with the Bat operator")
    base = base_of(layer)
    modules = layer._modules
    adapters = []
    for name in active(layer):
        if name not in modules["miss_dropout"]._modules:
            continue
        D = read(modules["miss_block"], name, "miss_block")
        p = drop_rate(modules["miss_dropout"]._modules[name], "miss_dropout")
        columns = layer.miss_mini_r[name] if layer.miss_fn == "mini" else layer.out_features
        if D.dim() != 2 or D.shape[1] != columns:
            raise Unfit(f"miss_block {list(D.shape)} does not fit the layer's kind ({layer.miss_fn})")
        adapters.append(Bone(D, p))
    if x is not None:
        check_input(layer, x, base, [a.D for a in adapters])
    return base, adapters


# --- the call --------------------------------------------------------------------------------------------------------


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
        out = lowrank_linear(x, base.weight, A, B, total, scale=scale, dropout_p=p, training=True)
        rest = adapters[1:]
    for a in rest:
        out = lowrank_update(out, x, a.A, a.B, scale=a.scale, dropout_p=a.p, training=True)
    return out


def run_dora(layer: nn.Module, x: torch.Tensor, base: Base, adapter: LowRank) -> torch.Tensor:
    name, A, B, scale, p, _, magnitude = adapter
    if base.weight is None:
        out = base_result(base, x)  # first: a fresh 8-bit layer completes its state in its own forward
        with torch.no_grad():  # no norm is kept: telling whether it is stale would need the dequantised weight as well
            weight = dequantize_bnb_weight(base.layer.weight, state=getattr(base.layer, "state", None))
            norm = column_norm(weight, A, B, scale)
        return dora_update(out, x, A, B, magnitude, norm, base.bias, scale=scale)
    norm = None
    if not torch.compiler.is_compiling():  # a compiled graph computes it anew each time
        norm = layer._spectral_ops.norm(name, base.weight, A, B, scale)
    return dora_linear(x, base.weight, A, B, magnitude, base.bias, scale=scale, norm=norm, dropout_p=p, training=True)


def run_miss(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[Bone]) -> torch.Tensor:
    if base.weight is None:
        out, rest = base_result(base, x), adapters
    else:
        D, p = adapters[0]
        out, rest = bone_linear(x, base.weight, D, base.bias, dropout_p=p, training=True), adapters[1:]
    for D, p in rest:
        out = bone_update(out, x, D, dropout_p=p, training=True)
    return out.to(x.dtype)  # PEFT's MiSS returns x's dtype, also under autocast


class Fused:
    """What the accelerated layers share; it stands before PEFT's class, whose forward is the way back."""

    _spectral_ops: LayerState

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._disable_adapters or self.merged_adapters:  # the base layer alone: nothing to fuse
            return super().forward(x, *args, **kwargs)
        reason = None
        try:
            if args or kwargs:
                raise Unfit(argument_reason(kwargs))
            base, adapters = self._plan(x)
        except Unfit as unfit:
            reason = str(unfit)
        if reason is not None:
            if torch.compiler.is_compiling():
                note_while_tracing(self._spectral_ops.key, reason)
            else:
                self._spectral_ops.note(reason)
        elif adapters:
            return self._run(x, base, adapters)
        return super().forward(x, *args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self._spectral_ops.norms.clear()
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:  # the base weight comes back rounded, perhaps at the same address
        self._spectral_ops.norms.clear()
        super().unmerge()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:  # some initialisations write to the base weight
        super().update_layer(*args, **kwargs)
        self._spectral_ops.norms.clear()

    def _apply(self, fn, recurse: bool = True):
        self._spectral_ops.norms.clear()
        return super()._apply(fn, recurse)


class FusedLora(Fused):
    _plan, _run = lora_plan, run_lora


class FusedLoraLinear(FusedLora, lora.Linear):
    """``peft.tuners.lora.Linear`` through lowrank_linear and dora_linear."""


class FusedMissLinear(Fused, miss.MissLinear):
    """``peft.tuners.miss.MissLinear`` through bone_linear."""

    _plan, _run = miss_plan, run_miss


REPLACEMENTS: dict[type, type] = {lora.Linear: FusedLoraLinear, miss.MissLinear: FusedMissLinear}

if is_bnb_available():

    class FusedLoraLinear8bitLt(FusedLora, lora.Linear8bitLt):
        """``peft.tuners.lora.Linear8bitLt`` through lowrank_update and dora_update."""

    REPLACEMENTS[lora.Linear8bitLt] = FusedLoraLinear8bitLt

if is_bnb_4bit_available():

    class FusedLoraLinear4bit(FusedLora, lora.Linear4bit):
        """``peft.tuners.lora.Linear4bit`` through lowrank_update and dora_update."""

    REPLACEMENTS[lora.Linear4bit] = FusedLoraLinear4bit

ORIGINALS = {fused: original for original, fused in REPLACEMENTS.items()}


# --- accelerate and restore ------------------------------------------------------------------------------------------


def variant_name(variant: Any) -> str:
    return type(variant).__name__.replace("LinearVariant", "").replace("Variant", "")


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


def describe(name: str, layer: BaseTunerLayer, configs: dict[str, Any], inside_attention: bool) -> Row:
    """The row of one layer: decided from its present state, the input still unknown."""
    original = ORIGINALS.get(type(layer), type(layer))
    head = (name, f"{tuner_of(layer)}.{original.__name__}", method_of(layer, configs))
    if inside_attention:
        return Row(*head, PEFT, reason="lora.MultiheadAttention uses its weight, not its forward")
    if original not in REPLACEMENTS:
        return Row(*head, PEFT, reason=f"{original.__name__} layers of the {tuner_of(layer)} tuner are left to PEFT")
    is_miss = original is miss.MissLinear
    try:
        base, adapters = miss_plan(layer, None) if is_miss else lora_plan(layer, None)
    except Unfit as unfit:
        return Row(*head, PEFT, reason=str(unfit))
    if not adapters:
        return Row(*head, FUSED, reason="no active adapter here: the base layer alone")
    first, more = ("bone_linear", "bone_update") if is_miss else ("lowrank_linear", "lowrank_update")
    if not is_miss and adapters[0].magnitude is not None:
        first, more = "column_norm, dora_linear", "column_norm, dora_update"
    if base.weight is None:
        return Row(*head, BASE_AGNOSTIC, more)
    return Row(*head, FUSED, first if len(adapters) == 1 else f"{first}, {more}")


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def accelerate(model: nn.Module, *, strict: bool = False) -> Report:
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
    rows = [describe(name, layer, configs, name.startswith(attention)) for name, layer in layers.items()]
    left = [f"  {row.name}: {row.reason}" for row in rows if row.path == PEFT]
    if strict and left:
        raise RuntimeError(f"strict=True, and {len(left)} layers would be left to PEFT:\n" + "\n".join(left))
    states = []
    for name, layer in layers.items():
        if type(layer) in REPLACEMENTS and not name.startswith(attention):
            layer._spectral_ops = LayerState(name, strict)
            layer.__class__ = REPLACEMENTS[type(layer)]
        if type(layer) in ORIGINALS:
            layer._spectral_ops.name, layer._spectral_ops.strict = name, strict
            states.append(layer._spectral_ops)
    reference = weakref.ref(model)

    def newcomers() -> list[str]:
        alive = reference()
        known = {row.name for row in rows}
        layers = {} if alive is None else tuner_layers(alive)
        return [name for name, layer in layers.items() if type(layer) in REPLACEMENTS and name not in known]

    return Report(rows, states, newcomers)


def restore(model: nn.Module) -> nn.Module:
    """See :func:`spectral_ops.restore`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {model!r} ({type(model).__name__}), wanted a PEFT model (a torch.nn.Module)")
    for layer in model.modules():
        if type(layer) in ORIGINALS:
            layer.__class__ = ORIGINALS[type(layer)]
            del layer._spectral_ops
    return model
