"""What one call of a PEFT layer computes with: the tensors of the fused path, or the reason why it does not fit.

Adapters are switched, hooks come and go and weights are offloaded between calls. So whatever a plan reads it notes down
(:class:`Facts`), and the next call takes the same plan only while every fact still holds, which costs two microseconds
where reading it all anew costs ten. A submodule that is more than its class's forward is never bypassed.
"""

from __future__ import annotations

import re
import sys
from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import variants
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from spectral_ops.adapters import float8
from spectral_ops.integrations.peft_hooks import hooked, inert, keeps_device
from spectral_ops.integrations.peft_sharded import fetch, freed, frozen, keep, unit, unit_weight
from spectral_ops.integrations.peft_tensor_parallel import Split, split_of, styled

PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)  # a fake one stands for a plain one while shapes are traced
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTISED: tuple[type, ...] = ()  # base layers whose forward returns a fresh tensor that nobody else reads
if is_bnb_available():
    import bitsandbytes as bnb

    QUANTISED += (bnb.nn.Linear8bitLt,)
    if is_bnb_4bit_available():
        QUANTISED += (bnb.nn.Linear4bit, bnb.nn.LinearFP4, bnb.nn.LinearNF4)


CALLED = GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear  # they call their base layer, whatever it is, and read nothing


class Unfit(Exception):
    """The fast path does not fit this call; the message is the reason that the report shows."""


class Unsettled(Unfit):
    """It does not fit as the model is now; the call may find it otherwise, once weights are gathered or loaded."""


class Base(NamedTuple):
    """The frozen layer: its weight as [d, k] and bias, or no weight where the layer itself must be called."""

    layer: nn.Module
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    observed: bool = False  # a hook may keep its result, so it must not be overwritten
    split: Split | None = None  # how tensor parallelism cuts its weight
    operators: str = ""  # that compute with it, where its adapters do not tell


class LowRank(NamedTuple):
    """One active LoRA or DoRA adapter."""

    name: str
    A: torch.Tensor
    B: torch.Tensor
    scale: float | torch.Tensor  # a tensor [] is read in every call: compiled hot swapping fills it anew
    p: float
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None

    def operators(self, tier: str) -> list[str]:
        return [f"lowrank_{tier}"] if self.magnitude is None else ["column_norm", f"dora_{tier}"]

    def scaled(self) -> tuple[torch.Tensor, float]:
        """B and the scale as the operators take it, a number: B times a scale that is a tensor, which costs d r."""
        return (self.B * self.scale, 1.0) if isinstance(self.scale, torch.Tensor) else (self.B, self.scale)


