"""What one call of a PEFT layer computes with: the tensors of the fused path, or the reason why it does not fit.

Nothing is cached: adapters are switched, hooks come and go and weights are offloaded between calls, and reading it all
anew costs a few microseconds. A submodule that is more than its class's forward is never bypassed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTISED: tuple[type, ...] = ()  # base layers whose forward returns a fresh tensor that nobody else reads
if is_bnb_available():
    import bitsandbytes as bnb

    QUANTISED += (bnb.nn.Linear8bitLt,)
    if is_bnb_4bit_available():
        QUANTISED += (bnb.nn.Linear4bit, bnb.nn.LinearFP4, bnb.nn.LinearNF4)


class Unfit(Exception):
    """The fast path does not fit this call; the message is the reason that the report shows."""


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


class Bat(NamedTuple):
    """The one active bat adapter of a MiSS layer; PEFT applies no dropout to it."""

    B: torch.Tensor


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, or a replaced one (device_map offload)."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def held(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter, or the plain tensor that FSDP1 and DataParallel put in its place."""
    p = module._parameters.get(name)
    return module.__dict__.get(name) if p is None else p


def read(module: nn.Module, name: str, role: str) -> torch.Tensor:
    """A parameter that can be used without calling its module: whole, on a real device, and no tensor subclass."""
    p = held(module, name)
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
        return Base(base, weight.t() if kind is Conv1D else weight, held(base, "bias"))
    if isinstance(base, BaseTunerLayer):
        raise Unfit("the base layer is itself an adapter layer")
    if "parametrizations" in base._modules:
        raise Unfit("the base layer is parametrized")
    if kind in QUANTISED:
        return Base(base, None, held(base, "bias"), hooked(base))
    if not isinstance(base, (nn.Linear, Conv1D)):
        raise Unfit(f"the base layer is a {kind.__name__}")
    if "weight" in base._parameters:
        read(base, "weight", "the base weight")
    return Base(base, None, held(base, "bias"), True)


def check_tracing() -> None:
    """Nothing watches this call that looks inside its operators and cannot see through an autograd.Function."""
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        raise Unfit("torch.jit.trace is running, which cannot save the fused operators")
    if torch._C._are_functorch_transforms_active():
        raise Unfit("a torch.func transform is running (grad, vmap, ...)")
    if forward_ad._current_level >= 0:
        raise Unfit("forward-mode differentiation is running")


def check_input(layer: nn.Module, x: torch.Tensor, base: Base, parameters: list[torch.Tensor]) -> None:
    """x and the dtypes are such that PEFT would compute the same up to rounding."""
    if type(x) is not torch.Tensor and type(x) is not nn.Parameter:
        raise Unfit(f"x is a {type(x).__name__}, not a plain tensor")
    check_tracing()
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


def variant_name(variant: Any) -> str:
    return type(variant).__name__.replace("LinearVariant", "").replace("Variant", "")


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
        bias = held(Bs[name], "bias")
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


def miss_plan(layer: nn.Module, x: torch.Tensor | None) -> tuple[Base, list[Bone] | list[Bat]]:
    """The tensors of a MiSS layer's call, or Unfit."""
    base = base_of(layer)
    if layer.miss_fn == "bat":
        return base, bat_plan(layer, x, base)
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


def bat_plan(layer: nn.Module, x: torch.Tensor | None, base: Base) -> list[Bat]:
    modules = layer._modules
    names = [name for name in active(layer) if name in modules["miss_dropout"]._modules]
    if len(names) > 1:
        raise Unfit("several active bat adapters: each transforms the weight that the one before it made")
    if names:
        check_bat_base(base)
    adapters = [Bat(read(modules["miss_block"], name, "miss_block")) for name in names]
    for (B,) in adapters:
        if B.dim() != 3 or B.shape[1] != B.shape[2] or B.shape[0] * B.shape[1] != layer.out_features:
            raise Unfit(f"miss_block {list(B.shape)} does not fit the layer's kind (bat)")
    if x is not None:
        check_input(layer, x, base, [a.B for a in adapters])
    return adapters


def check_bat_base(base: Base) -> None:
    if type(base.layer) in QUANTISED:
        raise Unfit("bat transforms the weight itself, and the base layer holds it quantised")
    if base.weight is None:
        raise Unfit("bat reads the base weight, and the base layer carries hooks or is not a plain nn.Linear")
    if type(base.layer) is Conv1D:
        raise Unfit("PEFT's bat takes the weight of a Conv1D as it is stored, transposed")