class Facts:
    """Everything a plan has read. The layer's own attributes are kept by name alone: a reference back to it would keep
    its weights alive after it."""

    def __init__(self) -> None:
        self.own: list[tuple[str, Any]] = []  # attributes of the layer
        self.entries: list[tuple[dict, str, Any]] = []  # of its modules' dicts
        self.plain: list[dict] = []  # modules without hooks, whose forward is their class's
        self.beside: list[torch.Tensor] = []  # weights to whose device a wrapper moves x, so x must be there
        self.dtypes: list[tuple[torch.Tensor, torch.dtype]] = []
        self.versions: list[tuple[torch.Tensor, int, bool]] = []  # of tensors whose content was read
        self.frozen: torch.Tensor | None = None  # the base weight
        self.fetched: list[torch.Tensor] = []  # parameters of ZeRO-3
        self.called = False  # else it is only asked what a call would do
        self.names: list[str] | str = []
        self.x_dtype: torch.dtype | None = None
        self.autocast: torch.dtype | None = None
        self.lasting = True

    def entry(self, holder: dict, key: str) -> Any:
        value = holder.get(key)
        self.entries.append((holder, key, value))
        return value

    def parameter(self, module: nn.Module, name: str) -> torch.Tensor | None:
        """A parameter, or the plain tensor that FSDP1 and DataParallel put in its place; whole, whoever keeps it."""
        p = self.entry(module._parameters, name)
        if p is None and name in module.__dict__:
            p = module.__dict__[name]
        if type(p) is torch.Tensor or hasattr(p, "_fsdp_flattened"):
            self.lasting = False
            if freed(p):
                raise Unsettled(f"the {name} of {type(module).__name__} is sharded by FSDP1")
        elif hasattr(p, "ds_id"):
            self.lasting = False
            if (reason := fetch(module, p)) is not None:
                raise Unsettled(f"the {name} of {type(module).__name__} is {reason}")
            self.fetched.append(p)
        return p

    def module(self, module: nn.Module) -> nn.Module:
        """A module that is not called: it must do no more than its class's forward."""
        self.plain.append(module.__dict__)
        if self.entry(module.__dict__, "forward") is not None and keeps_device(module):
            self.entry(module.__dict__, "forward_origin")
            self.beside.append(module.weight)
        return module

    def attribute(self, layer: nn.Module, key: str) -> Any:
        self.own.append((key, layer.__dict__.get(key)))
        return getattr(layer, key)

    def version(self, t: torch.Tensor) -> None:
        if torch.compiler.is_compiling() or t.is_inference():  # a graph keeps no plan
            self.lasting = False
        else:
            self.versions.append((t, t._version, t.requires_grad))

    def hold(self, layer: nn.Module, x: torch.Tensor) -> bool:
        """Whether a plan with these facts is what planning anew would give."""
        own = layer.__dict__
        if layer._disable_adapters or layer.merged_adapters or layer._active_adapter != self.names:
            return False
        for key, value in self.own:
            if own.get(key) is not value:
                return False
        for holder, key, value in self.entries:
            if holder.get(key) is not value:
                return False
        for d in self.plain:
            if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
                return False
        if type(x) is not torch.Tensor and type(x) is not nn.Parameter:
            return False
        for t in self.beside:
            if t.device != x.device:
                return False
        for t, dtype in self.dtypes:
            if t.dtype is not dtype:
                return False
        for t, version, trained in self.versions:
            if t._version != version or t.requires_grad is not trained:
                return False
        if x.dtype is not self.x_dtype or watched():
            return False
        if self.frozen is not None and self.frozen.requires_grad and torch.is_grad_enabled():
            return False
        return (autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None) is self.autocast

    def settle(self, layer: nn.Module, x: torch.Tensor, tensors: list[torch.Tensor]) -> None:
        """The facts that every plan has, noted once it is made."""
        if self.fetched:
            keep(layer, self.fetched)
        self.attribute(layer, "_modules")  # a replica of DataParallel has another
        active = layer._active_adapter
        self.names = list(active) if isinstance(active, list) else active
        self.dtypes = [(t, t.dtype) for t in tensors]
        self.x_dtype, self.autocast = x.dtype, autocast_dtype(x)
        self.lasting = self.lasting and not any(type(t) is FakeTensor for t in (x, *tensors))


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast would give products of x; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def watched() -> bool:
    """Whether somebody looks inside this call, or must see every module called (see :func:`check_tracing`)."""
    return bool(
        torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _has_any_global_hook()
    )


def busy(module: nn.Module, facts: Facts) -> bool:
    """Whether calling the module would do more in this call. Hooks that do nothing in this one may in the next."""
    if not hooked(module):
        return False
    facts.lasting = False
    return not inert(module)


def read(module: nn.Module, name: str, role: str, facts: Facts) -> torch.Tensor:
    """A parameter that can be used without calling its module: whole, on a real device, and no tensor subclass."""
    p = facts.parameter(module, name)
    if type(p) not in PLAIN:
        kind = Unsettled if isinstance(p, DTensor) else Unfit  # FSDP2 gathers it for the call
        raise kind(f"{role} is a {type(p).__name__}, not a plain tensor")
    if p.is_meta:
        raise Unsettled(f"{role} is on the meta device (offloaded)")
    return p


def leaf(module: nn.Module, kind: type, role: str, facts: Facts, split: Split | None = None) -> torch.Tensor:
    """The weight of a submodule that PEFT would call and the fast path does not."""
    if split is not None and type(module) is kind and styled(module):
        return module._parameters["weight"]
    if type(module) is not kind:
        if (inner := unit(module)) is not None and type(inner) is kind:
            facts.lasting = False
            if not facts.called or busy(facts.module(inner), facts):
                raise (Unfit if facts.called else Unsettled)(f"{role} is an FSDP unit of its own")
            if (weight := unit_weight(module, inner)) is None:
                raise Unfit(f"{role} is an FSDP unit with more than a weight")
            return weight
        raise Unfit(f"{role} is a {type(module).__name__}, not a plain {kind.__name__}")
    if busy(facts.module(module), facts):
        raise Unfit(f"{role} carries hooks of its own")
    return read(module, "weight", role, facts)


def drop_rate(dropout: nn.Module, role: str, facts: Facts) -> float:
    """The probability a dropout submodule applies in this call."""
    if type(dropout) is nn.Identity:
        p = 0.0
    elif type(dropout) is nn.Dropout:
        state = dropout.__dict__
        p = facts.entry(state, "p") if facts.entry(state, "training") else 0.0
    else:
        raise Unfit(f"{role} is a {type(dropout).__name__}, not nn.Dropout")
    if busy(facts.module(dropout), facts):
        raise Unfit(f"{role} carries hooks of its own")
    if p >= 1.0:
        raise Unfit(f"{role} drops everything (p = {p})")
    return p


def scaling(value: Any) -> Any:
    """A factor that the fused operators can take: a number, or a tensor of one."""
    if isinstance(value, (float, int)) or (type(value) in PLAIN and value.dim() == 0):
        return value
    raise Unfit(f"the scaling is a {type(value).__name__}, not a number")


def linear(kind: type) -> bool:
    """Whether a class's forward is x Wᵀ + b of its own weight: nn.Linear's, kept by a subclass or arranged anew."""
    if kind is nn.Linear or kind is Conv1D:
        return True
    if not issubclass(kind, nn.Linear) or kind.__call__ is not nn.Module.__call__ or hasattr(kind, "weight"):
        return False
    falcon = sys.modules.get("transformers.models.falcon.modeling_falcon")  # x @ Wᵀ, then + b
    return kind.forward is nn.Linear.forward or kind is getattr(falcon, "FalconLinear", None)


def quantised(base: nn.Module) -> bool:
    """Whether the base layer holds its weight quantised, and returns a fresh tensor that nobody else reads."""
    weight = base._parameters.get("weight")
    if weight is None or type(weight) in PLAIN:
        return weight is not None and float8.holds(weight)
    return type(base) in QUANTISED or isinstance(
        weight, getattr(sys.modules.get("torchao.utils"), "TorchAOBaseTensor", ())
    )


def weight_of(base: nn.Module, facts: Facts, name: str = "weight") -> torch.Tensor:
    """The weight of a base layer that is not called, which must take no gradient."""
    weight = read(base, name, f"the base {name}", facts)
    if weight.requires_grad and weight._is_view():
        weight = frozen(base, name, weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise Unfit(f"the base {name} is trained")
    return weight


def base_of(layer: nn.Module, facts: Facts, x: torch.Tensor | None = None) -> Base:
    """How the frozen layer takes part in this call."""
    base = facts.entry(layer._modules, "base_layer")
    kind = type(base)
    if x is not None and kind is nn.Linear and (split := split_of(base)) is not None:  # in a call: FSDP2 has gathered
        facts.lasting = False
        return Base(base, None, None, True, split)
    if linear(kind) and not busy(base, facts) and not quantised(base) and "parametrizations" not in base._modules:
        facts.module(base)
        weight = weight_of(base, facts)
        facts.frozen = weight
        # a view of Conv1D's weight would outlive a new `.data`
        facts.lasting = facts.lasting and kind is not Conv1D
        return Base(base, weight.t() if kind is Conv1D else weight, facts.parameter(base, "bias"))
    facts.lasting = False
    if isinstance(base, BaseTunerLayer):
        raise Unfit("the base layer is itself an adapter layer")
    if "parametrizations" in base._modules:
        raise Unfit("the base layer is parametrized")
    if quantised(base):
        if float8.holds(base.weight):
            float8.read(base)  # raises where it cannot be read
        return Base(base, None, facts.parameter(base, "bias"), busy(base, facts) or bool(base._forward_hooks))
    if isinstance(layer, CALLED):
        if layer._modules.get("quant_linear_module", base) is not base:
            raise Unfit("the base layer was replaced under one of its two names")
        return Base(base, None, None, True)
    if not isinstance(base, (nn.Linear, Conv1D)):
        raise Unfit(f"the base layer is a {kind.__name__}")
    if "weight" in base._parameters:
        read(base, "weight", "the base weight", facts)
    return Base(base, None, facts.parameter(base, "bias"), True)


def frozen_weight(base: Base) -> torch.Tensor | None:
    """The weight that PEFT's DoRA reads: dequantised where the layer holds it quantised. None where that is in FP8: it
    is dequantised tile by tile, where it is needed."""
    if base.weight is not None:
        return base.weight
    weight = base.layer.weight
    if float8.holds(weight):
        return None
    if type(weight) in PLAIN:
        return weight.t() if isinstance(base.layer, Conv1D) else weight
    if type(base.layer) in QUANTISED:
        return dequantize_bnb_weight(weight, state=getattr(base.layer, "state", None))
    return weight.dequantize()


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


def check_input(
    layer, x: torch.Tensor, base: Base, parameters: list[torch.Tensor], facts: Facts, any_weight: bool = False
) -> None:
    """x and the dtypes are such that PEFT would compute the same up to rounding; with ``any_weight`` it casts x to the
    base weight's dtype too."""
    if type(x) not in PLAIN:
        raise Unfit(f"x is a {type(x).__name__}, not a plain tensor")
    check_tracing()
    if _has_any_global_hook():
        raise Unfit("a global module hook is registered, which must see every submodule called")
    for t in facts.beside:
        if t.device != x.device:
            raise Unfit(f"x is on {x.device} and an adapter on {t.device}: ms-swift's keep_device_forward moves x")
    tensors = parameters if base.weight is None else [base.weight, *parameters]
    for t in tensors:
        if t.device != x.device:
            raise Unfit(f"x is on {x.device}, a weight on {t.device}")
    facts.settle(layer, x, tensors)
    dtype = x.dtype
    if base.weight is None and torch.is_autocast_enabled() and dtype not in (torch.float32, facts.autocast):
        raise Unfit(f"x is {dtype} under autocast to {facts.autocast}: over a quantised base PEFT returns float32")
    weight = x if base.weight is None else base.weight
    if weight.dtype is dtype and dtype in FLOATS:
        for p in parameters:
            if p.dtype is not dtype:
                break
        else:
            return
    casts = facts.attribute(layer, "cast_input_dtype_enabled")
    autocast = facts.autocast is not None and dtype is not torch.float64
    if weight.dtype is not dtype and not (autocast or (any_weight and casts)):
        raise Unfit(f"x is {dtype} over a base weight in {weight.dtype}")
    if weight.dtype not in FLOATS[:3] or dtype not in FLOATS[:3]:
        raise Unfit(f"x in {dtype} over {weight.dtype} is not a mix the fused operators take")
    dtype = facts.autocast if autocast else dtype
    for p in parameters:
        if p.dtype not in FLOATS[:3]:
            raise Unfit(f"an adapter in {p.dtype} over {dtype} is not a mix the fused operators take")
        if p.dtype is not dtype and not (autocast or casts):
            raise Unfit(f"an adapter in {p.dtype} over {dtype} with input casting disabled")


def active(layer: nn.Module) -> list[str] | tuple[str, ...]:
    names = layer._active_adapter
    return (names,) if isinstance(names, str) else names


def variant_name(variant: Any) -> str:
    return re.sub(r"(Linear|Embedding|Conv\dd)?Variant", "", type(variant).__name__)


def lora_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Base, list[LowRank]]:
    """The tensors of a LoRA layer's call, or Unfit. Without x the input is not looked at."""
    facts.called = x is not None
    base = base_of(layer, facts, x)
    As, Bs, dropouts = (facts.entry(layer._modules, key)._modules for key in ("lora_A", "lora_B", "lora_dropout"))
    adapters, parameters = [], []
    for name in active(layer):
        if (module_A := facts.entry(As, name)) is None:
            continue
        module_B = facts.entry(Bs, name)
        A = leaf(module_A, nn.Linear, "lora_A", facts, base.split)
        B = leaf(module_B, nn.Linear, "lora_B", facts, base.split)
        p = drop_rate(facts.entry(dropouts, name), "lora_dropout", facts)
        bias = facts.parameter(module_B, "bias")
        scale = scaling(facts.entry(facts.attribute(layer, "scaling"), name))
        magnitude = None
        variant = facts.entry(facts.attribute(layer, "lora_variant"), name)
        check_split(base, p, "lora_bias" if bias is not None else "DoRA" if variant is not None else None)
        if variant is not None:
            if type(variant) is not variants.DoraLinearVariant:
                raise Unfit(f"the LoRA variant {variant_name(variant)} is left to PEFT")
            vectors = facts.entry(layer._modules, "lora_magnitude_vector")._modules
            magnitude = leaf(facts.entry(vectors, name), DoraLinearLayer, "the magnitude", facts)
            p = p if facts.attribute(layer, "training") else 0.0
            check_dora(layer, base, bias)
            parameters.append(magnitude)
        parameters += (A, B)
        adapters.append(LowRank(name, A, B, scale, p, bias, magnitude))
    if x is not None:
        check_input(layer, x, base, parameters, facts)
    return base, adapters


def check_split(base: Base, p: float, what: str | None) -> None:
    """Tensor parallelism goes with LoRA and MiSS as they are."""
    if base.split is not None and (what is not None or p > 0):
        raise Unfit(f"{what or 'dropout'} over a tensor-parallel base layer")


def check_dora(layer: nn.Module, base: Base, bias: torch.Tensor | None) -> None:
    if bias is not None:
        raise Unfit("DoRA with lora_bias: PEFT counts the bias into every entry of the weight whose norm it takes")
    if layer.ephemeral_gpu_offload:
        raise Unfit("DoRA with ephemeral_gpu_offload")
    if base.weight is None and not quantised(base.layer):
        dtype = read(base.layer, "weight", "the base weight", Facts()).dtype
        if dtype not in FLOATS:
            raise Unfit(f"DoRA reads the base weight, which is in {dtype}")
